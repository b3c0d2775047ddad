"""Writes tiny.model.gz, a small torch MACE with random weights, and what torch says of two frames.

Needs torch and mace-torch. From the root of the repository::

    PYTHONPATH=.:tests/parity python tests/data/make_tiny.py

The weights are random and none is degenerate; the scale makes the forces of ordinary structures a
few eV/Å. The model is compressed since the coupling tensors are mostly zeros.
"""

import gzip
import io
import json
import warnings
from pathlib import Path

import ase.build
import numpy as np
import reference
import torch

ELEMENTS = (1, 6, 8, 11, 17)
SCALE = 10.0
MESSAGE = 16.0
"""Factor on the messages: with unit weights the energy is nearly all self-connection."""

reference.ARCHITECTURES["tiny"] = {
    "hidden": "4x0e+4x1o",
    "max_ell": 2,
    "r_max": 4.5,
    "num_bessel": 6,
    "mlp": "4x0e",
}


def main() -> None:
    model = reference.build("tiny", elements=ELEMENTS, dtype="float64", seed=1)
    model.scale_shift.scale.fill_(SCALE)
    with torch.no_grad():
        for interaction in model.interactions:
            interaction.linear.weight.mul_(MESSAGE)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, buffer)
    target = Path(__file__).with_name("tiny.model.gz")
    target.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    frames = [ase.build.molecule("CH3OH"), ase.build.bulk("NaCl", "rocksalt", 5.5)]
    frames[0].positions += np.random.default_rng(0).normal(scale=0.1, size=(6, 3))
    frames[1].positions[1] += [0.2, -0.1, 0.3]
    answers = []
    for atoms in frames:
        out = reference.evaluate(model, [atoms])
        answers.append(
            {
                "numbers": atoms.numbers.tolist(),
                "positions": atoms.positions.tolist(),
                "cell": atoms.cell.tolist(),
                "pbc": atoms.pbc.tolist(),
                "energy": float(out.energy[0]),
                "forces": out.forces.tolist(),
                "stress": out.stress[0].tolist() if atoms.pbc.all() else None,
            }
        )
    Path(__file__).with_name("tiny_torch.json").write_text(json.dumps(answers, indent=1) + "\n")
    print(f"{target.name}: {len(buffer.getvalue())} bytes, {target.stat().st_size} compressed")


if __name__ == "__main__":
    main()
