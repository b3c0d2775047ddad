"""Frames: structures with labels, read from any file that ASE reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import ase
import numpy as np
from ase.data import atomic_numbers as number_of
from ase.data import chemical_symbols

from jaxft.data import formats
from jaxft.data.curvatures import Curvatures, curvatures_of
from jaxft.data.labels import (
    WEIGHTS,
    atom_weights_of,
    check_weight,
    moments_of,
    numbers,
    stress_from_virials,
    tensor,
    weights_of,
)
from jaxft.postponed import postponed

with postponed("scipy.integrate", "scipy.spatial"):  # for densities of states, for slabs
    import ase.io

ISOLATED_ATOM = "IsolatedAtom"
"""``config_type`` of frames that hold one free atom: they give E0s and are never trained on."""


@dataclass(frozen=True)
class Keys:
    """Under which names a file stores its labels, in ``info`` (or ``arrays`` for forces)."""

    energy: str = "REF_energy"
    """eV per cell."""
    forces: str = "REF_forces"
    """eV/Å."""
    stress: str = "REF_stress"
    """eV/Å³, ASE sign: 3x3, its 9 numbers, or Voigt xx, yy, zz, yz, xz, xy."""
    virials: str = "REF_virials"
    """eV, −V times the stress, laid out as it; read as a stress."""
    hessian: str = "REF_hvp"
    """eV/Å, in ``arrays``: the Hessian times each displacement under ``probe``, [n, 3 k]."""
    probe: str = "probe"
    """Å, in ``arrays``: k displacements of all atoms."""
    moments: str = "REF_magmoms"
    """µB of each atom, collinear or vectors."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One structure. Labels that the file lacks are None, never zeros."""

    atomic_numbers: np.ndarray
    """[n] int."""
    positions: np.ndarray
    """[n, 3] Å, float64."""
    cell: np.ndarray
    """[3, 3] Å, rows are lattice vectors; zero rows where there is none."""
    pbc: tuple[bool, bool, bool]
    energy: float | None = None
    """eV, total."""
    forces: np.ndarray | None = None
    """[n, 3] eV/Å."""
    stress: np.ndarray | None = None
    """[3, 3] eV/Å³, positive under tension."""
    hessian: Curvatures | None = None
    """Its Hessian times some displacements."""
    moments: np.ndarray | None = None
    """[n] or [n, 3] µB, magnetic moments: collinear, or vectors."""
    features: Mapping[str, object] = field(default_factory=dict)
    """Other numbers that came with the frame, by name: ``charge``, ``spin``, …"""
    atom_features: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Other numbers that came with its atoms, [n, …]."""
    weight: float = 1.0
    """Of all labels of the frame in the loss: 2 is the frame twice, 0 is no frame."""
    energy_weight: float = 1.0
    """Of the energy, times ``weight``; likewise the next three."""
    forces_weight: float = 1.0
    stress_weight: float = 1.0
    hessian_weight: float = 1.0
    moments_weight: float = 1.0
    atom_weights: np.ndarray | None = None
    """[n], of the forces on each atom, times ``weight`` and ``forces_weight``; None is 1."""
    config_type: str = "Default"
    source: str = "frame"
    """File and position in it, for messages."""

    def __post_init__(self) -> None:
        for name in WEIGHTS:
            check_weight(getattr(self, name), name, self.source)
        if self.atom_weights is not None:
            numbers(self.atom_weights, (len(self),), "atom_weights", self.source)
            check_weight(self.atom_weights, "atom_weights", self.source)

    def __len__(self) -> int:
        return len(self.atomic_numbers)

    @property
    def is_periodic(self) -> bool:
        """Periodic in all three directions, so that volume and stress mean something."""
        return all(self.pbc)

    @property
    def volume(self) -> float:
        """Å³."""
        return abs(float(np.linalg.det(self.cell)))


def read(paths: str | Path | Iterable[str | Path], *, keys: Keys | None = None) -> list[Frame]:
    """Read all frames of one or more files (extxyz, ASE db, trajectories, VASP output, …).

    Labels come from ``atoms.info`` and ``atoms.arrays`` under ``keys``. The reserved names
    ``energy``, ``forces``, ``stress`` and ``magmoms`` are where ASE puts a calculator's results;
    ask for them by name, as in ``Keys(energy="energy", forces="forces", stress="stress")``. Virials
    of a frame that is periodic in three directions are read as its stress.

    Weights come under mace-torch's names, ``info["config_weight"]`` for the frame and
    ``config_energy_weight``, ``config_forces_weight``, ``config_stress_weight`` (or
    ``config_virials_weight``), ours being ``config_moments_weight``; and for single atoms from
    ``arrays["atom_weights"]``.

    Raises:
      ValueError: a file cannot be read or is empty; a label or weight has the wrong shape or is not
        finite, a weight is negative, or stress and virials disagree. The message names file and
        frame.
    """
    keys = keys or Keys()
    if isinstance(paths, str | Path):
        paths = (paths,)
    frames: list[Frame] = []
    for path in paths:
        frames += [
            from_atoms(atoms, keys=keys, source=f"{path}:{index}")
            for index, atoms in enumerate(read_atoms(Path(path)))
        ]
    return frames


def read_atoms(path: Path) -> list[ase.Atoms]:
    """All frames of one file, or folder of shards, as ASE's Atoms; see :mod:`jaxft.data.formats`.

    Raises:
      ValueError: the file is absent, empty, or nothing that ASE reads.
    """
    shards = formats.read(path)
    if shards is not None:
        return shards
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a file of structures that ASE can read.")
    try:
        images = ase.io.read(path, index=":")
    # ASE's parsers raise whatever a damaged file leads them into: sqlite3, XML, assertions, …
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as structures ({type(error).__name__}: {error});\n"
            "expected extended XYZ or another format of ase.io."
        ) from error
    images = images if isinstance(images, list) else [images]
    if not images:
        raise ValueError(f"{path} holds no frames.")
    return images


def from_atoms(atoms: ase.Atoms, *, keys: Keys | None = None, source: str = "frame") -> Frame:
    """A frame from ASE's Atoms; errors as :func:`read`."""
    keys = keys or Keys()
    results = atoms.calc.results if atoms.calc is not None else {}
    energy = atoms.info.get(keys.energy, results.get(keys.energy))
    forces = atoms.arrays.get(keys.forces, results.get(keys.forces))
    stress = atoms.info.get(keys.stress, results.get(keys.stress))
    virials = atoms.info.get(keys.virials, results.get(keys.virials))
    moments = atoms.arrays.get(keys.moments, results.get(keys.moments))
    frame = unlabelled(atoms, source=source)
    if energy is not None:
        energy = float(numbers(energy, (), keys.energy, source))
    if forces is not None:
        forces = numbers(forces, (len(atoms), 3), keys.forces, source)
    if stress is not None:
        stress = tensor(stress, keys.stress, source)
    if moments is not None:
        moments = moments_of(moments, len(atoms), keys.moments, source)
    if virials is not None and frame.is_periodic:
        virials = tensor(virials, keys.virials, source)
        names = (keys.stress, keys.virials)
        stress = stress_from_virials(stress, virials, frame.volume, names, source)
    return replace(
        frame,
        energy=energy,
        forces=forces,
        stress=stress,
        hessian=curvatures_of(
            atoms.arrays.get(keys.probe),
            atoms.arrays.get(keys.hessian),
            len(atoms),
            (keys.probe, keys.hessian),
            source,
        ),
        moments=moments,
        config_type=str(atoms.info.get("config_type", "Default")),
        atom_weights=atom_weights_of(atoms, source),
        **weights_of(atoms, source),
    )


def unlabelled(atoms: ase.Atoms, *, source: str = "frame") -> Frame:
    """The structure alone; no label is looked at.

    Raises:
      ValueError: there are no atoms, or positions or cell are not finite.
    """
    frame = Frame(
        atomic_numbers=atoms.numbers.copy(),
        positions=np.array(atoms.positions, np.float64),
        cell=np.array(atoms.cell.array, np.float64),
        pbc=(bool(atoms.pbc[0]), bool(atoms.pbc[1]), bool(atoms.pbc[2])),
        features=features_of(atoms),
        atom_features=atom_features_of(atoms),
        source=source,
    )
    if not len(frame):
        raise ValueError(f"{source} has no atoms; give at least one.")
    if not np.isfinite(frame.positions).all() or not np.isfinite(frame.cell).all():
        raise ValueError(f"{source}: positions or cell are not finite; remove or repair the frame.")
    return frame


NOT_FEATURES = frozenset(
    {"numbers", "positions", "forces", "momenta", "masses", Keys.probe, Keys.hessian}
)
CHARGE_AND_SPIN = frozenset({"charge", "spin", "total_charge", "total_spin"})


def features_of(atoms: ase.Atoms) -> dict[str, object]:
    """The numbers in ``info`` that a model might read, such as charge and spin."""
    return {
        name: value
        for name, value in atoms.info.items()
        # what is no number under these names is an error for a model that reads them
        if name in CHARGE_AND_SPIN or _is_scalar(value)
    }


def atom_features_of(atoms: ase.Atoms) -> dict[str, np.ndarray]:
    """The numbers in ``arrays`` that a model might read."""
    return {
        name: array
        for name, array in atoms.arrays.items()
        if name not in NOT_FEATURES and not name.endswith("forces") and array.dtype.kind in "if"
    }


def _is_scalar(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.dtype.kind in "if"
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def without_isolated_atoms(frames: Iterable[Frame]) -> list[Frame]:
    """The frames that a model is fitted to or judged by."""
    return [frame for frame in frames if frame.config_type != ISOLATED_ATOM]


def isolated_atom_energies(frames: Iterable[Frame]) -> dict[int, float]:
    """``{atomic number: energy in eV}`` of the frames with ``config_type`` IsolatedAtom.

    Raises:
      ValueError: such a frame has more than one atom or no energy, or an element occurs twice
        with different energies.
    """
    found: dict[int, float] = {}
    for frame in frames:
        if frame.config_type != ISOLATED_ATOM:
            continue
        if len(frame) != 1 or frame.energy is None:
            raise ValueError(
                f"{frame.source} is marked {ISOLATED_ATOM} but has {len(frame)} atoms and energy "
                f"{frame.energy}; expected one atom with an energy."
            )
        z = int(frame.atomic_numbers[0])
        if found.setdefault(z, frame.energy) != frame.energy:
            raise ValueError(
                f"{frame.source}: a second isolated {chemical_symbols[z]} has energy "
                f"{frame.energy} eV, the first {found[z]} eV; keep one."
            )
    return found


@dataclass(frozen=True)
class Coverage:
    """How many frames carry each label."""

    frames: int
    energy: int
    forces: int
    stress: int
    """Of frames that are periodic in three directions; the stress of others means nothing."""
    elements: dict[str, int] = field(default_factory=dict)
    moments: int = 0


def coverage(frames: Sequence[Frame]) -> Coverage:
    """Count the labels and the elements of ``frames``."""
    elements: dict[str, int] = {}
    for frame in frames:
        for z in frame.atomic_numbers:
            symbol = chemical_symbols[int(z)]
            elements[symbol] = elements.get(symbol, 0) + 1
    return Coverage(
        frames=len(frames),
        energy=sum(frame.energy is not None for frame in frames),
        forces=sum(frame.forces is not None for frame in frames),
        stress=sum(has_label(frame, "stress") for frame in frames),
        elements=dict(sorted(elements.items(), key=lambda item: number_of[item[0]])),
        moments=sum(has_label(frame, "moments") for frame in frames),
    )


def has_label(frame: Frame, label: str) -> bool:
    """Whether a label counts: it has weight, and stress only where a volume exists."""
    if getattr(frame, label) is None or (label == "stress" and not frame.is_periodic):
        return False
    weight = frame.weight * getattr(frame, f"{label}_weight")
    of_atoms = frame.atom_weights if label == "forces" else None
    return weight > 0 and (of_atoms is None or bool(np.any(of_atoms > 0)))


def require_labels(frames: Sequence[Frame], labels: Iterable[str], *, keys: Keys) -> None:
    """Raises ValueError if one of ``labels`` occurs in no frame at all."""
    if not frames:
        raise ValueError("no frames to train on (isolated atoms do not count); give some.")
    for label in labels:
        if not any(has_label(frame, label) for frame in frames):
            periodic = " and is periodic in three directions" if label == "stress" else ""
            raise ValueError(
                f"none of {len(frames)} frames ({frames[0].source} …) has {label} under the key "
                f"{getattr(keys, label)!r}{periodic};\nset the key that the file uses, or "
                "give this term no weight in the loss."
            )


def require_any_label(frames: Sequence[Frame], *, keys: Keys) -> None:
    """Raises ValueError if no frame has any label, or there is no frame."""
    if not frames:
        raise ValueError("no frames to judge by (isolated atoms do not count); give some.")
    labels = ("energy", "forces", "stress", "moments")
    if all(getattr(frame, label) is None for frame in frames for label in labels):
        raise ValueError(
            f"none of {len(frames)} frames ({frames[0].source} …) has a label under the keys "
            f"{keys.energy!r}, {keys.forces!r}, {keys.stress!r}, {keys.moments!r};\n"
            "name the keys that the file uses."
        )
