"""Interpolating weights after training: a curve between what was known and what was learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from jaxft import tree
from jaxft.data import Frame
from jaxft.evaluate.errors import MISSING, errors
from jaxft.evaluate.predictions import FrameResult, predict_frames
from jaxft.potential import E0_BUFFER, Potential
from jaxft.strategies.delta import support_of
from jaxft.typing import Params

AMOUNTS = tuple(i / 10 for i in range(11))
"""From the base, 0, to the tuned model, 1."""

CITES = ("wortsman2022wiseft",)
"""Keys of the works to cite, in ``jaxft.citation``."""

Sets = Mapping[str, tuple[Sequence[Frame], Potential]]
"""``{name: (frames, model with the E0s of their level of theory)}``."""


@dataclass(frozen=True)
class Point:
    """One model between base and tuned."""

    amount: float
    errors: dict[str, dict[str, float | None]]
    """RMSE by set and quantity: ``energy`` in meV/atom, ``forces`` in meV/Å, ``stress`` in
    meV/Å³; None where nothing is labelled."""


def sweep(
    model: Potential,
    base: Params,
    tuned: Params,
    sets: Sets,
    amounts: Sequence[float] = AMOUNTS,
    *,
    head: str | None = None,
    batch_size: int = 16,
) -> list[Point]:
    """Errors of θ* + a(θ − θ*) on every set, for every amount a.

    One training gives a whole curve from "nothing forgotten" to "all learnt", often with points
    that are better on both ends. The model is compiled once per size of the frames and serves all
    sets: their E0s are added afterwards.

    Args:
      model: the potential of both trees.
      base: θ*, parameters before training.
      tuned: θ, after, merged.
      sets: such as ``{"target": (frames, tuned_model), "replay": (frames, base_model)}``. Isolated
        atoms count like any frame.
      amounts: a; outside [0, 1] is extrapolation.
      head: of the model; not needed with one head.
      batch_size: largest frames per batch.

    Raises:
      ValueError: there are no sets or amounts, the two trees are of different models, or a set's
        model differs from ``model`` in more than its E0s.

    Reference: Wortsman et al., CVPR 2022, arXiv:2109.01903 (WiSE-FT).
    """
    if not sets or not len(amounts):
        raise ValueError("a sweep over nothing; give at least one set of frames and one amount.")
    support_of(base, tuned)  # refuses trees of other models
    for name, (_, own) in sets.items():
        _check_same_but_e0s(model, own, name)
    points = []
    for amount in amounts:
        params = tree.interpolate(base, tuned, amount)
        found = {}
        for name, (frames, own) in sets.items():
            results = predict_frames(model, params, frames, head=head, batch_size=batch_size)
            shifted = [
                _with_e0s(result, frame, model, own, head)
                for result, frame in zip(results, frames, strict=True)
            ]
            found[name] = errors(frames, shifted).total.rmse()
        points.append(Point(float(amount), found))
    return points


def to_dict(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Rows ready for JSON."""
    return [{"amount": point.amount, **point.errors} for point in points]


def render(points: Sequence[Point]) -> Table:
    """A row per amount: RMSEs of energy (meV/atom) and forces (meV/Å) per set; rich prints it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("a", justify="right")
    names = list(points[0].errors)
    for name in names:
        for unit in ("E meV/atom", "F meV/Å"):
            table.add_column(f"{name}\n{unit}", justify="right", no_wrap=True)
    for point in points:
        values = [point.errors[name][key] for name in names for key in ("energy", "forces")]
        cells = (MISSING if value is None else f"{value:.2f}" for value in values)
        table.add_row(f"{point.amount:g}", *cells)
    return table


def _with_e0s(
    result: FrameResult, frame: Frame, model: Potential, own: Potential, head: str | None
) -> FrameResult:
    """The result as if ``own`` had predicted it."""
    row = model.head_index(head)
    columns = [model.atomic_numbers.index(z) for z in frame.atomic_numbers]
    change = (own.e0s - model.e0s)[row, columns]
    return replace(
        result, energy=result.energy + float(change.sum()), energies=result.energies + change
    )


def _check_same_but_e0s(model: Potential, own: Potential, name: str) -> None:
    names = (model.buffers.keys() | own.buffers.keys()) - {E0_BUFFER}
    other = [
        key
        for key in sorted(names)
        if not np.array_equal(model.buffers.get(key, np.nan), own.buffers.get(key, np.nan))
    ]
    if model.config != own.config:
        other.insert(0, "the architecture")
    if other:
        raise ValueError(
            f"the model of the set {name!r} differs in more than its E0s: {', '.join(other)};\n"
            "between such models weights cannot be interpolated: give the same model, with "
            "jaxft.surgery.set_e0s where its level of theory is another."
        )
