"""Phonons by which studies judge, and labels of the Hessian from force constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest

import jaxft
from jaxft import data
from jaxft.data.curvatures import curvatures_of
from jaxft.evaluate.candidate import JaxCandidate
from jaxft.evaluate.crystals import crystal_of, read_crystal
from jaxft.evaluate.curvature import labelled
from jaxft.evaluate.hessian import hessian
from jaxft.study import phonons
from jaxft.study.config import StudyConfig
from jaxft.study.plan import plan

pytest.importorskip("phonopy")
pytest.importorskip("seekpath")

SALT = Path(__file__).parents[1] / "benchmarks" / "data" / "nacl_phonons"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small) -> Path:
    """``base.jaxft``, ``soft.jaxft`` with energies of half the size, a cell, frames."""
    folder = tmp_path_factory.mktemp("phonons")
    model, params = small
    jaxft.save(folder / "base.jaxft", model, params)
    half = model.buffers | {
        "scale_shift/scale": 0.25 * np.asarray(model.buffers["scale_shift/scale"])
    }
    jaxft.save(folder / "soft.jaxft", replace(model, buffers=half), params)
    cell = ase.build.bulk("NaCl", "rocksalt", a=5.64)
    ase.io.write(folder / "cell.vasp", cell)
    cell.info["REF_energy"] = -1.0
    cell.arrays["REF_forces"] = np.zeros((2, 3))
    ase.io.write(folder / "frames.xyz", [cell] * 3)
    return folder


def cells(folder: Path, **entry: object) -> list:
    asked = {"crystal": str(folder / "cell.vasp"), "supercell": [2, 2, 2], **entry}
    study = {
        "output": str(folder / "study"),
        "base": str(folder / "base.jaxft"),
        "datasets": {
            "salt": {
                "train": str(folder / "frames.xyz"),
                "valid": str(folder / "frames.xyz"),
                "phonons": {"NaCl": asked} if entry else {},
            }
        },
        "recipes": {"naive": {"recipe": []}},
        "set": ["e0s=foundation", "epochs=1"],
    }
    return plan(StudyConfig.model_validate(study))


def test_ids_tell_what_a_cell_is_judged_by(folder: Path) -> None:
    (plain,), (judged,) = cells(folder), cells(folder, reference=str(folder / "base.jaxft"))
    (other,) = cells(folder, reference=str(folder / "soft.jaxft"))
    assert len({plain.id, judged.id, other.id}) == 3
    assert judged.config.output == folder / "study" / "cells" / judged.id / "run"
    assert not plain.phonons


def test_a_model_is_judged_against_a_bundle(folder: Path) -> None:
    """Energies of a quarter: frequencies of a half, before against after."""
    (cell,) = cells(folder, reference=str(folder / "base.jaxft"), mesh=10.0)
    phonons.check(cell)
    found = {name: value for _, name, _, value in phonons.of_run(cell, folder / "soft.jaxft")}
    assert found["before_omega_mae"] < 1e-9
    assert found["before_omega_max_bias"] == pytest.approx(0, abs=1e-9)
    assert found["omega_max_bias"] == pytest.approx(-50, abs=1e-6)
    assert found["omega_max"] == pytest.approx(found["before_omega_max"] / 2, rel=1e-9)
    assert found["omega_mae"] > 0.1
    assert found["has_phonons"] == found["before_has_phonons"] == 1


def test_a_crystal_without_reference_is_refused_before_training(folder: Path) -> None:
    (cell,) = cells(folder, mesh=10.0)
    with pytest.raises(ValueError, match="a bundle as `reference`"):
        phonons.check(cell)


def test_force_constants_become_columns(folder: Path) -> None:
    """Of phonopy's files: symmetric, no force of a translation."""
    atoms = labelled(read_crystal(SALT), is_at_rest=True)
    frame = data.from_atoms(atoms)
    assert len(frame) == 16
    units, products = frame.hessian
    assert units.shape == products.shape == (6, 16, 3)
    np.testing.assert_allclose(products.sum(axis=1), 0, atol=1e-10)
    block = np.einsum("knx,lnx->kl", units, products)
    np.testing.assert_allclose(block, block.T, atol=1e-10)
    assert block[0, 0] > 1  # eV/Å², a sodium's own
    assert not frame.forces.any()
    assert not frame.stress.any()


def test_a_teachers_columns_are_its_hessian(small) -> None:
    teacher = JaxCandidate("teacher", *small)
    crystal = crystal_of(ase.build.bulk("NaCl", "rocksalt", a=5.64), supercell=(1, 1, 2))
    atoms = labelled(crystal, teacher=teacher)
    found = curvatures_of(atoms.arrays["probe"], atoms.arrays["REF_hvp"], 4, ("", ""), "")
    whole = hessian(*small, atoms)
    chosen = found.displacements.reshape(6, 12)
    np.testing.assert_allclose(found.products.reshape(6, 12), chosen @ whole, atol=1e-9)
    assert abs(found.products).max() > 0.1


def test_without_force_constants_there_are_no_labels() -> None:
    crystal = crystal_of(ase.build.bulk("NaCl", "rocksalt", a=5.64))
    with pytest.raises(ValueError, match="without force constants"):
        labelled(crystal)
