"""One process at a time works on a cell, on one machine or on many that share a folder.

A lock is a file that says who holds it. On the holder's own machine it is stale when that process
is no more, however long it was suspended; from other machines, when it was not touched for
:data:`STALE` seconds. Looking and taking happen under the kernel's own lock of a second file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK, GUARD = "lock", "lock.guard"
BEAT, STALE = 20.0, 600.0
"""Seconds between two signs of life, and without any."""


class Busy(RuntimeError):
    """Another process works here."""


class Lost(RuntimeError):
    """The lock was taken over: this process gave no sign of life for too long."""


class Held:
    """A lock that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = uuid.uuid4().hex
        self._is_over = threading.Event()

    def check(self) -> None:
        """Raises Lost if it is no longer ours."""
        if _read(self.path).get("token") != self._token:
            raise Lost(f"{self.path} was taken over by another process; nothing was written.")

    def write(self) -> None:
        self.path.write_text(json.dumps({**_me(), "token": self._token}))

    def beat(self) -> None:
        while not self._is_over.wait(BEAT):
            if _read(self.path).get("token") != self._token:
                return
            os.utime(self.path)

    def release(self) -> None:
        self._is_over.set()
        with _guarded(self.path.parent):
            if _read(self.path).get("token") == self._token:
                self.path.unlink()


@contextmanager
def hold(folder: Path) -> Iterator[Held]:
    """Hold the lock of a folder, which is made.

    Raises:
      Busy: another process holds it; the message says which.
      OSError: the file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = Held(folder / LOCK)
    with _guarded(folder):
        holder = _read(held.path)
        if holder and not _is_stale(held.path, holder):
            raise Busy(f"process {holder.get('pid')} on {holder.get('host')} works on {folder}")
        held.write()
    pulse = threading.Thread(target=held.beat, daemon=True, name="lock")
    pulse.start()
    try:
        yield held
    finally:
        held.release()


def is_held(folder: Path) -> bool:
    """Whether a living process works on a folder."""
    path = folder / LOCK
    holder = _read(path)
    return bool(holder) and not _is_stale(path, holder)


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    with (folder / GUARD).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise OSError(
                f"{folder} is on a file system without locks (flock), so two processes could run "
                "one cell;\ngive an output on another one."
            ) from error
        yield


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "where": _where(), "pid": os.getpid(), **_born()}


def _born() -> dict[str, str]:
    found = _start_of(os.getpid())
    return {} if found is None else {"born": found}


def _where() -> str:
    """The machine since its last start, and the container: within it numbers name processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks: numbers of processes come again. None where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _is_alive(pid: int, born: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return born is None or _start_of(pid) in (None, born)


def _is_stale(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("where") == _where():
        return not _is_alive(int(holder["pid"]), holder.get("born"))
    try:
        return time.time() - path.stat().st_mtime > STALE
    except FileNotFoundError:
        return True


def _read(path: Path) -> dict[str, Any]:
    """Who holds a lock; empty if nobody does. A file that is cut short was written as its process
    was killed."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
