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
from ase.calculators.calculator import Calculator
from ase.data import covalent_radii

from converters.to_jax import convert_with_provenance
from converters.to_torch import torch_and_mace
from jaxft import data, predict
from jaxft.bundle import require_dtype
from jaxft.potential import Potential
from jaxft.typing import Params


@dataclass(frozen=True)
class Deviation:
    """Largest absolute differences between jaxft and mace-torch on one structure and head."""

    name: str
    head: str
    atoms: int
    energy: float
    """eV/atom."""
    forces: float | None
    """eV/Å; None where torch has none (Chebyshev's basis)."""
    stress: float | None
    """eV/Å³; None unless periodic in three directions, where alone it is defined."""


TOLERANCES = {
    "float64": {"energy": 1e-8, "forces": 1e-7, "stress": 1e-8},
    "float32": {"energy": 1e-4, "forces": 1e-3, "stress": 1e-4},
    "float16": {"energy": 1e-2, "forces": 1e-1, "stress": 1e-2},
    "bfloat16": {"energy": 1e-1, "forces": 1e0, "stress": 1e-1},
}
"""What :attr:`Report.agrees` allows, eV/atom, eV/Å and eV/Å³, by the dtype of the computation, or
of the file where that is half precision: torch keeps its Clebsch-Gordan constants rounded, too."""


@dataclass(frozen=True)
class Report:
    """Deviations of all structures and heads; printed, a table."""

    path: Path
    dtype: str
    """Of the computation."""
    allowed: Mapping[str, float]
    """Largest energy, forces and stress deviations that are rounding."""
    rows: tuple[Deviation, ...]

    @property
    def energy(self) -> float:
        """The largest, eV/atom."""
        return max(row.energy for row in self.rows)

    @property
    def forces(self) -> float:
        """The largest, eV/Å; 0 if torch has none."""
        return max((row.forces for row in self.rows if row.forces is not None), default=0.0)

    @property
    def stress(self) -> float:
        """The largest, eV/Å³; 0 if no structure has one."""
        return max((row.stress for row in self.rows if row.stress is not None), default=0.0)

    @property
    def agrees(self) -> bool:
        """Every deviation is within what is ``allowed``."""
        found = {"energy": self.energy, "forces": self.forces, "stress": self.stress}
        return all(found[key] <= most for key, most in self.allowed.items())

    def __str__(self) -> str:
        heads = max(len(row.head) for row in self.rows)
        lines = [
            f"{self.path}: jaxft against mace-torch, {self.dtype}, largest absolute differences",
            f"{'structure':<22}{'head':<{heads + 2}}{'atoms':>6}{'E (eV/atom)':>14}{'F (eV/Å)':>12}"
            f"{'σ (eV/Å³)':>12}",
        ]
        for row in self.rows:
            forces, stress = (
                "-" if value is None else f"{value:.1e}" for value in (row.forces, row.stress)
            )
            lines.append(
                f"{row.name:<22}{row.head:<{heads + 2}}{row.atoms:>6}{row.energy:>14.1e}"
                f"{forces:>12}{stress:>12}"
            )
        limits = ", ".join(f"{name} {most:.0e}" for name, most in self.allowed.items())
        lines.append(f"{'agrees' if self.agrees else 'DIFFERS'} (allowed: {limits})")
        return "\n".join(lines)


def verify(
    model_path: str | Path,
    *,
    frames: Mapping[str, ase.Atoms] | Sequence[ase.Atoms] | None = None,
    dtype: str = "float64",
) -> Report:
    """Run mace-torch and jaxft on the same file and the same structures, for every head.

    Unlike everything else in jaxft, this lets torch load the file, and loading a whole torch model
    executes what it contains: verify only files that you trust.

    A float32 file holds torch's Clebsch-Gordan constants rounded to float32, while ours are exact
    and the couplings' rounding noise is dropped: in float64 it agrees to about 1e-8 eV/Å, a
    float64 file to 1e-14.

    Args:
      model_path: a torch ``.model``.
      frames: structures, by name if you like; by default :func:`structures`. Features that the
        model reads and they lack (total charge, …) are drawn at random.
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
    model, params, provenance = convert_with_provenance(model_path)
    coarse = [name for name in ("bfloat16", "float16") if name in provenance["dtype"].split("+")]
    allowed = TOLERANCES[coarse[0] if coarse else dtype]
    if frames is None:
        frames = structures(model.atomic_numbers, model.r_max)
    elif not isinstance(frames, Mapping):
        frames = {f"frame {i}": atoms for i, atoms in enumerate(frames)}
    atoms = with_features(list(frames.values()), model)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    rows = []
    with _Torch(Path(model_path), dtype) as theirs:
        for head in model.heads:
            dataset = data.prepare([data.from_atoms(a) for a in atoms], model, head=head)
            here, there = ours(model, params, dataset, dtype), theirs.evaluate(dataset, atoms)
            for name, a, mine, its in zip(frames, atoms, here, there, strict=True):
                rows.append(_deviation(name, head, a, mine, its))
    return Report(Path(model_path), dtype, allowed, tuple(rows))


def with_features(frames: Sequence[ase.Atoms], model: Potential) -> list[ase.Atoms]:
    """Copies of ``frames`` with random values of what the model reads and they lack."""
    rng = np.random.default_rng(3)
    copies = [atoms.copy() for atoms in frames]
    for atoms in copies:
        for spec in model.embeddings:
            told = data.features_of if spec.per == "graph" else data.atom_features_of
            known = told(atoms).keys()
            if known & {spec.name, *data.USUAL.get(spec.name, ())}:
                continue
            size = (len(atoms),) if spec.per == "atom" else ()
            value: Any
            if spec.num_classes is None:
                value = rng.normal(size=(*size, spec.in_dim) if spec.in_dim > 1 else size)
            else:
                low = -spec.offset
                high = spec.num_classes - spec.offset
                value = rng.integers(max(low, -3), min(high, 5), size)
            if spec.per == "atom":
                atoms.arrays[spec.name] = value
            else:
                atoms.info[spec.name] = np.asarray(value).item()
    return copies


@dataclass(frozen=True, eq=False)
class Result:
    """What either says of one structure, in float64."""

    energy: float
    """eV, isolated-atom energies left out."""
    forces: np.ndarray
    """[n, 3] eV/Å; NaN where torch has none."""
    virial: np.ndarray
    """[3, 3] eV, stress times volume."""
    volume: float
    """Å³; 1 unless periodic in three directions."""
    node_energy: np.ndarray
    """[n] eV, isolated-atom energies left out."""


def _deviation(name: str, head: str, atoms: ase.Atoms, ours: Result, theirs: Result) -> Deviation:
    stress, forces = None, None
    if np.isfinite(theirs.forces).all():
        forces = float(np.abs(ours.forces - theirs.forces).max())
        if atoms.pbc.all():
            stress = float(np.abs(ours.virial - theirs.virial).max()) / ours.volume
    energy = abs(ours.energy - theirs.energy) / len(atoms)
    return Deviation(name, head, len(atoms), energy, forces, stress)


_predict = jax.jit(predict, static_argnums=0)  # heads share what is compiled


def ours(model: Potential, params: Params, dataset: data.Dataset, dtype: str) -> list[Result]:
    """jaxft's results of a dataset, as one batch; ``params`` have the dtype."""
    (batch,) = data.epoch(dataset, len(dataset), dtype=dtype)
    out = _predict(model, params, batch.graph)
    ends = np.cumsum([len(frame) for frame in dataset.frames])

    def split(values: Any) -> list[np.ndarray]:
        return np.split(np.asarray(values, np.float64)[: ends[-1]], ends[:-1])

    volume = np.asarray(batch.graph.volume, np.float64)
    virial = np.asarray(out.stress, np.float64) * volume[:, None, None]
    atoms = zip(split(out.forces), split(out.node_energy), strict=True)
    return [
        Result(float(out.energy[g]), forces, virial[g], float(volume[g]), node_energy)
        for g, (forces, node_energy) in enumerate(atoms)
    ]


class _Torch:
    """mace-torch with a file loaded, and torch's global state as before afterwards."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._context = torch_and_mace(dtype)
        self._path, self._dtype = path, dtype

    def __enter__(self) -> _Torch:
        self._torch, _ = self._context.__enter__()
        module = self._torch.load(self._path, map_location="cpu", weights_only=False)
        self._module = module.to(getattr(self._torch, self._dtype))
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def evaluate(self, dataset: data.Dataset, frames: Sequence[ase.Atoms]) -> list[Result]:
        """As :func:`ours`; ``frames`` are the dataset's."""
        torch, module = self._torch, self._module
        batch = _torch_batch(module, frames)
        samples = dataset.samples
        batch["head"] = torch.tensor([sample.head for sample in samples])
        for name in samples[0].features:
            join = np.concatenate if name in dataset.per_atom else np.stack
            values = join([sample.features[name] for sample in samples])
            batch[name] = torch.tensor(values, dtype=getattr(torch, self._dtype))
        # torch has no derivative of Chebyshev's polynomials
        can = type(module.radial_embedding.bessel_fn).__name__ != "ChebychevBasis"
        out = module(batch, compute_force=can, compute_virials=can, compute_stress=can)
        counts = [len(atoms) for atoms in frames]
        e0s = np.atleast_2d(_numpy(module.atomic_energies_fn.atomic_energies))
        rows = np.split(batch["node_attrs"].argmax(dim=1).numpy(), np.cumsum(counts)[:-1])
        own = [e0s[sample.head, row] for sample, row in zip(samples, rows, strict=True)]
        nothing = np.full((sum(counts), 3), np.nan)
        forces = np.split(_numpy(out["forces"]) if can else nothing, np.cumsum(counts)[:-1])
        node_energy = np.split(_numpy(out["node_energy"]), np.cumsum(counts)[:-1])
        virials = -_numpy(out["virials"]) if can else np.full((len(frames), 3, 3), np.nan)
        energy = self._interaction(out, own)
        return [
            Result(energy[g], forces[g], virials[g], samples[g].volume, node_energy[g] - own[g])
            for g in range(len(frames))
        ]

    def _interaction(self, out: Mapping[str, Any], e0s: Sequence[np.ndarray]) -> list[float]:
        """Energies without those of isolated atoms; in float32 their sum would drown the rest."""
        if hasattr(self._module, "embedding_readout"):  # counted with the isolated atoms
            return [float(e - e0.sum()) for e, e0 in zip(_numpy(out["energy"]), e0s, strict=True)]
        if "interaction_energy" in out:
            return _numpy(out["interaction_energy"]).tolist()
        return _numpy(out["contributions"])[:, 1:].sum(axis=1).tolist()


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy()


def _torch_batch(module: Any, frames: Sequence[ase.Atoms]) -> dict[str, Any]:
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


def torch_calculator(path: str | Path, *, dtype: str, head: str | None = None) -> Calculator:
    """mace-torch's own ASE calculator of a ``.model``, on the CPU.

    torch executes what the file says; this is for files of one's own.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: torch or mace-torch is not installed.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file; give the .model that mace-torch saved.")
    options: dict[str, Any] = {} if head is None else {"head": head}
    with torch_and_mace(dtype):
        from mace.calculators import MACECalculator

        return MACECalculator(model_paths=str(path), device="cpu", default_dtype=dtype, **options)


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
