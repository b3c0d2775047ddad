"""Shared by the generators: attach labels under the REF_ keys, read and write extxyz."""

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read, write

HERE = Path(__file__).resolve().parent


def labelled(atoms, config_type, energy, forces, stress=None, **info):
    """A bare copy of `atoms` with the labels; a stress only where there is one."""
    frame = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    frame.info.update(config_type=config_type, **info)
    frame.info["REF_energy"] = round(float(energy), 8)
    if stress is not None:
        # symmetric by physics; averaged so that the file is exactly so
        frame.info["REF_stress"] = np.round((stress + stress.T) / 2, 10)
    frame.arrays["REF_forces"] = np.array(forces)
    return frame


def isolated_atom(symbol, energy, **info):
    """The reference frame of one element."""
    return labelled(Atoms(symbol), "IsolatedAtom", energy, np.zeros((1, 3)), **info)


def load(path):
    """All frames of a file, none if it is absent."""
    return read(path, ":") if Path(path).exists() else []


def save(path, frames):
    """Write all frames at once."""
    write(path, frames, format="extxyz")
    print(f"{Path(path).name}: {len(frames)} frames, {Path(path).stat().st_size / 1e6:.2f} MB")


def append(path, frame):
    """Add one frame, so that a long run that is cut short loses nothing."""
    write(path, frame, format="extxyz", append=True)
