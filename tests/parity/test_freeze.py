"""Levels of freezing are torch MACE's, by name."""

import argparse

import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
pytest.importorskip("mace")

from mace.tools.scripts_utils import get_params_options  # noqa: E402
from parity import reference  # noqa: E402

from converters.rules import parameter_rules  # noqa: E402
from converters.to_jax import convert  # noqa: E402
from jaxft import tree  # noqa: E402
from jaxft.strategies.freeze import freeze  # noqa: E402

MODELS = ("small-d", "small-zbl", "small-mh-1", "small-embedding-readout")


def required_grads(module, level):
    """What torch's own function leaves to train, by parameter name."""
    for parameter in module.parameters():
        parameter.requires_grad = True
    factors = '{"embedding_lr_factor": 1.0}'
    numbers = {"lr": 0.01, "weight_decay": 0.0, "amsgrad": True, "beta": 0.9}
    arguments = argparse.Namespace(freeze=level, lr_params_factors=factors, **numbers)
    get_params_options(arguments, module)
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_a_level_trains_what_torch_trains(name, tmp_path):
    module = reference.build(name)
    model, params = convert(reference.save(module, tmp_path / "random.model"))
    leaves = {
        block.path: rule.name for rule in parameter_rules(model.config) for block in rule.blocks
    }
    assert leaves.keys() == tree.flatten(params).keys()
    masks = {}
    for level in range(1, 8):
        theirs = required_grads(module, level)
        expected = {path: theirs[torch_name] for path, torch_name in leaves.items()}
        masks[level] = tree.flatten(freeze(level=level).trains(params))
        assert masks[level] == expected, level
    assert masks[1] == masks[2] == masks[3] == masks[4] != masks[5] != masks[6] != masks[7]


def test_a_level_means_the_same_with_and_without_repulsion(tmp_path):
    """Where levels count modules, as in mace-freeze, the repulsion shifts them."""
    masks = []
    for plain in (True, False):
        module = reference.build("small-zbl", pair_repulsion=not plain)
        assert hasattr(module, "pair_repulsion_fn") != plain
        _, params = convert(reference.save(module, tmp_path / "random.model"))
        masks.append([freeze(level=level).trains(params) for level in range(1, 8)])
    assert masks[0] == masks[1]
