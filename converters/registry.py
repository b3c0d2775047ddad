"""Foundation models by name: resolve, verify, download once.

:func:`fetch` gives the path of a published ``.model`` file. It looks in jaxft's cache, then in
mace-torch's, then asks the authors' server; every file is checked against its sha256 before it is
used. Where no digest is published, that of the first download is written beside the file and holds
from then on. Nothing is downloaded under a licence that was not accepted.

Example:
  >>> resolve("medium-0b3").name
  'mace-mp-0b3-medium'
  >>> fetch("mace-mp-0b3-medium")                                         # doctest: +SKIP
  PosixPath('~/.cache/jaxft/models/mace-mp-0b3-medium.model')
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from converters.download import FetchError, Job, Progress, beside, download
from converters.published import PUBLISHED, Published

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = [
    "PUBLISHED",
    "FetchError",
    "LicenceError",
    "Published",
    "Row",
    "cache_folder",
    "fetch",
    "identify",
    "resolve",
    "table",
]

logger = logging.getLogger(__name__)

POLL = 0.2
"""Seconds between two looks at another process's download."""


class LicenceError(ValueError):
    """The weights have a licence that must be accepted first."""


def resolve(name: str) -> Published:
    """A published model by its name or an alias.

    Case does not matter, nor whether words are joined by ``-`` or ``_``, and the leading
    ``mace-`` may be left out. ``small``, ``medium`` and ``large`` are MACE-MP-0, as in mace-torch's
    ``mace_mp``; OFF23 has ``small_off`` and so on.

    Raises:
      ValueError: No model has this name; the closest are listed.
    """
    names = {known: entry for entry in PUBLISHED.values() for known in _names(entry)}
    wanted = name.strip().lower().replace("_", "-")
    if wanted in names:
        return names[wanted]
    close = {
        names[known].name: None
        for known in difflib.get_close_matches(wanted, names, n=8, cutoff=0.4)
    }
    known = list(close)[:4] or list(PUBLISHED)
    raise ValueError(
        f"{name!r} is not the name of a published MACE model; "
        f"{'closest' if close else 'there are'}: {', '.join(map(repr, known))}"
    )


def _names(entry: Published) -> set[str]:
    names = (entry.name, *entry.aliases)
    return {*names, *(known.removeprefix("mace-") for known in names)}


def identify(sha256: str) -> Published | None:
    """The published model with this digest, if its digest is known."""
    wanted = sha256.lower()
    return next((entry for entry in PUBLISHED.values() if entry.sha256 == wanted), None)


@dataclass(frozen=True)
class Row:
    """A line of :func:`table`."""

    name: str
    licence: str
    size: int | None
    """Bytes: of the file at hand, else as published, else None."""
    digest: str
    """Where the sha256 comes from: ``authors``, ``reported``, or ``first download``."""
    cached: Path | None
    """The file at hand, not yet verified."""
    family: str


def table(*, cache: Path | None = None) -> tuple[Row, ...]:
    """All published models and whether they are at hand; reads no file and no network."""
    folder = cache or cache_folder()
    rows = []
    for entry in PUBLISHED.values():
        places = (folder / entry.file, *_mace_files(entry))
        cached = next((path for path in places if path.is_file()), None)
        rows.append(
            Row(
                entry.name,
                entry.licence,
                cached.stat().st_size if cached else entry.size,
                entry.sha256_from or "first download",
                cached,
                entry.family,
            )
        )
    return tuple(rows)


def cache_folder() -> Path:
    """``$JAXFT_CACHE``, else ``$XDG_CACHE_HOME/jaxft/models``, else ``~/.cache/jaxft/models``."""
    if folder := os.environ.get("JAXFT_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft" / "models"


def _mace_files(entry: Published) -> tuple[Path, ...]:
    """Where mace-torch keeps this file: ``mace_mp`` drops punctuation, the other loaders do not."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mace"
    base = entry.url.rpartition("/")[2]
    bare = "".join(c for c in base if c.isalnum() or c == "_")
    return folder / bare, folder / base.partition("?")[0]


def fetch(
    name: str,
    *,
    cache: Path | None = None,
    accept_license: bool = False,
    timeout: float = 30.0,
    progress: Progress | None = None,
) -> Path:
    """The file of a published model, downloaded unless it is at hand; its sha256 is checked.

    A download that was cut off goes on where it stopped, in the next attempt or the next call.
    Calls at the same time, in one process or several, download once.

    Args:
      name: See :func:`resolve`.
      cache: Folder to look in and to download to; default :func:`cache_folder`.
      accept_license: Of weights that are not under the MIT licence.
      timeout: Seconds without a connection or without data after which an attempt ends.
      progress: Told of every block that arrives.

    Raises:
      LicenceError: The licence asks for acceptance, whether or not the file is at hand.
      FetchError: No file: no network, no such file there, a wrong digest, no space, ...
      ValueError: No model has this name.
    """
    entry = resolve(name)
    _require_licence(entry, accept_license)
    target = (cache or cache_folder()) / entry.file
    try:
        if found := _cached(entry, target) or _from_mace(entry, target):
            return found
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if found := _cached(entry, target):  # another process was faster
                return found
            return _download(entry, target, timeout, progress or _ignore)
    except OSError as error:
        raise FetchError(
            f"{entry.name}: cannot use the cache {target.parent} ({error}); "
            "set JAXFT_CACHE to a folder with space on a disk that you may write to"
        ) from error


def _ignore(done: int, total: int | None) -> None:
    pass


def _require_licence(entry: Published, accepted: bool) -> None:
    if entry.licence == "MIT" or accepted:
        return
    raise LicenceError(
        f"the weights of {entry.name} are under the Academic Software Licence (ASL), "
        f"{entry.licence_url}: based on the GNU Public License, for academic, non-commercial use "
        "only; read it and, if you accept it, give --accept-license (in Python accept_license=True)"
    )


# Files at hand


def _cached(entry: Published, target: Path) -> Path | None:
    if not target.is_file():
        return None
    expected = _expected(entry, target)
    got = _sha256(target)
    if expected is None:
        _record(entry, target, got)
    elif got != expected:
        raise FetchError(
            f"{target}: {_mismatch(entry, target, expected, got)}; "
            f"delete the file to download {entry.name} again"
        )
    return target


def _from_mace(entry: Published, target: Path) -> Path | None:
    """The first intact file of mace-torch's cache; damaged ones are named and left alone."""
    for path in _mace_files(entry):
        if not path.is_file():
            continue
        expected = _expected(entry, target)
        got = _sha256(path)
        if expected is None:
            _record(entry, target, got)
        elif got != expected:
            logger.warning(
                "%s: mace-torch's file is not used: %s",
                path,
                _mismatch(entry, target, expected, got),
            )
            continue
        return path
    return None


def _expected(entry: Published, target: Path) -> str | None:
    """The published digest, else the one of the first download."""
    if entry.sha256:
        return entry.sha256
    record = beside(target, ".sha256")
    if not record.is_file():
        return None
    digest = record.read_text(errors="replace").partition(" ")[0]
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise FetchError(
            f"{record}: expected a sha256 and a file name, found {digest[:80]!r}; "
            f"delete it to trust the {entry.file} of the next use"
        )
    return digest


def _record(entry: Published, target: Path, digest: str) -> None:
    """Trust on first use: write the digest down, as ``sha256sum`` would."""
    record = beside(target, ".sha256")
    record.parent.mkdir(parents=True, exist_ok=True)
    scratch = beside(target, f".sha256.{os.getpid()}-{threading.get_ident()}")
    scratch.write_text(f"{digest}  {target.name}\n")
    os.replace(scratch, record)
    logger.warning(
        "%s: no sha256 is published; the one found now, %s, is kept in %s and holds from now on",
        entry.name,
        digest,
        record,
    )


def _mismatch(entry: Published, target: Path, expected: str, got: str) -> str:
    origin = {
        "authors": "published by its authors",
        "reported": "reported by a third party, not by its authors",
        None: f"of its first download, kept in {beside(target, '.sha256')}",
    }[entry.sha256_from]
    return f"expected the sha256 {expected} ({origin}), got {got}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One download at a time; the lock dies with its process, the empty file stays."""
    with beside(target, ".lock").open("ab") as file:
        waiting = False
        while not _try_lock(file):
            if not waiting:
                logger.warning("%s: waiting for another process that downloads it", target)
            waiting = True
            time.sleep(POLL)
        yield  # closing the file releases the lock


def _try_lock(file: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _download(entry: Published, target: Path, timeout: float, progress: Progress) -> Path:
    expected = _expected(entry, target)
    job = Job(
        url=entry.url,
        target=target,
        verifiable=expected is not None,
        size=entry.size,
        timeout=timeout,
        progress=progress,
    )
    part = download(job)
    got = _sha256(part)
    if expected is None:
        _record(entry, target, got)
    elif got != expected:
        job.discard()
        raise FetchError(
            f"{entry.name}: what {entry.url} sent was removed: "
            f"{_mismatch(entry, target, expected, got)}; try again, and if you trust the server, "
            + (
                "give the path of a file that you downloaded by hand instead of the name"
                if entry.sha256
                else "delete that record"
            )
        )
    os.replace(part, target)
    job.discard()
    return target
