r"""What training changed: per leaf, group, irrep and element; also the report of a sparse update.

For old numbers W and new ones W', with :math:`\Delta = W' - W`: the share of numbers that differ
at all; the relative change :math:`\lVert\Delta\rVert/\lVert W\rVert`; and :math:`1 - R^2` with R
the correlation of W' and W, which a common factor or offset leaves at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from ase.data import chemical_symbols
from rich import box
from rich.console import Group
from rich.table import Table

from jaxft import tree
from jaxft.strategies.delta import support_of
from jaxft.typing import Params

OTHER = "–"
"""The irrep of leaves that have none: radial networks, biases."""

ELEMENT_TABLES = frozenset({"source_embedding", "target_embedding", "symmetric_contractions"})
"""Modules whose leaves have a leading axis of elements, beside ``node_embedding`` and
``skip_tp``."""


@dataclass(frozen=True)
class Change:
    """Of one set of numbers."""

    name: str
    numbers: int
    changed: int
    """How many differ at all."""
    relative: float | None
    """‖Δ‖/‖W‖; None if W is zero and the change is not."""
    scatter: float | None
    """1 - R², in [0, 1]; None of less than two numbers, or if the old or the new are constant."""

    @property
    def share(self) -> float:
        """Changed numbers over all, in [0, 1]."""
        return self.changed / self.numbers

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "numbers": self.numbers,
            "changed": self.changed,
            "share": self.share,
            "relative": self.relative,
            "scatter": self.scatter,
        }


@dataclass(frozen=True)
class Changes:
    """The same numbers, grouped in several ways."""

    leaves: tuple[Change, ...]
    groups: tuple[Change, ...]
    """By first name: ``interactions_0``."""
    irreps: tuple[Change, ...]
    """``0e``, ``1o``, …, and ``OTHER``."""
    elements: tuple[Change, ...]
    """By symbol, over leaves that hold numbers per element; empty if no elements were given."""
    element_irreps: tuple[Change, ...]
    """By symbol and irrep, ``O 1o``."""
    total: Change

    def to_dict(self) -> dict[str, Any]:
        """``{"total": …, "leaves": {name: …}, …}``, ready for JSON."""
        tables = ("leaves", "groups", "irreps", "elements", "element_irreps")
        return {"total": self.total.to_dict()} | {
            key: {change.name: change.to_dict() for change in getattr(self, key)} for key in tables
        }

    def render(self) -> Group:
        """Tables of what changed, by group, irrep and element; rich prints them."""
        tables = [_table("group", (*self.groups, self.total)), _table("irrep", self.irreps)]
        if self.elements:
            tables.append(_table("element", [e for e in self.elements if e.changed]))
        return Group(*tables)


def changes(base: Params, tuned: Params, *, elements: Sequence[int] | None = None) -> Changes:
    """Compare parameters before and after training.

    Args:
      base: before.
      tuned: after, merged.
      elements: the model's element table, ``model.atomic_numbers``; None for no table by element.

    Raises:
      ValueError: the two have other leaves or shapes, or leaves per element have another number of
        elements.

    Example:
      >>> tuned = {**params, "readouts_0": jax.tree.map(lambda x: 2 * x, params["readouts_0"])}
      >>> [change.name for change in changes(params, tuned).groups if change.changed]
      ['readouts_0']

    Reference: 1 - R² by element and irrep as in Cho et al., ICLR 2026, arXiv:2606.18691.
    """
    support_of(base, tuned)  # refuses trees of other models
    before, after = tree.flatten(base), tree.flatten(tuned)
    parts = [
        Part(path, np.asarray(before[path], np.float64), np.asarray(after[path], np.float64))
        for path in before
    ]
    slices = [] if elements is None else list(_by_element(parts, elements))
    return Changes(
        leaves=_grouped(parts, lambda part: part.path),
        groups=_grouped(parts, lambda part: part.path.split("/")[0]),
        irreps=_grouped(parts, lambda part: _irrep(part.path)),
        elements=_grouped(slices, lambda part: part.symbol),
        element_irreps=_grouped(slices, lambda part: f"{part.symbol} {_irrep(part.path)}"),
        total=_change("total", parts),
    )


class Part(NamedTuple):
    """A leaf, or what it holds of one element."""

    path: str
    before: np.ndarray
    after: np.ndarray
    symbol: str = ""


def _by_element(parts: Sequence[Part], elements: Sequence[int]) -> Iterator[Part]:
    chosen = [part for part in parts if _is_per_element(part)]
    for part in chosen:
        if len(part.before) != len(elements):
            raise ValueError(
                f"{part.path!r} of shape {part.before.shape} has numbers of {len(part.before)} "
                f"elements, but {len(elements)} elements were given;\ngive model.atomic_numbers."
            )
    for i, z in enumerate(elements):
        for part in chosen:
            yield Part(part.path, part.before[i], part.after[i], chemical_symbols[z])


def _is_per_element(part: Part) -> bool:
    """By name, as torch MACE builds them; a skip connection with two axes is an ``o3.Linear``."""
    first, *_ = names = part.path.split("/")
    if "skip_tp" in names:
        return part.before.ndim == 3
    return first == "node_embedding" or not ELEMENT_TABLES.isdisjoint(names)


def _irrep(path: str) -> str:
    names = [name for name in path.split("/") if name[:-1].isdigit() and name[-1] in "eo"]
    return names[-1] if names else OTHER


def _grouped(parts: Sequence[Part], key: Callable[[Part], str]) -> tuple[Change, ...]:
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(key(part), []).append(part)
    return tuple(_change(name, members) for name, members in found.items())


def _change(name: str, parts: Sequence[Part]) -> Change:
    before = np.concatenate([part.before.ravel() for part in parts])
    after = np.concatenate([part.after.ravel() for part in parts])
    size, moved = np.linalg.norm(before), np.linalg.norm(after - before)
    changed = int((after != before).sum())
    relative = float(moved / size) if size else (None if changed else 0.0)
    return Change(name, before.size, changed, relative, _scatter(before, after))


def _scatter(before: np.ndarray, after: np.ndarray) -> float | None:
    """1 - R²: what is left of the new numbers' variance after a line through the old ones."""
    if before.size < 2 or np.ptp(before) == 0 or np.ptp(after) == 0:
        return None
    if (before == after).all():
        return 0.0
    x, y = before - before.mean(), after - after.mean()
    left = y - x * (x @ y / (x @ x))
    return float(left @ left / (y @ y))


def _table(kind: str, changes: Sequence[Change]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(kind, overflow="fold")
    for heading in ("numbers", "changed", "changed\n%", "‖Δ‖/‖W‖", "1 - R²"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in changes:
        values = (change.relative, change.scatter)
        table.add_row(
            change.name,
            f"{change.numbers:,}",
            f"{change.changed:,}",
            f"{100 * change.share:.2f}",
            *(OTHER if value is None else f"{value:.3g}" for value in values),
            style="bold" if change.name == "total" else None,
        )
    return table
