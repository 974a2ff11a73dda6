"""Writes a model's code beside its weights: `from_pretrained(..., trust_remote_code=True)` without this package.

The files are this package's own sources. transformers loads modules of one folder that import each other relatively, so
`mom_layers/route/plan.py` becomes `mom_layers_route_plan.py`, and its imports are rewritten to match.
"""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "mom_layers"
ENTRIES = {f"{PACKAGE}.hf.configuration_mom": "configuration_mom", f"{PACKAGE}.hf.modeling_mom": "modeling_mom"}
AUTO_MAP = {
    "AutoConfig": "configuration_mom.MomConfig",
    "AutoModel": "modeling_mom.MomModel",
    "AutoModelForCausalLM": "modeling_mom.MomForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mom.MomForSequenceClassification",
}
# Imported on CUDA only. transformers refuses a model whose files import a package that is missing, unless the import
# stands in a `try`.
OPTIONAL_PACKAGES = ("triton",)


def save_remote_code(directory: str | Path) -> list[Path]:
    """Adds the model's code to an exported folder, and names it in the folder's config.json (`auto_map`).

    Loading the folder then needs torch and transformers only, and triton on a CUDA device. Files of an earlier call are
    replaced.

    Args:
        directory: a folder with a config.json of `model_type` "mom".

    Returns:
        The files written.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: its config.json is of another model type.
    """
    directory = Path(directory)
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config.get("model_type") != "mom":
        raise ValueError(f"{config_path} has model_type {config.get('model_type')!r}, not 'mom'")
    written = []
    for name, source in bundle_sources().items():
        path = directory / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        written.append(path)
    config["auto_map"] = AUTO_MAP
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*written, config_path]


def bundle_sources() -> dict[str, str]:
    """The model's module and all that it imports of this package: {module name in the flat folder: its source}."""
    sources: dict[str, str] = {}
    waiting = list(ENTRIES)
    while waiting:
        module = waiting.pop()
        if flat_name(module) not in sources:
            sources[flat_name(module)], needed = _rewrite(module)
            waiting += needed
    # transformers 4 copies what the entry modules import from local folders, but not what the imported modules import.
    others = [f"    from .{name} import __name__ as _\n" for name in sorted(set(sources) - set(ENTRIES.values()))]
    index = "\n\nif False:  # never run: names every file, for loaders that look no further\n" + "".join(others)
    for entry in ENTRIES.values():
        sources[entry] += index
    return sources


def flat_name(module: str) -> str:
    """``mom_layers.route.plan`` -> ``mom_layers_route_plan``; the entry modules keep the names that users write."""
    return ENTRIES.get(module, module.replace(".", "_"))


def _rewrite(module: str) -> tuple[str, list[str]]:
    """The source of a module with this package's imports made relative and flat, and the modules that it imports."""
    path = Path(find_spec(module).origin)
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    needed = []
    for node in sorted(ast.walk(ast.parse(source)), key=lambda node: -getattr(node, "lineno", 0)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            replacement, modules = _relative_import(node)
            needed += modules
        elif _is_optional(node):
            replacement = ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"]
        else:
            continue
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in replacement]
    origin = f"{PACKAGE}/{path.relative_to(Path(find_spec(PACKAGE).origin).parent).as_posix()}"
    header = f"# Generated from {origin}: change it there. SPDX-License-Identifier: MIT\n"
    return header + "\n".join(lines) + "\n", needed


def _is_optional(node: ast.AST) -> bool:
    """Whether a statement imports an optional package, as a whole or a part of the package."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in OPTIONAL_PACKAGES for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OPTIONAL_PACKAGES


def _relative_import(node: ast.ImportFrom) -> tuple[list[str], list[str]]:
    """An import from this package as lines for the flat folder, and the modules that it needs."""
    lines, plain, modules = [], [], []
    for alias in node.names:
        submodule = f"{node.module}.{alias.name}"
        if _is_package(node.module) and find_spec(submodule) is not None:
            # The loader copies the files of `from .name import` only, and would miss `from . import name`.
            lines += [
                f"from .{flat_name(submodule)} import __name__ as _",
                f"from . import {flat_name(submodule)} as {alias.asname or alias.name}",
            ]
            modules.append(submodule)
        else:
            plain.append(alias)
    if plain:
        names = ", ".join(ast.unparse(alias) for alias in plain)
        lines.append(f"from .{flat_name(node.module)} import {names}")
        modules.append(node.module)
    return lines, modules


def _is_package(module: str) -> bool:
    return find_spec(module).submodule_search_locations is not None
