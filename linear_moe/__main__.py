"""Runs an unmodified training script of Megatron-LM with our arguments in its command line.

    python -m linear_moe path/to/pretrain_gpt.py <the script's arguments> --token-mixer mom
    torchrun <torchrun's arguments> -m linear_moe path/to/pretrain_gpt.py <the script's arguments> --token-mixer mom

The Megatron that runs is the one that the script itself would import: the clone around it, or else the installed one.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def asks_for_mom(arguments: list[str]) -> bool:
    """Whether the command line chooses memories, or may find that a checkpoint does."""
    if "--use-checkpoint-args" in arguments or "--token-mixer=mom" in arguments:
        return True
    return ("--token-mixer", "mom") in zip(arguments, arguments[1:], strict=False)


def main() -> int:
    """Runs the script that the command line names. Returns the exit status of a wrong command line."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if len(sys.argv) > 1 else 2
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"error: there is no script {str(script)!r}; {__doc__.splitlines()[2].strip()}", file=sys.stderr)
        return 2
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(script.resolve().parent))  # as Python does; before anything of Megatron is imported

    from linear_moe.entry import machine
    from megatron_patches.patch import PatchError

    mom = asks_for_mom(sys.argv[1:])
    if mom and any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv):
        print("error: beside --yaml-cfg Megatron ignores all arguments, --token-mixer too", file=sys.stderr)
        return 2
    machine.show_log()
    try:
        machine.start()
        from linear_moe.entry import plugin

        plugin.install(mom=mom)
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if mom:
        machine.announce()
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
