r"""Elastic constants from stresses of strained cells, with ions clamped and relaxed.

With tensor strain ε the cell becomes :math:`h(1+\varepsilon)`; Voigt strains count shear twice, and
:math:`C_{ij} = d\sigma_i/d\varepsilon_j` is the slope of a line through the stresses at all
amplitudes of one strain. Relaxed ions are linear response, so that everything is one batch and
nothing is optimised: with the force constants :math:`\Phi` of the cell and
:math:`\Lambda_{iu} = d\sigma_i/du`,

.. math:: C = C^\mathrm{clamped} - V\,\Lambda\,\Phi^{+}\,\Lambda^T .

Reference: Wu, Vanderbilt & Hamann, Phys. Rev. B 72, 035105 (2005). Moduli: Hill, Proc. Phys. Soc. A
65, 349 (1952).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ase
import numpy as np
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_strain
from ase.units import GPa

from jaxft.evaluate.candidate import Candidate, Flag, Outcome, check_names
from jaxft.evaluate.finding import Finding, Row, Value
from jaxft.evaluate.relaxation import collapse, no_crystal, relax

NORMAL = (-0.01, -0.005, 0.005, 0.01)
"""Of matcalc."""
SHEAR = (-0.01, -0.005, 0.005, 0.01)
"""Tensor components: half the engineering shear. matcalc's ±3 and ±6 % are not linear."""
DISPLACEMENT = 0.01
"""Å, of ions for their response."""
FLOPPY = 1e-2
"""eV/Å²; force constants below it are no resistance."""
RESIDUAL = 0.5
"""GPa; a larger stress at zero strain means that this is no equilibrium."""
DIGITS = 6
"""Of GPa, in the rows of tensors; what is smaller is rounding."""

VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")
UNITS = {
    "k_vrh": "GPa",
    "g_vrh": "GPa",
    "lowest_eigenvalue": "GPa",
    "asymmetry": "GPa",
    "residual_stress": "GPa",
    "k_error": "%",
    "g_error": "%",
    "tensor_mae": "GPa",
    **{f"c_{name}": "GPa" for name in VOIGT},
}
KINDS = ("clamped ions", "relaxed ions")


@dataclass(frozen=True, eq=False)
class Tensors:
    """Elastic constants of one structure, [6, 6] in GPa, Voigt order xx, yy, zz, yz, xz, xy."""

    clamped: np.ndarray
    relaxed: np.ndarray | None
    """None where the ions have no stable places."""
    asymmetry: float
    """GPa, the largest of \\|C - Cᵀ\\| before it was symmetrised."""
    residual: float
    """GPa, the largest stress at zero strain."""
    softest: float
    """eV/Å², the lowest eigenvalue of the force constants but the three of translation."""


def check(
    candidates: Sequence[Candidate],
    structures: Mapping[str, ase.Atoms],
    *,
    relax_first: bool = True,
    fmax: float = 0.01,
    steps: int = 500,
    normal: Sequence[float] = NORMAL,
    shear: Sequence[float] = SHEAR,
    against: str | None = None,
) -> Finding:
    """The full tensor and the moduli of Voigt, Reuss and Hill, with ions clamped and relaxed.

    Args:
      candidates: who is judged.
      structures: by name; primitive cells cost least.
      relax_first: relax cell and ions with each model; elastic constants belong to its minimum.
      fmax: eV/Å, of that.
      steps: of that, at most.
      normal: amplitudes of normal strains.
      shear: amplitudes of tensor shear strains.
      against: the name of the candidate whose moduli are the reference.

    Raises:
      ValueError: names occur twice or are not known, or a kind of strain has fewer than two
        amplitudes.
    """
    check_names(candidates)
    if against is not None and against not in [c.name for c in candidates]:
        raise ValueError(f"{against!r} is none of the models; name one of them.")
    if len(set(normal)) < 2 or len(set(shear)) < 2:
        raise ValueError("a slope needs two amplitudes; give at least two of each strain.")
    found = {
        c.name: _judge(c, structures, relax_first, fmax, steps, normal, shear) for c in candidates
    }
    rows = []
    for model, results in found.items():
        for name, result in results.items():
            reference = found[against].get(name) if against not in (None, model) else None
            rows += _rows(model, name, result, reference)
            if isinstance(reference, Flag) and rows[-1].flag is None:
                rows.append(Row(model, name, {}, f"there is no reference: {reference.reason}"))
    settings = {
        "normal_strains": list(normal),
        "shear_strains": list(shear),
        "shear": "tensor components, half the engineering shear",
        "relaxed_first": relax_first,
        "fmax": fmax,
        "ion_displacement": DISPLACEMENT,
        "against": against,
    }
    return Finding("elastic", tuple(rows), UNITS, settings, (), NOTES)


NOTES = (
    "K and G are Hill's means. The rows xx … xy are those of the tensor, against "
    "engineering strains. Relaxed ions by linear response. A lowest eigenvalue of C below 0 is "
    "mechanically unstable.",
)


def tables(finding: Finding) -> list[Finding]:
    """For a terminal: moduli and flags, then tensors."""

    def part(name: str, is_tensor: bool) -> Finding:
        rows = tuple(row for row in finding.rows if ("c_xx" in row.values) is is_tensor)
        units = {c: u for c, u in finding.units.items() if c.startswith("c_") is is_tensor}
        return Finding(name, rows, units)

    return [found for found in (part(finding.check, False), part("tensors", True)) if found.rows]


def _judge(
    candidate: Candidate,
    structures: Mapping[str, ase.Atoms],
    relax_first: bool,
    fmax: float,
    steps: int,
    normal: Sequence[float],
    shear: Sequence[float],
) -> dict[str, Tensors | Flag]:
    found: dict[str, Tensors | Flag] = {
        name: Flag(reason) for name, atoms in structures.items() if (reason := no_crystal(atoms))
    }
    starts = {name: atoms for name, atoms in structures.items() if name not in found}
    if relax_first:
        crystals = list(starts.values())
        relaxed = relax(candidate, crystals, fmax=fmax, steps=steps, stop=collapse)
        for name, result in zip(list(starts), relaxed, strict=True):
            starts[name] = result.atoms
            if result.flag is not None:
                found[name] = Flag(f"not relaxed: {result.flag}")
    todo = {name: atoms for name, atoms in starts.items() if name not in found}
    strains = _strains(normal, shear)
    batches = {name: _cells(atoms, strains) for name, atoms in todo.items()}
    outcomes = iter(candidate.evaluate([cell for cells in batches.values() for cell in cells]))
    for name, cells in batches.items():
        some = [next(outcomes) for _ in cells]
        found[name] = _tensors(todo[name], some, strains)
    return {name: found[name] for name in structures}


def _strains(normal: Sequence[float], shear: Sequence[float]) -> np.ndarray:
    """[n, 6], Voigt, engineering shear."""
    rows = []
    for j in range(6):
        for amplitude in normal if j < 3 else [2 * a for a in shear]:
            rows.append(np.eye(6)[j] * amplitude)
    return np.array(rows)


def _cells(atoms: ase.Atoms, strains: np.ndarray) -> list[ase.Atoms]:
    """As it is; strained; with every coordinate displaced forwards and back."""
    cells = [atoms.copy()]
    for strain in strains:
        cell = atoms.copy()
        deformation = voigt_6_to_full_3x3_strain(strain)  # ASE's holds the identity
        cell.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
        cells.append(cell)
    for k in range(3 * len(atoms)):
        for sign in (1, -1):
            cell = atoms.copy()
            cell.positions[k // 3, k % 3] += sign * DISPLACEMENT
            cells.append(cell)
    return cells


def _tensors(atoms: ase.Atoms, outcomes: Sequence[Outcome], strains: np.ndarray) -> Tensors | Flag:
    results = []
    for outcome in outcomes:
        if isinstance(outcome, Flag):
            return outcome
        if outcome.stress is None:
            return Flag("there is no stress")
        results.append(outcome)
    stress = np.array([full_3x3_to_voigt_6_stress(r.stress) for r in results]) / GPa
    count = len(strains)
    c = np.empty((6, 6))
    for j in range(6):
        chosen = np.flatnonzero(strains[:, j])
        c[:, j] = np.polyfit(strains[chosen, j], stress[1 + chosen], 1)[0]
    forces = np.array([r.forces.ravel() for r in results[1 + count :]])
    hessian = -(forces[::2] - forces[1::2]) / (2 * DISPLACEMENT)
    response = (stress[1 + count :: 2] - stress[2 + count :: 2]).T / (2 * DISPLACEMENT)
    softest, inverse = _pseudo_inverse((hessian + hessian.T) / 2)
    clamped, relaxed = (c + c.T) / 2, None
    if inverse is not None:
        correction = atoms.get_volume() * response @ inverse @ response.T * GPa
        relaxed = clamped - correction
    return Tensors(
        clamped, relaxed, float(abs(c - c.T).max()), float(abs(stress[0]).max()), softest
    )


def _pseudo_inverse(hessian: np.ndarray) -> tuple[float, np.ndarray | None]:
    """The lowest eigenvalue without translations (inf of one atom), and the inverse if stable."""
    atoms = len(hessian) // 3
    shift = np.tile(np.eye(3), (atoms, 1)) / np.sqrt(atoms)
    basis = np.linalg.svd(shift)[0][:, 3:]  # orthogonal to the three translations
    if not basis.size:
        return float("inf"), np.zeros_like(hessian)
    reduced = basis.T @ hessian @ basis
    lowest = float(np.linalg.eigvalsh(reduced)[0])
    if lowest < FLOPPY:
        return lowest, None
    return lowest, basis @ np.linalg.inv(reduced) @ basis.T


def moduli(c: np.ndarray) -> tuple[float, float] | None:
    """Bulk and shear modulus of Voigt, Reuss and Hill, in the unit of ``c``; None if singular."""
    try:
        s = np.linalg.inv(c)
    except np.linalg.LinAlgError:
        return None

    def sums(m: np.ndarray) -> tuple[float, float, float]:
        return np.trace(m[:3, :3]), m[0, 1] + m[0, 2] + m[1, 2], np.trace(m[3:, 3:])

    (a, b, d), (e, f, g) = sums(c), sums(s)
    voigt = (a + 2 * b) / 9, (a - b + 3 * d) / 15
    reuss = 1 / (e + 2 * f), 15 / (4 * (e - f) + 3 * g)
    return float((voigt[0] + reuss[0]) / 2), float((voigt[1] + reuss[1]) / 2)


def _rows(
    model: str, name: str, found: Tensors | Flag, reference: Tensors | Flag | None
) -> list[Row]:
    if isinstance(found, Flag):
        return [Row(model, f"{name}, {kind}", {}, found.reason) for kind in KINDS]
    rows = []
    for kind, attribute in zip(KINDS, ("clamped", "relaxed"), strict=True):
        c = getattr(found, attribute)
        known = None if isinstance(reference, Flag | None) else getattr(reference, attribute)
        if c is None:
            reason = f"ions are unstable: a force constant of {found.softest:.3g} eV/Å²"
            rows.append(Row(model, f"{name}, {kind}", {}, reason))
            continue
        values = _values(c, known) | {
            "asymmetry": found.asymmetry,
            "residual_stress": found.residual,
        }
        rows.append(Row(model, f"{name}, {kind}", values, _warning(found, c)))
        for axis, line in zip(VOIGT, (np.round(c, DIGITS) + 0.0).tolist(), strict=True):
            numbers = {f"c_{other}": value for other, value in zip(VOIGT, line, strict=True)}
            rows.append(Row(model, f"{name}, {kind}, {axis}", numbers))
    return rows


def _warning(found: Tensors, c: np.ndarray) -> str | None:
    if np.linalg.eigvalsh(c)[0] <= 0:
        return "mechanically unstable: an eigenvalue of C is not positive"
    if found.residual > RESIDUAL:
        return f"a stress of {found.residual:.3g} GPa at zero strain: no equilibrium"
    return None


def _values(c: np.ndarray, reference: np.ndarray | None) -> dict[str, Value]:
    values: dict[str, Value] = {"lowest_eigenvalue": float(np.linalg.eigvalsh(c)[0])}
    found, known = moduli(c), None if reference is None else moduli(reference)
    if found is not None:
        values |= {"k_vrh": found[0], "g_vrh": found[1]}
    if reference is not None:
        values["tensor_mae"] = float(abs(c - reference)[np.triu_indices(6)].mean())
    if found is not None and known is not None:
        values["k_error"], values["g_error"] = (
            100 * (a / b - 1) for a, b in zip(found, known, strict=True)
        )
    return values
