"""Does jaxft say of a torch ``.model`` what mace-torch says? Both are run on awkward structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase
import jax
import jax.numpy as jnp
import numpy as np
from ase.data import covalent_radii

from converters.to_jax import convert
from converters.to_torch import torch_and_mace
from jaxft import data, predict
from jaxft.bundle import require_dtype
from jaxft.potential import Potential
from jaxft.typing import Params


@dataclass(frozen=True)
class Deviation:
    """Largest absolute differences between jaxft and mace-torch on one structure."""

    name: str
    atoms: int
    energy: float
    """eV/atom."""
    forces: float
    """eV/Å."""
    stress: float | None
    """eV/Å³; None unless periodic in three directions, where alone it is defined."""


@dataclass(frozen=True)
class Report:
    """Deviations of all structures; printed, a table."""

    path: Path
    dtype: str
    rows: tuple[Deviation, ...]

    @property
    def energy(self) -> float:
        """The largest, eV/atom."""
        return max(row.energy for row in self.rows)

    @property
    def forces(self) -> float:
        """The largest, eV/Å."""
        return max(row.forces for row in self.rows)

    @property
    def stress(self) -> float:
        """The largest, eV/Å³; 0 if no structure has one."""
        return max((row.stress for row in self.rows if row.stress is not None), default=0.0)

    def __str__(self) -> str:
        lines = [
            f"{self.path}: jaxft against mace-torch, {self.dtype}, largest absolute differences",
            f"{'structure':<22}{'atoms':>6}{'E (eV/atom)':>14}{'F (eV/Å)':>12}{'σ (eV/Å³)':>12}",
        ]
        for row in self.rows:
            stress = "-" if row.stress is None else f"{row.stress:.1e}"
            lines.append(
                f"{row.name:<22}{row.atoms:>6}{row.energy:>14.1e}{row.forces:>12.1e}{stress:>12}"
            )
        return "\n".join(lines)


def verify(
    model_path: str | Path,
    *,
    frames: Mapping[str, ase.Atoms] | Sequence[ase.Atoms] | None = None,
    dtype: str = "float64",
) -> Report:
    """Run mace-torch and jaxft on the same file and the same structures.

    Unlike everything else in jaxft, this lets torch load the file, and loading a whole torch model
    executes what it contains: verify only files that you trust.

    A float32 file holds torch's Clebsch-Gordan constants rounded to float32, while ours are exact
    and the couplings' rounding noise is dropped: in float64 it agrees to about 1e-8 eV/Å, a
    float64 file to 1e-14.

    Args:
      model_path: a torch ``.model``.
      frames: structures, by name if you like; by default :func:`structures`.
      dtype: that both compute in. Isolated-atom energies are summed in float64 in either.

    Returns:
      The largest absolute differences, structure by structure.

    Raises:
      ModelFileError: jaxft cannot convert the file.
      ImportError: torch or mace-torch is not installed.
      ValueError: an element is unknown to the model, a geometry impossible, or float64 is asked
        for while JAX has it switched off.
    """
    require_dtype(dtype)
    model, params = convert(model_path)
    if frames is None:
        frames = structures(model.atomic_numbers, model.r_max)
    elif not isinstance(frames, Mapping):
        frames = {f"frame {i}": atoms for i, atoms in enumerate(frames)}
    ours = _ours(model, params, list(frames.values()), dtype)
    theirs = _theirs(Path(model_path), list(frames.values()), dtype)
    rows = [
        _deviation(name, atoms, *results)
        for (name, atoms), *results in zip(frames.items(), ours, theirs, strict=True)
    ]
    return Report(Path(model_path), dtype, tuple(rows))


@dataclass(frozen=True, eq=False)
class _Result:
    energy: float
    forces: np.ndarray
    stress: np.ndarray


def _deviation(name: str, atoms: ase.Atoms, ours: _Result, theirs: _Result) -> Deviation:
    stress = float(np.abs(ours.stress - theirs.stress).max()) if atoms.pbc.all() else None
    return Deviation(
        name,
        len(atoms),
        abs(ours.energy - theirs.energy) / len(atoms),
        float(np.abs(ours.forces - theirs.forces).max()),
        stress,
    )


def _ours(model: Potential, params: Params, frames: list[ase.Atoms], dtype: str) -> list[_Result]:
    dataset = data.prepare([data.from_atoms(atoms) for atoms in frames], model)
    (batch,) = data.epoch(dataset, len(frames), dtype=dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    out = jax.jit(lambda params, graph: predict(model, params, graph))(params, batch.graph)
    ends = np.cumsum([len(atoms) for atoms in frames])
    forces = np.split(np.asarray(out.forces, np.float64)[: ends[-1]], ends[:-1])
    e0s = dict(zip(model.atomic_numbers, model.e0s[0], strict=True))
    return [
        _Result(
            float(out.energy[g]) + sum(e0s[z] for z in atoms.numbers.tolist()),
            forces[g],
            np.asarray(out.stress[g], np.float64),
        )
        for g, atoms in enumerate(frames)
    ]


def _theirs(path: Path, frames: list[ase.Atoms], dtype: str) -> list[_Result]:
    with torch_and_mace(dtype) as (torch, _):
        module = torch.load(path, map_location="cpu", weights_only=False)
        e0s = np.atleast_2d(module.atomic_energies_fn.atomic_energies.double().numpy())[0]
        module = module.to(getattr(torch, dtype))
        batch = _torch_batch(module, frames)
        out = module(batch, compute_force=True, compute_stress=True)
        rows = batch["node_attrs"].argmax(dim=1).numpy()
        atoms = np.split(np.arange(len(rows)), np.cumsum([len(f) for f in frames])[:-1])
        energy = out["interaction_energy"].detach().double().numpy()
        forces = out["forces"].detach().double().numpy()
        stress = out["stress"].detach().double().numpy()
    return [
        _Result(float(energy[g] + e0s[rows[chosen]].sum()), forces[chosen], stress[g])
        for g, chosen in enumerate(atoms)
    ]


def _torch_batch(module: Any, frames: list[ase.Atoms]) -> dict[str, Any]:
    from mace import data as mace_data
    from mace.tools import AtomicNumberTable
    from mace.tools.torch_geometric.batch import Batch

    table = AtomicNumberTable([int(z) for z in module.atomic_numbers])
    items = [
        mace_data.AtomicData.from_config(
            # mace overwrites the cell of what it is given
            mace_data.config_from_atoms(atoms.copy()),
            z_table=table,
            cutoff=float(module.r_max),
        )
        for atoms in frames
    ]
    return Batch.from_data_list(items).to_dict()


SPACING = 2.8
"""Å, between neighbours in the slab and in the 64-atom cell."""


def structures(atomic_numbers: Sequence[int], r_max: float) -> dict[str, ase.Atoms]:
    """Six small structures that each break one careless implementation.

    Args:
      atomic_numbers: elements to choose from; up to four are used, spread over the list.
      r_max: Å; the triclinic cell is smaller, so atoms see their own images.
    """
    rng = np.random.default_rng(0)
    rows = np.linspace(0, len(atomic_numbers) - 1, min(4, len(atomic_numbers))).round().astype(int)
    elements = [int(atomic_numbers[row]) for row in rows]

    def species(n: int) -> np.ndarray:
        return rng.permutation(np.resize(elements, n))

    cell = 0.7 * r_max * np.array([[1.0, 0.0, 0.0], [0.35, 0.95, 0.0], [-0.2, 0.3, 0.9]])
    scaled = np.array([[0.02, 0.05, 0.1], [0.5, 0.45, 0.55], [0.95, 0.4, 0.05]])
    a, b = elements[0], elements[-1]
    return {
        "isolated atom": ase.Atoms([b], [[0.3, 0.2, 0.1]]),
        "short dimer": ase.Atoms([a, b], [[0.0] * 3, _direction(rng) * 0.7 * _bond(a, b)]),
        "molecule": _cluster(species(9), rng),
        "triclinic crystal": ase.Atoms(species(3), scaled @ cell, cell=cell, pbc=True),
        "slab, open along y": _lattice(species(18), (3, 2, 3), (True, False, True), rng),
        "64-atom cell": _lattice(species(64), (4, 4, 4), (True, True, True), rng),
    }


def _bond(a: int, b: int) -> float:
    return float(covalent_radii[a] + covalent_radii[b])


def _direction(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def _cluster(numbers: np.ndarray, rng: np.random.Generator) -> ase.Atoms:
    """Atoms attached one by one, a bond length from one and not closer to any other."""
    positions = [np.zeros(3)]
    while len(positions) < len(numbers):
        z, k = numbers[len(positions)], rng.integers(len(positions))
        trial = positions[k] + 1.05 * _bond(z, numbers[k]) * _direction(rng)
        placed = zip(positions, numbers, strict=False)
        if all(np.linalg.norm(trial - x) > 0.95 * _bond(z, other) for x, other in placed):
            positions.append(trial)
    return ase.Atoms(numbers, positions)


def _lattice(
    numbers: np.ndarray,
    shape: tuple[int, int, int],
    pbc: tuple[bool, bool, bool],
    rng: np.random.Generator,
) -> ase.Atoms:
    """A rattled simple cubic lattice; open directions have no lattice vector at all."""
    positions = SPACING * np.argwhere(np.ones(shape)) + rng.normal(
        scale=0.15, size=(len(numbers), 3)
    )
    cell = np.diag(
        [SPACING * n if periodic else 0.0 for n, periodic in zip(shape, pbc, strict=True)]
    )
    return ase.Atoms(numbers, positions, cell=cell, pbc=pbc)
