"""Files that a run reads and writes: regular ones alone, one holder of a lock, and names given when all is written."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


def regular(path: str | Path, flags: int) -> int:
    """An opener for `open`, which opens regular files and links to such.

    Raises OSError for anything else: a FIFO without a writer would be waited for, and a device may have no end.
    """
    # A file that is to be made is not there yet.
    with suppress(FileNotFoundError):
        _check_regular(path, Path(path).stat().st_mode)
    # What has become a FIFO since is not waited for.
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


@contextmanager
def locked(path: Path, conflict: str) -> Iterator[None]:
    """A block that one process at a time is in. The file at path is made if it is not there, and stays.

    The kernel lets the lock go when the process ends, however it ends.

    Raises ValueError that begins with `conflict` and names the holder, its process, host and since when. Raises OSError
    if path is no regular file; a symbolic link is none, and what it points to stays as it is.
    """
    with suppress(FileNotFoundError):
        _check_regular(path, path.lstat().st_mode)
    # No link is followed: the file is truncated below, and the target may be anybody's. A program that is started in
    # the block must not inherit the lock.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 1000).decode(errors="replace")
            raise ValueError(f"{conflict}: {holder or 'the holder has not written its name yet'}") from None
        # For the error of the next one; the lock itself is the kernel's.
        since = datetime.now(timezone.utc).isoformat(" ", "seconds")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on host {socket.gethostname()} since {since}".encode())
        yield
        os.ftruncate(file, 0)
    finally:
        os.close(file)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what gets the name `path` when the block ends: until then, what has that name stays."""
    unfinished = path.with_name(f"unfinished-{path.name}")
    unfinished.unlink(missing_ok=True)
    yield unfinished
    # A rename within a folder is atomic: nobody sees half a file.
    unfinished.replace(path)


def to_disk(path: Path) -> None:
    """Return when a file or folder would outlast a power failure."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _check_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "no file")
        raise OSError(errno.EINVAL, f"is {kind}, expected a regular file", str(path))
