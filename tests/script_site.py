"""A copy of the main script with stand-ins for all that the script starts."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Writes down what reached it. With a file named "hold" beside its records it lives until that is gone, or until a
# signal; then it writes "stopped" and lives on for a moment, as a launcher whose ranks save does.
LAUNCH = """
import json, os, pathlib, signal, sys, time
records = pathlib.Path(os.environ["RECORDS"])
signals = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda received, _: signals.append(received))
(records / "arguments.json").write_text(json.dumps(sys.argv[1:]))
while (records / "hold").exists() and not signals:
    time.sleep(0.01)
if signals:
    time.sleep(0.6)
    (records / "stopped").write_text(json.dumps(signals))
"""
PICTURES = """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "loss.png").touch()
"""


class Site:
    """A copy of the main script whose packages and tools are stand-ins."""

    def __init__(self, folder: Path):
        self.root, self.records = folder / "repository", folder / "records"
        self.out = folder / "out"
        for directory in ("examples", "tools", "linear_moe/entry"):
            (self.root / directory).mkdir(parents=True)
        self.records.mkdir()
        for script in ("examples/pretrain_mom_a100.sh", "examples/run_lock.sh", "tools/environment.sh"):
            shutil.copy(ROOT / script, self.root / script)
        for package in ("linear_moe", "linear_moe/entry"):
            (self.root / package / "__init__.py").touch()
        (self.root / "linear_moe/entry/launch.py").write_text(LAUNCH)
        (self.root / "tools/plot_run.py").write_text(PICTURES)
        self.environment = {
            "PATH": os.environ["PATH"], "RECORDS": str(self.records), "MOM_PYTHON": sys.executable, "GPUS": "0",
            "DATA_PATH": "/data/text", "TOKENIZER": "/data/tokenizer", "OUT": str(self.out),
        }  # fmt: skip

    def command(self, settings, *arguments, before=()) -> dict:
        words = [*before, "bash", str(self.root / "examples/pretrain_mom_a100.sh"), *arguments]
        return {"args": words, "cwd": self.root, "env": self.environment | settings, "text": True}

    def run(self, *arguments, **settings) -> subprocess.CompletedProcess:
        return subprocess.run(**self.command(settings, *arguments), capture_output=True, timeout=60)

    def start(self, before=(), **settings) -> subprocess.Popen:
        """A run whose training goes on until `finish`, or until a signal."""
        (self.records / "hold").touch()
        (self.records / "arguments.json").unlink(missing_ok=True)
        process = subprocess.Popen(
            **self.command(settings, before=before), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        wait_for(lambda: (self.records / "arguments.json").exists() or process.poll() is not None)
        return process

    def finish(self) -> None:
        (self.records / "hold").unlink()

    def arguments(self) -> list[str]:
        return json.loads((self.records / "arguments.json").read_text())

    def untouched(self) -> bool:
        """Whether nothing was started and nothing written."""
        return not (self.records / "arguments.json").exists() and not self.out.exists()


def wait_for(condition, seconds=30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
