"""Foundation models by name, against a server on this machine that misbehaves as asked."""

import errno
import hashlib
import http.server
import itertools
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import namedtuple
from dataclasses import replace

import pytest

from converters import download, published, registry
from converters.download import FetchError
from converters.registry import LicenceError

BODY = b"PK\x03\x04" + random.Random(0).randbytes(1_500_000)
LATER = b"PK\x03\x04" + random.Random(2).randbytes(1_500_000)  # another file of BODY's length
OTHER = b"PK\x03\x04" + random.Random(1).randbytes(1_400_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
FILE = "toy-model.model"
SPAN = 300_000  # bytes sent before a connection is cut


class Server(http.server.ThreadingHTTPServer):
    """Answers every GET with ``body``, in the manner set by its attributes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.etag = '"one"'
        self.modified = None
        self.ranges = True
        self.heed_if_range = True
        self.say_length = True
        self.misplaced = False  # call the whole body a part
        self.headers = {"Content-Type": "application/octet-stream"}
        self.redirects = {}
        self.statuses = []  # of the next answers; then 200
        self.cuts = []  # bytes to send in the next answers; then all
        self.stall = None  # an event to wait for when an answer is cut
        self.delay = 0.0  # seconds per block
        self.requests = []  # their headers
        self.sent = 0

    def url(self, path=f"/{FILE}"):
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request, client_address):
        pass  # the client hung up


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if self.path in server.redirects:
            self.answer(302, {"Location": server.redirects[self.path], "Content-Length": "0"})
            return
        if server.statuses and (status := server.statuses.pop(0)) != 200:
            self.answer(status, {"Content-Length": "0"})
            return
        body, start = server.body, 0
        if server.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        condition = self.headers.get("If-Range")
        if server.heed_if_range and condition not in (None, server.etag, server.modified):
            start = 0
        if start and start >= len(body):
            self.answer(416, {"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})
            return
        headers = dict(server.headers)
        if server.etag:
            headers["ETag"] = server.etag
        if server.modified:
            headers["Last-Modified"] = server.modified
        if server.say_length:
            headers["Content-Length"] = str(len(body) - start)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if start and server.misplaced:
            start = 0
            headers["Content-Length"] = str(len(body))
            headers["Content-Range"] = f"bytes 0-{len(body) - 1}/{len(body)}"
            self.answer(206, headers)
        else:
            self.answer(206 if start else 200, headers)
        stop = start + server.cuts.pop(0) if server.cuts else len(body)
        for at in range(start, min(stop, len(body)), 50_000):
            block = body[at : min(at + 50_000, stop)]
            server.sent += len(block)  # before: the client may be done before this thread goes on
            self.wfile.write(block)
            time.sleep(server.delay)
        if stop < len(body) and server.stall:
            server.stall.wait(10)
        self.close_connection = True

    def answer(self, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def publish(monkeypatch, server, tmp_path):
    """Replace the published models by a toy of the local server; no test reaches beyond it."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("JAXFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(registry, "POLL", 0.01)
    toy = published.Published(
        name="toy-model",
        aliases=("toy",),
        file=FILE,
        url=server.url(),
        licence="MIT",
        citation="nobody",
        family="toy",
        sha256=DIGEST,
        sha256_from="authors",
    )

    def publish(**changes):
        entry = replace(toy, **changes)
        monkeypatch.setattr(registry, "PUBLISHED", {entry.name: entry})
        return entry

    publish()
    return publish


@pytest.fixture
def cache(tmp_path, publish):
    return tmp_path / "xdg" / "jaxft" / "models"


UNKNOWN = {"sha256": None, "sha256_from": None}


def names_in(folder):
    """What a fetch left there, its empty lock file aside."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Names


def test_names_and_aliases_are_unique():
    entries = registry.PUBLISHED.values()
    assert all(registry.PUBLISHED[entry.name] is entry for entry in entries)
    for one, two in itertools.combinations(entries, 2):
        assert not registry._names(one) & registry._names(two)
        assert one.url != two.url
        assert one.sha256 is None or one.sha256 != two.sha256


@pytest.mark.parametrize("entry", registry.PUBLISHED.values(), ids=lambda entry: entry.name)
def test_every_entry_is_well_formed(entry):
    assert entry.url.startswith("https://")
    assert entry.url.endswith(f"/{entry.file}")
    assert all(name == name.lower() and "_" not in name for name in registry._names(entry))
    assert (entry.licence_url is None) == (entry.licence == "MIT")
    assert (entry.sha256 is None) == (entry.sha256_from is None)
    if entry.sha256:
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert registry.identify(entry.sha256.upper()) is entry


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("mace-mp-0b3-medium", "mace-mp-0b3-medium"),
        ("MACE_MP_0b3_medium", "mace-mp-0b3-medium"),
        ("medium-0b3", "mace-mp-0b3-medium"),
        (" small ", "mace-mp-0-small"),
        ("small_off", "mace-off23-small"),
        ("medium-mpa-0", "mace-mpa-0-medium"),
        ("mh-1", "mace-mh-1"),
        ("mace-matpes-r2scan-0", "mace-matpes-r2scan-0"),
        ("mace_omol", "mace-omol-0-extra-large"),
        ("anicc", "mace-anicc"),
    ],
)
def test_a_model_has_several_names(name, canonical):
    assert registry.resolve(name).name == canonical


@pytest.mark.torch
def test_urls_and_keys_are_those_of_mace_torch():
    models = pytest.importorskip("mace.calculators.foundations_models")
    for key, url in models.mace_mp_urls.items():
        assert registry.resolve(key).url == url
    for key, url in models.mace_off_urls.items():
        assert registry.resolve(f"{key}_off").url == url


def test_an_unknown_name_lists_the_closest():
    with pytest.raises(ValueError, match=r"'mace-mp-0b3-medum'.*closest: 'mace-mp-0b3-medium'"):
        registry.resolve("mace-mp-0b3-medum")
    with pytest.raises(ValueError, match=r"there are: 'mace-mp-0-small'.*'mace-anicc'"):
        registry.resolve("xyzzy!")


def test_an_unknown_digest_is_nobodys():
    assert registry.identify("0" * 64) is None


# Caches


def test_the_cache_is_found_when_called(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert registry.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("JAXFT_CACHE")
    assert registry.cache_folder() == tmp_path / "b" / "jaxft" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert registry.cache_folder() == tmp_path / "c" / ".cache" / "jaxft" / "models"


def test_a_cached_file_needs_no_server(cache, server):
    path = put(cache / FILE, BODY)
    assert registry.fetch("toy-model") == path
    assert server.requests == []


def test_a_cached_file_is_checked_every_time(cache, server):
    path = put(cache / FILE, OTHER)
    got = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(
        FetchError, match=f"{FILE}: expected the sha256 {DIGEST}.*got {got}.*delete"
    ):
        registry.fetch("toy-model")
    assert path.read_bytes() == OTHER
    assert server.requests == []


@pytest.mark.parametrize("file", ["toymodelmodel", FILE])
def test_a_file_of_mace_torch_is_used_where_it_lies(file, cache, server, tmp_path):
    path = put(tmp_path / "xdg" / "mace" / file, BODY)
    assert registry.fetch("toy-model") == path
    assert server.requests == []
    assert not (cache / FILE).exists()


def test_mace_torch_names_its_files_as_we_think(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bare, plain = registry._mace_files(registry.resolve("small"))
    assert bare == tmp_path / "mace" / "20231210mace128L0_energy_epoch249model"
    assert plain == tmp_path / "mace" / "2023-12-10-mace-128-L0_energy_epoch-249.model"


def test_a_damaged_file_of_mace_torch_is_named_and_left_alone(cache, server, tmp_path, caplog):
    path = put(tmp_path / "xdg" / "mace" / "toymodelmodel", BODY[:1000])
    assert registry.fetch("toy-model") == cache / FILE
    assert path.read_bytes() == BODY[:1000]
    assert str(path) in caplog.text
    assert DIGEST in caplog.text


def test_the_table_says_what_is_at_hand(cache, publish):
    publish(size=7)
    (row,) = registry.table()
    assert (row.name, row.licence, row.size, row.cached) == ("toy-model", "MIT", 7, None)
    path = put(cache / FILE, BODY)
    (row,) = registry.table()
    assert (row.size, row.cached, row.digest) == (len(BODY), path, "authors")


def test_the_real_table_has_all_models(tmp_path):
    rows = registry.table(cache=tmp_path)
    assert [row.name for row in rows] == list(registry.PUBLISHED)


# Licences


@pytest.mark.parametrize("where", ["server", "jaxft", "mace"])
def test_nothing_is_used_under_a_licence_not_accepted(where, cache, server, publish, tmp_path):
    publish(licence="ASL", licence_url=published.ASL_URL)
    at = {"jaxft": cache / FILE, "mace": tmp_path / "xdg" / "mace" / FILE}
    if where in at:
        put(at[where], BODY)
    with pytest.raises(LicenceError, match=r"ASL.*gabor1/ASL.*non-commercial.*--accept-license"):
        registry.fetch("toy-model")
    assert server.requests == []
    assert registry.fetch("toy-model", accept_license=True) == at.get(where, cache / FILE)


# Downloads


def test_a_download_arrives_whole_and_reports_progress(cache, server):
    seen = []
    path = registry.fetch("toy-model", progress=lambda *at: seen.append(at))
    assert path == cache / FILE
    assert path.read_bytes() == BODY
    assert seen == sorted(seen)
    assert seen[-1] == (len(BODY), len(BODY))
    assert len(seen) > 2
    assert names_in(cache) == [FILE]
    assert server.sent == len(BODY)


def test_a_cache_can_be_named(publish, tmp_path):
    assert registry.fetch("toy-model", cache=tmp_path / "here") == tmp_path / "here" / FILE


@pytest.mark.parametrize("validator", ["etag", "modified", "digest alone"])
def test_a_cut_download_goes_on_where_it_stopped(validator, cache, server):
    server.etag = '"one"' if validator == "etag" else None
    server.modified = "Mon, 01 Jan 2024 00:00:00 GMT" if validator == "modified" else None
    server.cuts = [SPAN, SPAN]
    assert registry.fetch("toy-model").read_bytes() == BODY
    assert server.sent == len(BODY)
    assert [r.get("Range") for r in server.requests] == [
        None,
        f"bytes={SPAN}-",
        f"bytes={2 * SPAN}-",
    ]
    assert server.requests[1].get("If-Range") == (server.etag or server.modified)


def test_a_weak_etag_is_no_ground_to_go_on(cache, server):
    server.etag, server.modified = 'W/"one"', "Mon, 01 Jan 2024 00:00:00 GMT"
    server.cuts = [SPAN]
    registry.fetch("toy-model")
    assert server.requests[1]["If-Range"] == server.modified


def test_the_next_call_goes_on_where_the_last_gave_up(cache, server):
    server.cuts = [SPAN] + 3 * [0]
    with pytest.raises(FetchError, match=rf"connection ended after {SPAN} of {len(BODY)} bytes.*4"):
        registry.fetch("toy-model")
    assert (cache / f"{FILE}.part").read_bytes() == BODY[:SPAN]
    assert not (cache / FILE).exists()
    assert registry.fetch("toy-model").read_bytes() == BODY
    assert server.sent == len(BODY)


def test_a_whole_part_is_not_asked_for_again(cache, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_sha256", lambda path: 1 / 0)  # killed before the last step
        with pytest.raises(ZeroDivisionError):
            registry.fetch("toy-model")
    assert registry.fetch("toy-model").read_bytes() == BODY
    assert server.sent == len(BODY)


def test_a_server_without_ranges_starts_again(cache, server):
    server.ranges = False
    server.cuts = [SPAN]
    assert registry.fetch("toy-model").read_bytes() == BODY
    assert server.sent == SPAN + len(BODY)


@pytest.mark.parametrize("heed", [True, False])
@pytest.mark.parametrize("body", [LATER, OTHER, OTHER[: SPAN // 2], LATER + OTHER])
def test_parts_of_two_versions_are_never_joined(heed, body, cache, server, publish):
    server.cuts = [SPAN] + 3 * [0]
    with pytest.raises(FetchError):
        registry.fetch("toy-model")
    server.body, server.etag, server.heed_if_range = body, '"two"', heed
    publish(sha256=hashlib.sha256(body).hexdigest())
    assert registry.fetch("toy-model").read_bytes() == body


def test_a_part_that_begins_elsewhere_is_not_appended(cache, server):
    server.misplaced = True
    server.cuts = [SPAN]
    assert registry.fetch("toy-model").read_bytes() == BODY
    assert "Range" not in server.requests[2]


def test_another_length_is_another_file(cache, server, publish):
    server.etag = None
    server.cuts = [SPAN] + 3 * [0]
    with pytest.raises(FetchError):
        registry.fetch("toy-model")
    server.body = OTHER
    publish(sha256=hashlib.sha256(OTHER).hexdigest())
    registry.fetch("toy-model")
    assert ["Range" in request for request in server.requests[4:]] == [True, False]


def test_a_part_of_unknown_origin_is_not_continued(cache, server, publish):
    publish(**UNKNOWN)
    server.etag = None
    server.cuts = [SPAN]
    registry.fetch("toy-model")
    assert "Range" not in server.requests[1]


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"url": 1', None])
def test_a_damaged_note_beside_a_part_starts_again(state, cache, server):
    put(cache / f"{FILE}.part", OTHER[:SPAN])
    if state is not None:
        put(cache / f"{FILE}.part.json", state.encode())
    assert registry.fetch("toy-model").read_bytes() == BODY


def test_a_part_of_another_address_is_not_continued(cache, server, publish):
    server.cuts = [SPAN] + 3 * [0]
    with pytest.raises(FetchError):
        registry.fetch("toy-model")
    publish(url=server.url(f"/moved/{FILE}"))
    registry.fetch("toy-model")
    assert "Range" not in server.requests[-1]


def test_a_part_longer_than_the_file_starts_again(cache, server):
    server.cuts = [SPAN] + 3 * [0]
    with pytest.raises(FetchError):
        registry.fetch("toy-model")
    put(cache / f"{FILE}.part", BODY + BODY)
    assert registry.fetch("toy-model").read_bytes() == BODY


def test_a_wrong_digest_leaves_nothing_behind(cache, server):
    server.body = OTHER
    got = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(FetchError, match=rf"expected the sha256 {DIGEST} .*authors.*got {got}"):
        registry.fetch("toy-model")
    assert names_in(cache) == []
    assert len(server.requests) == 1


def test_a_third_partys_digest_is_called_one(cache, server, publish):
    publish(sha256_from="reported")
    server.body = OTHER
    with pytest.raises(FetchError, match="reported by a third party, not by its authors"):
        registry.fetch("toy-model")


def test_no_final_file_before_its_digest_is_checked(cache, server, monkeypatch):
    seen = []
    check = registry._sha256

    def spy(path):
        seen.append((path.name, (cache / FILE).exists()))
        return check(path)

    monkeypatch.setattr(registry, "_sha256", spy)
    registry.fetch("toy-model", progress=lambda *_: seen.append(("", (cache / FILE).exists())))
    assert seen[-1] == (f"{FILE}.part", False)
    assert not any(exists for _, exists in seen)


def test_an_interrupt_keeps_the_part_and_frees_the_lock(cache, server):
    def interrupt(done, total):
        if done > SPAN:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.fetch("toy-model", progress=interrupt)
    assert not (cache / FILE).exists()
    kept = (cache / f"{FILE}.part").stat().st_size
    assert kept > SPAN
    assert registry.fetch("toy-model").read_bytes() == BODY
    assert server.requests[-1]["Range"] == f"bytes={kept}-"


def test_a_stalled_server_ends_in_an_error(cache, server):
    server.stall = threading.Event()
    server.cuts = 4 * [SPAN // 2]
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"nothing came for 0\.2 s"):
        registry.fetch("toy-model", timeout=0.2)
    assert time.monotonic() - start < 5
    server.stall.set()
    assert server.sent == 2 * SPAN
    assert (cache / f"{FILE}.part").stat().st_size == 2 * SPAN  # every attempt kept what it got


def test_a_server_that_never_answers_ends_in_an_error(publish):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        publish(url=f"http://127.0.0.1:{deaf.getsockname()[1]}/{FILE}")
        with pytest.raises(FetchError, match=r"nothing came for 0\.1 s"):
            registry.fetch("toy-model", timeout=0.1)


def test_a_trickle_is_a_stall(cache, server, monkeypatch):
    monkeypatch.setattr(download, "SLOWEST", 1 << 30)
    server.delay = 0.02
    with pytest.raises(FetchError, match=r"only \d+ bytes came in"):
        registry.fetch("toy-model", timeout=0.1)


def test_a_busy_server_is_asked_again(cache, server):
    server.statuses = [503, 429, 200]
    assert registry.fetch("toy-model").read_bytes() == BODY
    assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (403, 1), (410, 1), (500, 4), (204, 1)])
def test_a_refusal_names_the_answer_and_the_way_round(status, asked, cache, server):
    server.statuses = 4 * [status]
    with pytest.raises(FetchError, match=f"answered {status} ") as error:
        registry.fetch("toy-model")
    assert server.url() in str(error.value)
    assert str(cache / FILE) in str(error.value)
    assert len(server.requests) == asked


def test_without_a_network_the_error_says_where_to_put_the_file(cache, publish):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/{FILE}"
    publish(url=url)
    with pytest.raises(FetchError, match="cannot be reached") as error:
        registry.fetch("toy-model")
    assert f"download {url} by hand and put it at {cache / FILE}" in str(error.value)
    path = put(cache / FILE, BODY)
    assert registry.fetch("toy-model") == path


def test_redirects_are_followed(cache, server, publish):
    publish(url=server.url("/there"))
    server.redirects = {"/there": server.url(), "/round": server.url("/round")}
    assert registry.fetch("toy-model").read_bytes() == BODY
    publish(url=server.url("/round"), file="round")
    with pytest.raises(FetchError, match="infinite loop"):
        registry.fetch("toy-model")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_only_http_is_opened(url, cache, server, publish):
    server.redirects = {"/there": url}
    publish(url=server.url("/there"))
    with pytest.raises(FetchError, match=r"not an http|is not allowed"):
        registry.fetch("toy-model")
    publish(url=url)
    with pytest.raises(FetchError, match="not an http"):
        registry.fetch("toy-model")
    assert names_in(cache) == []


def test_a_redirect_does_not_leave_https():
    request = urllib.request.Request("https://example.org/x")
    with pytest.raises(FetchError, match="unprotected"):
        download.Redirects().redirect_request(request, None, 302, "", {}, "http://example.org/x")


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"<!DOCTYPE html><p>Log in", "text/html; charset=utf-8", "text/html page"),
        (b"<!DOCTYPE html><p>Log in", "application/octet-stream", "DOCTYPE"),
        (b' {"error": "gone"}', "text/plain", "error"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "text/plain", "Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_page_is_not_a_model(body, kind, said, known, cache, server, publish):
    publish(**({} if known else UNKNOWN))
    server.body = body
    server.headers = {"Content-Type": kind}
    with pytest.raises(FetchError, match=said):
        registry.fetch("toy-model")
    assert names_in(cache) == []


def test_an_empty_file_is_an_error(cache, server, publish):
    publish(**UNKNOWN)
    server.body = b""
    with pytest.raises(FetchError, match="empty"):
        registry.fetch("toy-model")
    assert not (cache / FILE).exists()


def test_a_compressed_answer_is_refused(cache, server):
    server.headers["Content-Encoding"] = "gzip"
    with pytest.raises(FetchError, match="Content-Encoding 'gzip'"):
        registry.fetch("toy-model")


def test_an_answer_of_unknown_length_must_be_verifiable(cache, server, publish):
    server.say_length = False
    publish(**UNKNOWN)
    with pytest.raises(FetchError, match="does not say how long"):
        registry.fetch("toy-model")
    publish()
    assert registry.fetch("toy-model").read_bytes() == BODY


@pytest.mark.parametrize("say_length", [True, False])
def test_a_file_too_large_is_refused(say_length, cache, server, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", len(BODY) - 1)
    server.say_length = say_length
    seen = []
    with pytest.raises(FetchError, match=f"more than {len(BODY) - 1}"):
        registry.fetch("toy-model", progress=lambda *at: seen.append(at))
    assert names_in(cache) == []
    assert bool(seen) != say_length  # at once, if the server says so


def test_a_size_that_is_not_the_published_one_is_refused(cache, server, publish):
    publish(size=len(BODY) + 1)
    with pytest.raises(FetchError, match=f"offers {len(BODY)} bytes, expected {len(BODY) + 1}"):
        registry.fetch("toy-model")
    assert names_in(cache) == []


def test_a_full_disk_is_noticed_before_writing(cache, server, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage(len(BODY) - 1))
    with pytest.raises(FetchError, match=f"{len(BODY)} bytes are to come.*JAXFT_CACHE"):
        registry.fetch("toy-model")
    assert names_in(cache) == []


def test_a_disk_that_fails_is_named(cache, server):
    def fail(done, total):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FetchError, match=r"No space left.*JAXFT_CACHE"):
        registry.fetch("toy-model", progress=fail)


def test_a_cache_that_is_a_file_is_named(publish, tmp_path):
    with pytest.raises(FetchError, match="cannot use the cache"):
        registry.fetch("toy-model", cache=put(tmp_path / "file", b""))


# Trust on first use


def test_the_first_download_sets_the_digest_where_none_is_published(cache, server, publish, caplog):
    publish(**UNKNOWN)
    path = registry.fetch("toy-model")
    record = cache / f"{FILE}.sha256"
    assert record.read_text() == f"{DIGEST}  {FILE}\n"
    assert DIGEST in caplog.text
    assert "no sha256 is published" in caplog.text
    caplog.clear()
    assert registry.fetch("toy-model") == path
    assert caplog.text == ""
    path.write_bytes(OTHER)
    with pytest.raises(FetchError, match=rf"{DIGEST} \(of its first download, kept in"):
        registry.fetch("toy-model")
    path.unlink()
    server.body = OTHER
    with pytest.raises(FetchError, match=r"first download.*delete that record"):
        registry.fetch("toy-model")
    record.unlink()
    assert registry.fetch("toy-model").read_bytes() == OTHER


def test_the_first_digest_holds_for_mace_torchs_file_too(cache, server, publish, tmp_path):
    publish(**UNKNOWN)
    path = put(tmp_path / "xdg" / "mace" / FILE, OTHER)
    assert registry.fetch("toy-model") == path
    assert not (tmp_path / "xdg" / "mace" / f"{FILE}.sha256").exists()
    path.write_bytes(BODY)
    with pytest.raises(FetchError, match="first download"):  # the server sends BODY as well
        registry.fetch("toy-model")


def test_a_damaged_record_is_an_error(cache, publish):
    publish(**UNKNOWN)
    put(cache / f"{FILE}.sha256", b"\xff nonsense")
    with pytest.raises(FetchError, match=r"sha256.*expected a sha256.*delete it"):
        registry.fetch("toy-model")


# At the same time


@pytest.mark.parametrize("entry", [{}, UNKNOWN], ids=["digest", "no digest"])
def test_fetches_at_the_same_time_download_once(entry, cache, server, publish, caplog):
    caplog.set_level(logging.WARNING)
    publish(**entry)
    server.delay = 0.005
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(registry.fetch("toy-model")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == 4 * [cache / FILE]
    assert (cache / FILE).read_bytes() == BODY
    assert server.sent == len(BODY)
    assert "waiting" in caplog.text


def test_another_process_is_waited_for(cache, server):
    pytest.importorskip("fcntl")
    cache.mkdir(parents=True)
    lock = cache / f"{FILE}.lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print(flush=True); sys.stdin.read()",
            str(lock),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        thread = threading.Thread(target=registry.fetch, args=("toy-model",))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert server.requests == []
    finally:
        holder.kill()  # its lock dies with it
        holder.communicate()
    thread.join(5)
    assert (cache / FILE).read_bytes() == BODY
