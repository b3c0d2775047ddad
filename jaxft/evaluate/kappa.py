"""Lattice thermal conductivity from third-order force constants, by phono3py.

Displacements, force constants and the Boltzmann equation in the relaxation-time approximation are
phono3py's; the forces are a model's, batched. Second-order force constants are the phonons'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ase
import numpy as np

from jaxft.evaluate.candidate import Candidate, Flag, Outcome, ProgressFn
from jaxft.evaluate.crystals import supercell_of, to_ase
from jaxft.evaluate.finding import Value
from jaxft.evaluate.phonon_tasks import Options, Solved
from jaxft.evaluate.predictions import FrameResult
from jaxft.evaluate.spectra import mesh_numbers, spectrum

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""phono3py's order of the six numbers of a symmetric tensor."""

UNSCATTERED = 1e-9
"""THz: half of a scattering rate below which a mode has met no partners, and lives forever."""

FREE_SHARE = 0.01
"""Of the conductivity, that such modes may have."""

UNSTABLE = "no kappa: there are imaginary modes"


def phono3py_api() -> Any:
    """The module ``phono3py``.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        import phono3py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"third-order force constants need {error.name}, which is not installed;\n"
            "use pip install 'jaxft[phonons,phono3py]'."
        ) from error
    return phono3py


@dataclass(frozen=True, eq=False)
class Conductivity:
    """At each temperature, in the relaxation-time approximation."""

    tensors: np.ndarray
    """[temperatures, 3, 3] W/m/K."""
    modes: np.ndarray
    """[temperatures, q, branches] W/m/K: what each mode gives to a third of the trace; their sum
    is that."""

    @property
    def means(self) -> np.ndarray:
        """[temperatures] W/m/K, a third of the trace."""
        return np.trace(self.tensors, axis1=1, axis2=2) / 3


def conductivities(
    candidate: Candidate,
    solved: Mapping[str, Solved | Flag],
    options: Options,
    progress: ProgressFn | None = None,
) -> dict[str, Conductivity | Flag]:
    """A model's thermal conductivity of crystals whose phonons are known.

    The displaced cells of all crystals are one batched call. Forces of the perfect cells are
    subtracted. Crystals with imaginary modes have none, and no cell of theirs is evaluated.

    Args:
      candidate: the model.
      solved: its phonons, by crystal.
      options: ``kappa_length``, ``kappa_distance``, ``kappa_mesh`` and ``temperatures`` are used.
      progress: told (cells done, cells in total).

    Returns:
      For each crystal the conductivity, or why there is none.

    Raises:
      ModuleNotFoundError: phono3py is not installed.
    """
    tasks = {name: _task(one, options) for name, one in solved.items()}
    cells: list[ase.Atoms] = []
    for task in tasks.values():
        if not isinstance(task, Flag):
            cells += [
                to_ase(cell) for cell in (task.supercell, *task.supercells_with_displacements)
            ]
    outcomes = iter(candidate.evaluate(cells, progress) if cells else [])
    found: dict[str, Conductivity | Flag] = {}
    for name, task in tasks.items():
        if isinstance(task, Flag):
            found[name] = task
            continue
        own = [next(outcomes) for _ in range(1 + len(task.supercells_with_displacements))]
        found[name] = _solve(task, own, options)
    return found


def _task(solved: Solved | Flag, options: Options) -> Any:
    """phono3py's object with displacements, or why there is none."""
    api = phono3py_api()
    if isinstance(solved, Flag):
        return solved
    phonons = solved.phonons
    if spectrum(phonons, solved.ground.zone.mesh).frequencies.min() < -options.tolerance:
        return Flag(UNSTABLE)
    free = replace(solved.ground.crystal, cell=to_ase(phonons.unitcell), supercell=None)
    task = api.Phono3py(
        phonons.unitcell,
        supercell_matrix=supercell_of(free, options.kappa_length),
        primitive_matrix=phonons.primitive_matrix,
        phonon_supercell_matrix=phonons.supercell_matrix,
    )
    task.fc2 = phonons.force_constants
    if phonons.nac_params is not None:
        task.nac_params = phonons.nac_params
    task.generate_displacements(distance=options.kappa_distance)
    task.mesh_numbers = mesh_numbers(phonons, options.kappa_mesh)
    return task


def _solve(task: Any, outcomes: list[Outcome], options: Options) -> Conductivity | Flag:
    wrong = [o.reason for o in outcomes if isinstance(o, Flag)]
    if wrong:
        return Flag(f"no kappa: {wrong[0]} ({len(wrong)} of {len(outcomes)} supercells)")
    perfect, *displaced = [o.forces for o in outcomes if isinstance(o, FrameResult)]
    task.forces = np.array(displaced) - perfect
    task.produce_fc3()
    task.symmetrize_fc3()
    task.init_phph_interaction()
    task.run_thermal_conductivity(temperatures=options.temperatures)
    result = task.thermal_conductivity
    tensors = _tensors(np.asarray(result.kappa)[0])
    if not np.isfinite(tensors).all():
        return Flag("no kappa: it is not finite")
    points = np.asarray(result.grid_weights).sum()
    modes = np.asarray(result.mode_kappa)[0, ..., :3].mean(-1) / points
    free = np.where(np.asarray(result.gamma)[0] < UNSCATTERED, modes, 0).sum((1, 2))
    if (free >= FREE_SHARE * modes.sum((1, 2))).any():
        return Flag("no kappa: modes that nothing scatters on so coarse a mesh; raise kappa_mesh")
    return Conductivity(tensors, modes)


def _tensors(numbers: np.ndarray) -> np.ndarray:
    """[t, 6] -> [t, 3, 3]."""
    found = np.zeros((len(numbers), 3, 3))
    for k, (i, j) in enumerate(VOIGT):
        found[:, i, j] = found[:, j, i] = numbers[:, k]
    return found


def kappa_values(
    ours: Conductivity, place: int, theirs: Conductivity | Flag | None = None
) -> dict[str, Value]:
    """Of one of the temperatures, and how far it is from a reference's.

    The signed and the mode-resolved relative deviation are between -2 and 2 and 0 and 2: Póta,
    Ahlawat, Csányi and Simoncelli, arXiv:2408.00755.
    """
    principal = np.linalg.eigvalsh(ours.tensors[place])
    mean = float(ours.means[place])
    found: dict[str, Value] = {
        "kappa": mean,
        "kappa_lowest": float(principal[0]),
        "kappa_highest": float(principal[-1]),
    }
    if isinstance(theirs, Conductivity):
        total = mean + float(theirs.means[place])
        found["kappa_srd"] = 2 * (mean - float(theirs.means[place])) / total
        if ours.modes.shape == theirs.modes.shape:
            off = abs(ours.modes[place] - theirs.modes[place]).sum()
            found["kappa_srme"] = float(2 * off / total)
    return found
