"""Bad values for every setting of examples/pretrain_mom_a100.sh, with stand-ins for all that the script starts."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

from judge import Case
from script_site import Site

WHOLE = (
    "TP PP EP CP NNODES PROCESSES LAYERS HIDDEN FFN HEADS HEAD_DIM SEQ_LENGTH MICRO_BATCH GLOBAL_BATCH TRAIN_ITERS "
    "VOCAB MEMORIES TOPK ATTENTION_HEADS LOG_INTERVAL EVAL_INTERVAL SAVE_INTERVAL GPUS NODE_RANK MASTER_PORT DEMO SP "
    "OVERLAP"
).split()
REAL = ["LR", "WARMUP_FRACTION"]
NUMBERS = {
    "wrong type": "two", "negative": "-1", "zero": "0", "huge": "9" * 30, "NaN": "nan", "fraction": "1.5",
    "a command": "PATH[$(touch ran)]", "octal": "08", "blank": "1 1",
}  # fmt: skip
FINE = {(name, "zero") for name in ("GPUS", "NODE_RANK", "DEMO", "SP", "OVERLAP", *REAL)}
FINE |= {("LR", "huge"), ("LR", "fraction"), ("LR", "octal")}
"""Values that work."""


def judge(name: str, value: str) -> str | None:
    folder = Path(tempfile.mkdtemp())
    try:
        site = Site(folder)
        run = site.run(**{name: value.replace("FOLDER", str(folder))})
        if (site.root / "ran").exists():
            return "ran the command in the value"
        if run.returncode == 0:
            return "accepted"
        if run.stderr.count("\n") != 1 or not run.stderr.startswith("error: ") or name not in run.stderr:
            return f"not one line that names the setting: {run.stderr[:200]}"
        return None if site.untouched() or empty(site.out) else "wrote something"
    finally:
        shutil.rmtree(folder)


def empty(folder: Path) -> bool:
    """Whether a folder holds no file and no lock: it was made before the next setting was found wrong."""
    return not any(folder.rglob("*"))


def script_cases(_: Path) -> list[Case]:
    cases = []
    for name in WHOLE + REAL:
        cases += [(name, kind, value) for kind, value in NUMBERS.items() if (name, kind) not in FINE]
    cases += [("PRECISION", kind, value) for kind, value in (("wrong type", "3"), ("unknown", "fp8"))]
    for name in ("OUT", "CHECKPOINTS"):
        cases += [(name, "wrong type: a file", "FOLDER/repository/tools/environment.sh")]
        cases += [(name, "path through a file", "FOLDER/repository/tools/environment.sh/x")]
        cases += [(name, "missing path", "/proc/nowhere"), (name, "huge", "x" * 300)]
    return [Case("script", name, kind, partial(judge, name, value)) for name, kind, value in cases]
