"""A copy of the main script with stand-ins for all that the script starts."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# As torchrun: writes its arguments down, and with a file named "hold" beside them starts a rank. The two live until the
# file is gone, or until a signal: SIGTERM for the rank, SIGINT and SIGHUP for the launcher. Then the process with the
# signal writes "stopped" after a moment, as ranks do that save, and both end.
LAUNCH = """
import json, os, pathlib, signal, subprocess, sys, time
records = pathlib.Path(os.environ["RECORDS"])
rank = sys.argv[1:] == ["rank"]
mine = [signal.SIGTERM] if rank else [signal.SIGINT, signal.SIGHUP]
signals = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if number in mine:
        signal.signal(number, lambda received, _: signals.append(received))
    elif rank:
        signal.signal(number, signal.SIG_IGN)
    else:
        assert signal.getsignal(number) == signal.SIG_IGN
child = None
if rank:
    print(flush=True)
else:
    if (records / "hold").exists():
        child = subprocess.Popen([sys.executable, __file__, "rank"], stdout=subprocess.PIPE)
        child.stdout.readline()  # the rank is ready for signals
    (records / "arguments.json").write_text(json.dumps(sys.argv[1:]))
while (records / "hold").exists() and not signals and (rank or child.poll() is None):
    time.sleep(0.01)
if signals:
    time.sleep(0.6)
    (records / "stopped").write_text(json.dumps(signals))
if child:
    child.kill()
    child.wait()
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
        (self.root / "linear_moe/cli.py").touch()
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
