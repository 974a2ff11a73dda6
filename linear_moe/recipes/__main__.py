"""Starts examples/pretrain_mom_a100.sh with the settings of a recipe; examples/train_recipe.sh calls this module.

bash examples/train_recipe.sh NAME [--tiny] [Megatron's arguments]
"""

from __future__ import annotations

import os
import sys

from linear_moe.recipes.recipe import FOLDER, names, read

SCRIPT = FOLDER.parent / "pretrain_mom_a100.sh"


def main(words: list[str]) -> int:
    """Replaces this process by the script. Returns 2 for a wrong command line."""
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\nrecipes: {', '.join(names())}")
        return 0 if words else 2
    name, *rest = words
    tiny = "--tiny" in rest
    try:
        recipe = read(name, tiny=tiny)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    layout = {axis: size for axis, size in recipe.layout.items() if axis != "GPUS"}
    kept = {variable: str(value) for variable, value in (recipe.settings | layout).items()}
    folder = str(FOLDER.parents[1] / "runs" / (f"{name}-tiny" if tiny else name))
    defaults = kept | {"OUT": folder} | ({"DEMO": "1"} if tiny else {})
    command = ["bash", str(SCRIPT), *recipe.words(), *(word for word in rest if word != "--tiny")]
    os.execvpe("bash", command, defaults | os.environ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
