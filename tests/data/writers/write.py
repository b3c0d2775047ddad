"""Writes random-weight models with whichever mace-torch is imported, and what that version says.

Needs torch and mace-torch, any version from 0.3.4 on, and nothing of jaxft, so that a file is what
its writer made of it. ``benchmarks/writers.py`` runs it under one version after another::

    PYTHONPATH=<folder of one mace-torch> python tests/data/writers/write.py FOLDER --size tiny
"""

import argparse
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 under torch >= 2.6
warnings.simplefilter("ignore")

import ase  # noqa: E402
import e3nn  # noqa: E402
import mace  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from e3nn import o3  # noqa: E402
from mace import data as mace_data  # noqa: E402
from mace import modules  # noqa: E402
from mace.tools import AtomicNumberTable, cg, torch_geometric  # noqa: E402

SEED = 1
CONSTRUCTOR = tuple(inspect.signature(modules.MACE.__init__).parameters)[1:]
HEADS = ("dft", "cc")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "elements": (1, 8, 26),
        "r_max": 3.5,
        "num_bessel": 4,
        "max_ell": 1,
        "correlation": 2,
        "hidden": "2x0e+2x1o",
        "scalars": "3x0e",
        "edge": "1x0e+1x1o",
        "mlp": "2x0e",
        "radial_MLP": [6, 5],
        "embedding": 3,
    },
    "published": {
        "elements": tuple(z for z in range(1, 95) if z not in range(84, 89)),
        "r_max": 6.0,
        "num_bessel": 10,
        "max_ell": 3,
        "correlation": 3,
        "hidden": "128x0e+128x1o",
        "scalars": "128x0e",
        "edge": "128x0e+128x1o",
        "mlp": "16x0e",
        "radial_MLP": [64, 64, 64],
        "embedding": 128,
    },
}


def kinds(size: str) -> dict[str, dict[str, Any]]:
    """The constructor arguments of each kind of model that this version can build."""
    options = SIZES[size]
    wanted: dict[str, dict[str, Any]] = {
        "residual": {"blocks": ("Residual", "Residual")},
        "agnesi-zbl": {
            "blocks": ("", "Residual"),
            "hidden": options["scalars"],
            "distance_transform": "Agnesi",
            "pair_repulsion": True,
        },
        "density-heads": {
            "blocks": ("Density", "DensityResidual"),
            "message": 1.0,
            "heads": list(HEADS),
            "distance_transform": "Agnesi",
            "pair_repulsion": True,
        },
        "nonlinear": {
            "blocks": ("ResidualNonLinear", "ResidualNonLinear"),
            "hidden": options["hidden"] if size == "tiny" else "512x0e+512x1o",
            "heads": ["omol"],
            "distance_transform": "Agnesi",
            "pair_repulsion": True,
            "apply_cutoff": False,
            "use_agnostic_product": True,
            "edge_irreps": o3.Irreps(options["edge"]),
            "readout_cls": getattr(modules.blocks, "NonLinearBiasReadoutBlock", None),
            "embedding_specs": {
                name: {
                    "type": "categorical",
                    "per": "graph",
                    "num_classes": classes,
                    "offset": offset,
                    "emb_dim": options["embedding"],
                }
                for name, classes, offset in (("total_spin", 6, 0), ("total_charge", 7, 3))
            },
        },
    }
    wanted["nonlinear-heads"] = wanted["nonlinear"] | {"heads": list(HEADS)}
    if size == "tiny":
        wanted |= {
            "one-layer": {"blocks": ("Residual", "Residual"), "num_interactions": 1},
            "plain": {
                "blocks": ("", "Residual"),
                "hidden": options["scalars"],
                "cls": modules.MACE,
            },
            "soft": {
                "blocks": ("Residual", "Residual"),
                "hidden": options["scalars"],
                "distance_transform": "Soft",
            },
            "edges-first": wanted["nonlinear-heads"] | {"use_edge_irreps_first": True},
            "reduced": {
                "blocks": ("Residual", "Residual"),
                "correlation": 3,
                "use_reduced_cg": True,
            },
        }
    return {name: arguments for name, arguments in wanted.items() if _known(arguments)}


def _known(arguments: Mapping[str, Any]) -> bool:
    """Whether this version knows every argument and both blocks."""
    if arguments.get("use_reduced_cg") and not getattr(cg, "CUET_AVAILABLE", False):
        return False
    names = set(arguments) - {"blocks", "cls", "hidden", "message"}
    blocks = {_block(short) for short in arguments["blocks"]}
    return names <= set(CONSTRUCTOR) and blocks <= set(modules.interaction_classes)


def _block(short: str) -> str:
    return f"RealAgnostic{short}InteractionBlock"


def build(size: str, **changes: Any) -> torch.nn.Module:
    """A model with every parameter random and forces of some eV/Å."""
    options = SIZES[size] | changes
    elements = options["elements"]
    first, other = (modules.interaction_classes[_block(name)] for name in options["blocks"])
    cls = options.get("cls", modules.ScaleShiftMACE)
    heads = options.get("heads")
    rng = np.random.default_rng(SEED)
    shape = () if heads is None else (len(heads),)
    arguments = {
        "r_max": options["r_max"],
        "num_bessel": options["num_bessel"],
        "num_polynomial_cutoff": 5,
        "max_ell": options["max_ell"],
        "interaction_cls": other,
        "interaction_cls_first": first,
        "num_interactions": 2,
        "num_elements": len(elements),
        "hidden_irreps": o3.Irreps(options["hidden"]),
        "MLP_irreps": o3.Irreps(options["mlp"]),
        "atomic_energies": rng.uniform(-1.0, 0.0, (*shape, len(elements))),
        "avg_num_neighbors": 4.0,
        "atomic_numbers": list(elements),
        "correlation": options["correlation"],
        "gate": torch.nn.functional.silu,
        "radial_MLP": options["radial_MLP"],
    }
    arguments |= {name: value for name, value in changes.items() if name in CONSTRUCTOR}
    if "use_reduced_cg" in CONSTRUCTOR:
        arguments.setdefault("use_reduced_cg", False)
    if cls is modules.ScaleShiftMACE:
        arguments["atomic_inter_scale"] = rng.uniform(0.8, 1.2, shape).tolist()
        arguments["atomic_inter_shift"] = rng.uniform(-0.2, 0.2, shape).tolist()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(SEED)
    model = cls(**arguments)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                randomise(module, name, parameter)
        for interaction in model.interactions:
            linear = getattr(interaction, "linear", None) or interaction.linear_1
            linear.weight.mul_(options.get("message", 4.0))
        for readout in model.readouts:
            last = getattr(readout, "linear_2", None) or readout.linear
            last.weight.mul_(20.0)
    return model


def randomise(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Draw a parameter afresh, about as large as training leaves it."""
    around = {"alpha": 20.0, "beta": 1.0}.get(name)
    if around is not None:
        parameter.uniform_(0.5, 1.5).mul_(around)
    elif isinstance(module, torch.nn.LayerNorm):
        parameter.normal_().mul_(0.2).add_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, torch.nn.Linear):
        parameter.normal_().mul_(module.in_features**-0.5 if name == "weight" else 0.3)
    else:
        parameter.normal_()
        if parameter.ndim == 3:
            parameter.div_(parameter.shape[1] ** 0.5)


def structures(elements: Sequence[int]) -> list[ase.Atoms]:
    """Two dimers, a molecule and a triclinic crystal whose atoms see their own images.

    The heavy dimer is shorter than any bond: elsewhere the old Soft transform is the identity.
    """
    a, b, c = (elements[i] for i in (0, len(elements) // 2, -1))
    cell = [[3.4, 0.1, -0.3], [0.9, 3.7, 0.2], [-0.5, 0.8, 3.2]]
    frames = [
        ase.Atoms([a, b], [[0.0, 0.0, 0.0], [0.7, -0.6, 0.9]]),
        ase.Atoms([c, c], [[0.0, 0.0, 0.0], [0.5, -0.4, 0.8]]),
        ase.Atoms([b, a, c, a], [[0, 0, 0], [1.3, 0.4, -0.3], [-0.8, 2.0, 0.5], [0.3, -0.5, 1.6]]),
        ase.Atoms([c, b, a], [[0.1, 0.2, 0.3], [1.9, 1.5, 1.2], [0.2, 2.3, 0.4]], cell=cell, pbc=1),
    ]
    for atoms, charge, spin in zip(frames, (0, -1, -2, 1), (1, 2, 3, 2), strict=True):
        atoms.info |= {"charge": charge, "spin": spin}
    return frames


def evaluate(
    model: torch.nn.Module, frames: Sequence[ase.Atoms], head: int
) -> list[dict[str, Any]]:
    """Energy (total), energies of atoms, forces and, in crystals, stress of each frame."""
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    from_config = mace_data.AtomicData.from_config
    answers = []
    for atoms in frames:
        config = mace_data.config_from_atoms(atoms.copy())
        item = from_config(config, z_table=table, cutoff=float(model.r_max))
        graph = next(iter(torch_geometric.dataloader.DataLoader([item], batch_size=1))).to_dict()
        graph["head"] = torch.tensor([head])
        graph["total_charge"] = torch.tensor([float(atoms.info["charge"])])
        graph["total_spin"] = torch.tensor([float(atoms.info["spin"])])
        out = model(graph, compute_force=True, compute_stress=True)
        found = {name: out[name].detach() for name in ("energy", "node_energy", "forces", "stress")}
        answers.append(
            {
                "energy": found["energy"].item(),
                "node_energy": found["node_energy"].reshape(-1).tolist(),
                "forces": found["forces"].tolist(),
                "stress": found["stress"].reshape(3, 3).tolist() if atoms.pbc.all() else None,
            }
        )
    return answers


def record(model: torch.nn.Module, frames: Sequence[ase.Atoms]) -> dict[str, Any]:
    """All that a test needs to know, and where it comes from."""
    names = getattr(model, "heads", None)
    return {
        "origin": {
            "mace-torch": mace.__version__,
            "torch": torch.__version__.split("+")[0],
            "e3nn": e3nn.__version__,
            "seed": SEED,
            "made by": "tests/data/writers/write.py",
        },
        "units": "eV, eV/Å, eV/Å^3; energies with E0",
        "model attributes": attributes(model),
        "constructor": list(CONSTRUCTOR),
        "heads": names,
        "e0s": np.atleast_2d(model.atomic_energies_fn.atomic_energies.numpy()).tolist(),
        "frames": [
            {
                "numbers": atoms.numbers.tolist(),
                "positions": atoms.positions.tolist(),
                "cell": atoms.cell.tolist(),
                "pbc": atoms.pbc.tolist(),
                "charge": atoms.info["charge"],
                "spin": atoms.info["spin"],
            }
            for atoms in frames
        ],
        "answers": [evaluate(model, frames, head) for head in range(len(names or [None]))],
    }


def attributes(model: torch.nn.Module) -> dict[str, list[str]]:
    """Plain attributes, parameters' and buffers' names of the modules whose layout has changed."""
    parts: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
        "model": lambda model: model,
        "radial_embedding": lambda model: model.radial_embedding,
        "distance_transform": lambda model: model.radial_embedding.distance_transform,
        "cutoff_fn": lambda model: model.radial_embedding.cutoff_fn,
        "pair_repulsion_fn": lambda model: model.pair_repulsion_fn,
        "interaction": lambda model: model.interactions[0],
        "product": lambda model: model.products[0],
        "contraction": lambda model: model.products[0].symmetric_contractions.contractions[0],
        "readout": lambda model: model.readouts[-1],
    }
    standard = set(vars(torch.nn.Module()))
    found = {}
    for name, part in parts.items():
        try:
            module = part(model)
        except AttributeError:
            continue
        own = {*vars(module), *module._buffers, *module._parameters, *module._modules} - standard
        found[name] = sorted(own)
    cutoff = model.radial_embedding.cutoff_fn
    found["cutoff_fn"] = [f"p: {str(cutoff.p.dtype).removeprefix('torch.')}", *found["cutoff_fn"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--version", help="refuse to run under another mace-torch")
    parser.add_argument("--only", nargs="*", help="kinds of model")
    options = parser.parse_args()
    if options.version not in (None, mace.__version__):
        raise SystemExit(f"mace {mace.__version__} was imported, from {mace.__file__}")
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for kind, arguments in kinds(options.size).items():
        if options.only is None or kind in options.only:
            model = build(options.size, **arguments)
            torch.save(model, options.folder / f"{kind}.model")
            document = {"kind": kind} | record(model, structures(SIZES[options.size]["elements"]))
            path = options.folder / f"{kind}.json"
            path.write_text(json.dumps(document, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
