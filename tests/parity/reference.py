"""torch MACE as the reference: build, save, evaluate, differentiate; only for tests with torch."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
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

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "small": {"hidden": "8x0e+8x1o", "max_ell": 2, "r_max": 4.5, "num_bessel": 8, "mlp": "4x0e"},
    "mp0-small": {"hidden": "128x0e"},
    "mp0-medium": {"hidden": "128x0e+128x1o"},
    "mp0-large": {"hidden": "128x0e+128x1o+128x2e"},
}
MP0 = {"max_ell": 3, "r_max": 6.0, "num_bessel": 10, "mlp": "16x0e"}

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
    elements: tuple[int, ...] = MP_ELEMENTS,
    dtype: str = "float64",
    seed: int = 0,
    message: float = 1.0,
    **changes: Any,
) -> torch.nn.Module:
    """A published architecture (MACE-MP-0: Batatia et al., arXiv:2401.00096) with random weights.

    Every parameter is random and none is degenerate: readouts, scale and shift included. With
    messages of 4 and a scale of 40 forces are several eV/Å; with plain unit weights the energy is
    nearly all self-connection.

    Args:
      name: of the architecture, a key of ``ARCHITECTURES``.
      elements: atomic numbers, ascending.
      dtype: of all floating tensors.
      message: factor on the messages' weights.
      seed: of the weights.
      changes: arguments of mace's constructor that differ; ``cls`` is the class itself.
    """
    options = MP0 | ARCHITECTURES[name]
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    arguments = {
        "r_max": options["r_max"],
        "num_bessel": options["num_bessel"],
        "num_polynomial_cutoff": 5,
        "max_ell": options["max_ell"],
        "interaction_cls": block,
        "interaction_cls_first": block,
        "num_interactions": 2,
        "num_elements": len(elements),
        "hidden_irreps": o3.Irreps(options["hidden"]),
        "MLP_irreps": o3.Irreps(options["mlp"]),
        "atomic_energies": np.linspace(-10.0, 0.0, len(elements)),
        "avg_num_neighbors": 8.0,
        "atomic_numbers": list(elements),
        "correlation": 3,
        "gate": torch.nn.functional.silu,
        "use_reduced_cg": False,
        "atomic_inter_scale": 40.0,
        "atomic_inter_shift": 0.1641,
    }
    cls = changes.pop("cls", modules.ScaleShiftMACE)
    arguments |= changes
    if cls is modules.MACE:
        del arguments["atomic_inter_scale"], arguments["atomic_inter_shift"]
    with default_dtype(dtype), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = cls(**arguments)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
                if parameter.ndim == 3:
                    parameter.div_(parameter.shape[1] ** 0.5)
            for interaction in model.interactions:
                interaction.linear.weight.mul_(message)
    return model


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


def batch_of(model: torch.nn.Module, frames: Sequence[ase.Atoms]) -> Any:
    """One torch batch of ``frames``, labels included where they have some, in the model's dtype."""
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    with default_dtype(next(model.parameters()).dtype):
        items = [
            mace_data.AtomicData.from_config(
                # mace overwrites the cell of what it is given
                mace_data.config_from_atoms(atoms.copy(), key_specification=LABELS),
                z_table=table,
                cutoff=float(model.r_max),
            )
            for atoms in frames
        ]
        loader = torch_geometric.dataloader.DataLoader(items, batch_size=len(items), shuffle=False)
        return next(iter(loader))


def _forward(model: torch.nn.Module, batch: Any, *, training: bool) -> dict[str, Any]:
    with default_dtype(next(model.parameters()).dtype):
        return model(
            batch.to_dict(),
            training=training,
            compute_force=True,
            compute_stress=True,
            compute_virials=True,
        )


class Evaluation(NamedTuple):
    """torch's answers in float64. G frames, N atoms in all."""

    energy: np.ndarray
    """[G] eV, isolated-atom energies included."""
    interaction: np.ndarray
    """[G] eV, without them."""
    forces: np.ndarray
    """[N, 3] eV/Å."""
    virial: np.ndarray
    """[G, 3, 3] eV, stress times volume: torch's virials have the opposite sign."""
    stress: np.ndarray
    """[G, 3, 3] eV/Å³; of a made-up volume for frames with open directions."""


def evaluate(model: torch.nn.Module, frames: Sequence[ase.Atoms]) -> Evaluation:
    """Energies, forces and stresses of all frames, as one batch."""
    out = _forward(model, batch_of(model, frames), training=False)
    names = ("energy", "interaction_energy", "forces", "virials", "stress")
    arrays = [out[name].detach().double().numpy() for name in names]
    arrays[3] = -arrays[3]
    return Evaluation(*arrays)


def gradient(
    model: torch.nn.Module,
    frames: Sequence[ase.Atoms],
    *,
    energy: float,
    forces: float,
    stress: float,
) -> tuple[float, dict[str, np.ndarray]]:
    """``WeightedEnergyForcesStressLoss`` of labelled frames and its gradient by parameter name."""
    batch = batch_of(model, frames)
    with default_dtype(next(model.parameters()).dtype):
        loss_fn = modules.WeightedEnergyForcesStressLoss(energy, forces, stress)
    model.zero_grad()
    loss = loss_fn(batch, _forward(model, batch, training=True))
    loss.backward()
    return loss.item(), {
        name: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy()
        for name, p in model.named_parameters()
    }


def labelled_crystals(model: Potential) -> list[ase.Atoms]:
    """Periodic frames with a random energy, forces and stress each."""
    rng = np.random.default_rng(1)
    crystal = structures(model.atomic_numbers, model.r_max)["triclinic crystal"]
    numbers = rng.choice(model.atomic_numbers, 8)
    cube = ase.Atoms(
        numbers,
        2.8 * np.argwhere(np.ones((2, 2, 2))) + rng.normal(scale=0.2, size=(8, 3)),
        cell=5.6 * np.eye(3) + rng.normal(scale=0.2, size=(3, 3)),
        pbc=True,
    )
    e0 = dict(zip(model.atomic_numbers, model.e0s, strict=True))
    frames = [crystal.copy(), cube]
    for atoms in frames:
        stress = rng.normal(scale=0.02, size=(3, 3))
        atoms.info["REF_energy"] = sum(e0[z] for z in atoms.numbers.tolist()) + rng.normal()
        atoms.info["REF_stress"] = 0.5 * (stress + stress.T)
        atoms.arrays["REF_forces"] = rng.normal(size=(len(atoms), 3))
    return frames
