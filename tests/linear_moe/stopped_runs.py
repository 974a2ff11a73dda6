"""Training runs that are stopped from outside: started in the background, signalled, searched for what they leave."""

import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import warm_python
from pretraining_runs import ROOT

MARK = "MOM_TEST_RUN"
"""An environment variable by which the processes of a run are found, whatever became of their parents."""


class Run:
    """linear_moe.pretrain in the background, under torchrun where there are several processes.

    The whole output is on the screen: tests wait for lines of Megatron.

    ignore_sigterm: SIGTERM reaches the ranks alone, as on Slurm (examples/pretrain_mom_slurm.sh): torchrun ignores it.
    """

    def __init__(
        self,
        folder: Path,
        *arguments,
        processes=1,
        words=("-m", "linear_moe.pretrain"),
        ignore_sigterm=False,
        environment=None,
    ):
        self.mark, self.output = uuid.uuid4().hex, folder / f"output-{uuid.uuid4().hex[:8]}.txt"
        environment = os.environ | warm_python.ENVIRONMENT | (environment or {})
        environment = {"MOM_VERBOSE": "1"} | environment | {MARK: self.mark, "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-W", "ignore"]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if ignore_sigterm:
            environment["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
            command = ["bash", "-c", "trap '' TERM; exec \"$@\"", "bash", *command]
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [*command, *map(str, [*words, *arguments])],
                cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.signal_all(signal.SIGKILL)
        self.process.wait()

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str, count=1, timeout=150) -> None:
        """Returns as soon as the output holds the text so many times."""
        end = time.monotonic() + timeout
        while self.text().count(text) < count:
            assert self.process.poll() is None, f"ended before {text!r}: {self.text()[-3000:]}"
            assert time.monotonic() < end, f"no {text!r} in {timeout} s: {self.text()[-3000:]}"
            time.sleep(0.01)

    def wait(self, timeout=150) -> int:
        """The exit status of the run."""
        return self.process.wait(timeout)

    def processes(self) -> dict[int, dict[str, str]]:
        """Process ids of the run that live (not zombies), with the environment that each started with."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            with suppress(OSError):
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                environment = dict(word.split("=", 1) for word in words if "=" in word)
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if environment.get(MARK) == self.mark and state != "Z":
                    found[int(folder.name)] = environment
        return found

    def left_after(self, seconds: float) -> dict[int, str]:
        """Command lines of the run's processes that are still there after so many seconds."""
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        commands = {}
        for pid in left:
            with suppress(OSError):
                commands[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
        return commands

    def signal_all(self, number: int) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def ranks(self) -> list[int]:
        """Process ids of the ranks by rank; the process itself where torchrun did not start the run."""
        children = {int(e["RANK"]): pid for pid, e in self.processes().items() if "RANK" in e and _parent(pid)}
        return [children[rank] for rank in sorted(children)] or [self.process.pid]


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
