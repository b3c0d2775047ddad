"""torch MACE as the reference: build, save, evaluate, differentiate; only for tests with torch."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 under torch >= 2.6

import ase
import numpy as np
import torch

from converters.verify import structures
from jaxft import Potential

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from e3nn import o3
    from mace import data as mace_data
    from mace import modules
    from mace.tools import AtomicNumberTable, torch_geometric

MP_ELEMENTS = tuple(z for z in range(1, 95) if z not in range(84, 89))
"""The 89 elements of MACE-MP."""

TEN_ELEMENTS = (1, 6, 8, 11, 14, 17, 26, 38, 72, 82)
"""Where 89 would only make a test slow."""

OFF_ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)
"""H C N O F P S Cl Br I."""

HCNO = (1, 6, 7, 8)

BLOCKS = {
    "A": "RealAgnosticInteractionBlock",
    "R": "RealAgnosticResidualInteractionBlock",
    "D": "RealAgnosticDensityInteractionBlock",
    "DR": "RealAgnosticDensityResidualInteractionBlock",
    "NL": "RealAgnosticResidualNonLinearInteractionBlock",
    "Att": "RealAgnosticAttResidualInteractionBlock",
}
"""Short names of the interaction blocks, e.g. ``blocks="D DR"`` for the first and the others."""

MH1_HEADS = [
    "matpes_r2scan",
    "mp_pbe_refit_add",
    "spice_wB97M",
    "oc20_usemppbe",
    "omol",
    "omat_pbe",
]
"""In the order of the published file."""

CHARGE_AND_SPIN = {
    "total_spin": {
        "type": "categorical",
        "per": "graph",
        "num_classes": 101,
        "offset": 0,
        "emb_dim": 1024,
    },
    "total_charge": {
        "type": "categorical",
        "per": "graph",
        "num_classes": 201,
        "offset": 100,
        "emb_dim": 1024,
    },
}
"""What MACE-OMOL embeds."""

SMALL_CHARGE_AND_SPIN = {name: spec | {"emb_dim": 8} for name, spec in CHARGE_AND_SPIN.items()}

MP0 = {"max_ell": 3, "r_max": 6.0, "num_bessel": 10, "mlp": "16x0e"}
BIAS = {"readout_cls": modules.blocks.NonLinearBiasReadoutBlock}
ZBL = {"pair_repulsion": True, "scale": 1.0, "readout": 40.0}
AGNESI_ZBL = ZBL | {"distance_transform": "Agnesi", "shift": 0.0}
B0 = {"num_bessel": 8, "message": 6.0, "blocks": "A R", **AGNESI_ZBL}
B2 = {"num_bessel": 8, "r_max": 5.0, "message": 2.0, "blocks": "D DR", **AGNESI_ZBL}
B3 = {"hidden": "128x0e+128x1o", "message": 2.0, "blocks": "D DR", **AGNESI_ZBL}
OFF = {"elements": OFF_ELEMENTS, "num_bessel": 8, "blocks": "A R", "shift": 0.0, "message": 4.0}
NON_LINEAR = {"blocks": "NL NL", "apply_cutoff": False, **BIAS}

PUBLISHED: dict[str, dict[str, Any]] = {
    "mp0-small": {"hidden": "128x0e"},
    "mp0-medium": {"hidden": "128x0e+128x1o"},
    "mp0-large": {"hidden": "128x0e+128x1o+128x2e"},
    "0b-small": B0 | {"hidden": "128x0e"},
    "0b-medium": B0 | {"hidden": "128x0e+128x1o"},
    "0b2-small": B2 | {"hidden": "128x0e"},
    "0b2-medium": B2 | {"hidden": "128x0e+128x1o"},
    "0b2-large": B2 | {"hidden": "128x0e+128x1o+128x2e"},
    "0b3-medium": B3 | {"heads": ["Default"]},
    "omat-medium": B3 | {"num_bessel": 8, "heads": ["Default"]},
    "off-small": OFF | {"hidden": "96x0e", "r_max": 4.5},
    "off-medium": OFF | {"hidden": "128x0e+128x1o", "r_max": 5.0},
    "off-large": OFF | {"hidden": "192x0e+192x1o+192x2e", "r_max": 5.0},
    "anicc": OFF | {"elements": HCNO, "hidden": "192x0e+192x1o+192x2e", "r_max": 5.0},
    "mh-0": B3 | {"heads": [*MH1_HEADS, "rgd1_b3lyp"]},
    "mh-1": AGNESI_ZBL
    | NON_LINEAR
    | {
        "hidden": "512x0e+512x1o",
        "message": 15.0,
        "edge_irreps": "128x0e+128x1o",
        "use_edge_irreps_first": True,
        "use_agnostic_product": True,
        "heads": MH1_HEADS,
    },
    "omol": NON_LINEAR
    | {
        "elements": tuple(range(1, 84)),
        "hidden": "1024x0e+1024x1o+1024x2e",
        "edge_irreps": "128x0e+128x1o+128x2e",
        "num_interactions": 3,
        "num_bessel": 8,
        "correlation": 2,
        "use_agnostic_product": True,
        "embedding_specs": CHARGE_AND_SPIN,
        "heads": ["omol"],
        "shift": 0.1021,
    },
}
"""The published energy models at their size (Batatia et al., arXiv:2401.00096 and its successors).

"0b3-medium" is also MPA-0, "omat-medium" also MatPES. What is not public is chosen: irreps of
MACE-OFF small and large and of ANI-cc, Bessel functions of OMAT-0, blocks and heads of MH-0, the
products of OMOL.
"""

SMALL = {"hidden": "8x0e+8x1o", "max_ell": 2, "r_max": 4.5, "num_bessel": 8, "mlp": "4x0e"}
"""No published model: each name made of it turns one option."""

LEAN = SMALL | {"elements": (1, 8, 26), "correlation": 2, "message": 2.0}
TWO_HEADS = {"heads": ["dft", "cc"]}
PLAIN = {"cls": modules.MACE, "readout": 40.0}
BOTH_PARITIES = {"hidden": "8x0e+8x0o+8x1o+8x1e"}
SMALL_NON_LINEAR = {"blocks": "NL NL", "edge_irreps": "4x0e+4x1o"}


def _embedding(kind: str, per: str, **spec: int) -> dict[str, dict[str, Any]]:
    sizes = {"num_classes": 7, "offset": 3} if kind == "categorical" else {"in_dim": 1}
    return {"extra": {"type": kind, "per": per, "emb_dim": 6} | sizes | spec}


OPTIONS: dict[str, dict[str, Any]] = {
    "small-mace": PLAIN,
    "small-mace-zbl": PLAIN | ZBL,
    "small-mace-zbl-heads": PLAIN | ZBL | TWO_HEADS,
    "small-gaussian": {"radial_type": "gaussian"},
    "small-chebyshev": {"radial_type": "chebyshev", "num_bessel": 3, "message": 0.02},
    "small-chebyshev-agnesi": {"radial_type": "chebyshev", "distance_transform": "Agnesi"},
    "small-gaussian-soft": {"radial_type": "gaussian", "distance_transform": "Soft"},
    "small-agnesi": {"distance_transform": "Agnesi"},
    "small-soft": {"distance_transform": "Soft"},
    "small-zbl": ZBL,
    "small-a": {"blocks": "A R"},
    "small-a-a": {"blocks": "A A"},
    "small-d": {"blocks": "D DR"},
    "small-d-d": {"blocks": "D D"},
    "small-dr": {"blocks": "DR DR"},
    "small-attention": {"blocks": "Att Att", "message": 0.3},
    "small-nl": {"blocks": "NL NL"},
    "small-nl-uncut": {"blocks": "NL NL", "apply_cutoff": False},
    "small-nl-edges": SMALL_NON_LINEAR,
    "small-nl-edges-first": SMALL_NON_LINEAR | {"use_edge_irreps_first": True},
    "small-nl-agnostic": SMALL_NON_LINEAR | {"use_agnostic_product": True, "apply_cutoff": False},
    "small-nl-large": SMALL_NON_LINEAR
    | {"hidden": "8x0e+8x1o+8x2e", "edge_irreps": "4x0e+4x1o+4x2e", "use_agnostic_product": True},
    "small-uneven-edges": {"blocks": "D NL", "edge_irreps": "6x0e+3x1o"},
    "small-r-edges": {"edge_irreps": "4x0e+4x1o"},
    "small-d-edges": {"blocks": "D DR", "edge_irreps": "4x0e+4x1o"},
    "small-r-agnostic": {"use_agnostic_product": True},
    "small-r-uncut": {"apply_cutoff": False},
    "small-a-uncut": {"blocks": "A A", "apply_cutoff": False},
    "small-d-uncut": {"blocks": "D DR", "apply_cutoff": False},
    "small-1-layer": {"num_interactions": 1},
    "small-1-layer-heads": {"num_interactions": 1} | TWO_HEADS,
    "small-3-layers": {"num_interactions": 3},
    "small-nl-3-layers": {"num_interactions": 3} | SMALL_NON_LINEAR,
    "small-correlation-1": {"correlation": 1},
    "small-correlation-3": {"correlation": 3},
    "small-correlation-4": {"correlation": 4, "max_ell": 1},
    "small-correlations": {"correlation": [3, 1]},
    "small-last-readout": {"use_last_readout_only": True},
    "small-bias": BIAS,
    "small-bias-heads": BIAS | TWO_HEADS,
    "small-heads": TWO_HEADS,
    "small-5-heads": {"heads": ["a", "b", "c", "d", "e"], "num_interactions": 3},
    "small-last-irreps": {"keep_last_layer_irreps": True},
    "small-so3": {"hidden": "8x0e+8x1e", "use_so3": True},
    "small-r-parity": {"blocks": "R R"} | BOTH_PARITIES,
    "small-a-parity": {"blocks": "A A"} | BOTH_PARITIES,
    "small-d-parity": {"blocks": "D DR"} | BOTH_PARITIES,
    "small-tanh": {"gate": torch.tanh},
    "small-abs": {"gate": torch.abs},
    "small-no-gate": {"gate": None},
    "small-charge-spin": {"embedding_specs": SMALL_CHARGE_AND_SPIN},
    "small-embedding-graph": {"embedding_specs": _embedding("categorical", "graph")},
    "small-embedding-graph-continuous": {"embedding_specs": _embedding("continuous", "graph")},
    "small-embedding-atom": {"embedding_specs": _embedding("categorical", "atom")},
    "small-embedding-atom-continuous": {
        "embedding_specs": _embedding("continuous", "atom", in_dim=3, use_bias=False)
    },
    "small-embedding-mixed": {
        "embedding_specs": SMALL_CHARGE_AND_SPIN | _embedding("continuous", "atom")
    },
    "small-embedding-readout": {
        "embedding_specs": SMALL_CHARGE_AND_SPIN,
        "use_embedding_readout": True,
        "heads": ["dft", "cc"],
    },
    "small-radial": {"radial_MLP": [24, 40]},
    "small-nl-radial": SMALL_NON_LINEAR | {"radial_MLP": [24]},
    "small-trainable": {
        "trainable": ("bessel", "agnesi", "zbl"),
    }
    | AGNESI_ZBL,
    "small-omol": {
        "hidden": "8x0e+8x1o+8x2e",
        "edge_irreps": "4x0e+4x1o+4x2e",
        "num_interactions": 3,
        "embedding_specs": SMALL_CHARGE_AND_SPIN,
        "heads": ["omol"],
        "use_agnostic_product": True,
    }
    | NON_LINEAR,
    "small-mh-1": {
        "message": 6.0,
        "edge_irreps": "4x0e+4x1o",
        "use_edge_irreps_first": True,
        "use_agnostic_product": True,
        "heads": MH1_HEADS,
    }
    | AGNESI_ZBL
    | NON_LINEAR,
}

ARCHITECTURES: dict[str, dict[str, Any]] = (
    {"small": SMALL} | PUBLISHED | {name: LEAN | option for name, option in OPTIONS.items()}
)
"""Besides mace's own arguments: hidden, mlp, blocks, elements, scale and shift;
message and readout, factors on those weights; and trainable, whose constants are
parameters, as after a fine-tune."""

LABELS = mace_data.KeySpecification(
    info_keys={"energy": "REF_energy", "stress": "REF_stress"},
    arrays_keys={"forces": "REF_forces"},
)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | str) -> Iterator[None]:
    """torch's default dtype, restored afterwards."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build(
    name: str = "small",
    *,
    elements: tuple[int, ...] | None = None,
    dtype: str = "float64",
    seed: int = 0,
    message: float | None = None,
    **changes: Any,
) -> torch.nn.Module:
    """A MACE with random weights, of a published architecture or of one that turns one option.

    Every parameter is random and none is degenerate: readouts, biases, scale and shift included.
    With messages of 4 and a scale of 40 (or readouts, where ZBL is scaled too) forces are several
    eV/Å; with plain unit weights the energy is nearly all self-connection.

    Args:
      name: of the architecture, a key of ``ARCHITECTURES``.
      elements: atomic numbers, ascending; by default the architecture's own.
      dtype: of all floating tensors.
      message: factor on the messages' weights, by default the architecture's.
      seed: of the weights.
      changes: arguments of mace's constructor that differ; ``cls`` is the class itself.
    """
    options = MP0 | ARCHITECTURES[name] | changes
    given = elements or options.get("elements", MP_ELEMENTS)
    factor = options.get("message", 1.0) if message is None else message
    cls = options.get("cls", modules.ScaleShiftMACE)
    arguments = _arguments(options, given, np.random.default_rng(seed))
    if cls is modules.MACE:
        del arguments["atomic_inter_scale"], arguments["atomic_inter_shift"]
    with default_dtype(dtype), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = cls(**arguments)
        for kind in options.get("trainable", ()):
            _make_trainable(model, kind)
        with torch.no_grad():
            for module in model.modules():
                for parameter_name, parameter in module.named_parameters(recurse=False):
                    _randomise(module, parameter_name, parameter)
            for interaction in model.interactions:
                linear = getattr(interaction, "linear", None) or interaction.linear_1
                linear.weight.mul_(factor)
            for readout in model.readouts:
                last = getattr(readout, "linear_2", None) or readout.linear
                last.weight.mul_(options.get("readout", 1.0))
    return model


OURS = {"hidden", "mlp", "blocks", "elements", "scale", "shift", "message", "readout", "cls"}
OURS.add("trainable")
"""Keys of an architecture that mace's constructor does not know."""


def _arguments(
    options: dict[str, Any], elements: tuple[int, ...], rng: np.random.Generator
) -> dict[str, Any]:
    """What mace's constructor takes; E0s, scale and shift differ between heads."""
    first, other = (BLOCKS[short] for short in options.get("blocks", "R R").split())
    heads = options.get("heads")
    scale, shift = options.get("scale", 40.0), options.get("shift", 0.1641)
    if heads is None:
        e0s = np.linspace(-10.0, 0.0, len(elements))
    else:
        e0s = rng.uniform(-10.0, 0.0, size=(len(heads), len(elements)))
        scale = (scale * rng.uniform(0.8, 1.2, len(heads))).tolist()
        shift = (shift + shift * rng.normal(size=len(heads))).tolist()
    arguments = {
        "num_polynomial_cutoff": 5,
        "interaction_cls": modules.interaction_classes[other],
        "interaction_cls_first": modules.interaction_classes[first],
        "num_interactions": 2,
        "num_elements": len(elements),
        "hidden_irreps": o3.Irreps(options["hidden"]),
        "MLP_irreps": o3.Irreps(options["mlp"]),
        "atomic_energies": e0s,
        "avg_num_neighbors": 8.0,
        "atomic_numbers": list(elements),
        "correlation": 3,
        "gate": torch.nn.functional.silu,
        "use_reduced_cg": False,
        "atomic_inter_scale": scale,
        "atomic_inter_shift": shift,
    }
    arguments |= {key: value for key, value in options.items() if key not in OURS}
    if isinstance(arguments.get("edge_irreps"), str):
        arguments["edge_irreps"] = o3.Irreps(arguments["edge_irreps"])
    return arguments


TRAINABLE = {
    "bessel": ("radial_embedding.bessel_fn", ("bessel_weights",)),
    "agnesi": ("radial_embedding.distance_transform", ("a", "q", "p")),
    "zbl": ("pair_repulsion_fn", ("a_exp", "a_prefactor")),
}


def _make_trainable(model: torch.nn.Module, kind: str) -> None:
    """Turn constants into parameters, as mace's fine-tuning does with Bessel frequencies."""
    path, names = TRAINABLE[kind]
    module = model.get_submodule(path)
    for name in names:
        value = module._buffers.pop(name)
        module.register_parameter(name, torch.nn.Parameter(value.to(torch.get_default_dtype())))


def _randomise(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Draw a parameter afresh, about as large as training leaves it."""
    around = {"alpha": 20.0, "beta": 1.0}.get(name)
    if around is not None:
        parameter.uniform_(0.5, 1.5).mul_(around)
    elif "radial" in type(module).__module__:
        parameter.mul_(1.0 + 0.05 * torch.randn(parameter.shape))
    elif isinstance(module, torch.nn.LayerNorm):
        parameter.normal_().mul_(0.2).add_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, torch.nn.Linear):
        parameter.normal_().mul_(module.in_features**-0.5 if name == "weight" else 0.3)
    else:
        parameter.normal_()
        if parameter.ndim == 3:
            parameter.div_(parameter.shape[1] ** 0.5)


def save(model: torch.nn.Module, path: Path) -> Path:
    """As ``mace_run_train`` saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, path)
    return path


def load(path: Path) -> torch.nn.Module:
    """The whole module of a file that the test itself wrote, or the one shipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=False)


Heads = str | Sequence[str] | None
"""A head for all frames, or one for each; None for the first."""

Features = Mapping[str, Sequence[Any]] | None
"""Embedded features by name, each with one value (or one array of values of atoms) per frame."""


def batch_of(
    model: torch.nn.Module,
    frames: Sequence[ase.Atoms],
    *,
    head: Heads = None,
    features: Features = None,
) -> Any:
    """One torch batch of ``frames``, labels included where they have some, in the model's dtype.

    What the model embeds is taken from ``features`` or else from the frames, where "charge" and
    "spin" stand for "total_charge" and "total_spin" and default to 0 and 1, as in mace.
    """
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    names = list(getattr(model, "heads", ["Default"]))
    chosen = [head or names[0]] * len(frames) if isinstance(head, str | None) else list(head)
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise ValueError(f"heads {unknown} are not among {names}")
    specs = getattr(model, "embedding_specs", None) or {}
    keys = _keys(specs)
    items = []
    with default_dtype(next(model.parameters()).dtype):
        for i, (atoms, name) in enumerate(zip(frames, chosen, strict=True)):
            given = {key: values[i] for key, values in (features or {}).items()}
            config = mace_data.config_from_atoms(
                _with_features(atoms, specs, given), key_specification=keys, head_name=name
            )
            items.append(
                mace_data.AtomicData.from_config(
                    config, z_table=table, cutoff=float(model.r_max), heads=names
                )
            )
        loader = torch_geometric.dataloader.DataLoader(items, batch_size=len(items), shuffle=False)
        return next(iter(loader))


def _keys(specs: Mapping[str, Any]) -> Any:
    """Where mace finds labels and features; as ``mace_run_train`` does it."""
    info, arrays = dict(LABELS.info_keys), dict(LABELS.arrays_keys)
    for name, spec in specs.items():
        (info if spec["per"] == "graph" else arrays)[name] = name
    return mace_data.KeySpecification(info_keys=info, arrays_keys=arrays)


def _with_features(
    atoms: ase.Atoms, specs: Mapping[str, Any], given: Mapping[str, Any]
) -> ase.Atoms:
    """A copy with features under their names; mace overwrites the cell of what it is given."""
    atoms = atoms.copy()
    for name, short, default in (("total_charge", "charge", 0), ("total_spin", "spin", 1)):
        if name in specs:
            atoms.info.setdefault(name, atoms.info.get(short, default))
    for name, value in given.items():
        if specs[name]["per"] == "graph":
            atoms.info[name] = value
        else:
            atoms.arrays[name] = np.asarray(value)
    for name, spec in specs.items():
        if name not in (atoms.info if spec["per"] == "graph" else atoms.arrays):
            raise ValueError(f"the model embeds {name!r}, which a frame of {atoms.symbols} lacks")
    return atoms


def random_features(model: torch.nn.Module, frames: Sequence[ase.Atoms]) -> dict[str, list[Any]]:
    """A value of everything that the model embeds, for each frame or atom; {} for most models."""
    rng = np.random.default_rng(2)
    found: dict[str, list[Any]] = {}
    for name, spec in (getattr(model, "embedding_specs", None) or {}).items():
        found[name] = []
        for atoms in frames:
            shape = () if spec["per"] == "graph" else (len(atoms),)
            if spec["type"] == "categorical":
                offset = spec.get("offset", 0)
                drawn = rng.integers(1, min(spec["num_classes"] - offset, 4), shape)
            else:
                drawn = rng.normal(size=shape if spec["in_dim"] == 1 else (*shape, spec["in_dim"]))
            found[name].append(drawn if shape else drawn.item())
    return found


def has_forces(model: torch.nn.Module) -> bool:
    """False with Chebyshev's basis, which torch cannot differentiate."""
    return type(model.radial_embedding.bessel_fn).__name__ != "ChebychevBasis"


def _forward(model: torch.nn.Module, batch: Any, *, training: bool) -> dict[str, Any]:
    differentiable = has_forces(model)
    with default_dtype(next(model.parameters()).dtype):
        return model(
            batch.to_dict(),
            training=training,
            compute_force=differentiable,
            compute_stress=differentiable,
            compute_virials=differentiable,
        )


class Evaluation(NamedTuple):
    """torch's answers in float64. G frames, N atoms in all.

    Forces, virial and stress are NaN where torch has no derivative (:func:`has_forces`).
    """

    energy: np.ndarray
    """[G] eV, isolated-atom energies (and an embedding readout) included."""
    interaction: np.ndarray
    """[G] eV, without them."""
    forces: np.ndarray
    """[N, 3] eV/Å."""
    virial: np.ndarray
    """[G, 3, 3] eV, stress times volume: torch's virials have the opposite sign."""
    stress: np.ndarray
    """[G, 3, 3] eV/Å³; of a made-up volume for frames with open directions."""


def evaluate(
    model: torch.nn.Module,
    frames: Sequence[ase.Atoms],
    *,
    head: Heads = None,
    features: Features = None,
) -> Evaluation:
    """Energies, forces and stresses of all frames, as one batch."""
    batch = batch_of(model, frames, head=head, features=features)
    out = _forward(model, batch, training=False)
    if "interaction_energy" not in out:  # plain MACE: contributions are [E0, ZBL, layers]
        out["interaction_energy"] = out["contributions"][:, 1:].sum(dim=1)
    shapes = {"forces": (len(batch.batch), 3)} | dict.fromkeys(
        ("virials", "stress"), (len(frames), 3, 3)
    )
    energy, interaction, forces, virials, stress = (
        np.full(shapes[name], np.nan) if out[name] is None else out[name].detach().double().numpy()
        for name in ("energy", "interaction_energy", "forces", "virials", "stress")
    )
    return Evaluation(energy, interaction, forces, -virials, stress)


def gradient(
    model: torch.nn.Module,
    frames: Sequence[ase.Atoms],
    *,
    energy: float,
    forces: float,
    stress: float,
    head: Heads = None,
    features: Features = None,
) -> tuple[float, dict[str, np.ndarray]]:
    """``WeightedEnergyForcesStressLoss`` of labelled frames and its gradient by parameter name."""
    batch = batch_of(model, frames, head=head, features=features)
    with default_dtype(next(model.parameters()).dtype):
        loss_fn = modules.WeightedEnergyForcesStressLoss(energy, forces, stress)
    model.zero_grad()
    loss = loss_fn(batch, _forward(model, batch, training=True))
    loss.backward()
    return loss.item(), {
        name: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy()
        for name, p in model.named_parameters()
    }


def labelled_crystals(model: Potential, *, head: str | None = None) -> list[ase.Atoms]:
    """Periodic frames with a random energy about the E0s of a head, forces and stress each."""
    rng = np.random.default_rng(1)
    crystal = structures(model.atomic_numbers, model.r_max)["triclinic crystal"]
    numbers = rng.choice(model.atomic_numbers, 8)
    cube = ase.Atoms(
        numbers,
        2.8 * np.argwhere(np.ones((2, 2, 2))) + rng.normal(scale=0.2, size=(8, 3)),
        cell=5.6 * np.eye(3) + rng.normal(scale=0.2, size=(3, 3)),
        pbc=True,
    )
    row = 0 if head is None else model.head_index(head)
    e0 = dict(zip(model.atomic_numbers, np.atleast_2d(model.e0s)[row].tolist(), strict=True))
    frames = [crystal.copy(), cube]
    for atoms in frames:
        stress = rng.normal(scale=0.02, size=(3, 3))
        atoms.info["REF_energy"] = sum(e0[z] for z in atoms.numbers.tolist()) + rng.normal()
        atoms.info["REF_stress"] = 0.5 * (stress + stress.T)
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
    return frames
