"""Runs an unmodified training script of Megatron-LM with our arguments in its command line.

    python -m linear_moe path/to/pretrain_gpt.py <the script's arguments> --token-mixer mom
    torchrun <torchrun's arguments> -m linear_moe path/to/pretrain_gpt.py <the script's arguments> --token-mixer mom

The run uses the Megatron that the script itself would import: the clone around the script, or else the installed one.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from linear_moe.pattern import asks_for_memories

USAGE = __doc__.splitlines()[2].strip()


def asks_for_mom(arguments: list[str]) -> bool:
    """Whether the command line chooses memories, by --token-mixer or by a pattern of layers with an R, or takes its
    arguments from a checkpoint that may choose memories.
    """
    if "--use-checkpoint-args" in arguments:
        return True
    given = [word.partition("=")[2] for word in arguments if word.startswith("--token-mixer=")]
    given += [after for word, after in zip(arguments, arguments[1:], strict=False) if word == "--token-mixer"]
    return any(mixer != "attention" for mixer in given) or asks_for_memories(arguments)


def main() -> int:
    """Runs the script that the command line names. Returns 2 for a wrong command line, and 1 for a Megatron that the
    patches do not fit.
    """
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0 if len(sys.argv) > 1 else 2
    script = Path(sys.argv[1])
    if not script.is_file():
        print(f"error: there is no script {str(script)!r}; {USAGE}", file=sys.stderr)
        return 2
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(script.resolve().parent))  # as Python does; before any import of Megatron

    from linear_moe.entry import log, machine
    from megatron_patches.patch import PatchError

    mom = asks_for_mom(sys.argv[1:])
    if mom and any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv):
        print(
            "error: with --yaml-cfg Megatron ignores all arguments, --token-mixer too; "
            "give the settings of the file as arguments",
            file=sys.stderr,
        )
        return 2
    log.show_log()
    try:
        machine.start()
        from linear_moe.entry import model_patches

        model_patches.install(mom=mom)
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if mom:
        log.announce()
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
