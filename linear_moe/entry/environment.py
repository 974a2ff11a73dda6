"""Settings of the mixer for a command line without arguments of ours: environment variables and a YAML file.

`MOM_NUM_MEMORIES=8`, and `mom_num_memories: 8` in the file that `MOM_CONFIG` names, mean `--mom-num-memories 8`. The
environment wins over the file, and the file over the defaults.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from linear_moe.entry import kernel_check
from linear_moe.entry.arguments import OLD_NAMES, OURS, add_mom_arguments, is_switch, option

CONFIG_FILE = "MOM_CONFIG"
OTHER_VARIABLES = {
    CONFIG_FILE, kernel_check.VARIABLE, *kernel_check.FORCING, "MOM_CHECK", "MOM_PYTHON", "MOM_TRACEBACK",
    "MOM_TRUST_CHECKPOINT", "MOM_VERBOSE",
}  # fmt: skip
NAMES = [name for name in OURS if name != "token_mixer"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def read_settings(environment: Mapping[str, str] = os.environ) -> dict[str, object]:
    """The settings that the environment and the file give, by the names of `MomTransformerConfig`'s fields.

    Raises ValueError for an unknown name, and for a value that the command line would refuse.
    """
    given = _from_file(environment) | _from_environment(environment)
    words = [word for name, value in given.items() for word in _as_argument(name, value)]
    parsed = vars(add_mom_arguments(_Parser(allow_abbrev=False)).parse_args(words))
    return {name: value for name, value in parsed.items() if value is not None} | {"token_mixer": "mom"}


def _from_file(environment: Mapping[str, str]) -> dict[str, object]:
    path = environment.get(CONFIG_FILE)
    if not path:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"{CONFIG_FILE}: there is no file {path!r}; give the path of a YAML file")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{CONFIG_FILE}: {path!r} is no YAML file: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines such as 'mom_num_memories: 4', got {content!r}")
    return _by_present_name(path, {str(name).replace("-", "_"): value for name, value in content.items()})


def _from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    variables = {name: value for name, value in environment.items() if name.startswith("MOM_")}
    settings = {name.lower(): value for name, value in variables.items() if name not in OTHER_VARIABLES}
    return _by_present_name("the environment", settings)


def _by_present_name(where: str, given: Mapping[str, object]) -> dict[str, object]:
    """The settings of one source under their present names. Raises ValueError for an unknown or a repeated name."""
    unknown = sorted(set(given) - {*NAMES, *OLD_NAMES})
    if unknown:
        raise ValueError(f"{where} sets {', '.join(unknown)}, which does not exist; there are {', '.join(NAMES)}")
    for old, name in OLD_NAMES.items():
        if old in given and name in given:
            raise ValueError(f"{where} sets {name} and {old}, two names of one setting: leave out {old}")
    return {OLD_NAMES.get(name, name): value for name, value in given.items()}


def _as_argument(name: str, value: object) -> list[str]:
    if is_switch(name):
        if str(value).lower() not in ("0", "1", "false", "true"):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        return [option(name) if str(value).lower() in ("1", "true") else option(f"no_{name}")]
    return [] if value is None else [f"{option(name)}={value}"]
