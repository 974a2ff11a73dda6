"""The store where the processes of one machine meet is reached from that machine alone."""

import re
import socket
from pathlib import Path

from pretraining_runs import run_python

from linear_moe.entry.launch import with_a_port

SCRIPT = Path(__file__).parent / "script" / "listening_ports.py"


def listening(run) -> list[str]:
    assert run.returncode == 0, run.stdout[-3000:]
    return re.search(r"^listening: (.*)$", run.stdout, re.M)[1].split()


def test_one_process():
    assert listening(run_python(SCRIPT, new_interpreter=True)) == ["127.0.0.1"]


def test_two_processes_at_a_free_port():
    words = ["--nproc-per-node", 2, "--master-port", 0]
    assert listening(run_python("-m", "linear_moe.entry.launch", *words, SCRIPT, new_interpreter=True)) == ["127.0.0.1"]


def test_only_the_port_of_the_store_is_replaced():
    words = ["--master-port", "0", "train.py", "--seed", "0"]
    option, port, *rest = with_a_port(words)
    assert option == "--master-port" and int(port) > 0 and rest == words[2:]
    assert with_a_port(["--master-port", "29531", "--node-rank", "0"]) == ["--master-port", "29531", "--node-rank", "0"]
    assert re.fullmatch(r"--master-port=[1-9]\d+", *with_a_port(["--master-port=0"]))


def test_two_processes():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--nnodes", 1, "--nproc-per-node", 2, "--master-addr", "127.0.0.1", "--master-port", port]
    assert listening(run_python("-m", "linear_moe.entry.launch", *words, SCRIPT, new_interpreter=True)) == ["127.0.0.1"]


def test_a_killed_process_leaves_the_end_of_its_log_on_the_screen(tmp_path):
    (tmp_path / "rank.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (tmp_path / "log.txt").write_text("the beginning\n" + "line\n" * 60 + "the last words\n")
    run = run_python(
        "-m", "linear_moe.entry.launch", "--nproc-per-node", 1, "--master-port", 0, tmp_path / "rank.py", "--log-file",
        tmp_path / "log.txt",
    )  # fmt: skip
    assert run.returncode != 0
    assert f"the end of {tmp_path / 'log.txt'}:" in run.stdout
    assert "the last words" in run.stdout and "the beginning" not in run.stdout
