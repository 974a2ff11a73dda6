"""Folders in the Hugging Face format: read lazily, written shard by shard, and published only when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from linear_moe.temporary import REPLACED, remove_leftovers, temporary_folder, umask
from linear_moe.tokens import make_portable

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class ConversionError(ValueError):
    """A checkpoint or model that cannot be used, with a message of one line for the user."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


def check_target(target: Path, marks: Iterable[str], overwrite: bool) -> None:
    """Raises ConversionError unless ``target`` can be written: it is new, an empty folder, or, with ``overwrite``, a
    folder that this tool wrote, which has one of the files ``marks``. Removes what killed runs left beside it."""
    remove_leftovers(target.absolute())
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise ConversionError(f"--save {target} is a file: give the name of a new folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConversionError(f"--save {target} exists: give the name of a new folder, or --overwrite to replace it")
    if not any((target / mark).exists() for mark in marks):
        raise ConversionError(
            f"--save {target} has none of {', '.join(marks)}, so it was not written by this tool: not overwriting it"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name at the end, or disappears when anything goes wrong.

    A folder that has that name already is replaced.
    """
    target = target.absolute()
    with temporary_folder(target) as folder:
        folder.chmod(0o777 & ~umask())
        yield folder
        replaced = folder.with_suffix(REPLACED)
        if target.is_dir():
            target.rename(replaced)
        try:
            folder.rename(target)
        except BaseException:
            if replaced.is_dir() and not target.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def write_weights(
    folder: Path,
    described: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_size: str | int,
) -> None:
    """Writes safetensors files, each as soon as its tensors are there: one shard is in memory at a time.

    Args:
        folder: to write to.
        described: every tensor on the meta device, in the order in which ``tensors`` produces them.
        tensors: (name, tensor) pairs.
        max_shard_size: of one file, in bytes or as "5GB".
    """
    split = split_torch_state_dict_into_shards(
        dict(described), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    file_of = {name: file for file, names in split.filename_to_tensors.items() for name in names}
    missing = {file: len(names) for file, names in split.filename_to_tensors.items()}
    pending: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        file = file_of[name]
        pending.setdefault(file, {})[name] = tensor
        missing[file] -= 1
        if not missing[file]:
            save_file(pending.pop(file), folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o666 & ~umask())  # safetensors makes it private
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": file_of}
        write_json(folder / WEIGHTS_INDEX, index)


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Raises ConversionError for a file that is outside ``folder``, by its name or by a link.

    A link to the blobs of the Hugging Face cache stays within the cache: its snapshots consist of such links.
    """
    root = Path(os.path.realpath(folder))  # of a link that leads to itself too, which opening the file tells
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in names:
        target = Path(os.path.realpath(folder / name))
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise ConversionError(f"{folder / name} leads to {target}, outside its folder: put a copy there")


def read_json(path: Path) -> dict:
    """Raises ConversionError for a file that is missing, not a JSON object, or a link out of its folder."""
    check_inside(path.parent, [path.name])
    if not path.is_file():
        raise ConversionError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is not a JSON object: expected {{...}}, got {type(content).__name__}")
    return content


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer's folder, empty where it is none."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    found = {path.name for path in files}
    return files if found & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"} else []


def copy_tokenizer(folder: Path, target: Path, *, pads: bool) -> None:
    """Copies a tokenizer's files, with the settings of `make_portable`. Raises ConversionError for a link out of the
    folder.
    """
    check_inside(folder, [file.name for file in tokenizer_files(folder)])
    target.mkdir(exist_ok=True)
    for file in tokenizer_files(folder):
        shutil.copyfile(file, target / file.name)
    make_portable(target, pads=pads)


def load_tokenizer(folder: Path):
    """The tokenizer of a folder, none of whose own code runs; raises ConversionError where there is none."""
    if not tokenizer_files(folder):
        raise ConversionError(f"{folder} has no tokenizer: expected a folder that save_pretrained wrote")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any of many libraries' own
        raise ConversionError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
