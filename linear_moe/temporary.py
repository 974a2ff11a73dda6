"""Files and folders that take their names when they are complete, and what killed processes left of them.

A temporary name says which process on which machine made it. The next run with the same target removes what a dead
process left, and gives a folder its name back that the process had set aside.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL, REPLACED = ".partial", ".replaced"
LONGEST_NAME = 100  # characters of the target's name in a temporary name; file systems take 255 in all


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None without such a process, 0 where that is unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, as another user's
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return None if fields[0] == "Z" else int(fields[19])


def _prefix(target: Path) -> str:
    return f".{target.name[:LONGEST_NAME]}.{socket.gethostname()}."


def _temporary_prefix(target: Path) -> str:
    return f"{_prefix(target)}{os.getpid()}.{_started(os.getpid())}."


def remove_leftovers(target: Path) -> None:
    """Removes the temporary files and folders of ``target`` whose process, of this machine, is dead.

    A process that was killed while it replaced a folder had set the old one aside: that one gets its name back.
    """
    pattern = re.compile(re.escape(_prefix(target)) + r"(\d+)\.(\d+)\.\w+(\.partial|\.replaced)")
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.iterdir(), key=lambda path: path.suffix != REPLACED):
        match = pattern.fullmatch(path.name)
        if match is None or _started(int(match[1])) == int(match[2]):
            continue
        if match[3] == REPLACED and not os.path.lexists(target):
            path.rename(target)
            print(f"{target} is back: process {match[1]} was killed while it replaced it", file=sys.stderr)
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        print(f"removed {path}, which process {match[1]} left when it was killed", file=sys.stderr)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, so that renaming into its place never copies; gone at the end, with all that is in
    it. Removes what killed processes left."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    folder = Path(tempfile.mkdtemp(prefix=_temporary_prefix(target), suffix=PARTIAL, dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """A path to write to; the file takes the name ``target`` when the block ends without an error and the file is on
    disk. Until then, and after an error, ``target`` is what it was. A device or a pipe is written to directly."""
    try:
        target = target.resolve()  # of a link, the file that it leads to is replaced
    except RuntimeError as error:  # Python 3.12's, of a link that leads to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target)) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():
        yield target
        return
    remove_leftovers(target)
    descriptor, name = tempfile.mkstemp(prefix=_temporary_prefix(target), suffix=PARTIAL, dir=target.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~umask())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def save_figure(figure, path: Path, dpi: int) -> None:
    """Saves a figure of matplotlib: ``path`` is the whole new picture, or what it was."""
    path = path if path.suffix else path.with_name(path.name + ".png")
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix("."))


def umask() -> int:
    """The mask of the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
