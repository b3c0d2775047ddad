"""Predictions of many frames, errors against labels, and the picture of them."""

import io
import json
import sys

import ase.build
import ase.io
import jax
import numpy as np
import pytest
from ase.units import GPa
from rich.console import Console

from jaxft import data, graph
from jaxft.calculator import JaxftCalculator
from jaxft.data import Frame
from jaxft.evaluate import (
    FrameResult,
    errors,
    parity_plot,
    predict_energies,
    predict_file,
    predict_frames,
    predictions,
    with_results,
)
from jaxft.surgery import set_e0s

ROUNDING = 1e-9
"""eV and eV/Å in float64; energies are up to 1e4 eV."""


@pytest.fixture(scope="module")
def mixed(structures):
    """Molecules, crystals, a slab and a lone atom, as Atoms; only the second has labels."""
    slab = ase.build.fcc100("Na", (2, 2, 1), a=4.3, periodic=False)
    slab.pbc = (True, True, False)
    slab.info.clear()
    found = [atoms.copy() for atoms in (*structures, slab, ase.Atoms("O"))]
    found[1].info.update(REF_energy=-1.0, config_type="labelled")
    found[1].arrays["REF_forces"] = np.ones((len(found[1]), 3))
    return found


@pytest.fixture(scope="module")
def results(mixed, tiny):
    return predict_frames(*tiny, [data.from_atoms(atoms) for atoms in mixed])


def assert_same(ours, theirs, tolerance=ROUNDING):
    assert ours.energy == pytest.approx(theirs.energy, abs=tolerance)
    np.testing.assert_allclose(ours.energies, theirs.energies, atol=tolerance)
    np.testing.assert_allclose(ours.forces, theirs.forces, atol=tolerance)
    assert (ours.stress is None) == (theirs.stress is None)
    if ours.stress is not None:
        np.testing.assert_allclose(ours.stress, theirs.stress, atol=tolerance)


def test_predictions_equal_the_calculator_frame_by_frame(mixed, results, tiny):
    calc = JaxftCalculator(*tiny)
    for atoms, result in zip(mixed, results, strict=True):
        alone = atoms.copy()
        alone.calc = calc
        assert result.energy == pytest.approx(alone.get_potential_energy(), abs=ROUNDING)
        np.testing.assert_allclose(result.energies, alone.get_potential_energies(), atol=ROUNDING)
        np.testing.assert_allclose(result.forces, alone.get_forces(), atol=ROUNDING)
        assert (result.stress is not None) == all(atoms.pbc)
        if result.stress is not None:
            np.testing.assert_allclose(
                result.stress, alone.get_stress(voigt=False), atol=1e-12, rtol=0
            )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_and_order_change_nothing(batch_size, mixed, results, tiny):
    frames = [data.from_atoms(atoms) for atoms in mixed]
    again = predict_frames(*tiny, frames[::-1], batch_size=batch_size)[::-1]
    for ours, theirs in zip(again, results, strict=True):
        assert_same(ours, theirs)


def test_energies_hold_the_isolated_atoms_in_float64(tiny, model):
    """Of 1e5 eV, float32 would lose 0.01 eV."""
    heavy = set_e0s(model, {z: -1e5 - z / 7 for z in model.atomic_numbers})
    frame = data.from_atoms(ase.build.molecule("CH3COOH"))
    (light,) = predict_frames(*tiny, [frame], dtype="float32")
    (result,) = predict_frames(heavy, tiny[1], [frame], dtype="float32")
    index = [model.atomic_numbers.index(z) for z in frame.atomic_numbers]
    np.testing.assert_allclose(
        result.energies - light.energies, (heavy.e0s - model.e0s)[0, index], atol=1e-9, rtol=0
    )
    assert result.energy == result.energies.sum()
    np.testing.assert_array_equal(result.forces, light.forces)


def test_one_shape_serves_all_batches(tiny, mixed, monkeypatch):
    shapes = []
    inner = predictions.predict_batch

    def spied(model, params, dataset, chosen, shape, **options):
        shapes.append((shape, len(chosen)))
        return inner(model, params, dataset, chosen, shape, **options)

    monkeypatch.setattr(predictions, "predict_batch", spied)
    frames = [data.from_atoms(atoms) for atoms in mixed] * 3
    done = []
    predict_frames(*tiny, frames, batch_size=3, progress=lambda *state: done.append(state))
    assert len({shape for shape, _ in shapes}) == 1
    counts = [count for _, count in shapes]
    assert sum(counts) == len(frames)
    assert counts[0] >= 3  # the largest three fit
    assert max(counts) > 3  # and small ones share a batch in greater numbers
    assert done[-1] == (len(frames), len(frames))
    assert len(done) == len(shapes)


def test_energies_alone_are_those_of_the_frames(tiny, mixed, results, monkeypatch):
    frames = [data.from_atoms(atoms) for atoms in mixed]
    expected = [result.energy for result in results]
    found = predict_energies(*tiny, frames)
    np.testing.assert_allclose(found, expected, atol=ROUNDING, rtol=0)
    monkeypatch.setitem(graph.EDGES_PER_BLOCK, "cpu", 50)  # in blocks, as a large set would be
    found = predict_energies(*tiny, frames)
    np.testing.assert_allclose(found, expected, atol=ROUNDING, rtol=0)


def test_no_frames_give_no_results(tiny):
    assert predict_frames(*tiny, []) == []
    assert len(predict_energies(*tiny, [])) == 0
    with pytest.raises(ValueError, match="batches of 0 frames are not possible"):
        predict_energies(*tiny, [], batch_size=0)
    with pytest.raises(ValueError, match="batch_size"):
        predict_frames(*tiny, [], batch_size=0)


def test_unknown_elements_are_refused_by_name(tiny):
    frame = data.from_atoms(ase.build.molecule("SiH4"), source="silane.xyz:3")
    with pytest.raises(ValueError, match=r"silane.xyz:3 holds Si"):
        predict_frames(*tiny, [frame])


def test_params_may_be_numpy_and_float32(tiny, mixed, results):
    model, params = tiny
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    frame = data.from_atoms(mixed[0])
    (result,) = predict_frames(model, single, [frame])
    assert result.energies.dtype == np.float64
    assert 0 < abs(result.forces - results[0].forces).max() < 1e-3


def test_results_survive_extended_xyz_beside_the_labels(mixed, results, tmp_path):
    path = tmp_path / "out.xyz"
    ase.io.write(path, [with_results(a, r) for a, r in zip(mixed, results, strict=True)])
    for result, read in zip(results, ase.io.read(path, ":"), strict=True):
        # extxyz writes eight decimals
        assert read.get_potential_energy() == pytest.approx(result.energy, abs=1e-7)
        np.testing.assert_allclose(read.get_forces(), result.forces, atol=1e-7)
        if result.stress is not None:
            np.testing.assert_allclose(read.get_stress(voigt=False), result.stress, atol=1e-7)
    labelled = ase.io.read(path, 1)
    assert labelled.info["REF_energy"] == -1.0
    assert labelled.info["config_type"] == "labelled"
    np.testing.assert_array_equal(labelled.arrays["REF_forces"], 1)
    assert mixed[0].calc is None
    assert data.read(path)[1].energy == -1.0


def test_results_of_another_structure_are_refused(mixed, results):
    with pytest.raises(ValueError, match="3 atoms"):
        with_results(mixed[1], results[0])


def test_a_file_is_predicted_into_a_file(mixed, results, tiny, tmp_path):
    source, output = tmp_path / "in.xyz", tmp_path / "out.xyz"
    ase.io.write(source, mixed)
    assert predict_file(*tiny, source, output) == len(mixed)
    for read, result in zip(ase.io.read(output, ":"), results, strict=True):
        # positions in the file have eight decimals
        assert read.get_potential_energy() == pytest.approx(result.energy, abs=1e-5)
    with pytest.raises(FileExistsError):
        predict_file(*tiny, source, output)


# errors: a case small enough to work out by hand


def frame(numbers, config_type, **labels):
    n = len(numbers)
    return Frame(
        np.array(numbers),
        np.arange(3.0 * n).reshape(n, 3),
        np.eye(3) * 10,
        (True,) * 3 if "stress" in labels else (False,) * 3,
        config_type=config_type,
        **labels,
    )


def result(energy, forces, stress=None):
    forces = np.array(forces, float)
    return FrameResult(energy, np.full(len(forces), energy / len(forces)), forces, stress)


@pytest.fixture
def case():
    stress = np.diag([0.1, 0.2, 0.3])
    frames = [
        # ΔE = 0.2 eV over 2 atoms; ΔF = (3, 0, 4), (0, 0, 0) meV/Å
        frame([1, 8], "a", energy=-10.0, forces=np.array([[1.0, 0, 0], [0, 0.001, 0]])),
        # ΔE = -0.3 eV over 1 atom; no forces; Δσ = 9 meV/Å³ in one of nine components
        frame([8], "a", energy=-5.0, stress=stress),
        # only forces: predicted at a right angle
        frame([1], "b", forces=np.array([[0, 2.0, 0]])),
        # nothing at all
        frame([1, 1], "c"),
    ]
    off = stress.copy()
    off[0, 0] += 0.009
    results = [
        result(-9.8, [[1.003, 0, 0.004], [0, 0.001, 0]]),
        result(-5.3, [[7.0, 7.0, 7.0]], off),
        result(3.0, [[2.0, 0, 0]]),
        result(1.0, [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]),
    ]
    return frames, results


def test_errors_are_those_worked_out_by_hand(case):
    table = errors(*case)
    a, b, c = table.groups
    assert [group.name for group in table.groups] == ["a", "b", "c"]
    assert (a.frames, a.atoms, table.total.frames, table.total.atoms) == (2, 3, 4, 6)

    assert a.energy.frames == a.energy.values == 2
    assert a.energy.mae == pytest.approx((0.1 + 0.3) / 2)
    assert a.energy.rmse == pytest.approx(np.sqrt((0.1**2 + 0.3**2) / 2))

    assert (a.forces.frames, a.forces.values) == (1, 6)
    assert a.forces.mae == pytest.approx(0.007 / 6)
    assert a.forces.rmse == pytest.approx(np.sqrt((0.003**2 + 0.004**2) / 6))
    # |ΔF| is 5 and 0 meV/Å; the 95th percentile between two values is 0.95 of the way
    assert a.force_p95 == pytest.approx(0.95 * 0.005)
    # the oxygen, with 1 meV/Å, has no direction
    assert a.force_cosine == pytest.approx(1.003 / np.hypot(1.003, 0.004))

    assert (a.stress.frames, a.stress.values) == (1, 9)
    assert a.stress.mae == pytest.approx(0.001)
    assert a.stress.rmse == pytest.approx(0.003)

    assert b.energy.mae is b.energy.rmse is b.stress.rmse is None
    assert b.forces.rmse == pytest.approx(np.sqrt(8 / 3))
    assert b.force_cosine == pytest.approx(0.0)

    assert (c.frames, c.atoms) == (1, 2)
    assert c.energy.frames == c.forces.frames == c.stress.frames == 0
    assert c.forces.mae is c.force_p95 is c.force_cosine is None

    assert table.total.forces.values == 9
    assert table.total.forces.rmse == pytest.approx(np.sqrt((25e-6 + 8) / 9))
    assert table.total.force_cosine == pytest.approx(a.force_cosine / 2)
    hydrogen, oxygen = table.elements
    assert (hydrogen.symbol, hydrogen.atoms) == ("H", 2)
    assert hydrogen.rmse == pytest.approx(np.sqrt((25e-6 + 8) / 6))
    assert (oxygen.symbol, oxygen.atoms, oxygen.rmse) == ("O", 1, 0.0)


def test_numbers_leave_in_milli_electronvolts_and_gigapascals(case):
    table = errors(*case)
    document = json.loads(json.dumps(table.to_dict()))
    group = document["groups"]["a"]
    assert group["energy"]["mae"] == pytest.approx(200.0)
    assert group["forces"]["p95"] == pytest.approx(4.75)
    assert group["stress"]["rmse"] == pytest.approx(3.0)
    assert group["stress_gpa"]["rmse"] == pytest.approx(0.003 / GPa)
    assert group["stress_gpa"]["rmse"] == pytest.approx(0.480653, abs=1e-6)
    assert document["groups"]["c"]["energy"] == {
        "frames": 0,
        "values": 0,
        "mae": None,
        "rmse": None,
    }
    assert document["units"]["energy"] == "meV/atom"
    assert document["elements"]["O"] == {"atoms": 1, "rmse": 0.0}
    assert table.total.rmse()["stress"] == pytest.approx(3.0)
    assert table.groups[2].rmse() == {"energy": None, "forces": None, "stress": None}


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_fits_a_terminal_and_shows_missing_labels_as_missing(case, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(errors(*case).render())
    lines = console.export_text().splitlines()
    assert "…" not in "".join(lines)
    (first, *_) = [line.split() for line in lines if line.split()[:1] == ["c"]]
    assert first == ["c", "1", "2", "0/0", *"–" * 6]
    (first, *_) = [line.split() for line in lines if line.split()[:1] == ["a"]]
    assert first == ["a", "2", "3", "2/1", "200.0", "223.6", "1.17", "2.04", "4.75", "1.000"]


def test_nothing_but_missing_labels_is_no_stress_table(case):
    frames, results = case
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(errors(frames[:1], results[:1]).render())
    assert "stress" not in console.export_text()


def test_nan_predictions_are_shown_not_hidden(case):
    frames, _ = case
    table = errors(frames[:1], [result(np.nan, np.full((2, 3), np.nan))])
    assert np.isnan(table.total.energy.rmse)
    assert np.isnan(table.total.forces.rmse)


def test_errors_agree_with_the_loss(frames, model, params, batch, objective):
    """The loss is the mean of squares: an implementation of its own, on the device."""
    table = errors(frames, predict_frames(model, params, frames))
    _, terms = jax.jit(objective)(params, batch)
    assert table.total.energy.rmse == pytest.approx(np.sqrt(terms["energy"]), rel=1e-9)
    assert table.total.stress.rmse == pytest.approx(np.sqrt(terms["stress"]), rel=1e-9)
    assert table.total.forces.rmse == pytest.approx(np.sqrt(terms["forces"]), rel=1e-9)
    assert table.total.forces.rmse > 0.01


def test_errors_of_other_frames_are_refused(case):
    frames, results = case
    with pytest.raises(ValueError, match="4 frames and 3 results"):
        errors(frames, results[:3])
    with pytest.raises(ValueError, match="in their order"):
        errors(frames, results[1:] + results[:1])
    with pytest.raises(ValueError, match="no frames"):
        errors([], [])


def test_a_picture_is_drawn(case, tmp_path):
    pytest.importorskip("matplotlib")
    frames, results = case
    path = parity_plot(frames, {"before": results, "after": results}, tmp_path / "parity.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_has_one_panel_per_labelled_quantity(case):
    pytest.importorskip("matplotlib")
    from jaxft.evaluate.plots import _figure, _panels

    frames, results = case
    figure = _figure(_panels(frames, {"before": results, "after": results}))
    parity = figure.axes[:3]
    assert [axes.get_xlabel().split(", ")[1] for axes in parity] == ["eV/atom", "eV/Å", "GPa"]
    for axes in parity:
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_aspect() == 1
    texts = [text.get_text() for text in parity[0].get_legend().get_texts()]
    # total energies, no shift removed: RMSE of 100 and 300 meV/atom
    assert texts == ["before: RMSE 224 meV/atom", "after: RMSE 224 meV/atom"]
    np.testing.assert_allclose(parity[0].collections[0].get_offsets(), [[-5, -4.9], [-5, -5.3]])
    only_forces = _figure(_panels(frames[2:3], {"model": results[2:3]}))
    assert len(only_forces.axes) == 2


def test_a_picture_of_nothing_is_refused(case, tmp_path):
    frames, results = case
    with pytest.raises(ValueError, match="label"):
        parity_plot(frames[3:], {"model": results[3:]}, tmp_path / "parity.png")
    with pytest.raises(ValueError, match="0 sets"):
        parity_plot(frames, {}, tmp_path / "parity.png")


def test_without_matplotlib_the_error_says_what_to_install(case, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    frames, results = case
    with pytest.raises(ImportError, match=r"pip install 'jaxft\[plots\]'"):
        parity_plot(frames, {"model": results}, tmp_path / "parity.png")
