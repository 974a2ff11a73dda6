"""The tensors of a Hugging Face folder, read one by one and checked."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from linear_moe.conversion.digests import Digests
from linear_moe.conversion.files import WEIGHTS, WEIGHTS_INDEX, ConversionError, check_inside, read_json

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raises ConversionError for a tensor with NaN or infinity. ``where`` ends the message."""
    if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
        count = tensor.numel() - int(finite.sum())
        raise ConversionError(f"{name} has {count} values of {tensor.numel()} that are NaN or infinite {where}")


class Weights:
    """The tensors of a Hugging Face folder, each read when asked for. Safetensors, or PyTorch's older pickled files.

    Raises ConversionError where there are none, where a file is missing, broken or outside the folder, and where the
    names are not those in the folder's digests.json.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, object] = {}
        files = self._files()
        self._file_of: dict[str, str] = {}
        check_inside(folder, files)
        for file in files:
            if not (folder / file).is_file():
                raise ConversionError(f"{folder} is incomplete: {file} is missing")
            self._file_of |= dict.fromkeys(self._load(file).keys(), file)
        if self._index:
            for name, file in self._index.items():
                if self._file_of.get(name) != file:
                    raise ConversionError(f"{folder / file} lacks {name}, which the index says it holds")
        self._digests = Digests(folder)
        self._digests.check_names(self._file_of)

    def _files(self) -> list[str]:
        self._index: dict[str, str] = {}
        for index, single in ((WEIGHTS_INDEX, WEIGHTS), (PICKLED_INDEX, PICKLED)):  # in the order of transformers
            if (self._folder / single).is_file():
                return [single]
            if (self._folder / index).is_file():
                self._index = read_json(self._folder / index).get("weight_map")
                if not isinstance(self._index, dict) or not all(isinstance(f, str) for f in self._index.values()):
                    raise ConversionError(f"{self._folder / index} has no weight_map of file names")
                return sorted(set(self._index.values()))
        raise ConversionError(f"{self._folder} has no {WEIGHTS}, {WEIGHTS_INDEX} or {PICKLED}")

    def _load(self, file: str):
        if file not in self._open:
            try:
                if file.endswith(".safetensors"):
                    self._open[file] = safe_open(self._folder / file, framework="pt")
                else:
                    self._open[file] = torch.load(self._folder / file, map_location="cpu", weights_only=True, mmap=True)
            except (SafetensorError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
                raise ConversionError(f"{self._folder / file} cannot be read: {error}") from error
            held = self._open[file]
            if not hasattr(held, "get_slice") and not (
                isinstance(held, dict) and all(isinstance(tensor, torch.Tensor) for tensor in held.values())
            ):
                raise ConversionError(f"{self._folder / file} is not a dictionary of tensors")
        return self._open[file]

    def names(self) -> set[str]:
        return set(self._file_of)

    def describe(self, name: str) -> torch.Tensor:
        """Shape and type of a tensor, as one on the meta device."""
        held = self._load(self._file_of[name])
        if isinstance(held, dict):
            return held[name].to("meta")
        piece = held.get_slice(name)
        if piece.get_dtype() not in _SAFETENSORS_DTYPES:
            raise ConversionError(f"{name} is of type {piece.get_dtype()}; it must be {', '.join(_SAFETENSORS_DTYPES)}")
        return torch.empty(piece.get_shape(), dtype=_SAFETENSORS_DTYPES[piece.get_dtype()], device="meta")

    def read(self, name: str) -> torch.Tensor:
        """Raises ConversionError for a tensor that is not finite, or not the one in the folder's digests.json."""
        file = self._file_of[name]
        held = self._load(file)
        tensor = held[name] if isinstance(held, dict) else held.get_tensor(name)
        self._digests.check(name, tensor)
        check_finite(name, tensor, f"in {self._folder / file}")
        return tensor


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
