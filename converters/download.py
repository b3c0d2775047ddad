"""A large file over HTTP: resumed where it was cut off, never hanging, never mistaken.

:func:`download` fills a ``.part`` file. What it is a part of (address, length, the server's
validators) stands beside it in ``.part.json``, so that a later attempt or a later process asks for
the rest only, and only of the same file. Whether the bytes are the right ones is for the caller to
check, by digest, before the part gets its final name.
"""

from __future__ import annotations

import errno
import http.client
import json
import logging
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and, if the server says, how many there will be."""

MAX_BYTES = 4 << 30
BLOCK = 1 << 18
SLOWEST = 100
"""Bytes per second; less, on average over ``timeout``, is a stall."""
PAUSES = (1.0, 2.0, 4.0)
"""Seconds before the second, third and fourth attempt."""

TRANSIENT = (408, 416, 425, 429, 500, 502, 503, 504)
OFFLINE = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


class FetchError(ValueError):
    """A published file could not be had; the message says why and how to get it by hand."""


class _Transient(Exception):
    """Worth another attempt; what was received is kept."""


def beside(path: Path, suffix: str) -> Path:
    """``path`` with ``suffix`` after its whole name."""
    return path.with_name(path.name + suffix)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A file to download.

    Attributes:
      url: http or https.
      target: Where the caller will put the file; the part lies beside it.
      verifiable: The caller knows the file's digest. Otherwise only a download whose length the
        server states, and only parts whose validators it confirms, are accepted.
      size: Bytes, if known.
      timeout: Seconds without a connection or without data after which an attempt ends.
      progress: Told of every block.
    """

    url: str
    target: Path
    verifiable: bool
    size: int | None
    timeout: float
    progress: Progress

    @property
    def part(self) -> Path:
        return beside(self.target, ".part")

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)
        beside(self.part, ".json").unlink(missing_ok=True)

    def failed(self, problem: str) -> FetchError:
        return FetchError(
            f"{self.target.name}: {problem}; try again, or download {self.url} by hand and put "
            f"it at {self.target}"
        )


def download(job: Job) -> Path:
    """Bring the part of a file to its full length, in a few attempts.

    Returns:
      The path of the part, which the caller verifies, moves and tidies up (:meth:`Job.discard`).

    Raises:
      FetchError: It cannot be had; what was received is kept if more may follow.
      OSError: The disk, not the network.
    """
    require_http(job.url)
    for pause in (*PAUSES, None):
        try:
            _attempt(job)
            break
        except _Transient as error:
            if pause is None:
                raise job.failed(f"{error}, in the last of {len(PAUSES) + 1} attempts") from error
            logger.info("%s: %s; trying again in %g s", job.url, error, pause)
            time.sleep(pause)
    return job.part


@dataclass(frozen=True)
class _State:
    """What a part is a part of."""

    url: str
    etag: str | None
    modified: str | None
    total: int | None

    @property
    def validator(self) -> str | None:
        """For ``If-Range``, which takes strong validators only."""
        weak = self.etag is None or self.etag.startswith("W/")
        return self.modified if weak else self.etag

    @classmethod
    def read(cls, part: Path) -> _State | None:
        try:
            return cls(**json.loads(beside(part, ".json").read_text()))
        except (OSError, ValueError, TypeError):
            return None  # none or a damaged one: start again

    def write(self, part: Path) -> None:
        beside(part, ".json").write_text(json.dumps(asdict(self)))


def _attempt(job: Job) -> None:
    state, offset = _resume_point(job)
    if state and offset and offset == state.total:
        return
    with _open(job, _request(job, state, offset)) as response:
        if response.status != 206 or state is None:
            state, offset = _describe(job, response), 0
        elif not _continues(response, state, offset):
            job.discard()
            raise _Transient("the file changed on the server since its first part")
        _check_answer(job, response, state.total)
        _check_space(job, (state.total or 0) - offset)
        with job.part.open("ab" if offset else "wb") as out:
            state.write(job.part)  # after the old part was emptied: never its bytes, these words
            offset = _receive(job, response, out, offset, state.total)
    if not offset:
        raise _Transient("the server sent an empty file")
    if state.total is not None and offset != state.total:
        raise _Transient(f"the connection ended after {offset} of {state.total} bytes")


def _resume_point(job: Job) -> tuple[_State | None, int]:
    state = _State.read(job.part)
    if state is None or state.url != job.url or not job.part.is_file():
        return None, 0
    if not (state.validator or job.verifiable):
        return None, 0  # nothing would tell whether the rest is of the same file
    return state, job.part.stat().st_size


def _receive(
    job: Job, response: http.client.HTTPResponse, out: IO[bytes], offset: int, total: int | None
) -> int:
    for block in _blocks(response, job.timeout):
        if not offset and (page := _not_a_model(block)):
            job.discard()
            raise job.failed(f"the server sent {page} instead of a model")
        offset += len(block)
        if offset > MAX_BYTES:
            job.discard()
            raise job.failed(f"it has more than {MAX_BYTES} bytes")
        out.write(block)
        job.progress(offset, total)
    return offset


def _blocks(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """What arrives, as it arrives; a trickle is a stall too."""
    mark, received = time.monotonic(), 0
    while True:
        try:
            block = response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(_said(error, timeout)) from error
        if not block:
            return
        yield block
        received += len(block)
        if (elapsed := time.monotonic() - mark) > timeout:
            if received < SLOWEST * elapsed:
                raise _Transient(f"only {received} bytes came in {elapsed:.1f} s")
            mark, received = time.monotonic(), 0


def _request(job: Job, state: _State | None, offset: int) -> urllib.request.Request:
    headers = {"User-Agent": "jaxft", "Accept-Encoding": "identity"}
    if state and offset:
        headers["Range"] = f"bytes={offset}-"
        if state.validator:
            headers["If-Range"] = state.validator
    return urllib.request.Request(job.url, headers=headers)


def _continues(response: http.client.HTTPResponse, state: _State, offset: int) -> bool:
    """Whether a 206 goes on with the same file where the part ends."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != offset:
        return False
    if state.total is not None and match[2] not in ("*", str(state.total)):
        return False
    # A server that ignores If-Range still says what it sends.
    now = (response.headers.get("ETag"), response.headers.get("Last-Modified"))
    then = (state.etag, state.modified)
    return all(new is None or new == old for new, old in zip(now, then, strict=True))


def _describe(job: Job, response: http.client.HTTPResponse) -> _State:
    length = response.headers.get("Content-Length")
    if length is not None and not re.fullmatch("[0-9]{1,18}", length):
        raise job.failed(f"the server's Content-Length is {length[:40]!r}")
    total = None if length is None else int(length)
    headers = response.headers
    return _State(job.url, headers.get("ETag"), headers.get("Last-Modified"), total)


def _check_answer(job: Job, response: http.client.HTTPResponse, total: int | None) -> None:
    """Refuse what cannot be the model before a byte is written."""
    kind = response.headers.get_content_type()
    encoding = response.headers.get("Content-Encoding", "identity")
    problem = None
    if response.status not in (200, 206):
        problem = f"the server answered {response.status} {response.reason}"
    elif kind in ("text/html", "application/json"):
        problem = (
            f"the server sent a {kind} page instead of a model: perhaps the login page of a "
            "network; open the URL in a browser"
        )
    elif encoding != "identity":
        problem = f"the server sent it with Content-Encoding {encoding[:40]!r}"
    elif total is not None and total > MAX_BYTES:
        problem = f"it has {total} bytes, more than {MAX_BYTES}"
    elif total is not None and job.size not in (None, total):
        problem = f"the server offers {total} bytes, expected {job.size}"
    elif total is None and not job.verifiable and not response.chunked:
        problem = "the server does not say how long it is, so that a truncated file would pass"
    if problem:
        raise job.failed(problem)


def _check_space(job: Job, wanted: int) -> None:
    free = shutil.disk_usage(job.target.parent).free
    if wanted > free:
        raise job.failed(
            f"{wanted} bytes are to come and {job.target.parent} has {free} free; make room, or "
            "set JAXFT_CACHE to another folder"
        )


def _not_a_model(head: bytes) -> str | None:
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if head.lstrip()[:1] in (b"<", b"{"):
        return f"text ({head.strip()[:40]!r})"
    return None


def _open(job: Job, request: urllib.request.Request) -> http.client.HTTPResponse:
    opener = urllib.request.build_opener(Redirects)  # proxies as the environment says
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=job.timeout)
    except urllib.error.HTTPError as error:
        with error:
            answer = f"the server answered {error.code} {error.reason}"
        if error.code == 416:  # the part is longer than the file
            job.discard()
        if error.code in TRANSIENT:
            raise _Transient(answer) from error
        raise job.failed(answer) from error
    except (OSError, http.client.HTTPException) as error:  # URLError among them
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            problem = f"the server's certificate is not valid ({reason.verify_message})"
            raise job.failed(problem) from error
        if isinstance(reason, socket.gaierror) or getattr(reason, "errno", None) in OFFLINE:
            host = urlsplit(request.full_url).hostname
            raise job.failed(f"{host} cannot be reached ({reason})") from error
        raise _Transient(_said(reason, job.timeout)) from error
    return response


def _said(reason: object, timeout: float) -> str:
    if isinstance(reason, TimeoutError):
        return f"nothing came for {timeout:g} s"
    return f"the connection failed ({str(reason) or type(reason).__name__})"


def require_http(url: str) -> None:
    """Raise :class:`FetchError` unless ``url`` is an http or https address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError(f"{url[:200]!r} is not an http or https address; nothing was opened")


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https back to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        require_http(newurl)
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise FetchError(f"{req.full_url} redirects to the unprotected {newurl[:200]}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
