"""The store where the processes of one machine meet is reached from that machine alone."""

import re
import socket
from datetime import timedelta
from pathlib import Path

from pretraining_runs import run_python
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

from linear_moe.entry.launch import LoopbackRendezvous, LoopbackStore

SCRIPT = Path(__file__).parent / "script" / "listening_ports.py"


def listening(run) -> list[str]:
    assert run.returncode == 0, run.stdout[-3000:]
    return re.search(r"^listening: (.*)$", run.stdout, re.M)[1].split()


def test_one_process():
    assert listening(run_python(SCRIPT, new_interpreter=True)) == ["127.0.0.1"]


def test_two_processes_at_a_free_port():
    words = ["--nproc-per-node", 2, "--master-port", 0]
    assert listening(run_python("-m", "linear_moe.entry.launch", *words, SCRIPT, new_interpreter=True)) == ["127.0.0.1"]


def test_the_ranks_receive_the_port_that_the_store_has(monkeypatch):
    monkeypatch.setattr(static_tcp_rendezvous, "TCPStore", LoopbackStore)
    for address in ("127.0.0.1", "localhost"):
        rendezvous = LoopbackRendezvous(address, 0, rank=0, world_size=1, run_id="run", timeout=10)
        found, again = rendezvous.next_rendezvous(), rendezvous.next_rendezvous()  # a restarted group meets again
        port = found.bootstrap_store_info.master_port
        assert port > 0 and again.bootstrap_store_info.master_port == port
        TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10)).set("key", "value")
        assert found.store.underlying_store.get("key") == b"value"


def test_a_port_that_is_named_stays():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rendezvous = LoopbackRendezvous("127.0.0.1", port, rank=0, world_size=1, run_id="run", timeout=10)
    assert rendezvous.next_rendezvous().bootstrap_store_info.master_port == port


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
