"""The store where the processes of one machine meet is reached from that machine alone."""

import re
import socket
from pathlib import Path

from pretraining_runs import run_python

SCRIPT = Path(__file__).parent / "script" / "listening_ports.py"


def listening(run) -> list[str]:
    assert run.returncode == 0, run.stdout[-3000:]
    return re.search(r"^listening: (.*)$", run.stdout, re.M)[1].split()


def test_one_process():
    assert listening(run_python(SCRIPT, new_interpreter=True)) == ["127.0.0.1"]


def test_two_processes():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--nnodes", 1, "--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port", port]
    assert listening(run_python("-m", "linear_moe.entry.launch", *words, SCRIPT, new_interpreter=True)) == ["127.0.0.1"]
