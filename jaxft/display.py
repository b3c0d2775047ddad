"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

TARGET = "valid"
"""The set that chooses the best epoch; the others are watched."""

COLUMNS = {
    "energy": ("E meV/atom", 1e3),
    "forces": ("F meV/Å", 1e3),
    "stress": ("σ meV/Å³", 1e3),
    "moments": ("µ mµB", 1e3),
}
"""Validation RMSEs by metric: heading and factor from eV, or µB."""

CELL = 11
"""Characters of a number."""
EPOCH = 6
MARK = 2
LOG_WIDTH = 160
"""Of a line in a file, which no terminal cuts."""

MISSING = "–"

SPEED = "atoms/s"

WAITING = 0.03
"""Of the time that the device could have computed in; waiting longer for batches is told."""


@dataclass(frozen=True)
class _Layout:
    """Which columns a table has; it is the same until other sets or metrics come."""

    metrics: tuple[str, ...]
    """Of any set: columns stand below one another."""
    watched: tuple[str, ...]
    is_wide: bool
    """Whether watched sets stand beside the target, not below it."""
    has_speed: bool
    """Whether there is room for it."""


class Display:
    """Progress of a run.

    Args:
      console: where to write; None is silent.
      initial_error: RMSE of the energy per atom before training, in eV, that is worth a warning.
    """

    def __init__(self, console: Console | None = None, *, initial_error: float = 0.5) -> None:
        self.console = console
        self._initial_error = initial_error
        self._layout: _Layout | None = None

    @contextmanager
    def counter(self, *, label: str) -> Iterator[Callable[[int, int | None], None]]:
        """A bar (only on a terminal) moved by calling the yielded function with (done, total).

        The total may be unknown, None.
        """
        if self.console is None or not self.console.is_terminal:
            yield lambda done, total: None
            return
        with Progress(*BAR, console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def track(self, items: Iterable[T], *, total: int, label: str) -> Iterator[T]:
        """Yield ``items`` behind a bar (only on a terminal)."""
        with self.counter(label=label) as advance:
            for done, item in enumerate(items):
                yield item
                advance(done + 1, total)

    def epoch(self, row: Mapping[str, float]) -> None:
        """One validation in the run's table: the target's errors and those of each watched set.

        Watched sets stand beside the target under a heading of two lines, or, where they do not fit
        the terminal, below it on lines of their own.

        Args:
          row: ``epoch``, ``seconds`` and, where known, ``is_best``, ``train/loss`` and
            ``<set>/energy``, ``<set>/forces``, ``<set>/stress``: RMSEs in eV/atom, eV/Å and eV/Å³
            of the set ``valid`` and of others; ``atoms_per_second``, shown where there is room, and
            ``waiting`` and ``computing`` in seconds. What else it holds is not shown.
        """
        if self.console is None:
            return
        layout = self._layout_of(row)
        if layout != self._layout:
            for line in _heading(layout):
                self._line(line, style="bold")
            self._layout = layout
        lines, note = _lines(layout, row), _waited(row)
        if note and len(lines[0]) + len(note) <= self._room:
            lines[0], note = lines[0] + note, ""
        for line in [*lines, *([note] if note else [])]:
            self._line(line)
        if row["epoch"] == 0:
            self._warn_of_offsets(layout, row)

    def say(self, text: str) -> None:
        """A plain line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """A line that begins with "warning:"."""
        self._print(f"warning: {text}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        if self.console is not None:
            # names and paths may hold brackets; in a file a message is one line, to be searched
            is_file = not self.console.is_terminal
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=is_file)

    def _line(self, text: str, style: str | None = None) -> None:
        """Of the table: cut or wrapped it would be none."""
        assert self.console is not None
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @property
    def _room(self) -> int:
        """Characters of a line."""
        assert self.console is not None
        return self.console.width if self.console.is_terminal else LOG_WIDTH

    def _layout_of(self, row: Mapping[str, float]) -> _Layout:
        """Columns that have come stay: a set that is not judged each epoch moves nothing."""
        before = self._layout or _Layout((), (), False, False)
        split = [key.rpartition("/") for key in row]
        judged = [(name, metric) for name, _, metric in split if name and metric in COLUMNS]
        names = dict.fromkeys([*before.watched, *(name for name, _ in judged)])
        has = {*before.metrics, *(metric for _, metric in judged)}
        layout = _Layout(
            metrics=tuple(metric for metric in COLUMNS if metric in has),
            watched=tuple(name for name in names if name != TARGET),
            is_wide=True,
            has_speed=False,
        )
        layout = replace(layout, is_wide=self._is_room_for(layout))
        faster = replace(layout, has_speed=True)
        return faster if self._is_room_for(faster) else layout

    def _is_room_for(self, layout: _Layout) -> bool:
        return len(_heading(layout)[-1]) + MARK <= self._room

    def _warn_of_offsets(self, layout: _Layout, row: Mapping[str, float]) -> None:
        for name in (TARGET, *layout.watched):
            error = row.get(f"{name}/energy", 0.0)
            if error > self._initial_error:
                of = "" if name == TARGET else f" of {name}"
                self.warn(
                    f"energies{of} are off by {error:.2f} eV/atom before training; the "
                    "isolated-atom energies are probably of another level of theory (key e0s)."
                )


def _heading(layout: _Layout) -> list[str]:
    """One line, or two where sets stand beside each other: their names above their columns."""
    names = "".join(f"{COLUMNS[metric][0]:>{CELL}}" for metric in layout.metrics)
    line = f"{'epoch':>{EPOCH}}{'train loss':>{CELL}}{names}"
    end = f"{'s/epoch':>{CELL}}" + (f"{SPEED:>{CELL}}" if layout.has_speed else "")
    if not (layout.watched and layout.is_wide):
        return [f"{line}{end}"]
    block = CELL * len(layout.metrics)
    sets = "".join(f" │{_cut(name, block - 1):^{block - 1}} " for name in layout.watched)
    columns = "".join(f" │{names}" for _ in layout.watched)
    above = f"{'':{EPOCH + CELL}}{TARGET:^{block}}{sets} │"
    return [above, f"{line}{columns} │{end}"]


def _lines(layout: _Layout, row: Mapping[str, float]) -> list[str]:
    loss = f"{row['train/loss']:.4g}" if "train/loss" in row else MISSING
    start = f"{row['epoch']:>{EPOCH}.0f}{loss:>{CELL}}{_cells(layout, row, TARGET)}"
    end = f"{row['seconds']:>{CELL}.1f}"
    if layout.has_speed:
        speed = row.get("atoms_per_second")
        end += f"{MISSING if speed is None else f'{speed:.0f}':>{CELL}}"
    end += " *" if row.get("is_best") else ""
    if not layout.watched:
        return [start + end]
    if layout.is_wide:
        beside = "".join(f" │{_cells(layout, row, name)}" for name in layout.watched)
        return [f"{start}{beside} │{end}"]
    width = EPOCH + CELL
    below = [
        f"{_cut(name, width - 1):>{width}}{_cells(layout, row, name)}"
        for name in layout.watched
        if any(f"{name}/{metric}" in row for metric in layout.metrics)
    ]
    return [start + end, *below]


def _waited(row: Mapping[str, float]) -> str:
    """What to add to an epoch's line where the device waited for the host; else nothing."""
    waiting, computing = row.get("waiting", 0.0), row.get("computing", 0.0)
    part = waiting / max(waiting + computing, 1e-9)
    return f"  waited for batches {100 * part:.0f} %" if part >= WAITING else ""


def _cells(layout: _Layout, row: Mapping[str, float], name: str) -> str:
    found = ((row.get(f"{name}/{metric}"), COLUMNS[metric][1]) for metric in layout.metrics)
    return "".join(
        f"{MISSING if value is None else _number(value * factor):>{CELL}}"
        for value, factor in found
    )


def _number(value: float) -> str:
    """Two decimals, as far as they fit a column."""
    text = f"{value:.2f}"
    return text if len(text) < CELL - 1 else f"{value:.3e}"


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"
