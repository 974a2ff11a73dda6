"""torchrun for the processes of one machine, whose meeting place no other machine reaches.

    python -m linear_moe.entry.launch <torchrun's arguments>

PyTorch's store listens on every interface of the machine, and does what anyone who connects to it says. Here it listens
on the loopback interface where --master-addr names that (127.0.0.1 or localhost), and everywhere else as before.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections import deque
from collections.abc import Sequence
from importlib import import_module

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousInfo, static_tcp_rendezvous
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

SHOWN_LINES = 50


class LoopbackStore(TCPStore):
    """A TCPStore whose server, where its host is the loopback interface, listens there alone."""

    def __init__(self, host_name, port, world_size=None, is_master=False, *args, **kwargs):
        if is_master and _is_loopback(host_name):
            listener = socket.create_server((socket.gethostbyname(host_name), port), backlog=2048)
            port = listener.getsockname()[1]
            kwargs["master_listen_fd"] = listener.detach()  # the server closes the socket
        super().__init__(host_name, port, world_size, is_master, *args, **kwargs)


class LoopbackRendezvous(StaticTCPRendezvous):
    """torchrun's meeting place, whose store may be at port 0: a free port, which the ranks receive.

    PyTorch's class hands the 0 on to the ranks, which then wait for ever at a port that no store has.
    """

    def next_rendezvous(self) -> RendezvousInfo:
        found = super().next_rendezvous()
        found.bootstrap_store_info.master_port = self._store.port
        return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def use_loopback_store(module: str) -> None:
    """Makes a module of PyTorch that creates stores create `LoopbackStore`."""
    import_module(module).TCPStore = LoopbackStore


def show_end_of_log(words: Sequence[str]) -> None:
    """Prints the last lines of the file that ``--log-file`` names: a process that a signal killed has shown none."""
    places = [place for place, word in enumerate(words[:-1]) if word == "--log-file"]
    if not places:
        return
    path = words[places[-1] + 1]
    try:
        with open(path, errors="replace") as file:
            lines = deque(file, maxlen=SHOWN_LINES)
    except OSError:
        return
    print(f"the end of {path}:\n{''.join(lines)}", file=sys.stderr, flush=True)


def main() -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    use_loopback_store(static_tcp_rendezvous.__name__)
    static_tcp_rendezvous.StaticTCPRendezvous = LoopbackRendezvous
    try:
        return run.main(sys.argv[1:]) or 0
    except ChildFailedError as error:
        if any(failure.exitcode < 0 for failure in error.failures.values()):
            show_end_of_log(sys.argv)
        raise


if __name__ == "__main__":
    sys.exit(main())
