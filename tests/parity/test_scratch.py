"""New models are models of mace-torch: statistics, initial weights, and what an export says."""

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("mace")

import ase.io  # noqa: E402
from mace import data as mace_data  # noqa: E402
from mace import modules  # noqa: E402
from mace.tools import AtomicNumberTable, torch_geometric  # noqa: E402
from parity import reference  # noqa: E402, F401

from converters.rules import parameter_rules  # noqa: E402
from converters.to_torch import _build, export, torch_and_mace  # noqa: E402
from converters.verify import verify  # noqa: E402
from jaxft import bundle, data, scratch, tree  # noqa: E402
from jaxft.architecture import Architecture  # noqa: E402

NACL = Path(__file__).parents[2] / "benchmarks" / "data" / "nacl_test.xyz"
E0S = {11: -5.0, 17: -12.0}
AGNOSTIC, DENSITY = "RealAgnosticInteractionBlock", "RealAgnosticDensityInteractionBlock"
SMALL = {"hidden": "8x0e+8x1o", "l_max": 2, "r_max": 4.0, "num_bessel": 6, "readout": 4}
# Of residual blocks tests/test_scratch.py compares every constant with those of a file.
ARCHITECTURES = {
    "agnostic": SMALL | {"first_block": AGNOSTIC, "correlation": 2},
    "density": SMALL
    | {"first_block": DENSITY, "block": DENSITY.replace("Density", "DensityResidual")}
    | {"distance_transform": "Agnesi", "pair_repulsion": True, "correlation": 2},
    "one layer": SMALL | {"layers": 1, "hidden": "8x0e", "l_max": 1},
}


@pytest.fixture(scope="module")
def frames():
    return data.read(NACL)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_model_exports_and_torch_agrees(name, frames, tmp_path):
    model, params = scratch.new(Architecture(**ARCHITECTURES[name]), frames, e0s=E0S)
    path = export(bundle.cast(model, params, "float64"), tmp_path / "new.model")
    assert verify(path).agrees


def test_initial_weights_are_spread_as_in_torch(frames, tmp_path):
    """Leaf by leaf, of a model that mace-torch has just drawn."""
    model, params = scratch.new(Architecture(**SMALL, correlation=3), frames, e0s=E0S)
    with torch_and_mace("float64") as (torch, mace):
        torch.manual_seed(0)
        module = _build(mace, torch, model.config, model.buffers)
        tensors = {name: p.detach().numpy() for name, p in module.named_parameters()}
    ours, compared = tree.flatten(params), 0
    for rule in parameter_rules(model.config):
        for path, theirs in rule.to_leaves(tensors[rule.name]).items():
            if theirs.size > 100:
                compared += 1
                error = 5 / np.sqrt(theirs.size)
                assert abs(np.std(ours[path]) / np.std(theirs) - 1) < error, path
    assert compared > 15


def test_statistics_are_those_of_mace_torch(frames):
    keys = mace_data.KeySpecification(
        info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"}
    )
    table = AtomicNumberTable([11, 17])
    items = [
        mace_data.AtomicData.from_config(
            mace_data.config_from_atoms(atoms, key_specification=keys),
            z_table=table,
            cutoff=4.0,
        )
        for atoms in ase.io.read(NACL, ":")
    ]
    loader = torch_geometric.dataloader.DataLoader(items, 7, shuffle=False)
    mean, rms = modules.compute_mean_rms_energy_forces(loader, np.array([list(E0S.values())]))
    found = scratch.statistics(frames, 4.0, E0S)
    assert found.scale == pytest.approx(float(np.asarray(rms).squeeze()), rel=1e-5)
    assert found.shift == pytest.approx(float(np.asarray(mean).squeeze()), rel=1e-5)
    average = modules.compute_avg_num_neighbors(loader)
    assert found.avg_num_neighbors == pytest.approx(average, rel=1e-5)
