"""A target at the base level: hot lithium sulfide chloride clusters labelled by GFN2-xTB (tblite).

    python make_sulfide.py            writes sulfide_train.xyz, sulfide_test.xyz
    python make_sulfide.py --check    compares forces with finite differences

No frame of the base set has lithium bound to sulfur, so its model is wrong about these clusters,
and nothing but the structures is new: energies and isolated atoms are those of ``base_*.xyz``.
"""

import argparse

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.md.langevin import Langevin
from frames import HERE, save
from make_base import calculator, label

# per split: frames at each temperature (K)
COUNTS = {"test": {600: 30, 1000: 30}, "train": {600: 75, 1000: 75}}
SPACING = 50  # fs between frames
EQUILIBRATION = 500  # fs


def cluster():
    """Li6S2Cl2: eight atoms of rock salt, and a lithium behind each sulfur."""
    atoms = bulk("LiCl", "rocksalt", a=5.1, cubic=True)
    atoms.pbc, atoms.cell = False, None
    sulfur = [atom.index for atom in atoms if atom.symbol == "Cl"][:2]
    atoms.symbols[sulfur] = "S"
    outward = atoms.positions[sulfur] - atoms.positions.mean(axis=0)
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    return atoms + Atoms("Li2", atoms.positions[sulfur] + 2.4 * outward)


def trajectory(split, kelvin, count):
    """``count`` snapshots of Langevin dynamics, 1 fs steps."""
    rng = np.random.default_rng([17, split == "test", kelvin])
    atoms = cluster()
    atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    atoms.calc = calculator()
    sizes = np.sqrt(atoms.get_masses()[:, None] * units.kB * kelvin)
    atoms.set_momenta(rng.normal(size=atoms.positions.shape) * sizes)
    md = Langevin(atoms, units.fs, temperature_K=kelvin, friction=0.02 / units.fs, rng=rng)
    md.run(EQUILIBRATION)
    for _ in range(count):
        md.run(SPACING)
        snapshot = atoms.copy()
        snapshot.positions = (snapshot.positions - snapshot.get_center_of_mass()).round(8)
        yield snapshot


def check():
    """Print analytical against central-difference forces."""
    atoms = next(trajectory("train", 600, 1))
    atoms.calc = calculator()
    forces, step = atoms.get_forces(), 2e-3
    for i, axis in [(0, 0), (4, 1), (9, 2)]:
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[i, axis] += sign * step
            moved.calc = calculator()
            energies.append(moved.get_potential_energy())
        slope = -(energies[0] - energies[1]) / (2 * step)
        print(f"{atoms.symbols[i]}{i} {'xyz'[axis]}: {forces[i, axis]: .5f}  {slope: .5f} eV/Å")


def main():
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        check()
        return
    for split, counts in COUNTS.items():
        found = [
            label(atoms, "cluster", f"Li6S2Cl2 {kelvin} K")
            for kelvin, count in counts.items()
            for atoms in trajectory(split, kelvin, count)
        ]
        frames = [frame for frame in found if not isinstance(frame, str)]
        save(HERE / f"sulfide_{split}.xyz", frames)
        print("  refused:", [reason for reason in found if isinstance(reason, str)] or "none")


if __name__ == "__main__":
    main()
