"""Isolated-atom energies for training data of another level of theory."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from ase.data import chemical_symbols

from jaxft.data import Frame, has_label
from jaxft.evaluate.predictions import predict_energies
from jaxft.potential import Potential
from jaxft.typing import Params

NULL = 1e-10
"""Entries of the projector on what no frame sees that are rounding, of order 1e-15; the others are
of the order of ratios of atom counts."""


class Undetermined(NamedTuple):
    """Elements whose single E0s the compositions of the data leave open."""

    elements: tuple[int, ...]
    """Atomic numbers, ascending."""
    sums: tuple[dict[int, int], ...]
    """What is determined of them, ``{atomic number: count}`` each: of NaCl alone, Na + Cl."""


class Estimate(NamedTuple):
    """Isolated-atom energies that suit data, and how well the data determine them."""

    e0s: dict[int, float]
    """``{atomic number: eV}`` of the elements in the data."""
    rank: int
    """Of the composition matrix; below the number of elements, only sums are determined."""
    residual: float
    """RMS of what is left, eV/atom."""
    undetermined: tuple[Undetermined, ...] = ()
    """Groups of elements that no frame tells apart; all others are determined."""
    kind: Literal["estimated", "average"] = "estimated"


class Energies(NamedTuple):
    """Labels of frames and what else a fit of E0s reads. B frames, S elements."""

    elements: tuple[int, ...]
    """[S] atomic numbers, ascending."""
    counts: np.ndarray
    """[B, S] atoms of each element."""
    total: np.ndarray
    """[B] eV."""
    weights: np.ndarray | None = None
    """[B], of the energies in a loss; None is 1 each. Weight 2 is the frame twice."""

    @property
    def atoms(self) -> np.ndarray:
        """[B] atoms."""
        return self.counts.sum(axis=1)


Weighting = Literal["total", "per_atom"]


def estimate(
    model: Potential,
    params: Params,
    frames: Sequence[Frame],
    *,
    head: str | None = None,
    weighting: Weighting = "total",
) -> Estimate:
    r"""Model-aware estimate: the model's E0s plus the smallest change that absorbs its errors.

    .. math:: \min_{\Delta E_0} \sum_b w_b (E_b - E^\mathrm{model}_b - n_b \cdot \Delta E_0)^2

    with n_b the composition of frame b, for the ΔE0 of smallest norm. With fewer independent
    compositions than elements (a single molecule) only sums are determined, as ``undetermined``
    lists; read no chemistry into the other values.

    Args:
      model, params: what will be fine-tuned.
      frames: with energies; the others are left out. Their weights count, and weight 2 is the
        frame twice; mace-torch ignores them.
      head: of the model; not needed with one head.
      weighting: ``total``: w = 1, as in mace-torch, large frames count most; ``per_atom``:
        w = 1/atoms², errors per atom count alike, as they do in a loss.

    Raises:
      ValueError: no frame has an energy, or the model's energy of one is not finite.

    Reference: ``--E0s=estimated`` of mace-torch; Tompa et al., arXiv:2606.12704.
    """
    frames = with_energy(frames)
    predicted = predict_energies(model, params, frames, head=head)
    return correct(energies_of(frames), predicted, own_e0s(model, head), weighting=weighting)


def correct(
    given: Energies,
    predicted: Sequence[float] | np.ndarray,
    own: Mapping[int, float],
    *,
    weighting: Weighting = "total",
) -> Estimate:
    """As :func:`estimate`, from predictions at hand.

    Args:
      given: the labels.
      predicted: [B] eV, with the E0s ``own``.
      own: ``{atomic number: eV}``.
      weighting: as in :func:`estimate`.

    Raises:
      ValueError: a prediction is not finite.
    """
    error = given.total - np.asarray(predicted, np.float64)
    if not np.isfinite(error).all():
        raise ValueError(
            f"the model's energies of {int((~np.isfinite(error)).sum())} of {len(error)} frames "
            "are not finite, so nothing can be estimated; look for atoms on top of each other."
        )
    change, rank, residual = _fit(given, error, weighting)
    e0s = {z: float(own[z] + d) for z, d in zip(given.elements, change, strict=True)}
    return Estimate(e0s, rank, residual, undetermined(given.elements, given.counts))


def average(frames: Sequence[Frame], *, weighting: Weighting = "total") -> Estimate:
    """Least squares of the total energies on the compositions; only where fidelity asks for it.

    The E0s swallow the cohesive energy, so the model starts from interaction energies that it never
    had: errors of forces double and trajectories end early (Tompa et al., arXiv:2606.12704, tables
    1 and 2). mace-torch's guidance for foundation models is: never. Prefer isolated atoms, then
    :func:`estimate`.

    Args:
      frames: with energies; the others are left out.
      weighting: as in :func:`estimate`.

    Raises:
      ValueError: no frame has an energy.

    Reference: ``--E0s=average`` of mace-torch.
    """
    given = energies_of(with_energy(frames))
    values, rank, residual = _fit(given, given.total, weighting)
    e0s = {z: float(value) for z, value in zip(given.elements, values, strict=True)}
    return Estimate(e0s, rank, residual, undetermined(given.elements, given.counts), "average")


def explain(found: Estimate) -> str:
    """What a person should know of an estimate."""
    names = " ".join(chemical_symbols[z] for z in found.e0s)
    how = {
        "estimated": "E0s estimated from the model's errors",
        "average": "E0s averaged from total energies",
    }
    text = (
        f"{how[found.kind]}: {found.residual * 1e3:.1f} meV/atom are left; "
        f"rank {found.rank} of {len(found.e0s)} elements ({names})"
    )
    if found.undetermined:
        text += ", so only sums are determined where these mean nothing one by one: "
        text += "; ".join(_say(group) for group in found.undetermined)
    text += "."
    if found.kind == "average":
        text += (
            "\nwarning: averaged E0s hold the cohesive energy, and fine-tuning from them is "
            "unstable; use isolated atoms, or else 'estimated'."
        )
    return text


def with_energy(frames: Iterable[Frame]) -> list[Frame]:
    """The frames that have an energy of any weight.

    Raises:
      ValueError: none has.
    """
    found = [frame for frame in frames if has_label(frame, "energy")]
    if not found:
        raise ValueError("E0s cannot be estimated: no frame has an energy; give them as numbers.")
    return found


def energies_of(frames: Sequence[Frame]) -> Energies:
    """Labels and compositions of frames that all have an energy."""
    elements = tuple(sorted({int(z) for frame in frames for z in frame.atomic_numbers}))
    counts = np.array([[(f.atomic_numbers == z).sum() for z in elements] for f in frames], float)
    return Energies(
        elements,
        counts,
        np.array([frame.energy for frame in frames], np.float64),
        np.array([frame.weight * frame.energy_weight for frame in frames]),
    )


def mean(values: np.ndarray, given: Energies) -> float:
    """Of a value per frame, by weight."""
    return float(np.average(values, weights=given.weights))


def own_e0s(model: Potential, head: str | None) -> dict[int, float]:
    """``{atomic number: eV}`` of a head."""
    row = model.e0s[model.head_index(head)].tolist()
    return dict(zip(model.atomic_numbers, row, strict=True))


def _fit(
    given: Energies, target: np.ndarray, weighting: Weighting
) -> tuple[np.ndarray, int, float]:
    """(change, rank, RMS per atom of what is left), of smallest norm."""
    if weighting not in ("total", "per_atom"):
        raise ValueError(f"weighting={weighting!r} is unknown; use 'total' or 'per_atom'.")
    scale = np.ones(len(target)) if given.weights is None else np.sqrt(given.weights)
    scale = scale / given.atoms if weighting == "per_atom" else scale
    change, _, rank, _ = np.linalg.lstsq(given.counts * scale[:, None], target * scale, rcond=None)
    left = (target - given.counts @ change) / given.atoms
    return change, int(rank), float(np.sqrt(mean(left**2, given)))


def undetermined(elements: Sequence[int], counts: np.ndarray) -> tuple[Undetermined, ...]:
    """Groups of elements that the compositions do not tell apart, and what is known of each.

    Two elements are in one group if some change of E0s that no frame notices changes both.

    Args:
      elements: [S] atomic numbers, ascending.
      counts: [B, S] atoms of each in every frame.

    Example:
      >>> undetermined([8, 11, 17], np.array([[0, 4, 4], [1, 1, 1], [0, 32, 32]]))
      (Undetermined(elements=(11, 17), sums=({11: 1, 17: 1},)),)
    """
    rows = np.unique(counts.astype(np.int64), axis=0)
    triangle = np.linalg.qr(rows.astype(np.float64), mode="r")  # few rows, the same row space
    _, values, vectors = np.linalg.svd(triangle, full_matrices=True)
    cutoff = values.max() * max(rows.shape) * np.finfo(np.float64).eps
    hidden = vectors[int((values > cutoff).sum()) :]
    projector = hidden.T @ hidden
    open_ = [i for i in range(len(elements)) if projector[i, i] > NULL**2]
    groups = []
    while open_:
        group = _connected(projector, open_[0])
        open_ = [i for i in open_ if i not in group]
        rank = round(len(group) - float(np.trace(projector[np.ix_(group, group)])))
        sums = tuple(
            {elements[i]: n for i, n in zip(group, row, strict=True) if n}
            for row in _reduced(rows[:, group], rank)
        )
        groups.append(Undetermined(tuple(elements[i] for i in group), sums))
    return tuple(groups)


def _connected(projector: np.ndarray, start: int) -> list[int]:
    found, fresh = {start}, [start]
    while fresh:
        row = np.abs(projector[fresh.pop()])
        new = {int(i) for i in np.flatnonzero(row > NULL)} - found
        found |= new
        fresh += new
    return sorted(found)


def _reduced(rows: np.ndarray, rank: int) -> list[list[int]]:
    """The row space in reduced echelon form, by exact arithmetic, each row in smallest integers."""
    basis: dict[int, list[Fraction]] = {}
    for row in rows:
        if len(basis) == rank:
            break
        left = [Fraction(int(n)) for n in row]
        for pivot, known in basis.items():
            left = [a - left[pivot] * b for a, b in zip(left, known, strict=True)]
        if not any(left):
            continue
        first = next(i for i, n in enumerate(left) if n)
        left = [n / left[first] for n in left]
        for other, known in basis.items():
            basis[other] = [a - known[first] * b for a, b in zip(known, left, strict=True)]
        basis[first] = left
    return [_integers(basis[pivot]) for pivot in sorted(basis)]


def _integers(row: Sequence[Fraction]) -> list[int]:
    common = functools.reduce(math.lcm, (n.denominator for n in row), 1)
    whole = [int(n * common) for n in row]
    return [n // math.gcd(*whole) for n in whole]


def _say(group: Undetermined) -> str:
    """``of Na and Cl only Na + Cl``."""
    names = [chemical_symbols[z] for z in group.elements]
    sums = [
        " + ".join(
            f"{n} {chemical_symbols[z]}" if n != 1 else chemical_symbols[z] for z, n in s.items()
        )
        for s in group.sums
    ]
    both = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"of {both} only {' and '.join(s.replace('+ -', '- ') for s in sums)}"
