"""Target level for molecules: ethanol labelled by PySCF, PBE/def2-SVP.

    python make_ethanol.py            writes ethanol_train.xyz, _test.xyz, _atoms.xyz
    python make_ethanol.py --check    compares the forces with finite differences

Geometries come from GFN2-xTB dynamics. Frames are appended one by one; a second run
continues where the first one stopped.
"""

import argparse

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.md.langevin import Langevin
from frames import HERE, append, isolated_atom, labelled, load
from pyscf import dft, gto
from pyscf.data.nist import BOHR, HARTREE2EV
from tblite.ase import TBLite

# per split: frames at each temperature (K)
COUNTS = {"test": {300: 24, 450: 24, 600: 24}, "train": {300: 70, 450: 70, 600: 70}}
SPACING = 100  # fs between frames
EQUILIBRATION = 500  # fs


def mean_field(atoms, spin=0):
    """PBE/def2-SVP with density fitting, grid level 2, energy converged to 1e-8 Ha."""
    geometry = list(zip(atoms.symbols, atoms.positions, strict=True))
    mol = gto.M(atom=geometry, basis="def2-svp", spin=spin, unit="Angstrom", verbose=0)
    mf = (dft.UKS(mol) if spin else dft.RKS(mol)).density_fit()
    mf.xc, mf.grids.level, mf.conv_tol = "PBE", 2, 1e-8
    return mf


def energy_and_forces(atoms):
    """eV and eV/Å; the gradient includes the response of the grid."""
    mf = mean_field(atoms)
    energy = mf.kernel()
    if not mf.converged:
        raise RuntimeError("SCF not converged")
    gradient = mf.nuc_grad_method()
    gradient.grid_response = True
    forces = -gradient.kernel() * HARTREE2EV / BOHR
    return energy * HARTREE2EV, forces


def trajectory(split, kelvin, count):
    """`count` snapshots of Langevin dynamics at GFN2-xTB, 1 fs steps."""
    rng = np.random.default_rng([11, split == "test", kelvin])
    atoms = molecule("CH3CH2OH")
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    atoms.set_momenta(
        rng.normal(size=(9, 3)) * np.sqrt(atoms.get_masses()[:, None] * units.kB * kelvin)
    )
    friction = 0.02 / units.fs
    md = Langevin(atoms, units.fs, temperature_K=kelvin, friction=friction, rng=rng)
    md.run(EQUILIBRATION)
    for _ in range(count):
        md.run(SPACING)
        snapshot = atoms.copy()
        snapshot.positions -= snapshot.get_center_of_mass()
        # rounded as in the file, so that the labels belong to the written geometry
        snapshot.positions = snapshot.positions.round(8)
        yield snapshot


def atom_frames():
    """Open-shell atoms at the same level."""
    for symbol, spin in [("H", 1), ("C", 2), ("O", 2)]:
        mf = mean_field(Atoms(symbol, positions=[[0, 0, 0]]), spin)
        mf.kernel()
        if not mf.converged:  # second order where DIIS wavers between degenerate shells
            mf = mf.newton()
            mf.kernel()
        assert mf.converged, symbol
        yield isolated_atom(symbol, mf.e_tot * HARTREE2EV, multiplicity=spin + 1)


def check():
    """Print analytical against central-difference forces."""
    atoms = next(trajectory("train", 300, 1))
    _, forces = energy_and_forces(atoms)
    step = 2e-3
    for i, axis in [(0, 0), (2, 1), (3, 2)]:
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[i, axis] += sign * step
            energies.append(energy_and_forces(moved)[0])
        slope = -(energies[0] - energies[1]) / (2 * step)
        print(f"{atoms.symbols[i]}{i} {'xyz'[axis]}: {forces[i, axis]: .5f}  {slope: .5f} eV/Å")


def main():
    """Label what is still missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        check()
        return
    if len(load(HERE / "ethanol_atoms.xyz")) < 3:
        (HERE / "ethanol_atoms.xyz").unlink(missing_ok=True)
        for frame in atom_frames():
            append(HERE / "ethanol_atoms.xyz", frame)
    for split, counts in COUNTS.items():
        path = HERE / f"ethanol_{split}.xyz"
        done = {frame.info["index"] for frame in load(path)}
        geometries = [x for kelvin, n in counts.items() for x in trajectory(split, kelvin, n)]
        for index, atoms in enumerate(geometries):
            if index in done:
                continue
            energy, forces = energy_and_forces(atoms)
            append(path, labelled(atoms, "ethanol", energy, forces, index=index))
            print(f"{split} {index}: {energy:.4f} eV", flush=True)


if __name__ == "__main__":
    main()
