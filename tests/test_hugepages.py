"""Huge pages are asked for by the command alone, once, and by nobody who said no."""

import os
import subprocess
import sys

import pytest

from jaxft import hugepages

SHOW = "import os, sys; print(os.environ.get('GLIBC_TUNABLES', ''))"


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


def test_who_is_left_alone(kernel, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(hugepages, "_glibc", lambda: (2, 36))
    assert hugepages.state({}, kernel)[0] is False
    assert hugepages.state({"GLIBC_TUNABLES": "glibc.malloc.top_pad=1"}, kernel)[0] is False
    assert hugepages.state({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, kernel)[0] is True
    assert hugepages.state({"JAXFT_HUGE_PAGES": "off"}, kernel)[0] is True
    assert hugepages.state({}, kernel.parent / "absent")[0] is True
    for setting in ("[always] madvise never", "always madvise [never]"):
        kernel.write_text(setting)
        assert hugepages.state({}, kernel)[0] is True
    kernel.write_text("always [madvise] never")
    monkeypatch.setattr(hugepages, "_glibc", lambda: (2, 31))
    assert hugepages.state({}, kernel)[0] is True


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "JAXFT_HUGE_PAGES")}
    return kept | extra


def run(*argv: str, **extra: str) -> str:
    done = subprocess.run(
        [sys.executable, *argv],
        env=environment(**extra),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


needed = pytest.mark.skipif(
    hugepages.state(environment())[0], reason="this machine needs or has no huge pages"
)


@needed
def test_the_command_starts_once_more(tmp_path):
    script = tmp_path / "jaxft"
    script.write_text(f"import sys; import jaxft.hugepages; {SHOW}; print(sys.argv[1:])")
    given = "glibc.malloc.top_pad=4096"
    assert run(str(script), "a b", "c").split("\n")[:2] == [
        f"{hugepages.TUNABLE}=1",
        "['a b', 'c']",
    ]
    assert run(str(script), GLIBC_TUNABLES=given).startswith(f"{given}:{hugepages.TUNABLE}=1")
    assert run(str(script), JAXFT_HUGE_PAGES="off").startswith("\n")


@needed
def test_other_programs_are_left_alone(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"import jaxft; {SHOW}")
    assert run(str(script)) == "\n"
