"""A whole fine-tune, epoch by epoch, against mace_run_train."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest

from jaxft import bundle, config, run, surgery
from jaxft.bundle import cast

pytest.importorskip("mace")

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "benchmarks" / "data" / "gfn2_small.model"
FRAMES = ROOT / "benchmarks" / "data" / "ethanol_train.xyz"
EPOCHS, BATCH, RATE = 4, 4, 5e-3
TOLERANCE = 1e-6
"""Relative, of validation errors. Both compute in float64; updates of a model whose errors halve in
the first amplify roundings of 1e-15."""

pytestmark = pytest.mark.skipif(
    not os.environ.get("JAXFT_ALL_PARITY"), reason="starts mace_run_train; JAXFT_ALL_PARITY=1"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four training frames, one batch, so that nothing depends on the order of frames; and the
    foundation: in float64 as torch file, and with the elements of the frames alone as bundle,
    since mace_run_train drops the others, too, and that rescales tables."""
    from converters.to_jax import convert
    from converters.to_torch import export

    found = tmp_path_factory.mktemp("run")
    images = ase.io.read(FRAMES, ":12")
    ase.io.write(found / "train.xyz", images[:BATCH])
    ase.io.write(found / "valid.xyz", images[BATCH:])
    model, params = cast(*convert(MODEL), "float64")
    export((model, params), found / "base.model")
    elements = sorted({int(z) for z in images[0].numbers})
    bundle.save(found / "base.jaxft", *surgery.select_elements(model, params, elements))
    return found


def torch_errors(folder: Path) -> np.ndarray:
    """[epochs + 1, 2] RMSE of energies per atom and forces on the validation frames."""
    flags = {
        "name": "torch",
        "foundation_model": folder / "base.model",
        "multiheads_finetuning": False,
        "E0s": "estimated",
        "train_file": folder / "train.xyz",
        "valid_file": folder / "valid.xyz",
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "loss": "weighted",
        "energy_weight": 10.0,
        "forces_weight": 100.0,
        "compute_stress": False,
        "lr": RATE,
        "weight_decay": 0.0,
        "scheduler": "ExponentialLR",
        "lr_scheduler_gamma": 1.0,
        "clip_grad": None,  # its norm counts the Bessel frequencies, see docs/training.md
        "ema_decay": 0.99,
        "batch_size": BATCH,
        "valid_batch_size": 8,
        "max_num_epochs": EPOCHS,
        "default_dtype": "float64",
        "device": "cpu",
        "plot": False,
        "work_dir": folder / "torch",
        "model_dir": folder / "torch",
    }
    options = [f"--{key}={value}" for key, value in flags.items()]
    command = [sys.executable, "-c", "from mace.cli.run_train import main; main()", *options]
    subprocess.run([*command, "--amsgrad", "--ema"], check=True, capture_output=True)
    (log,) = (folder / "torch" / "results").glob("*_train.txt")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    judged = [row for row in rows if row["mode"] == "eval"]
    return np.array([[row["rmse_e_per_atom"], row["rmse_f"]] for row in judged])


def test_every_epoch_of_a_fine_tune_is_that_of_mace_run_train(folder):
    settings = {
        "model": str(folder / "base.jaxft"),
        "output": str(folder / "ours"),
        "train": str(folder / "train.xyz"),
        "valid": str(folder / "valid.xyz"),
        "e0s": "estimated",
        "loss": {"energy": 10.0, "forces": 100.0},
        "optimizer": {"name": "amsgrad", "learning_rate": RATE, "clip_norm": None},
        "ema_decay": 0.99,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "dtype": "float64",
    }
    history = run.finetune(config.validate(settings, "test")).fit.history
    ours = np.array([[row["valid/energy"], row["valid/forces"]] for row in history])
    np.testing.assert_allclose(ours, torch_errors(folder), rtol=TOLERANCE)
    assert ours[-1, 1] < 0.9 * ours[0, 1]
