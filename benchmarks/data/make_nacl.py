"""Target level for crystals: strained, rattled rock salt labelled by GPAW, PBE.

    python make_nacl.py            writes nacl_train.xyz, nacl_test.xyz, nacl_atoms.xyz
    python make_nacl.py --check    compares forces and stress with finite differences

Frames are appended one by one; a second run continues where the first one stopped.
"""

import argparse

import numpy as np
from ase import Atoms
from ase.build import bulk
from frames import HERE, append, isolated_atom, labelled, load
from gpaw import GPAW, PW, FermiDirac

LATTICE = 5.69  # Å, near the PBE minimum
COUNTS = {"test": 24, "train": 78}
CUTOFF = 340  # eV
# dE/dE_cut of one cell (8 atoms), from 320 and 360 eV: with it the stress is the strain
# derivative at a fixed cutoff, not at a fixed number of plane waves
PULAY = -0.00089375
MAX_FORCE = 10.0  # eV/Å


def calculator(**kwargs):
    """PBE, plane waves, Pulay correction of the stress."""
    settings = {
        "mode": PW(CUTOFF, dedecut=PULAY),
        "xc": "PBE",
        "kpts": {"size": (2, 2, 2), "gamma": False},
        "occupations": FermiDirac(0.05),
        "convergence": {"energy": 1e-6, "density": 1e-5, "eigenstates": 1e-8},
        "symmetry": {"point_group": False},
        "txt": None,
    }
    return GPAW(**(settings | kwargs))


def geometry(split, index):
    """Volume within ±8 %, shear and anisotropy within ±3 %, displacements of 0.02-0.22 Å."""
    rng = np.random.default_rng([7, split == "test", index])
    atoms = bulk("NaCl", "rocksalt", a=LATTICE, cubic=True)
    shear = rng.uniform(-0.03, 0.03, (3, 3))
    shear = (shear + shear.T) / 2
    shear -= np.eye(3) * np.trace(shear) / 3
    scale = rng.uniform(0.92, 1.08) ** (1 / 3)
    atoms.set_cell(atoms.cell @ (scale * (np.eye(3) + shear)), scale_atoms=True)
    atoms.positions += rng.normal(scale=rng.uniform(0.02, 0.22), size=(8, 3))
    return atoms


def atom_frames():
    """Spin-polarised atoms in a box; the odd sides break the symmetry of the p shell."""
    for symbol in ("Na", "Cl"):
        atom = Atoms(symbol, cell=[10.0, 10.5, 11.0], pbc=True, magmoms=[1.0])
        atom.center()
        atom.calc = calculator(kpts={"size": (1, 1, 1)}, hund=True, occupations=FermiDirac(0.0))
        energy = atom.get_potential_energy(force_consistent=False)
        yield isolated_atom(symbol, energy, multiplicity=2)


def check():
    """Print analytical against central-difference derivatives for one frame."""
    atoms = geometry("train", 0)

    def energy(strain=0.0, shift=0.0):
        moved = atoms.copy()
        moved.set_cell(moved.cell @ (np.eye(3) + strain), scale_atoms=True)
        moved.positions[0, 0] += shift
        moved.calc = calculator()
        return moved.get_potential_energy(force_consistent=True)

    atoms.calc = calculator()
    force, stress = atoms.get_forces()[0, 0], atoms.get_stress(voigt=False)
    slope = -(energy(shift=0.01) - energy(shift=-0.01)) / 0.02
    print(f"force 0x: {force: .5f}  -dE/dx {slope: .5f} eV/Å")
    shear = np.zeros((3, 3))
    shear[0, 1] = shear[1, 0] = 0.5
    # a wide step for the volume, where the number of plane waves jumps
    for name, direction, step in [("trace/3", np.eye(3) / 3, 0.03), ("01", shear, 0.002)]:
        slope = (energy(step * direction) - energy(-step * direction)) / (2 * step)
        value, slope = np.sum(stress * direction), slope / atoms.get_volume()
        print(f"stress {name}: {value: .6f}  (1/V) dE/de {slope: .6f} eV/Å^3")


def main():
    """Label what is still missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        check()
        return
    if len(load(HERE / "nacl_atoms.xyz")) < 2:
        (HERE / "nacl_atoms.xyz").unlink(missing_ok=True)
        for frame in atom_frames():
            append(HERE / "nacl_atoms.xyz", frame)
    for split, count in COUNTS.items():
        path = HERE / f"nacl_{split}.xyz"
        done = {frame.info["index"] for frame in load(path)}
        for index in sorted(set(range(count)) - done):
            atoms = geometry(split, index)
            atoms.calc = calculator()
            # the free energy is what the forces and the stress are derivatives of
            energy = atoms.get_potential_energy(force_consistent=True)
            forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
            if np.abs(forces).max() > MAX_FORCE:
                print(f"{split} {index}: refused, force above {MAX_FORCE} eV/Å", flush=True)
                continue
            append(path, labelled(atoms, "nacl", energy, forces, stress, index=index))
            print(f"{split} {index}: {energy:.4f} eV", flush=True)


if __name__ == "__main__":
    main()
