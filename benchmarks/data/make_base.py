"""Base level: molecules and periodic crystals labelled by GFN2-xTB (tblite).

python make_base.py            writes base_train.xyz, base_test.xyz, base_atoms.xyz
python make_base.py --check    compares forces and stress with finite differences
"""

import argparse
from collections import Counter
from multiprocessing import Pool

import numpy as np
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.collections import g2
from ase.data import atomic_numbers, ground_state_magnetic_moments
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from frames import HERE, isolated_atom, labelled, save
from tblite.ase import TBLite

ELEMENTS = ["H", "Li", "C", "N", "O", "F", "Na", "Si", "S", "Cl", "K"]
MAX_FORCE = 15.0  # eV/Å; harder collisions only spoil the fit
# SCF solutions from two starting guesses must agree, else the crystal frame is dropped
MAX_SCF_GAP = 1e-3  # eV/atom

# Cubic lattice constants near the minimum of this level (Γ point, 8 atoms). GFN2 binds
# LiF, NaF and LiCl less tightly than experiment. MgO, MgS, KF, LiH were tried and left
# out: their self-consistency is unstable.
CRYSTALS = {
    "NaCl": ("rocksalt", 5.66),
    "LiCl": ("rocksalt", 5.35),
    "KCl": ("rocksalt", 6.35),
    "LiF": ("rocksalt", 4.25),
    "NaF": ("rocksalt", 4.95),
    "C": ("diamond", 3.62),
    "Si": ("diamond", 5.47),
    "SiC": ("zincblende", 4.50),
}
MIXED = [("NaCl", "KCl"), ("NaCl", "LiCl"), ("NaCl", "NaF"), ("LiF", "LiCl"), ("Si", "SiC")]
ORGANIC = ["CH3CH2OH", "CH3OH", "C2H6CHOH", "CH3OCH3", "CH3CH2OCH3", "C2H6", "C3H8", "H2O",
           "CH3CHO", "CH3COOH", "C2H4", "CH3CH2NH2"]  # fmt: skip
PARTNERS = ["CH3CH2OH", "CH3OH", "H2O", "NH3", "CH4", "HF", "HCl", "H2CO", "CO2", "C2H4", "HCN",
            "CH3Cl", "SH2", "SiH4", "NaCl", "LiF"]  # fmt: skip
BOXED = ["CH3CH2OH", "CH3OH", "H2O", "NH3", "CH4", "C2H6"]


def closed_shell_molecules():
    """Names of the G2 molecules of our elements that are singlets."""
    names = []
    for name in g2.names:
        atoms = molecule(name)
        singlet = abs(atoms.get_initial_magnetic_moments().sum()) < 0.1
        known = set(atoms.symbols) <= set(ELEMENTS)
        if len(atoms) > 1 and singlet and known and atoms.numbers.sum() % 2 == 0:
            names.append(name)
    return names


def calculator(**kwargs):
    """GFN2-xTB with tight self-consistency."""
    return TBLite(method="GFN2-xTB", verbosity=0, accuracy=0.1, **kwargs)


def random_rotation(rng):
    """A uniform rotation matrix."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q *= np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def rattled(atoms, amplitude, rng):
    """A copy with Gaussian displacements."""
    atoms = atoms.copy()
    atoms.positions += rng.normal(scale=amplitude, size=atoms.positions.shape)
    return atoms


def dynamics(atoms, kelvin, steps, every, rng):
    """Snapshots of xTB Langevin dynamics, 1 fs a step, started at `kelvin`."""
    atoms = rattled(atoms, 0.02, rng)
    atoms.calc = calculator()
    MaxwellBoltzmannDistribution(atoms, temperature_K=2 * kelvin, rng=rng)
    md = Langevin(atoms, units.fs, temperature_K=kelvin, friction=0.02 / units.fs, rng=rng)
    snapshots = []
    for _ in range(steps // every):
        md.run(every)
        snapshots.append(atoms.copy())
    return snapshots


def molecule_frames(name, rng, few):
    """Rattled and hot geometries of one molecule; `few` takes one of them."""
    atoms = molecule(name)
    if few:
        return dynamics(atoms, rng.choice([300, 700, 1200]), 80, 80, rng)
    rattles = [rattled(atoms, amplitude, rng) for amplitude in (0.03, 0.1)]
    hot = dynamics(atoms, 1200, 120, 60, rng)
    return rattles + dynamics(atoms, 400, 60, 60, rng) + hot


def organic_frames(name, rng, few):
    """A longer trajectory at one temperature."""
    return dynamics(molecule(name), rng.choice([300, 600, 1000]), 100 if few else 300, 50, rng)


def pair(rng, names):
    """Two randomly turned molecules in van der Waals contact."""
    first, second = (rattled(molecule(name), 0.04, rng) for name in names)
    for part in (first, second):
        part.positions = (part.positions - part.positions.mean(0)) @ random_rotation(rng)
    gap = rng.uniform(1.7, 3.2)
    while np.linalg.norm(first.positions[:, None] - second.positions, axis=-1).min() < gap:
        second.positions[:, 2] += 0.1
    return first + second


def dimer_frames(_, rng, few):
    """One pair of small molecules."""
    return [pair(rng, rng.choice(PARTNERS, 2))]


def boxed_frames(name, rng, few):
    """One molecule in a small, slightly sheared periodic box: organics with a stress."""
    atoms = rattled(molecule(name), 0.04, rng)
    atoms.positions = atoms.positions @ random_rotation(rng)
    atoms.cell = np.ptp(atoms.positions, axis=0) + rng.uniform(2.2, 3.4, 3)
    atoms.pbc = True
    return [strained(atoms, 0.0, 0.05, rng)]


def strained(atoms, dilation, shear, rng):
    """A random symmetric strain: isotropic part in ±dilation, the rest in ±shear."""
    strain = rng.uniform(-shear, shear, (3, 3))
    strain = (strain + strain.T) / 2 + rng.uniform(-dilation, dilation) * np.eye(3)
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


def crystal_frames(name, rng, few):
    """One strained and rattled conventional cell (8 atoms)."""
    structure, a = CRYSTALS[name]
    atoms = strained(bulk(name, structure, a=a, cubic=True), 0.05, 0.03, rng)
    stiff = name in ("C", "Si", "SiC")
    return [rattled(atoms, rng.uniform(0.02, 0.12 if stiff else 0.25), rng)]


def mixed_frames(pair_index, rng, few):
    """A solid solution of two crystals at the mixed lattice constant."""
    first, second = MIXED[pair_index]
    a = CRYSTALS[second][1]
    start, end = (bulk(n, CRYSTALS[n][0], a=a, cubic=True) for n in (first, second))
    changed = np.flatnonzero(start.numbers != end.numbers)
    changed = rng.permutation(changed)[: rng.integers(1, len(changed) + 1)]
    start.numbers[changed] = end.numbers[changed]
    share = (start.symbols == end.symbols).mean()
    share = 2 * share - 1  # half of the sites are common to both
    start.set_cell([CRYSTALS[first][1] * (1 - share) + a * share] * 3, scale_atoms=True)
    stiff = first == "Si"
    atoms = strained(start, 0.04, 0.03, rng)
    return [rattled(atoms, rng.uniform(0.02, 0.10 if stiff else 0.20), rng)]


FAMILIES = {
    "molecule": molecule_frames,
    "organic": organic_frames,
    "dimer": dimer_frames,
    "boxed": boxed_frames,
    "crystal": crystal_frames,
    "mixed": mixed_frames,
}


def jobs(split):
    """All (family, argument, split) of a split; the position in the list is the seed."""
    test = split == "test"
    molecules = closed_shell_molecules()
    work = [("molecule", name) for name in molecules[:: 2 if test else 1]]
    work += [("organic", name) for name in ORGANIC[: 4 if test else None]]
    work += [("organic", "CH3CH2OH")] * (2 if test else 8)
    work += [("dimer", "pair")] * (20 if test else 120)
    work += [("boxed", name) for name in BOXED] * (2 if test else 8)
    work += [("crystal", name) for name in CRYSTALS] * (5 if test else 36)
    work += [("crystal", "NaCl")] * (5 if test else 30)
    work += [("mixed", i) for i in range(len(MIXED))] * (5 if test else 26)
    return [(family, argument, split, i) for i, (family, argument) in enumerate(work)]


def label(atoms, family, name):
    """The labelled frame, or the reason why it is refused."""
    atoms.calc = calculator()
    try:
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        stress = atoms.get_stress(voigt=False) if atoms.pbc.all() else None
        if atoms.pbc.all():
            other = atoms.copy()
            other.calc = calculator(guess="eeq")
            gap = abs(other.get_potential_energy() - energy) / len(atoms)
            if gap > MAX_SCF_GAP:
                return "two SCF solutions"
    except Exception as error:  # tblite has its own exception per version
        return f"unconverged ({type(error).__name__})"
    if np.abs(forces).max() > MAX_FORCE:
        return f"force above {MAX_FORCE} eV/Å"
    return labelled(atoms, family, energy, forces, stress, name=name)


def run(job):
    """The labelled frames or refusals of one job."""
    family, argument, split, index = job
    rng = np.random.default_rng([2024, split == "test", index])
    try:
        geometries = FAMILIES[family](argument, rng, split == "test")
    except Exception as error:
        return [f"dynamics failed ({type(error).__name__})"]
    results = []
    for atoms in geometries:
        name = "+".join(MIXED[argument]) if family == "mixed" else argument
        results.append(label(atoms, family, str(name)))
    return results


def atom_frames():
    """Isolated atoms with the multiplicity of their ground state."""
    frames = []
    for symbol in ELEMENTS:
        atom = Atoms(symbol)
        multiplicity = int(ground_state_magnetic_moments[atomic_numbers[symbol]]) + 1
        atom.calc = calculator(multiplicity=multiplicity)
        energy = atom.get_potential_energy()
        frames.append(isolated_atom(symbol, energy, multiplicity=multiplicity))
    return frames


def check():
    """Print analytical against central-difference derivatives for a rattled NaCl cell."""
    rng = np.random.default_rng(0)
    a = CRYSTALS["NaCl"][1]
    atoms = rattled(strained(bulk("NaCl", "rocksalt", a=a, cubic=True), 0.05, 0.03, rng), 0.1, rng)
    step = 2e-3  # smaller ones show the noise of the self-consistency

    def energy(strain=None, shift=0.0):
        moved = atoms.copy()
        if strain is not None:
            moved.set_cell(moved.cell @ (np.eye(3) + strain), scale_atoms=True)
        moved.positions[0, 0] += shift
        moved.calc = TBLite(method="GFN2-xTB", verbosity=0, accuracy=0.01)
        return moved.get_potential_energy()

    atoms.calc = calculator()
    stress = atoms.get_stress(voigt=False)
    for i, j in [(0, 0), (1, 1), (0, 1), (1, 2)]:
        strain = np.zeros((3, 3))
        strain[i, j] += step / 2
        strain[j, i] += step / 2
        slope = (energy(strain) - energy(-strain)) / (2 * step * atoms.get_volume())
        print(f"stress {i}{j}: {stress[i, j]: .7f}  (1/V) dE/de {slope: .7f} eV/Å^3")
    slope = -(energy(shift=step) - energy(shift=-step)) / (2 * step)
    print(f"force 0x: {atoms.get_forces()[0, 0]: .6f}  -dE/dx {slope: .6f} eV/Å")


def main():
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.check:
        check()
        return
    save(HERE / "base_atoms.xyz", atom_frames())
    for split in ("test", "train"):
        with Pool(args.processes) as pool:
            results = [x for group in pool.imap(run, jobs(split), chunksize=1) for x in group]
        frames = [x for x in results if not isinstance(x, str)]
        save(HERE / f"base_{split}.xyz", frames)
        print("  kept   ", dict(Counter(f.info["config_type"] for f in frames)))
        print("  refused", dict(Counter(x for x in results if isinstance(x, str))))


if __name__ == "__main__":
    main()
