"""Settings of the mixer for a command line that has no arguments of ours: environment variables and a YAML file.

`MOM_NUM_MEMORIES=8` and `mom_num_memories: 8` in the file that `MOM_CONFIG` names are `--mom-num-memories 8`. The
environment goes before the file, and the file before the defaults.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from linear_moe.entry.arguments import OURS, add_mom_arguments

CONFIG_FILE = "MOM_CONFIG"
OTHER_VARIABLES = {CONFIG_FILE, "MOM_PYTHON", "MOM_TRACEBACK", "MOM_TRUST_CHECKPOINT"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def read_settings(environment: Mapping[str, str] = os.environ) -> dict[str, object]:
    """The mixer's settings by the names of `MomTransformerConfig`'s fields, those that are given anywhere.

    Raises ValueError for a name or a value that the arguments would not take either.
    """
    words = [word for name, value in _given(environment).items() for word in _as_argument(name, value)]
    parsed = vars(add_mom_arguments(_Parser(allow_abbrev=False)).parse_args(words))
    return {name: value for name, value in parsed.items() if value is not None} | {"token_mixer": "mom"}


def _given(environment: Mapping[str, str]) -> dict[str, object]:
    given: dict[str, object] = {}
    names = [name for name in OURS if name != "token_mixer"]
    if path := environment.get(CONFIG_FILE):
        if not Path(path).is_file():
            raise ValueError(f"{CONFIG_FILE}: there is no file {path!r}")
        content = yaml.safe_load(Path(path).read_text()) or {}
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected lines such as 'mom_num_memories: 4', got {content!r}")
        given = {str(name).replace("-", "_"): value for name, value in content.items()}
        _check_names(path, given, names)
    variables = {name: value for name, value in environment.items() if name.startswith("MOM_")}
    variables = {name.lower(): value for name, value in variables.items() if name not in OTHER_VARIABLES}
    _check_names("the environment", variables, names)
    return given | variables


def _check_names(where: str, given: Mapping[str, object], names: list[str]) -> None:
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"{where} sets {', '.join(unknown)}, which does not exist; there are {', '.join(names)}")


def _as_argument(name: str, value: object) -> list[str]:
    option = name.replace("_", "-")
    if name in ("mom_shared_memory", "mom_single_kv_proj"):
        if str(value).lower() not in ("0", "1", "false", "true"):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return [f"--{option}" if str(value).lower() in ("1", "true") else f"--no-{option}"]
    return [] if value is None else [f"--{option}={value}"]
