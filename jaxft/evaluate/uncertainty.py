r"""How far an ensemble disagrees, whether that tells of its errors, and what to label next.

The members' mean is the prediction and their standard deviation s (with M - 1 below the sum) its
uncertainty. If errors were normal with that width, a share p of the labels would lie within
:math:`s\sqrt{2}\,\mathrm{erf}^{-1}(p)` of the mean. The curve of observed against expected shares
is the calibration; the area between it and the diagonal the miscalibration (0 to 1/2).

Reference: Kuleshov, Fenner and Ermon, ICML 2018, arXiv:1807.00263; the area: Tran et al., Mach.
Learn.: Sci. Technol. 1, 025006 (2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from scipy.stats import spearmanr

from jaxft.data import Frame
from jaxft.evaluate.accuracy import atoms_of
from jaxft.evaluate.candidate import Candidate, Flag
from jaxft.evaluate.finding import Finding, Line, Picture, Row, Value
from jaxft.evaluate.spread import Spread, Spreads, ranking, spreads

ALL = "all frames"
MILLI = 1e3
LEVELS = np.linspace(0.05, 0.95, 19)
"""Expected shares at which observed ones are counted."""
MOST_POINTS = 2000
"""In the picture of errors against spreads."""

UNITS = {
    "members": "",
    "frames": "",
    "energy_spread": "meV/atom",
    "forces_spread": "meV/Å",
    "forces_spread_max": "meV/Å",
    "energy_error": "meV/atom",
    "forces_error": "meV/Å",
    "energy_scale": "",
    "forces_scale": "",
    "energy_miscalibration": "",
    "forces_miscalibration": "",
    "energy_correlation": "",
    "forces_correlation": "",
}

NOTES = (
    "Spreads are standard deviations over the members, errors those of their mean; both as root "
    "mean squares. forces_spread_max: the largest over the atoms, of the vector. scale: error over "
    "spread, by which to multiply the spread; above 1 the ensemble is too sure of itself.",
    "miscalibration: area between observed and expected coverage, 0 to 0.5. correlation: Spearman "
    "of spread and absolute error, per frame for energies, per atom for forces.",
)


UNLABELLED = "No frame is labelled, so there are no errors here."


def is_labelled(frames: Sequence[Frame]) -> bool:
    """Any of them, with energy, forces or stress."""
    return any(f.energy is not None or f.forces is not None or f.stress is not None for f in frames)


def check(
    candidates: Sequence[Candidate],
    frames: Sequence[Frame],
    *,
    ensembles: Mapping[str, Sequence[str]] | None = None,
    top: int = 5,
) -> Finding:
    """Spreads and errors of ensembles of candidates on ``frames``.

    Args:
      candidates: the members.
      frames: with labels or without.
      ensembles: names of members by that of their ensemble; by default all are one.
      top: so many frames of the largest spread get rows of their own.

    Raises:
      ValueError: as :func:`spreads`, or an ensemble has a member that is no candidate.
    """
    known = {candidate.name: candidate for candidate in candidates}
    chosen = ensembles or {"ensemble": list(known)}
    unknown = sorted({name for names in chosen.values() for name in names} - set(known))
    if unknown:
        raise ValueError(
            f"{', '.join(map(repr, unknown))} in an ensemble is none of the models "
            f"{', '.join(map(repr, known))}."
        )
    structures = [atoms_of(frame) for frame in frames]
    found = {e: spreads([known[name] for name in names], structures) for e, names in chosen.items()}
    return judge(found, frames, top=top)


def judge(ensembles: Mapping[str, Spreads], frames: Sequence[Frame], *, top: int = 5) -> Finding:
    """Spreads of ensembles, and how they compare with errors where there are labels.

    Args:
      ensembles: :func:`spreads` by name.
      frames: that they are of.
      top: as in :func:`check`.

    Raises:
      ValueError: there are no frames, or other numbers of them.
    """
    if not frames or any(len(found) != len(frames) for found in ensembles.values()):
        raise ValueError(
            f"{len(frames)} frames cannot be compared with spreads of "
            f"{', '.join(str(len(f)) for f in ensembles.values()) or 'nothing'}; give those of the "
            "same frames, at least one."
        )
    rows: list[Row] = []
    curves: dict[str, list[Line]] = {"energy": [], "forces": []}
    clouds: list[Line] = []
    for name, found in ensembles.items():
        rows.append(_summary(name, found, frames, curves, clouds))
        rows += [Row(name, _subject(frames, i), _of_frame(found[i])) for i in ranking(found)[:top]]
        rows += [
            Row(name, _subject(frames, i), {}, flag.reason)
            for i, flag in enumerate(found)
            if isinstance(flag, Flag)
        ]
    settings = {"frames": len(frames), "levels": LEVELS, "top": top}
    notes = NOTES if is_labelled(frames) else (*NOTES, UNLABELLED)
    return Finding("uncertainty", tuple(rows), UNITS, settings, _pictures(curves, clouds), notes)


def coverage(errors: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Observed shares of errors within the central interval of every level of ``LEVELS``."""
    widths = np.array([NormalDist().inv_cdf((1 + p) / 2) for p in LEVELS])
    return (np.abs(errors)[:, None] <= widths * spread[:, None]).mean(axis=0)


def miscalibration(observed: np.ndarray) -> float:
    """Area between observed and expected coverage; both are 0 and 1 at the ends."""
    x = np.concatenate([[0.0], LEVELS, [1.0]])
    return float(np.trapezoid(np.abs(np.concatenate([[0.0], observed, [1.0]]) - x), x))


def _summary(
    name: str,
    found: Spreads,
    frames: Sequence[Frame],
    curves: dict[str, list[Line]],
    clouds: list[Line],
) -> Row:
    known = [(s, f) for s, f in zip(found, frames, strict=True) if isinstance(s, Spread)]
    if not known:
        return Row(name, ALL, {"frames": 0}, "no frame has a spread")
    values: dict[str, Value] = {
        "members": known[0][0].members,
        "frames": len(known),
        "energy_spread": MILLI * _rms(np.array([s.energy_std for s, _ in known])),
        "forces_spread": MILLI * _rms(np.concatenate([s.forces_std.ravel() for s, _ in known])),
        "forces_spread_max": MILLI * max(s.worst for s, _ in known),
    }
    energies = [
        ((s.energy - f.energy) / len(f), s.energy_std) for s, f in known if f.energy is not None
    ]
    if energies:
        errors, spread = map(np.array, zip(*energies, strict=True))
        values |= _judged("energy", name, errors, spread, curves)
        values["energy_correlation"] = _correlation(np.abs(errors), spread)
    forces = [(s.forces - f.forces, s) for s, f in known if f.forces is not None]
    if forces:
        errors = np.concatenate([error.ravel() for error, _ in forces])
        spread = np.concatenate([s.forces_std.ravel() for _, s in forces])
        values |= _judged("forces", name, errors, spread, curves)
        x = np.concatenate([s.atoms_std for _, s in forces])
        y = np.concatenate([np.linalg.norm(error, axis=1) for error, _ in forces])
        values["forces_correlation"] = _correlation(y, x)
        thin = slice(None, None, -(-len(x) // MOST_POINTS))
        clouds.append(Line(name, MILLI * x[thin], MILLI * y[thin], is_scatter=True))
    return Row(name, ALL, values)


def _judged(
    quantity: str,
    name: str,
    errors: np.ndarray,
    spread: np.ndarray,
    curves: dict[str, list[Line]],
) -> dict[str, Value]:
    observed = coverage(errors, spread)
    curves[quantity].append(Line(name, LEVELS, observed))
    error, width = _rms(errors), _rms(spread)
    return {
        f"{quantity}_error": MILLI * error,
        f"{quantity}_scale": error / width if width > 0 else None,
        f"{quantity}_miscalibration": miscalibration(observed),
    }


def _subject(frames: Sequence[Frame], i: int) -> str:
    return f"frame {i}: {frames[i].source}"


def _of_frame(spread: Spread | Flag) -> dict[str, Value]:
    assert isinstance(spread, Spread)
    return {
        "energy_spread": MILLI * spread.energy_std,
        "forces_spread": MILLI * _rms(spread.forces_std),
        "forces_spread_max": MILLI * spread.worst,
    }


def _pictures(curves: Mapping[str, Sequence[Line]], clouds: Sequence[Line]) -> tuple[Picture, ...]:
    found = [
        Picture(
            f"Calibration of {quantity}",
            "expected share within the interval",
            "observed share",
            tuple(lines),
            diagonal=True,
        )
        for quantity, lines in curves.items()
        if lines
    ]
    if clouds:
        found.append(
            Picture(
                "Errors of forces against spreads",
                "spread of an atom's force, meV/Å",
                "error of an atom's force, meV/Å",
                tuple(clouds),
                diagonal=True,
            )
        )
    return tuple(found)


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; None where it is not defined."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))
