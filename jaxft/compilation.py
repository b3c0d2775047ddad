"""Compiled programs: kept on disk between runs, compiled ahead in the background, and counted."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

MAX_BYTES = 2 << 30
"""Of the kept programs; a training step takes 1 to 5 MB."""


class Cache(NamedTuple):
    """Where compiled programs are kept for the next process."""

    folder: Path | None
    """None: nowhere."""
    reason: str
    """Who chose the folder, or why there is none."""

    def __str__(self) -> str:
        if self.folder is None:
            return f"not kept: {self.reason}"
        files = list(self.folder.glob("*-cache"))
        size = sum(file.stat().st_size for file in files) / 1e6
        return f"kept in {self.folder} ({self.reason}; {len(files)} programs, {size:.0f} MB)"


def enable_cache(folder: str | Path | None = None, *, max_bytes: int = MAX_BYTES) -> Cache:
    """Keep compiled programs on disk, for this process and those that follow.

    A program is found again by its text, the versions of jax and XLA, its flags and the devices.
    Whoever can write to the folder can have this process run what they please, so the folder is
    made readable for its owner alone, and refused where others could write to it.

    Call it before the first computation. To be called by programs, not by libraries: importing
    jaxft changes nothing.

    Args:
      folder: where; None is a cache that JAX was already given, or else
        ``$XDG_CACHE_HOME/jaxft/xla``, apart for each kind of CPU, since home folders are shared by
        machines that differ in their instructions.
      max_bytes: programs used longest ago are deleted now until the rest takes no more than this.
        (JAX's own limit needs ``filelock`` and locks every access; it is left as it is.)

    Raises:
      ValueError: others can write to the folder or to one that it lies in, or it is a file.
      OSError: the folder cannot be made or used.
    """
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return Cache(None, "JAX's compilation cache is switched off")
    if folder is None and given is not None:
        return Cache(Path(given), "set before")
    path = (_default_folder() if folder is None else Path(folder).expanduser()).absolute()
    for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)  # pathlib would give parents the umask's mode
    path = path.resolve()
    if not path.is_dir():
        raise ValueError(f"compiled programs cannot be kept in {path}, which is no folder.")
    _check_private(path)
    _prune(path, max_bytes)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Starting takes dozens of small programs; loading one is ten times faster than compiling it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()
    return Cache(path, "default" if folder is None else "as asked for")


def disable_cache(reason: str) -> Cache:
    """Keep no programs and load none from now on, whoever asked for it before.

    Args:
      reason: for the log. A backend whose programs hold handles of this process, say: another
        process that loads them would follow a stale one.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    return Cache(None, reason)


def cache() -> Cache:
    """What holds now, for the log; changes nothing."""
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return Cache(None, "switched off")
    return Cache(None, "no folder is set") if folder is None else Cache(Path(folder), "in use")


def _default_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "jaxft" / "xla" / _kind_of_cpu()


def _kind_of_cpu() -> str:
    """Machines with the same instructions agree in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()}-{platform.processor() or 'cpu'}"
    kinds = [line for line in lines if line.startswith(("flags", "Features", "isa"))][:1]
    return f"{platform.machine()}-{hashlib.sha256(''.join(kinds).encode()).hexdigest()[:8]}"


def _check_private(folder: Path) -> None:
    """Raises ValueError if another user could change what is there, or exchange the folder."""
    if os.name != "posix":
        return
    for path in (folder, *folder.glob("*-cache"), *folder.parents):
        info = _stat(path)
        if info is None:
            continue
        others, owners = stat.S_IWGRP | stat.S_IWOTH, {os.getuid()}
        if path in folder.parents:
            owners.add(0)
            if info.st_gid == info.st_uid:  # a user's own group, as Debian and Red Hat make them
                others = stat.S_IWOTH
            if info.st_mode & stat.S_ISVTX:  # others can add to /tmp, not exchange what is in it
                others = 0
        if info.st_mode & others or info.st_uid not in owners:
            raise ValueError(
                f"compiled programs cannot be kept in {folder}: other users can write to {path} "
                f"(owner {info.st_uid}, mode {stat.S_IMODE(info.st_mode):o}), and this process "
                f"would run what they put there.\nUse chmod go-w {path}, another folder "
                "(JAXFT_XLA_CACHE=FOLDER), or none (JAXFT_XLA_CACHE=off)."
            )


def _prune(folder: Path, max_bytes: int) -> None:
    """Delete what was used longest ago."""
    found = sorted(
        ((max(info.st_atime, info.st_mtime), info.st_size, file))
        for file in folder.glob("*-cache")
        if (info := _stat(file)) is not None
    )
    total = sum(size for _, size, _ in found)
    for _, size, file in found:
        if total <= max_bytes:
            return
        file.unlink(missing_ok=True)
        total -= size


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:  # another process pruned it
        return None


@dataclass
class Count:
    """What this process compiled while it was counted."""

    compiled: int = 0
    loaded: int = 0
    """Programs found in the cache."""
    seconds: float = 0.0
    """In the compiler and in loading; summed over threads, without tracing and lowering."""

    def __str__(self) -> str:
        return f"{self.compiled} programs compiled, {self.loaded} loaded, {self.seconds:.1f} s"


@contextmanager
def counting() -> Iterator[Count]:
    """Count every program that JAX compiles in this process, in any thread, small ones included."""
    found, lock = Count(), threading.Lock()

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":  # also where it is loaded
            with lock:
                found.compiled += 1
                found.seconds += duration_secs

    def on_event(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            with lock:
                found.compiled -= 1
                found.loaded += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)


class Ahead:
    """A jitted function whose programs are compiled in the background before they are needed.

    Called like the function, which it never calls itself: it keeps one compiled program per set of
    shapes, so that every compilation is seen. Donation stays as the function has it.

    Args:
      jitted: made by ``jax.jit``, without static arguments; its arguments are pytrees of arrays.
      pool: where to compile, one that others use too perhaps; None is two threads of its own. JAX
        traces under Python's lock, XLA compiles outside it.
      options: of XLA's compiler, such as :func:`jaxft.effort.effort` chooses.
      report: told of every program compiled after :meth:`settle`.

    Example:
      >>> double = Ahead(jax.jit(lambda x: 2 * x))
      >>> double.start([(jax.ShapeDtypeStruct((n,), "float32"),) for n in (3, 4)])
      >>> float(double(np.ones(3, "float32")).sum())
      6.0
    """

    def __init__(
        self,
        jitted: Any,
        *,
        pool: Executor | None = None,
        options: Mapping[str, Any] | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._jitted, self._report = jitted, report
        self._options = dict(options or {})
        self._pool = pool or ThreadPoolExecutor(2, thread_name_prefix="compile")
        self._programs: dict[_Key, Any] = {}
        self._futures: dict[_Key, Future[Any]] = {}
        self._lock = threading.Lock()
        self._is_settled = False
        self.unexpected: list[str] = []
        """What was compiled after :meth:`settle`, and why."""

    @property
    def compilations(self) -> int:
        """Programs made so far, those in the background included once they are done."""
        return len(self._programs)

    def start(self, arguments: Iterable[tuple[Any, ...]]) -> None:
        """Begin to compile for each tuple of arguments, in this order, and return at once.

        What fails in the background raises from the call that needs it.

        Args:
          arguments: arrays, or ``jax.ShapeDtypeStruct`` in their place.
        """
        for one in arguments:
            abstract = shapes_of(one)
            key = _key(abstract)
            with self._lock:
                if key not in self._futures and key not in self._programs:
                    self._futures[key] = self._pool.submit(self._compile, key, abstract)

    def settle(self) -> None:
        """From now on a new program is unexpected, and reported."""
        self._is_settled = True

    def __call__(self, *args: Any) -> Any:
        """Run the program of these shapes, waiting for it or compiling it where need be."""
        return self.program(*args)(*args)

    def program(self, *args: Any) -> Any:
        """The compiled program of these shapes."""
        key = _key(args)
        program = self._programs.get(key)
        return self._obtain(key, args) if program is None else program

    def close(self) -> None:
        """Give up what was not begun, wait for what was; a pool that was given stays open."""
        with self._lock:
            wait([future for future in self._futures.values() if not future.cancel()])

    def _obtain(self, key: _Key, args: tuple[Any, ...]) -> Any:
        with self._lock:
            future = self._futures.get(key)
            is_under_way = future is not None and not future.cancel()  # or still in the queue
        if future is not None and is_under_way:
            return future.result()
        abstract = shapes_of(args)
        if self._is_settled and future is None:
            message = self._difference(abstract)
            self.unexpected.append(message)
            if self._report is not None:
                self._report(message)
        return self._compile(key, abstract)

    def _compile(self, key: _Key, abstract: tuple[Any, ...]) -> Any:
        program = self._jitted.lower(*abstract).compile(compiler_options=self._options)
        self._programs[key] = program
        return program

    def _difference(self, args: tuple[Any, ...]) -> str:
        """Where the arguments differ from those of the most similar program."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(args)
        now = {jax.tree_util.keystr(path): _leaf_key(leaf) for path, leaf in leaves}
        known = [key for key in list(self._programs) if key[0] == structure]
        if not known:
            return "compiled for arguments of another structure than any before"
        new = list(now.values())
        old = min(known, key=lambda key: _distance(new, key[1:]))[1:]
        differences = [
            f"{name}: {_text(a)}, not {_text(b)}"
            for (name, a), b in zip(now.items(), old, strict=True)
            if a != b
        ]
        return f"compiled once more, for {'; '.join(differences)}"


def shapes_of(arguments: Any) -> Any:
    """The same pytree of ``jax.ShapeDtypeStruct``: all that a program depends on.

    Weak types are kept, and shardings but that of a single default device.
    """

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        shape, dtype, weak, sharding = _leaf_key(leaf)
        return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak, sharding=sharding)

    return jax.tree.map(abstract, arguments)


_Leaf = tuple[tuple[int, ...], Any, bool, Any]
"""Shape, dtype, whether the dtype is weak, sharding or None for the default device."""

_Key = tuple[Any, ...]
"""The structure of the arguments and their leaves."""


def _key(args: tuple[Any, ...]) -> _Key:
    leaves, structure = jax.tree.flatten(args)
    return (structure, *map(_leaf_key, leaves))


def _leaf_key(leaf: Any) -> _Leaf:
    try:
        shape, dtype = leaf.shape, leaf.dtype
    except AttributeError:
        raise TypeError(
            f"a compiled program was given {leaf!r}, a {type(leaf).__name__}; it takes arrays.\n"
            "Use jnp.asarray(…, dtype), so that its dtype is known and always the same."
        ) from None
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:  # numpy, where JAX without x64 makes float32 of float64
        return shape, _canonical(dtype), getattr(leaf, "weak_type", False), None
    return shape, dtype, leaf.weak_type, _elsewhere(sharding)


@functools.lru_cache(maxsize=64)
def _elsewhere(sharding: Any) -> Any:
    """None for a single default device."""
    devices = sharding.device_set
    return None if len(devices) == 1 and jax.devices()[0] in devices else sharding


def _canonical(dtype: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(dtype)


def _distance(some: Iterable[_Leaf], others: Iterable[_Leaf]) -> int:
    """How many shapes, dtypes and shardings differ."""
    pairs = zip(some, others, strict=True)
    return sum(a != b for one, other in pairs for a, b in zip(one, other, strict=True))


def _text(key: _Leaf) -> str:
    shape, dtype, weak, sharding = key
    where = "" if sharding is None else f" on {sharding}"
    return f"{'weak ' * weak}{dtype.name}{list(shape)}{where}"
