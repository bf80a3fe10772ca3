"""One writer at a time: a lock on the folder of a run, or on an output file.

The lock is a POSIX record lock on a small file. The kernel releases it when the process ends, even
if it is killed; child processes do not inherit it. The file names the holder (process id, host,
start time) and is deleted at the end. A file left behind by a killed process is taken over.

Network file systems share such locks between hosts if mounted accordingly. A file left behind by a
process of another host is taken over with a note, since that process cannot be checked. On a file
system without locks the holder's process id decides, and a holder on another host counts as alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from cpo_fast.errors import UsageError
from cpo_fast.folders import open_private

LOCK = ".lock"
"""The lock file's name in a locked folder."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, and its start time."""

    pid: int
    host: str
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, started {self.started}"

    def may_live(self) -> bool:
        """Whether the process can still be running; an earlier process with the id of this one
        cannot."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return self.pid != os.getpid()


_held: dict[Path, Holder] = {}
"""The locks of this process, since record locks do not exclude their own process."""


@contextmanager
def lock_folder(folder: str | Path, flag: str = "--output_dir") -> Iterator[None]:
    """Lock `folder` for this process; a missing folder is created (mode 0700).

    A folder created here is removed if it is empty at the end. Raises UsageError, starting with
    `flag`, if another process holds the lock (with its id, host and start time) or the folder
    cannot be written.
    """
    path = Path(folder)
    made = not path.exists()
    what = f"{flag} {path}"
    _make(path, what)
    try:
        with _locked(path / LOCK, what):
            yield
    finally:
        if made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def lock_file(path: Path, flag: str = "--output") -> Iterator[None]:
    """Lock `path` for this process, by a lock file beside it; a missing folder is created (mode
    0700).

    Raises UsageError as `lock_folder` does.
    """
    what = f"{flag} {path}"
    _make(path.parent, what)
    with _locked(path.with_name(f".{path.name}{LOCK}"), what):
        yield


def check_folder(folder: str | Path, flag: str = "--output_dir") -> None:
    """UsageError if `folder` can neither be written nor created; nothing is created."""
    path = Path(folder)
    nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not nearest.is_dir():
        raise UsageError(f"{flag} {path} cannot be written: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path} cannot be written: no permission to write into {nearest}")


def check_file(file: str | Path, flag: str = "--output") -> None:
    """UsageError if `file` is a folder, or its folder can neither be written nor created."""
    path = Path(file)
    if path.is_dir():
        raise UsageError(f"{flag} {path} cannot be written: it is a folder; name a file")
    check_folder(path.parent, flag)


def _make(folder: Path, what: str) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{what} cannot be written: {error}") from error


@contextmanager
def _locked(file: Path, what: str) -> Iterator[None]:
    file = file.resolve()
    if file in _held:
        raise _busy(what, _held[file])
    try:
        handle = _take(file, what)
    except OSError as error:
        raise UsageError(f"{what} cannot be written: {error}") from error
    try:
        yield
    finally:
        del _held[file]
        with suppress(OSError):
            if _is_at(handle, file):
                file.unlink()
        os.close(handle)


def _take(file: Path, what: str) -> int:
    """Lock `file` and write this process to it; returns the handle."""
    while True:
        handle = open_private(file, os.O_RDWR)
        try:
            shared = _lock(handle)
            left = _read(handle)
            if shared is False or (shared is None and left and left.may_live()):
                advice = f"; if it has ended, delete {file}" if shared is None else ""
                raise _busy(what, left, advice)
            if not _is_at(handle, file):  # the holder has deleted it meanwhile
                os.close(handle)
                continue
            if left and left.host != socket.gethostname():
                print(
                    f"note: {what}: takes over the lock that {left}, left behind; if that process "
                    "still runs, the file system does not share locks between hosts: stop one",
                    file=sys.stderr,
                )
            started = _process_start().astimezone().isoformat(" ", "seconds")
            _held[file] = Holder(os.getpid(), socket.gethostname(), started)
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(asdict(_held[file])).encode(), 0)
            return handle
        except BaseException:
            _held.pop(file, None)
            os.close(handle)
            raise


def _process_start() -> datetime:
    """Start time of this process from /proc; without it, the current time."""
    try:
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        lines = Path("/proc/stat").read_text().splitlines()
        boot = next(line for line in lines if line.startswith("btime")).split()[1]
        return datetime.fromtimestamp(int(boot) + int(ticks) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, StopIteration):
        return datetime.now()


def _lock(handle: int) -> bool | None:
    """Try to lock; whether it succeeded, None on a file system without locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _read(handle: int) -> Holder | None:
    """The holder written in a lock file, or None."""
    try:
        return Holder(**json.loads(os.pread(handle, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _is_at(handle: int, file: Path) -> bool:
    """Whether `file` is still the file of the handle."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _busy(what: str, holder: Holder | None, advice: str = "") -> UsageError:
    by = str(holder) if holder else "another process"
    return UsageError(
        f"{what} is being written by {by}: wait for its end, stop it, or name another{advice}"
    )
