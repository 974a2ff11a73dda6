"""Runs a script as Python does, with the patches that Megatron needs without a GPU, and nothing of linear_moe.

python without_launcher.py [--apply-and-undo] script arguments...
"""

import os
import runpy
import sys
from pathlib import Path

from megatron_patches import cpu, dataset_helpers
from megatron_patches.patch import applied


def main() -> None:
    # Port 0 is any free port. No other process connects to it.
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= alone | {"LOCAL_RANK": "0", "TORCHDYNAMO_DISABLE": "1"}
    if sys.argv[1] == "--apply-and-undo":
        del sys.argv[1]
        from linear_moe.entry import machine, model_patches

        machine.start()
        model_patches.install(mom=True)
        model_patches.uninstall()
        assert not applied()
    cpu.apply()
    dataset_helpers.apply()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
