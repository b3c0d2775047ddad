"""The laws of jaxft.testing over every strategy and over pairs; and that each law can fail."""

import itertools
from pathlib import Path

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import testing, tree
from jaxft.data import unlabelled
from jaxft.potential import Prediction
from jaxft.strategies import (
    STRATEGIES,
    Strategy,
    base,
    delta,
    distill,
    dora,
    elora,
    ewc,
    freeze,
    l2sp,
    lora,
    lora_torch,
    multihead_replay,
    pseudolabel_replay,
    rates,
    replay,
    sparse,
)

KEY = jax.random.key(7)


def consolidated(strength=0.5):
    """``ewc`` with a Fisher for whichever tree it meets, zero for some of its numbers."""

    def at(params):
        importance = jax.tree.map(lambda x: np.maximum(np.sin(99 * np.asarray(x)), 0), params)
        return ewc(importance, strength=strength)

    penalty = ewc({"any": jnp.ones(())}, strength=strength).penalty  # reads its constants alone
    return Strategy(
        name="ewc",
        trains=lambda params: at(params).trains(params),
        init=lambda key, params: at(params).init(key, params),
        penalty=penalty,
    )


def ball(radius=0.1, name="ball"):
    """Additive deltas of the radial networks, kept in a box; it projects and owns coordinates."""

    def init(key, params):
        chosen = tree.select(params, "**/conv_tp_weights/*")
        flat = tree.flatten(params)
        return tree.unflatten({path: jnp.zeros_like(flat[path]) for path in chosen}), {}

    def apply(params, coords, consts):
        delta = tree.flatten(coords)
        return tree.unflatten(
            {
                path: leaf + delta[path] if path in delta else leaf
                for path, leaf in tree.flatten(params).items()
            }
        )

    def project(coords, consts):
        return jax.tree.map(lambda x: jnp.clip(x, -radius, radius), coords)

    return Strategy(name=name, init=init, apply=apply, project=project)


def toy(params, graph):
    """A prediction for any tree: enough for a penalty on predictions."""
    waves = sum(jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(jax.tree.leaves(params)))
    per_atom = graph.species[:, None] + waves
    energy = graph.volume * waves
    return Prediction(
        energy=energy,
        node_energy=per_atom[:, 0],
        forces=per_atom * jnp.ones(3),
        stress=energy[:, None, None] * jnp.ones((3, 3)),
    )


WATER = [unlabelled(ase.build.molecule("H2O"))]

PUBLIC = {
    "freeze": freeze("interactions_*/**"),
    "rates": rates({"node_embedding/**": 0.1, "products_*/**": {"from": 1, "factor": 0.5}}),
    "lora": lora(rank=2),
    "lora_torch": lora_torch(rank=2, name="lora_torch"),
    "elora": elora(rank=2, alpha=2.0),
    "dora": dora(rank=2),
    "delta": delta("interactions_*/**"),
    "sparse": sparse(threshold=1e-3),
    "l2sp": l2sp(0.5),
    "ewc": consolidated(),
    "distill": distill(toy, strength=0.5),
    "replay": replay(WATER, fraction=0.25),
    "multihead_replay": multihead_replay(WATER, head="Default"),
    "pseudolabel_replay": pseudolabel_replay(WATER, schedule="alternate"),
}
"""One of each strategy that a config may name."""

MEMBERS = PUBLIC | {
    "freeze-all-but": freeze(except_=("readouts_*/**", "products_*/**"), name="all-but"),
    "freeze-callable": freeze(lambda path, leaf: leaf.ndim == 3, name="callable"),
    "freeze-level": freeze(level=6, name="level"),
    "lora-per-element": lora("interactions_*/skip_tp/*", rank=1, name="elements"),
    "lora-and-train": lora(
        "**/conv_tp_weights/*", rank=3, alpha=2.0, also_train="readouts_*/**", name="and-train"
    ),
    "lora-rslora": lora(rank=3, scaling="rslora", name="rslora"),
    "sparse-per-leaf": sparse("**/skip_tp/*", per="leaf", name="per-leaf"),
    "ball": ball(),
}
SINGLE = {"full": (), **{name: (member,) for name, member in MEMBERS.items()}}
PAIRS = {f"{a}+{b}": (PUBLIC[a], PUBLIC[b]) for a, b in itertools.combinations(PUBLIC, 2)}
THREE = {
    "lora+ewc+ball": (MEMBERS["lora"], MEMBERS["ewc"], MEMBERS["ball"]),
    "dora+sparse+l2sp": (MEMBERS["dora"], MEMBERS["sparse"], MEMBERS["l2sp"]),
    "rates+delta+replay": (MEMBERS["rates"], MEMBERS["delta"], MEMBERS["replay"]),
}
RECIPES = SINGLE | PAIRS | THREE

singles = pytest.mark.parametrize("recipe", (SINGLE | THREE).values(), ids=(SINGLE | THREE).keys())
pairs = pytest.mark.parametrize("recipe", PAIRS.values(), ids=PAIRS.keys())

LEAVES = (
    "node_embedding/linear/0e",
    "interactions_0/linear_up/0e",
    "interactions_0/conv_tp_weights/layer0",
    "interactions_0/linear/1o",
    "interactions_0/skip_tp/0e",
    "products_0/symmetric_contractions/0e/weights_max",
    "products_0/symmetric_contractions/0e/weights_0",
    "products_0/linear/0e",
    "readouts_0/linear/0e",
)
"""A leaf of each kind."""


@pytest.fixture(scope="module")
def layer(params):
    """Enough for laws that need no potential, and faster."""
    flat = tree.flatten(params)
    return tree.unflatten({path: flat[path] for path in LEAVES})


def wavy(params, batch):
    """A loss with a gradient for every number of the tree; cheap to compile."""
    return sum(jnp.sum(jnp.sin(leaf + i)) for i, leaf in enumerate(jax.tree.leaves(params))), {}


def optimiser():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))


def test_every_public_strategy_is_tried():
    assert set(PUBLIC) == set(STRATEGIES)


@singles
def test_recipe_obeys_the_laws(recipe, predictor, params, batch):
    testing.assert_lawful(recipe, predictor, params, batch)


@singles
def test_recipe_trains_lawfully(recipe, layer, batch):
    finetuned = jaxft.finetune(wavy, recipe, optimiser())
    with jax.disable_jit():
        testing.assert_trains_lawfully(finetuned, jaxft.merge, recipe, layer, batch)


@pairs
def test_pair_obeys_the_laws(recipe, predictor, params, layer, batch):
    """The laws that need a potential with it, the others on a leaf of each kind."""
    testing.assert_equivariant(recipe, predictor, params, batch.graph, key=KEY)
    testing.assert_lawful_trees(recipe, layer, batch, key=KEY)


@pairs
def test_pair_trains_lawfully(recipe, layer, batch):
    finetuned = jaxft.finetune(wavy, recipe, optimiser())
    with jax.disable_jit():  # the same laws, without a compilation per recipe
        testing.assert_trains_lawfully(finetuned, jaxft.merge, recipe, layer, batch, steps=2)


def test_recipe_trains_a_potential_lawfully(predictor, params, batch, objective):
    """With the loss of a potential; law 10 in energies, forces and stresses."""
    recipe = (MEMBERS["lora-and-train"], MEMBERS["ewc"], MEMBERS["ball"])
    init, step = finetuned = jaxft.finetune(objective, recipe, optimiser())
    testing.assert_trains_lawfully(finetuned, jaxft.merge, recipe, params, batch)
    state, _ = step(init(KEY, params), batch)
    whole = tree.combine(state.trainable.params, state.frozen.params)
    effective = base.apply(recipe, whole, state.trainable.coords, state.frozen.consts)
    merged = predictor(jaxft.merge(recipe, state), batch.graph)
    seen, before = predictor(effective, batch.graph), predictor(params, batch.graph)
    for a, b, start in zip(
        jax.tree.leaves(merged), jax.tree.leaves(seen), jax.tree.leaves(before), strict=True
    ):
        assert jnp.array_equal(a, b)
        assert not jnp.array_equal(a, start)


# --- every law can fail ---------------------------------------------------------------------------


def shifted(amount):
    return lambda params, coords, consts: jax.tree.map(lambda x: x + amount, params)


def test_law_1_sees_a_start_that_is_not_the_identity(params):
    with pytest.raises(AssertionError, match=r"at init changes .*node_embedding/linear/0e"):
        testing.assert_identity_at_init(
            (Strategy(name="bad", apply=shifted(1e-12)),), params, key=KEY
        )


def test_law_2_sees_another_dtype_and_a_lost_leaf(params):
    def single(params, coords, consts):
        return jax.tree.map(lambda x: x.astype("float32"), params)

    def lossy(params, coords, consts):
        return {name: node for name, node in params.items() if name != "readouts_1"}

    with pytest.raises(AssertionError, match=r"float64\[.*\] into float32"):
        testing.assert_keeps_structure((Strategy(name="bad", apply=single),), params, key=KEY)
    with pytest.raises(AssertionError, match="- readouts_1/linear_1/0e"):
        testing.assert_keeps_structure((Strategy(name="bad", apply=lossy),), params, key=KEY)


def test_law_2_sees_masks_that_are_not_of_bools(params, monkeypatch):
    monkeypatch.setattr(base, "trains", lambda recipe, params: jax.tree.map(jnp.any, params))
    with pytest.raises(AssertionError, match=r"the mask of .* at '.*/layer0' is"):
        testing.assert_keeps_structure((), params, key=KEY)


def test_law_3_sees_a_model_that_prefers_a_direction(predictor, params, batch):
    def leaning(params, graph):
        out = predictor(params, graph)
        return out._replace(forces=out.forces + jnp.array([1e-6, 0.0, 0.0]))

    def handed(params, graph):
        out = predictor(params, graph)
        u, v = graph.vectors[:, 0], graph.vectors[:, 1]
        twist = jnp.sum(jnp.cross(u, v) * graph.vectors[:, 2])
        return out._replace(node_energy=out.node_energy + 1e-3 * twist)

    with pytest.raises(AssertionError, match="forces are not equivariant under a rotation"):
        testing.assert_equivariant((), leaning, params, batch.graph, key=KEY)
    with pytest.raises(AssertionError, match="energies are not equivariant under inversion"):
        testing.assert_equivariant((), handed, params, batch.graph, key=KEY)


def test_law_4_sees_decay_of_frozen_leaves_and_states_for_them(layer):
    recipe = (MEMBERS["freeze"],)
    init, step = jaxft.finetune(wavy, recipe, optimiser())

    def decaying(state, batch):
        state, info = step(state, batch)
        smaller = jax.tree.map(lambda x: 0.999 * x, state.frozen.params)
        return state._replace(frozen=state.frozen._replace(params=smaller)), info

    def hoarding(key, params):
        return init(key, params)._replace(opt_state=optax.adam(1e-3).init(params))

    def idle(state, batch):
        return state, {"is_finite": True}

    with pytest.raises(AssertionError, match=r"moved frozen leaves: .*interactions_0/linear_up/0e"):
        testing.assert_trains_lawfully((init, decaying), jaxft.merge, recipe, layer, None)
    with pytest.raises(AssertionError, match=r"'interactions_0/.*', frozen, has an opt"):
        testing.assert_trains_lawfully((hoarding, step), jaxft.merge, recipe, layer, None)
    with pytest.raises(AssertionError, match="moved nothing"):
        testing.assert_trains_lawfully((init, idle), jaxft.merge, recipe, layer, None)


def test_law_5_sees_masks_that_depend_on_the_order(params, monkeypatch):
    monkeypatch.setattr(base, "trains", lambda recipe, params: recipe[-1].trains(params))
    with pytest.raises(AssertionError, match=r"masks of .* depend on the order"):
        testing.assert_order_free(RECIPES["freeze+lora"], params, None, key=KEY)


def test_law_6_sees_a_negative_penalty_and_a_pull_at_the_anchor(params):
    def of(penalty):
        return (Strategy(name="bad", penalty=lambda p, c, b: penalty(p["readouts_0"])),)

    value = params["readouts_0"]["linear"]["0e"]
    cases = {
        "is -.*, negative": lambda p: -jnp.sum((p["linear"]["0e"] - value) ** 2),
        "is 2.* at its anchor": lambda p: 2.0 + jnp.sum((p["linear"]["0e"] - value) ** 2),
        "pulls 'readouts_0/linear/0e'": lambda p: jnp.sum(p["linear"]["0e"] - value),
    }
    for match, penalty in cases.items():
        with pytest.raises(AssertionError, match=match):
            testing.assert_penalty_anchored(of(penalty), params, None, key=KEY)


def test_law_7_sees_a_projection_that_goes_on(params):
    bad = Strategy(
        name="bad",
        init=lambda key, params: ({"x": jnp.ones(3)}, {}),
        project=lambda coords, consts: jax.tree.map(lambda x: 0.5 * x, coords),
    )
    with pytest.raises(AssertionError, match="applied twice changes 'bad/x'"):
        testing.assert_projection_idempotent((bad,), params, key=KEY)


def test_law_8_sees_keys_that_count_members(params, monkeypatch):
    def init(recipe, key, params):
        drawn = [s.init(jax.random.fold_in(key, i), params) for i, s in enumerate(recipe)]
        return tuple({s.name: d[k] for s, d in zip(recipe, drawn, strict=True)} for k in (0, 1))

    monkeypatch.setattr(base, "init", init)
    with pytest.raises(AssertionError, match="'and-train' draws other coordinates"):
        testing.assert_own_keys((MEMBERS["lora"], MEMBERS["lora-and-train"]), params, key=KEY)


def test_law_9_sees_python_that_looks_at_values(params):
    def peeking(params, coords, consts):
        is_traced = isinstance(params["readouts_0"]["linear"]["0e"], jax.core.Tracer)
        return jax.tree.map(lambda x: x * (1.0 + 1e-6 * is_traced), params)

    with pytest.raises(AssertionError, match=r"apply of .* depends on jit"):
        testing.assert_jit_agrees((Strategy(name="bad", apply=peeking),), params, None, key=KEY)


def test_law_10_sees_a_merge_that_forgets_a_strategy_or_shares_buffers(layer):
    recipe = (MEMBERS["lora"],)
    finetuned = jaxft.finetune(wavy, recipe, optimiser())

    def forgetful(recipe, state):
        return tree.combine(state.trainable.params, state.frozen.params)

    with pytest.raises(AssertionError, match="does not give the effective"):
        testing.assert_trains_lawfully(finetuned, forgetful, recipe, layer, None)
    with pytest.raises(AssertionError, match="shares its buffer"):
        testing.assert_trains_lawfully(
            jaxft.finetune(wavy, (), optimiser()), forgetful, (), layer, None
        )


def test_the_page_has_a_row_and_a_tick_for_every_pair():
    page = (Path(__file__).parents[1] / "docs" / "strategies.md").read_text()
    rows = {
        cells[1]: cells[2:-1]
        for cells in (line.split("|") for line in page.splitlines())
        if len(cells) == len(PUBLIC) + 3 and cells[1] in PUBLIC
    }
    assert list(rows) == list(PUBLIC)
    assert all(set(ticks) == {"✓"} for ticks in rows.values()), "run benchmarks/laws.py --write"
