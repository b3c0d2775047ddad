"""Phonon reference of rock salt at the target level, and frames of small displacements around it.

    python make_phonons.py displace      phonopy: the cells that are to be computed
    python3 make_phonons.py label        a Python that has GPAW; goes on where it stopped
    python make_phonons.py collect       nacl_phonons/, nacl_displaced.xyz

The settings are those of make_nacl.py. Cells are 2x2x2 primitive ones (16 atoms) at 5.69 Å: by
symmetry two displacements of 0.02 Å say all force constants; in the other frames every atom is
displaced by 0.03 Å in a random direction.
"""

import argparse

import ase.io
import numpy as np
from ase.build import bulk
from frames import HERE, append, labelled, load

LATTICE = 5.69  # Å, near the PBE minimum
STEP = 0.02  # Å
RANDOM_STEP = 0.03  # Å
FRAMES = 17
WORK = HERE / "work"
FILE, DONE = WORK / "cells.xyz", WORK / "labelled.xyz"


def new_phonons():
    """Phonopy's object; its supercell has the order of atoms of all files here."""
    from jaxft.evaluate.crystals import new_phonons as new

    return new(bulk("NaCl", "rocksalt", a=LATTICE), np.diag([2, 2, 2]))


def displace():
    """Write the cells, without labels."""
    from jaxft.evaluate.crystals import to_ase

    phonons = new_phonons()
    phonons.generate_displacements(distance=STEP)
    cells = []
    for cell in phonons.supercells_with_displacements:
        atoms = to_ase(cell)
        atoms.info["config_type"] = "phonopy"
        cells.append(atoms)
    for index in range(FRAMES):
        directions = np.random.default_rng([11, index]).normal(size=(len(phonons.supercell), 3))
        directions /= np.linalg.norm(directions, axis=1)[:, None]
        atoms = to_ase(phonons.supercell)
        atoms.positions += RANDOM_STEP * directions
        atoms.info["config_type"] = "displaced"
        cells.append(atoms)
    WORK.mkdir(exist_ok=True)
    ase.io.write(FILE, cells)


def label():
    """Add energies, forces and stresses, frame by frame."""
    from make_nacl import calculator

    count = len(load(DONE))
    for atoms in ase.io.read(FILE, ":")[count:]:
        kind = atoms.info["config_type"]
        # small displacements need no stress; symmetry saves k points where there is some
        atoms.calc = calculator(symmetry={"point_group": kind == "phonopy"})
        energy = atoms.get_potential_energy(force_consistent=True)
        forces = atoms.get_forces()
        append(DONE, labelled(atoms, kind, energy, forces))
        print(kind, f"{energy:.4f} eV, {abs(forces).max():.4f} eV/Å", flush=True)


def collect():
    """Phonopy's files of the first, extxyz of the others."""
    from jaxft.evaluate.crystals import solve

    every = ase.io.read(DONE, ":")
    phonons = new_phonons()
    phonons.generate_displacements(distance=STEP)
    count = len(phonons.supercells_with_displacements)
    phonons.forces = [atoms.arrays["REF_forces"] for atoms in every[:count]]
    folder = HERE / "nacl_phonons"
    folder.mkdir(exist_ok=True)
    print(f"sum rule off by {solve(phonons):.1e} eV/Å^2")
    phonons.save(folder / "phonopy_params.yaml", settings={"force_constants": False})
    displaced = every[count:]
    ase.io.write(HERE / "nacl_displaced.xyz", displaced)
    print(f"nacl_displaced.xyz: {len(displaced)} frames")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"displace": displace, "label": label, "collect": collect}
    parser.add_argument("part", choices=sorted(parts))
    parts[parser.parse_args().part]()
