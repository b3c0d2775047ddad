"""torch MACE as the reference: build, evaluate, differentiate. Imported only where torch is."""

from __future__ import annotations

import os
import warnings

os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # e3nn 0.4.4 under torch >= 2.6

import ase
import numpy as np
import torch

warnings.filterwarnings("ignore", module="e3nn|mace|torch")
warnings.filterwarnings("ignore", message=".*TorchScript.*|.*torch.jit.*")

from e3nn import o3  # noqa: E402
from mace import data as mace_data  # noqa: E402
from mace import modules  # noqa: E402
from mace.tools import AtomicNumberTable, torch_geometric  # noqa: E402

MP_ELEMENTS = tuple(z for z in range(1, 95) if z not in range(84, 89))
"""The 89 elements of MACE-MP."""

ARCHITECTURES = {
    "small": dict(hidden="8x0e+8x1o", max_ell=2, r_max=4.5, num_bessel=8, mlp="4x0e"),
    "mp0-small": dict(hidden="128x0e"),
    "mp0-medium": dict(hidden="128x0e+128x1o"),
    "mp0-large": dict(hidden="128x0e+128x1o+128x2e"),
}


def build(
    name: str = "small",
    *,
    elements: tuple[int, ...] = MP_ELEMENTS,
    dtype: str = "float64",
    seed: int = 0,
) -> modules.ScaleShiftMACE:
    """A published architecture (MACE-MP-0: Batatia et al., arXiv:2401.00096) with random weights.

    Every parameter is random and none is degenerate: readouts, scale and shift included.
    """
    options = dict(max_ell=3, r_max=6.0, num_bessel=10, mlp="16x0e") | ARCHITECTURES[name]
    torch.set_default_dtype(getattr(torch, dtype))
    torch.manual_seed(seed)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = modules.ScaleShiftMACE(
        r_max=options["r_max"],
        num_bessel=options["num_bessel"],
        num_polynomial_cutoff=5,
        max_ell=options["max_ell"],
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(elements),
        hidden_irreps=o3.Irreps(options["hidden"]),
        MLP_irreps=o3.Irreps(options["mlp"]),
        atomic_energies=np.linspace(-10.0, 0.0, len(elements)),
        avg_num_neighbors=8.0,
        atomic_numbers=list(elements),
        correlation=3,
        gate=torch.nn.functional.silu,
        use_reduced_cg=False,
        atomic_inter_scale=40.0,
        atomic_inter_shift=0.1641,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
            if parameter.ndim == 3:
                parameter.div_(parameter.shape[1] ** 0.5)
    return model


def batch_of(model: modules.ScaleShiftMACE, frames: list[ase.Atoms]) -> dict:
    """A torch batch of ``frames``, in the model's default dtype."""
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    items = [
        mace_data.AtomicData.from_config(
            mace_data.config_from_atoms(atoms.copy()), z_table=table, cutoff=float(model.r_max)
        )
        for atoms in frames
    ]
    loader = torch_geometric.dataloader.DataLoader(items, batch_size=len(items), shuffle=False)
    return next(iter(loader)).to_dict()


def evaluate(model: modules.ScaleShiftMACE, frames: list[ase.Atoms], **options) -> dict:
    """torch's outputs for one batch; tensors that need no further derivative."""
    torch.set_default_dtype(next(model.parameters()).dtype)
    return model(
        batch_of(model, frames),
        compute_force=True,
        compute_stress=True,
        compute_virials=True,
        **options,
    )
