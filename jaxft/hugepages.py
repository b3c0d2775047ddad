"""Memory in huge pages: on a CPU, up to half of a training step is page faults without them.

XLA asks for the memory of a program when it starts and gives it back when it ends, gigabytes at
every step, and the kernel hands it out anew in zeroed pages of 4 KiB. glibc can ask for pages of
2 MiB instead, but only if told so before the process starts, by an environment variable. So the
command ``jaxft`` starts itself once more with that variable; importing jaxft in another program
changes nothing. ``JAXFT_HUGE_PAGES=off`` leaves the command alone, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def state(environment: Mapping[str, str] = os.environ, kernel: Path = KERNEL) -> tuple[bool, str]:
    """Whether this process has huge pages or needs none, and why it is so."""
    if environment.get("JAXFT_HUGE_PAGES", "").lower() == "off":
        return True, "left alone: JAXFT_HUGE_PAGES=off"
    if not sys.platform.startswith("linux") or not kernel.exists():
        return True, "left alone: not a Linux with transparent huge pages"
    chosen = kernel.read_text().partition("[")[2].partition("]")[0]
    if chosen != "madvise":
        return True, f"left alone: the kernel's setting is {chosen!r} for every process"
    if TUNABLE in environment.get("GLIBC_TUNABLES", ""):
        return True, f"GLIBC_TUNABLES={environment['GLIBC_TUNABLES']}"
    if _glibc() < (2, 35):
        return True, "left alone: glibc before 2.35 cannot ask for them"
    return False, f"pages of 4 KiB: set GLIBC_TUNABLES={TUNABLE}=1 before the program starts"


def restart() -> None:
    """Start the running program once more, with huge pages, unless it has them.

    Call it first, before anything is imported that takes long: what the process did is done again.
    """
    is_settled, _ = state()
    if is_settled:
        return
    tunables = [os.environ["GLIBC_TUNABLES"]] if os.environ.get("GLIBC_TUNABLES") else []
    environment = os.environ | {"GLIBC_TUNABLES": ":".join([*tunables, f"{TUNABLE}=1"])}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def is_command() -> bool:
    """Whether this process is the command ``jaxft`` or ``python -m jaxft``."""
    return Path(sys.argv[0]).name == "jaxft" or sys.orig_argv[1:3] == ["-m", "jaxft"]


def _glibc() -> tuple[int, ...]:
    """(2, 36); (0,) with another C library."""
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        name = ""
    numbers = name.removeprefix("glibc ").split(".")
    return tuple(int(x) for x in numbers) if all(x.isdigit() for x in numbers) else (0,)
