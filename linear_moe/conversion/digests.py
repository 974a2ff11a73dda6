"""digests.json of an export: the SHA-256 of every tensor, so that a later change of a single bit is found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from linear_moe.conversion.files import ConversionError, read_json, write_json

DIGESTS = "digests.json"
ALGORITHM = "sha256"
REMEDY = f"restore the file; where the weights were changed on purpose, remove {DIGESTS}"


def digest(tensor: torch.Tensor) -> dict[str, object]:
    """Type, shape and SHA-256 of a tensor's bytes, which are those of a safetensors file."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        ALGORITHM: hashlib.sha256(data.numpy()).hexdigest(),
    }


def write_digests(folder: Path, digests: dict[str, dict[str, object]]) -> None:
    """Writes the file from {name of a tensor: its `digest`}."""
    write_json(folder / DIGESTS, {"algorithm": ALGORITHM, "tensors": digests})


class Digests:
    """What a folder's digests.json says of its tensors; without the file, nothing is compared.

    Raises ConversionError for a file that is not one of `write_digests`.
    """

    def __init__(self, folder: Path):
        self._path = folder / DIGESTS
        self._tensors: dict[str, dict[str, object]] | None = None
        if not self._path.is_file():
            return
        content = read_json(self._path)
        tensors = content.get("tensors")
        if content.get("algorithm") != ALGORITHM or not isinstance(tensors, dict):
            raise ConversionError(f"{self._path} is not a list of {ALGORITHM} digests: {REMEDY}")
        self._tensors = tensors

    def check_names(self, names: Iterable[str]) -> None:
        """Raises ConversionError unless the file describes exactly these tensors."""
        if self._tensors is None:
            return
        names = set(names)
        for word, found in (("lack", self._tensors.keys() - names), ("have", names - self._tensors.keys())):
            if found:
                but = "lists" if word == "lack" else "does not list"
                raise ConversionError(f"the weights {word} {listed(found)}, which {self._path} {but}: {REMEDY}")

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ConversionError for a tensor whose type, shape or bytes differ from the file's entry."""
        if self._tensors is not None and (found := digest(tensor)) != (expected := self._tensors[name]):
            keys = [key for key in found if not isinstance(expected, dict) or found[key] != expected.get(key)]
            what = "the bytes" if keys == [ALGORITHM] else " and ".join(keys)
            raise ConversionError(f"{name} differs from {self._path} in {what or 'other keys'}: {REMEDY}")


def listed(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
