"""Structures handed over to a reference calculation: one extended XYZ, or a folder of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import ase
import ase.io

from jaxft.bundle import refuse_existing, whole_folder

FRAMES = "frames.xyz"
"""In a folder of inputs: all frames in the order of the inputs, with what is known of each."""


def _poscar(folder: Path, atoms: ase.Atoms) -> None:
    ase.io.write(folder / "POSCAR", atoms, format="vasp", direct=True, sort=False)


def _espresso(folder: Path, atoms: ase.Atoms) -> None:
    names = {symbol: f"{symbol}.UPF" for symbol in dict.fromkeys(atoms.get_chemical_symbols())}
    wanted = {"control": {"calculation": "scf", "tprnfor": True, "tstress": True}}
    ase.io.write(
        folder / "espresso.pwi",
        atoms,
        format="espresso-in",
        input_data=wanted,
        pseudopotentials=names,
    )


FORMATS: dict[str, Callable[[Path, ase.Atoms], None]] = {"vasp": _poscar, "espresso": _espresso}
"""Inputs that hold a structure; everything else that a calculation needs is the user's."""


def check_target(path: Path, code: str | None, structures: Iterable[ase.Atoms] = ()) -> None:
    """Before anything is computed.

    Raises:
      FileExistsError: ``path`` exists.
      ValueError: a file without a known suffix, a format that is not known, no folder to write in,
        or a structure without a cell for a format that needs one.
    """
    refuse_existing(path)
    if code is not None and code not in FORMATS:
        raise ValueError(f"format {code!r} is not known; use {', '.join(FORMATS)}, or none.")
    if code is None and path.suffix not in (".xyz", ".extxyz"):
        raise ValueError(
            f"{path} is no .xyz or .extxyz; give such a name, or a folder together with the "
            f"format of its inputs ({', '.join(FORMATS)})."
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written; its folder does not exist.")
    if code is not None and (flat := [a for a in structures if a.cell.rank < 3]):
        raise ValueError(
            f"{flat[0].symbols} has no cell, which inputs of {code} need; give it one, or write "
            "NAME.xyz."
        )


def hand_over(path: Path, frames: Sequence[ase.Atoms], code: str | None = None) -> None:
    """Write frames; complete or not at all.

    Args:
      path: ``NAME.xyz``, or with ``code`` a new folder: in it ``0000/POSCAR`` (or
        ``0000/espresso.pwi``) and so on, and ``frames.xyz``.
      frames: structures; results of calculators are not written.
      code: one of ``FORMATS``.

    Raises:
      FileExistsError, ValueError: as :func:`check_target`, or there are no frames.
    """
    check_target(path, code, frames)
    if not frames:
        raise ValueError("there are no frames, so nothing was written.")
    bare = [atoms.copy() for atoms in frames]
    if code is None:
        scratch = path.with_name(f".{path.name}.part")
        try:
            ase.io.write(scratch, bare, format="extxyz")
            scratch.rename(path)
        finally:
            scratch.unlink(missing_ok=True)
        return
    with whole_folder(path) as folder:
        ase.io.write(folder / FRAMES, bare, format="extxyz")
        for i, atoms in enumerate(bare):
            (folder / f"{i:04d}").mkdir()
            FORMATS[code](folder / f"{i:04d}", atoms)
