"""Every kernel of the product compiles for every NVIDIA chip of the table, within the chip's shared memory.

The compiler needs no GPU. A chip is a process, because Triton's interpreter is on in the tests' own. MOM_ALL_CHIPS=1
compiles all types and head sizes too. PYTHONPATH chooses the Triton: `make compile-matrix TRITON=FOLDER`.
"""

import csv
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mom_layers.common.chips import CHIPS

ROOT = Path(__file__).parents[2]
NVIDIA = [name for name, chip in CHIPS.items() if chip.vendor == "nvidia"]
ALL_SIZES = ("256x256", "128x128", "64x64", "32x32", "16x16", "256x64", "64x256", "128x32", "16x128")
# Every kernel, with a rule of each kernel family, for a chip with much shared memory and a chip with little. For
# the other chips the kernels of training.
EVERY_KERNEL = ("--rules", "gated_deltanet,gla,kda,mamba2")
TRAINING = ("--training-alone", "--rules", "gated_deltanet,gla")
CASES = [
    *((chip, "bfloat16", "256x256", EVERY_KERNEL) for chip in ("sm_100", "sm_86")),
    ("sm_90", "bfloat16", "256x256", TRAINING),
    *((chip, "bfloat16", "128x128", TRAINING) for chip in NVIDIA if chip not in ("sm_100", "sm_86")),
]
if os.environ.get("MOM_ALL_CHIPS"):
    CASES = list(itertools.product(NVIDIA, ("bfloat16", "float16", "float32"), ALL_SIZES, [()]))


def compiled(tmp_path, *arguments) -> tuple[list[dict[str, str]], int]:
    """The rows of compile_matrix.py, and its exit status."""
    output = tmp_path / "matrix.csv"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_matrix.py"), *arguments, "--output", output],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert output.exists(), done.stderr[-2000:]
    with output.open() as file:
        return list(csv.DictReader(file)), done.returncode


def launched_kernels() -> set[str]:
    """The kernels that host functions launch, by room and name, but for Hopper's."""
    found = set()
    for path in (ROOT / "mom_layers").rglob("*.py"):
        room = path.relative_to(ROOT / "mom_layers").parent.as_posix().replace("/", ".")
        if "hopper" not in room and "selftest" not in room:
            found |= {f"{room}.{name}" for name in re.findall(r"^ +(\w*_kernel)\[", path.read_text(), re.MULTILINE)}
    return found


@pytest.mark.parametrize("chip,dtype,size,options", CASES)
def test_every_kernel_compiles_for_every_chip(chip, dtype, size, options, tmp_path):
    rows, status = compiled(tmp_path, "--chips", chip, "--dtypes", dtype, "--sizes", size, *options)
    failed = [row for row in rows if row["result"] != "compiled"]
    assert not failed and status == 0, failed
    assert {row["chip"] for row in rows} == {chip}
    # A kernel's name without its file: convolutions are launched from another file of their room.
    names = {".".join((*row["kernel"].split(".")[:-2], row["kernel"].split(".")[-1])) for row in rows}
    if chip != "sm_90" and "--training-alone" not in options:
        assert launched_kernels() <= names, launched_kernels() - names
    if chip == "sm_90" and dtype != "float32" and min(map(int, size.split("x"))) >= 64:
        assert any("hopper" in name for name in names)


def test_a_kernel_that_takes_too_much_shared_memory_is_reported(tmp_path):
    """Blackwell's tiles on a card with 99 KB."""
    rows, status = compiled(
        tmp_path, "--chips", "sm_86", "--dtypes", "bfloat16", "--sizes", "256x256", "--kernel-set", "Blackwell",
        "--rules", "gated_deltanet", "--training-alone",
    )  # fmt: skip
    assert status == 1
    failed = {row["kernel"].split(".")[-1]: row["result"] for row in rows if row["result"] != "compiled"}
    assert failed and set(failed.values()) == {"too much shared memory"} and "_recurrence_kernel" in failed
