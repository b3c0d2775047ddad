"""What a person sees while something runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

COLUMNS = {
    "valid/energy": ("E meV/atom", 1e3),
    "valid/forces": ("F meV/Å", 1e3),
    "valid/stress": ("σ meV/Å³", 1e3),
}
"""Validation RMSEs by metric name: heading and factor from eV."""


class Display:
    """Progress of a run.

    Args:
      console: where to write; None is silent.
      initial_error: RMSE of the energy per atom before training, in eV, that is worth a warning.
    """

    def __init__(self, console: Console | None = None, *, initial_error: float = 0.5) -> None:
        self.console = console
        self._initial_error = initial_error
        self._has_heading = False

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
        """One line of the run's table."""
        if self.console is None:
            return
        shown = [(key, *COLUMNS[key]) for key in COLUMNS if key in row]
        if not self._has_heading:
            heads = "".join(f"{name:>13}" for _, name, _ in shown)
            self.console.print(
                f"{'epoch':>6}{'train loss':>13}{heads}{'s/epoch':>10}", style="bold"
            )
            self._has_heading = True
        values = "".join(f"{row[key] * factor:>13.2f}" for key, _, factor in shown)
        loss = f"{row['train/loss']:>13.4g}" if "train/loss" in row else f"{'–':>13}"
        mark = " *" if row.get("is_best") else ""
        self.console.print(
            f"{row['epoch']:>6.0f}{loss}{values}{row['seconds']:>10.1f}{mark}", highlight=False
        )
        if row["epoch"] == 0 and row.get("valid/energy", 0.0) > self._initial_error:
            self.console.print(
                f"warning: energies are off by {row['valid/energy']:.2f} eV/atom before training; "
                "the isolated-atom energies are probably of another level of theory (key e0s).",
                style="yellow",
            )

    def say(self, text: str) -> None:
        """A plain line."""
        if self.console is not None:
            self.console.print(text, highlight=False)
