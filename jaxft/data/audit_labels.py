"""What an audit asks of labels: present, of plausible size, and possible for a potential."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxft.data.finding import Finding, found, worst
from jaxft.data.frames import ISOLATED_ATOM, Frame, has_label
from jaxft.data.neighbours import neighbours

LARGE_FORCE = 50.0
"""eV/Å; two atoms nearly on top of one another."""
LARGE_STRESS = 0.6
"""eV/Å³, about 100 GPa."""
UNIT_STRESS = 1.0
"""eV/Å³; a set whose median lies beyond it is hardly in eV/Å³."""
NET_FORCE = 0.05
"""eV/Å on a whole frame; densely converged sets stay below 0.01."""
TORQUE = 0.1
"""eV about the centre, and TORQUE_SHARE of the sum of |r||F|."""
TORQUE_SHARE = 0.01
ASYMMETRY = 1e-3
"""Of a stress, relative to its largest component."""
ENVIRONMENT = 5.0
"""Å, within which a site is called symmetric."""


def check_labels(frames: Sequence[Frame]) -> list[Finding]:
    """All findings about single labels."""
    real = [frame for frame in frames if frame.config_type != ISOLATED_ATOM]
    return [*_missing(real), *_zeros(real), *_forces(real), *_stresses(real)]


def _missing(frames: Sequence[Frame]) -> list[Finding]:
    bare = [f for f in frames if f.energy is None and f.forces is None and f.stress is None]
    if frames and len(bare) == len(frames):
        return found(
            "no-labels", "error", bare, "No frame has any label.", "Name the keys of the file."
        )
    useless = [f for f in frames if f.stress is not None and not f.is_periodic]
    weightless = [
        f
        for f in frames
        if f.weight == 0 or (f.atom_weights is not None and not f.atom_weights.any())
    ]
    return [
        *found(
            "unlabelled-frames", "warning", bare, "No label at all.",
            "Leave these frames out, or name the keys under which their labels are.",
        ),
        *found(
            "stress-without-volume", "note", useless,
            "A stress, but no periodicity in three directions: it is not trained on.",
            "Set pbc and the cell if the frame is a bulk.",
        ),
        *found(
            "weightless-frames", "note", weightless, "Weight 0: nothing is learnt from them.",
            "Leave them out, or set the weight.",
        ),
    ]  # fmt: skip


def _zeros(frames: Sequence[Frame]) -> list[Finding]:
    energy = [f for f in frames if f.energy == 0 and len(f) > 1]
    stress = [f for f in frames if has_label(f, "stress") and not np.any(f.stress)]
    zero: list[Frame] = []
    some: list[Frame] = []
    for frame in frames:
        if frame.forces is None or len(frame) == 1:
            continue
        still = np.asarray(~frame.forces.any(axis=1))
        if not still.any() or _is_symmetric(frame, still):
            continue
        (zero if still.all() else some).append(frame)
    some = [f for f in some if f.forces is not None and np.abs(f.forces).max() > 0.1]
    return [
        *found(
            "zero-energy", "error", energy, "The energy is exactly 0: a placeholder.",
            "Remove the label: a missing one costs nothing, a zero is learnt.",
        ),
        *found(
            "zero-stress", "error", stress, "The stress is exactly 0: a placeholder.",
            "Remove the label: a missing one costs nothing, a zero is learnt.",
        ),
        *found(
            "zero-forces", "error", zero,
            "All forces are exactly 0 where no symmetry asks for it: placeholders.",
            "Remove the label: a missing one costs nothing, a zero is learnt.",
        ),
        *found(
            "frozen-atoms", "warning", some,
            "Some forces are exactly 0 where no symmetry asks for it: constraints, it seems.",
            "Write the raw forces of the calculation, or give these atoms the weight 0.",
        ),
    ]  # fmt: skip


def _is_symmetric(frame: Frame, still: np.ndarray) -> bool:
    """Whether each of these atoms may have no force by symmetry: its surroundings point nowhere."""
    try:
        edges = neighbours(frame, ENVIRONMENT)
    except ValueError:  # an impossible geometry is found elsewhere
        return True
    length = np.linalg.norm(edges.vectors, axis=1)
    pull = frame.atomic_numbers[edges.senders] * (1 - length / ENVIRONMENT) ** 2 / length
    total, size = np.zeros((len(frame), 3)), np.zeros(len(frame))
    np.add.at(total, edges.receivers, pull[:, None] * edges.vectors)
    np.add.at(size, edges.receivers, pull * length)
    return bool((np.linalg.norm(total, axis=1) <= 1e-3 * size)[still].all())


def _forces(frames: Sequence[Frame]) -> list[Finding]:
    have = [f for f in frames if f.forces is not None and len(f) > 1]
    largest = {id(f): float(np.linalg.norm(_of(f), axis=1).max()) for f in have}
    net = {id(f): float(np.linalg.norm(_of(f).sum(0))) for f in have}
    torque = {id(f): _torque(f) for f in have if not any(f.pbc)}
    large = worst(have, largest, LARGE_FORCE)
    drifting = worst(have, net, NET_FORCE)
    twisted = worst([f for f in have if id(f) in torque], torque, TORQUE_SHARE)
    found_ = found(
        "large-forces",
        "warning",
        large,
        f"Forces up to {max(largest.values(), default=0):.3g} eV/Å (beyond {LARGE_FORCE:g}).",
        "Leave these frames out, or weigh them down: they dominate a squared loss.",
    )
    found_ += found(
        "net-force",
        "warning",
        drifting,
        f"Forces sum to up to {max(net.values(), default=0):.2g} eV/Å (beyond {NET_FORCE:g}); a "
        "potential's sum to 0, so this much is never fitted.",
        "Converge the calculation (grid, cutoff), or subtract the mean force.",
    )
    found_ += found(
        "net-torque", "warning", twisted,
        f"Forces turn the whole molecule, by up to {max(torque.values(), default=0):.1%} of their "
        "size; a potential's do not.",
        "Check that forces and positions are of one orientation and atom order.",
    )  # fmt: skip
    return found_


def _of(frame: Frame) -> np.ndarray:
    assert frame.forces is not None
    return frame.forces


def _torque(frame: Frame) -> float:
    """Net torque as a share of all, 0 if it is small in eV."""
    arms, forces = frame.positions - frame.positions.mean(0), _of(frame)
    total = float(np.linalg.norm(np.cross(arms, forces).sum(0)))
    size = float((np.linalg.norm(arms, axis=1) * np.linalg.norm(forces, axis=1)).sum())
    return total / size if total > TORQUE else 0.0


def _stresses(frames: Sequence[Frame]) -> list[Finding]:
    have = [f for f in frames if has_label(f, "stress") and f.stress is not None]
    size = {id(f): float(np.abs(f.stress).max()) for f in have}  # type: ignore[arg-type]
    skew = {
        id(f): float(np.abs(f.stress - f.stress.T).max()) / (size[id(f)] or 1.0)
        for f in have
        if f.stress is not None
    }
    median = float(np.median(list(size.values()))) if size else 0.0
    if median > UNIT_STRESS:
        high = found(
            "stress-size", "error", worst(have, size, UNIT_STRESS),
            f"Suspicion: stresses are {median:.3g} eV/Å³ in the median ({median * 160.2:.0f} GPa); "
            "numbers like these are usual in GPa or kbar.",
            "Convert to eV/Å³, positive = tension: GPa / 160.22, VASP's kbar / -1602.2.",
        )  # fmt: skip
    else:
        high = found(
            "high-pressure", "note", worst(have, size, LARGE_STRESS),
            f"Stresses up to {max(size.values(), default=0):.2g} eV/Å³ "
            f"({max(size.values(), default=0) * 160.2:.0f} GPa).",
            "Leave them out of the training unless such pressures are meant.",
        )  # fmt: skip
    return high + found(
        "asymmetric-stress", "warning", worst(have, skew, ASYMMETRY),
        f"The stress is not symmetric, by up to {max(skew.values(), default=0):.2g} of its size.",
        "Check the order of its components: 3x3, or xx, yy, zz, yz, xz, xy.",
    )  # fmt: skip
