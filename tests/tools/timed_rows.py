"""Runs a timing tool as a user does, and reads its rows."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"


def rows_of(tool, folder, *arguments):
    """The rows that a tool wrote as CSV. On a busy machine times are noise: no test compares them."""
    out = folder / "rows.csv"
    command = [sys.executable, ROOT / "tools" / tool, "--csv", out, *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = [name for name in rows[0] if "ms" in name or name in ("tokens_per_second", "first_step_s")]
    assert times and all(float(row[name]) > 0 for row in rows for name in times)
    return rows
