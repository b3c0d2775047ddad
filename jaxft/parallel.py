"""Devices and processes: the mesh, where arrays lie on it, and what processes agree on.

A mesh has one axis, ``data``. Parameters and optimiser state lie whole on every device; of a batch
each device holds one part. One device is a mesh of one, and one process is a group of one: nothing
here asks which of them it is, but to leave out what would cost time.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"

T = TypeVar("T")

LAUNCHERS = {
    "SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}
"""Variables that tell a process how many there are, and which it is."""

StopFn = Callable[[int], bool]
"""``updates made -> whether to stop here``; the same answer in every process."""


class Refused(ValueError):
    """Raised in every process because one of them refused its input."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """How this process finds the others."""

    coordinator: str | None = None
    """``host:port`` of process 0; None is to be found out by JAX, like the next two."""
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300
    """Seconds to wait for the others."""
    found_by: str = ""
    """What told so, for people."""


def group(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool | None = None,
    timeout: int = 300,
    environment: Mapping[str, str],
) -> Group | None:
    """The processes that this one is to work with; None is alone. Touches no device.

    Args:
      coordinator, num_processes, process_id: all or none, see :class:`Group`.
      distributed: True lets JAX find the others (SLURM, Open MPI, Cloud TPU, Kubernetes); False is
        alone; None is True where ``srun`` or ``mpirun`` started several processes.
      timeout: see :class:`Group`.
      environment: where these leave their variables, ``os.environ``.

    Raises:
      ValueError: only some of the three are given, one is out of range, or they contradict
        ``distributed``.
    """
    flags = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if timeout < 1:
        raise ValueError(f"a timeout of {timeout} s waits for nobody; use 1 or more.")
    if coordinator is None or num_processes is None or process_id is None:
        if len(missing) < len(flags):
            given = ", ".join(name for name in flags if name not in missing)
            raise ValueError(
                f"{given} without {', '.join(missing)}; give all three in every process, or none "
                "of them and --distributed."
            )
        return _found_group(distributed, timeout, environment)
    if distributed is False:
        raise ValueError(f"{', '.join(flags)} contradict --no-distributed; leave one out.")
    _address(coordinator)
    if num_processes < 1:
        raise ValueError(f"--num-processes {num_processes} is no group; use 1 or more.")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process-id {process_id} is out of range; {num_processes} processes have the ids 0 "
            f"to {num_processes - 1}."
        )
    return Group(
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        timeout=timeout,
        found_by="--coordinator",
    )


def _found_group(
    distributed: bool | None, timeout: int, environment: Mapping[str, str]
) -> Group | None:
    for launcher, (count, _) in LAUNCHERS.items():
        if distributed is not False and int(environment.get(count) or 1) > 1:
            return Group(timeout=timeout, found_by=f"{launcher}, {count}={environment[count]}")
    return Group(timeout=timeout, found_by="--distributed") if distributed else None


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"--coordinator {coordinator!r} is no address; give HOST:PORT of process 0, such as "
            "node17:7077."
        )
    return host, int(port)


def start(group: Group) -> str:
    """Connect to the other processes; before anything touches a device.

    Where they do not all come in time, the process ends with a message and exit code 1: JAX's
    client cannot be told to give up, and would abort.

    Returns:
      A line that says what was done.

    Raises:
      ValueError: the others cannot be found.
      TimeoutError: process 0 does not answer.
    """
    if group.coordinator is not None and group.process_id != 0:
        _wait_for(group.coordinator, group.timeout)
    watch = threading.Timer(group.timeout, _give_up, [group])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            group.coordinator,
            group.num_processes,
            group.process_id,
            cluster_detection_method=None if group.coordinator is None else "deactivate",
            initialization_timeout=group.timeout + 60,
            shutdown_timeout_seconds=60,  # where one fails alone, the others end after it
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the other processes cannot be found ({group.found_by}): {error!s:.300}\n"
            "Start with srun or mpirun, on a Cloud TPU or in a Kubernetes job, or give "
            "--coordinator, --num-processes and --process-id."
        ) from error
    finally:
        watch.cancel()
    return (
        f"process {jax.process_index()} of {jax.process_count()} ({group.found_by}), "
        f"{jax.local_device_count()} of {jax.device_count()} devices"
    )


def _give_up(group: Group) -> None:
    print(
        f"error: not all processes came within {group.timeout} s ({group.found_by}).\n"
        "Start all of them, with the same coordinator and number of processes and each its own "
        "id, or wait longer: --start-timeout.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _wait_for(coordinator: str, timeout: int) -> None:
    """JAX ends the process where the coordinator never answers; an error says more."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(_address(coordinator), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"no answer from the coordinator {coordinator} within {timeout} s ({error}).\n"
                    "It is process 0: start it there, give its address as other hosts see it, and "
                    "open the port; or wait longer: --start-timeout."
                ) from error
            time.sleep(0.2)


def mesh(devices: int | None = None) -> Mesh:
    """The devices of all processes in one row.

    Args:
      devices: how many of each process to use; None is all.

    Raises:
      ValueError: a process has not so many.
    """
    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    if devices is not None:
        for process, own in by_process.items():
            if not 1 <= devices <= len(own):
                raise ValueError(
                    f"devices={devices}, but process {process} has {len(own)} "
                    f"({own[0].platform}); use 1 to {len(own)}."
                )
    chosen = [device for process in sorted(by_process) for device in by_process[process][:devices]]
    return Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))


def mine(mesh: Mesh) -> list[int]:
    """Positions in the mesh of the devices of this process."""
    here = jax.process_index()
    return [i for i, device in enumerate(mesh.devices.flat) if device.process_index == here]


def per_device(mesh: Mesh, function: Callable[..., T], *, donate: tuple[int, ...] = ()) -> Any:
    """``function(replicated, part)`` on every device, jitted; what it returns is the same on all.

    The last argument comes stacked, ``[devices, …]``, and loses that axis; the one before lies
    whole on every device.
    """

    def on_one(whole: Any, parts: Any) -> T:
        return function(whole, jax.tree.map(lambda part: part[0], parts))

    # custom kernels carry no type that says along which axes a value varies
    mapped = jax.shard_map(
        on_one, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate)


def total(values: T) -> T:
    """Sums over devices, inside :func:`per_device`. Not to be differentiated: with ``check_vma=
    False`` the gradient of a sum over n devices is n times that of each."""
    return jax.lax.psum(values, AXIS)


def replicated(mesh: Mesh, values: T) -> T:
    """The same values on every device; what lies there already stays."""
    sharding = NamedSharding(mesh, P())

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, values)


def spread(mesh: Mesh, parts: T) -> T:
    """Arrays ``[own devices, …]`` of every process as ``[devices, …]``, a part on each device."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), parts)


def local(values: T) -> T:
    """What :func:`replicated` placed, as arrays of this process's first device, not copied."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), values)


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


@contextmanager
def together(what: str) -> Iterator[None]:
    """Either every process gets through the block, or none does.

    Args:
      what: is done in it, for the message.

    Raises:
      Refused: with several processes, for a ValueError or OSError in any of them.
    """
    if jax.process_count() == 1:
        yield
        return
    problem: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        problem = error
    failed = np.flatnonzero(_gathered(np.array([problem is not None])))
    if problem is not None:
        raise Refused(str(problem)) from problem
    if len(failed):
        listed = ", ".join(map(str, failed))
        raise Refused(f"{what} failed in process {listed}; its message says why.")


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raises :class:`Refused` unless all processes hold the same JSON-like facts."""
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True, default=str)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    every = _gathered(digest)
    others = np.flatnonzero((every != every[0]).any(axis=-1))
    if len(others):
        raise Refused(
            f"process {', '.join(map(str, others))} has other settings, model or data than process "
            "0;\ngive all of them the same config, files and versions."
        )


def said_by_first(claim: bool) -> bool:
    """What the first process claims, in all of them; for decisions that clocks make."""
    if jax.process_count() == 1:
        return claim
    return bool(_gathered(np.array(claim))[0])


def _gathered(values: np.ndarray) -> np.ndarray:
    """[processes, …]."""
    return np.asarray(multihost_utils.process_allgather(values))


@contextmanager
def preemption() -> Iterator[StopFn]:
    """Inside the block SIGTERM ends nothing; the function that it gives says when to stop.

    With several processes, SIGTERM to any of them stops all after the same update; JAX's
    coordination service sees to it. Elsewhere than in the main thread, where Python allows no
    handlers of signals, a lone process is ended by SIGTERM as ever.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda updates: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        yield lambda updates: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
