"""Published figures: they are whole, and a model is held against its own."""

import json

import ase.io
import numpy as np
import pytest

from converters import golden, registry
from converters.to_jax import convert_with_provenance
from jaxft import bundle, data
from jaxft.evaluate.predictions import predict_frames

FILES = sorted(golden.FIGURES.glob("*.json"))
FRAMES = {a.info["name"]: a for a in ase.io.read(golden.FIGURES / "structures.xyz", ":")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_published_figures_obey_physics(file):
    figures = json.loads(file.read_text())
    assert figures["sha256"] in golden.known()
    assert registry.identify(figures["sha256"]).file == figures["file"]
    for name, frame in figures["frames"].items():
        atoms, forces = FRAMES[name], np.array(frame["forces"])
        size = max(np.abs(forces).max(), 1.0)
        assert len(atoms) == len(forces) == len(frame["energies"])
        np.testing.assert_allclose(forces.sum(axis=0), 0.0, atol=1e-14 * size)
        assert sum(frame["energies"]) == pytest.approx(frame["energy"], rel=1e-14)
        if name.startswith("slab"):
            # along the open axis, the virial theorem: what volume the stress refers to
            virial = -(forces[:, 2] * atoms.positions[:, 2]).sum()
            volume = golden._volume(atoms, figures["r_max"])
            assert frame["stress"][2][2] * volume == pytest.approx(virial, rel=1e-12)


@pytest.fixture
def published(tiny_file, tmp_path, monkeypatch):
    """Figures of the shipped tiny model for two of the structures, made by its own predictions."""
    model, params, provenance = convert_with_provenance(tiny_file)
    names = ["water_cluster", "triclinic_bulk"]
    frames = [data.from_atoms(FRAMES[name]) for name in names]
    found = {}
    for name, result in zip(names, predict_frames(model, params, frames), strict=True):
        rows = [model.atomic_numbers.index(z) for z in FRAMES[name].numbers]
        found[name] = {
            "energy": result.energy,
            "node_energy": (result.energies - model.e0s[0, rows]).tolist(),
            "forces": result.forces.tolist(),
            "stress": None if result.stress is None else result.stress.tolist(),
        }
    figures = {
        "model": "tiny",
        "file": "tiny.model",
        "sha256": provenance["sha256"],
        "source_url": "none",
        "head": None,
        "frames": found,
    }
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(figures))
    (folder / "structures.xyz").write_text((golden.FIGURES / "structures.xyz").read_text())
    monkeypatch.setattr(golden, "FIGURES", folder)
    return folder / "tiny.json"


def test_file_and_bundle_agree_with_their_figures(published, tiny_file, tmp_path):
    model, params, provenance = convert_with_provenance(tiny_file)
    bundle.save(tmp_path / "tiny.jaxft", model, params, provenance=provenance)
    for path in (tiny_file, tmp_path / "tiny.jaxft"):
        report = golden.check(path)
        assert report.agrees
        assert str(report).endswith("\nagrees")
        assert len(report.rows) == 7  # the molecule has no stress


def test_wrong_figures_are_found_and_reported_in_full(published, tiny_file):
    figures = json.loads(published.read_text())
    frame = figures["frames"]["triclinic_bulk"]
    quantities = ("energy", "node_energy", "forces", "stress")
    for quantity in quantities:
        value = np.array(frame[quantity])
        value.flat[0] += 3e-6
        frame[quantity] = value.tolist()
    published.write_text(json.dumps(figures))
    report = golden.check(tiny_file)
    assert not report.agrees
    wrong = [(row.structure, row.quantity) for row in report.rows if not row.agrees]
    assert wrong == [("triclinic_bulk", quantity) for quantity in quantities]
    text = str(report)
    assert "DIFFERS" in text
    document = json.loads(text[text.index("{") :])
    assert document["sha256"] == figures["sha256"]
    listed = [row for row in document["comparisons"] if not row["agrees"]]
    assert [row["published"] for row in listed] == [frame[q] for q in quantities]
    assert {"jaxft", "jax", "numpy"} <= document["versions"].keys()
    assert document["architecture"]["r_max"]


def test_a_nan_is_a_difference():
    row = golden.Comparison("a", "energy", np.array(1.0), np.array(np.nan))
    assert not row.agrees


def test_files_without_figures_are_told_where_there_are_some(tiny_file):
    with pytest.raises(ValueError, match=r"(?s)no figures are published.*MACE-MPA-0 medium.*torch"):
        golden.check(tiny_file)


def test_bundles_that_are_no_plain_conversion_are_refused(published, tiny_file, tmp_path):
    model, params, provenance = convert_with_provenance(tiny_file)
    bundle.save(tmp_path / "tuned", model, params, provenance={"base": provenance})
    with pytest.raises(ValueError, match="not the plain conversion"):
        golden.check(tmp_path / "tuned")
    narrow = bundle.cast(model, params, "float32")
    bundle.save(tmp_path / "narrow", *narrow, provenance=provenance)
    with pytest.raises(ValueError, match="holds float32 numbers"):
        golden.check(tmp_path / "narrow")
