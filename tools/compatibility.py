"""Keeps what the compiler reported of every kernel, and says per chip and Triton what was tried.

    python tools/compatibility.py MATRIX.csv ...

The files come from `tests/mom_layers/compile_matrix.py --output`. Their rows, one for each kernel and not for each of
its variants, replace the rows of the same Triton, chip, type and head sizes in tools/measured/compiled_kernels.csv.
`python tools/make_docs.py` writes the tables of docs/compatibility.md from that file and from the measured figures.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

from measured_rows import MEASURED, Row, read_rows

from mom_layers.common.chips import CHIPS

FILE = "compiled_kernels.csv"
CELL = ("triton", "chip", "dtype", "key_size", "value_size")
LARGEST = ("shared_bytes", "registers", "local_bytes")
COLUMNS = (*CELL, "kernel", "variants", "result", *LARGEST, "tensor_cores")
COMPILED = "compiled"


def condensed(rows: list[Row]) -> list[Row]:
    """One row for each kernel of a cell: of its variants the largest numbers, and the first failure."""
    found: dict[tuple, Row] = {}
    for row in rows:
        key = (*(row[name] for name in CELL), row["kernel"])
        kept = found.setdefault(key, {name: row[name] for name in COLUMNS if name != "variants"} | {"variants": 0})
        kept["variants"] += 1
        if kept["result"] == COMPILED and row["result"] != COMPILED:
            kept |= {name: row[name] for name in ("result", "tensor_cores")}
        for name in LARGEST:
            kept[name] = str(max((int(each[name]) for each in (kept, row) if each[name]), default=""))
    return list(found.values())


def series(version: str) -> str:
    """3.6.0 to 3.6."""
    return ".".join(version.split(".")[:2])


def timed() -> set[tuple[str, str]]:
    """(chip, series of Triton) of the measured figures' devices."""
    found = set()
    for path in MEASURED.glob("*.csv"):
        for row in read_rows(path.name):
            device = row.get("device") or ""
            for name, chip in CHIPS.items():
                if any(re.search(rf"\b{word}\b", device) for word in chip.name.split(", ")) and row.get("triton"):
                    found.add((name, series(row["triton"])))
    return found


def state(rows: list[Row]) -> str:
    """What the compiler made of a chip's kernels with one Triton."""
    failed = {row["kernel"].split(".")[-1].strip("_"): row["result"] for row in rows if row["result"] != COMPILED}
    if failed:
        return "no: " + "; ".join(f"`{name}`: {result}" for name, result in sorted(failed.items()))
    cells = {(row["dtype"], row["key_size"], row["value_size"]) for row in rows}
    types = ", ".join(sorted({dtype for dtype, *_ in cells}))
    sizes = ", ".join(f"{k} x {v}" for k, v in sorted({(int(k), int(v)) for _, k, v in cells}, reverse=True))
    return f"compiled: {types}; {sizes}"


def chips() -> list[tuple[str, ...]]:
    """A line for each chip and Triton: chip, devices, Triton, what was tried."""
    rows, fast = read_rows(FILE), timed()
    versions = sorted({series(row["triton"]) for row in rows} | {version for _, version in fast})
    lines = []
    for name, chip in CHIPS.items():
        for version in versions:
            here = [row for row in rows if row["chip"] == name and series(row["triton"]) == version]
            parts = ["timed"] * ((name, version) in fast) + [state(here)] * bool(here)
            lines.append((f"`{name}`", chip.name, version, "; ".join(parts) or "not tried"))
    return lines


def about(row: Row) -> str:
    """Which kernel a row is of."""
    family, name = re.search(r"(?:recur\.)?(\w+)\..*?(\w+)$", row["kernel"]).groups()
    sizes = f"{row['dtype']}, {row['key_size']} x {row['value_size']}"
    return f"`{family}`, `{name.strip('_')}` ({sizes}, Triton {series(row['triton'])})"


def order(row: Row) -> tuple:
    """A row's place in the file."""
    sizes = int(row["key_size"]), int(row["value_size"])
    return row["triton"], list(CHIPS).index(row["chip"]), row["dtype"], *sizes, row["kernel"]


def spills() -> list[tuple[str, ...]]:
    """A line for each chip: the most shared memory that a kernel takes, and the kernels that spill the most."""
    rows = [row for row in read_rows(FILE) if row["result"] == COMPILED]
    lines = []
    for name, chip in CHIPS.items():
        here = [row for row in rows if row["chip"] == name]
        if not here:
            continue
        most = max(here, key=lambda row: int(row["shared_bytes"]))
        spilled = max(here, key=lambda row: int(row["local_bytes"]))
        shared = f"{int(most['shared_bytes']):,} of {chip.shared_memory:,}: {about(most)}"
        lines.append((f"`{name}`", shared, f"{int(spilled['local_bytes']):,}: {about(spilled)}"))
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("matrix", nargs="+", type=Path, help="files that compile_matrix.py wrote")
    arguments = parser.parse_args(argv)
    new = []
    for path in arguments.matrix:
        with path.open(newline="") as file:
            new += condensed(list(csv.DictReader(file)))
    replaced = {tuple(row[name] for name in CELL) for row in new}
    old = read_rows(FILE) if (MEASURED / FILE).exists() else []
    kept = [row for row in old if tuple(row[name] for name in CELL) not in replaced]
    rows = sorted(kept + new, key=order)
    with (MEASURED / FILE).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(new)} rows written, {len(kept)} kept: {MEASURED / FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
