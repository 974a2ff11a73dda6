"""Files and folders that are whole or absent, and the leftovers of killed processes."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.figure
import pytest

from linear_moe import temporary
from linear_moe.conversion.files import check_target, new_folder
from linear_moe.temporary import remove_leftovers, replaced_file, save_figure, temporary_folder

ROOT = Path(__file__).parents[2]


def killed(code: str, number: int = signal.SIGKILL) -> int:
    """Runs code in a process until it says that it is ready, and kills that. Returns the exit status."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    return process.wait()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_next_run_removes_what_a_killed_one_left(tmp_path, capsys):
    code = (
        "import time; from pathlib import Path; from linear_moe.temporary import *\n"
        f"target = Path({str(tmp_path / 'target')!r})\n"
        "with temporary_folder(target) as folder, replaced_file(target.with_name('picture.png')) as partial:\n"
        "    (folder / 'weights').write_text('half')\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    assert killed(code) == -signal.SIGKILL
    left = names(tmp_path)
    assert len(left) == 2 and all(name.endswith(".partial") for name in left)
    (tmp_path / ".target.other-host.1.1.abcdefgh.partial").mkdir()  # its process may be alive
    (tmp_path / f".target.{socket.gethostname()}.mine.partial").touch()
    with temporary_folder(tmp_path / "target"):
        with temporary_folder(tmp_path / "target"):  # another run beside this one
            pass
        assert len([name for name in names(tmp_path) if name.startswith(".target")]) == 3
    save_figure(matplotlib.figure.Figure(), tmp_path / "picture.png", dpi=20)
    assert names(tmp_path) == [
        ".target.other-host.1.1.abcdefgh.partial", f".target.{socket.gethostname()}.mine.partial", "picture.png",
    ]  # fmt: skip
    error = capsys.readouterr().err
    assert all(f"removed {tmp_path / name}" in error for name in left)


def test_a_process_id_used_again_is_not_the_same_process(tmp_path):
    mine = temporary._temporary_prefix(tmp_path / "target")
    pid, started = mine.split(".")[-3:-1]
    old = f"{mine.removesuffix(f'{pid}.{started}.')}{pid}.{int(started) - 5}.abcdefgh.partial"
    (tmp_path / old).mkdir()
    (tmp_path / f"{mine}abcdefgh.partial").mkdir()
    remove_leftovers(tmp_path / "target")
    assert names(tmp_path) == [f"{mine}abcdefgh.partial"]


def test_folder_set_aside_comes_back(tmp_path, capsys):
    target = tmp_path / "target"
    code = (
        "import os, time; from pathlib import Path; from linear_moe.conversion.files import new_folder\n"
        f"target = Path({str(target)!r}); target.mkdir(); (target / 'config.json').write_text('old')\n"
        "rename = Path.rename\n"
        "def slow(self, other):\n"
        "    if other == target: print('ready', flush=True); time.sleep(60)\n"
        "    return rename(self, other)\n"
        "Path.rename = slow\n"
        "with new_folder(target) as folder: (folder / 'config.json').write_text('new')\n"
    )
    killed(code)
    assert not target.exists() and len(names(tmp_path)) == 2
    with pytest.raises(Exception, match="exists: give the name of a new folder"):
        check_target(target, ["config.json"], overwrite=False)
    assert names(tmp_path) == ["target"] and (target / "config.json").read_text() == "old"
    assert f"{target} is back" in capsys.readouterr().err
    with new_folder(target) as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == ["target"] and (target / "config.json").read_text() == "new"


def test_picture_survives_an_error(tmp_path):
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"old")
    picture.chmod(0o640)

    class FullDisk:
        def savefig(self, path, **options):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_figure(FullDisk(), picture, dpi=20)
    assert picture.read_bytes() == b"old" and names(tmp_path) == ["loss.png"]
    save_figure(matplotlib.figure.Figure(), picture, dpi=20)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_mode & 0o777 == 0o640
    (tmp_path / "link.png").symlink_to("other.png")
    save_figure(matplotlib.figure.Figure(), tmp_path / "link.png", dpi=20)
    save_figure(matplotlib.figure.Figure(), tmp_path / "name", dpi=20)
    assert names(tmp_path) == ["link.png", "loss.png", "name.png", "other.png"]
    assert (tmp_path / "link.png").is_symlink()


def test_a_device_stays_a_device():
    with replaced_file(Path("/dev/null")) as path:
        path.write_text("x")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_signals_leave_nothing(tmp_path, number, ignored):
    """A command that is told to end removes what is half written; nohup's SIGHUP is ignored as before."""
    code = (
        "import signal, sys, time, types; from pathlib import Path\n"
        f"signal.signal({int(number)}, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "from linear_moe import commands; from linear_moe.temporary import temporary_folder\n"
        "def main():\n"
        f"    with temporary_folder(Path({str(tmp_path / 'target')!r})):\n"
        f"        print('ready', flush=True); time.sleep({0.5 if ignored else 60})\n"
        "    return 7\n"
        "sys.modules['linear_moe.commands.slow'] = types.SimpleNamespace(main=main)\n"
        "sys.exit(commands.run('slow'))\n"
    )
    start = time.monotonic()
    assert killed(code, number) == (7 if ignored else 128 + number)
    assert names(tmp_path) == [] and time.monotonic() - start < 50
