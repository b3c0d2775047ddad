"""The pretrained model: an MP-0-like MACE of a few layers, fitted with mace-torch.

python train_base.py                trains and writes gfn2_small.model
python train_base.py --epochs N     stops at epoch N; a later call goes on from there
python train_base.py --evaluate     prints the errors on all test files
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from frames import HERE, load

NAME = "gfn2_small"
STATISTICS = ("atomic_energies_fn.", "scale_shift.")  # buffers that depend on the data
MODEL = HERE / f"{NAME}.model"

ARCHITECTURE = {
    # plain "MACE" would replace interaction_first by the non-residual block
    "model": "ScaleShiftMACE",
    "interaction_first": "RealAgnosticResidualInteractionBlock",
    "interaction": "RealAgnosticResidualInteractionBlock",
    "num_interactions": 2,
    "hidden_irreps": "32x0e + 32x1o",
    "MLP_irreps": "16x0e",
    "radial_MLP": "[64, 64, 64]",
    "radial_type": "bessel",
    "num_radial_basis": 8,
    "num_cutoff_basis": 5,
    "r_max": 5.0,
    # the coupling matrices of max_ell 3 alone would exceed 3 MB
    "max_ell": 2,
    "correlation": 3,
    "gate": "silu",
    "use_reduced_cg": False,
    "scaling": "rms_forces_scaling",
}

TRAINING = {
    "loss": "stress",
    "energy_weight": 40.0,
    "forces_weight": 100.0,
    "stress_weight": 2000.0,
    "compute_stress": True,
    "energy_key": "REF_energy",
    "forces_key": "REF_forces",
    "stress_key": "REF_stress",
    "error_table": "PerAtomRMSEstressvirials",
    "batch_size": 10,
    "valid_batch_size": 20,
    "lr": 0.01,
    "scheduler": "ExponentialLR",
    "lr_scheduler_gamma": 0.962,
    "ema_decay": 0.99,
    "clip_grad": 10.0,
    "weight_decay": 1e-7,
    "default_dtype": "float32",
    "device": "cpu",
    "enable_cueq": False,
    "seed": 1,
}


def reference_energies():
    """E0s as the literal dict that the command line takes."""
    atoms = load(HERE / "base_atoms.xyz")
    return str({int(a.numbers[0]): float(a.info["REF_energy"]) for a in atoms})


def train(work, epochs):
    """Run mace_run_train up to `epochs` and keep its final model."""
    work.mkdir(parents=True, exist_ok=True)
    options = ARCHITECTURE | TRAINING
    options |= {
        "name": NAME,
        "train_file": HERE / "base_train.xyz",
        "valid_fraction": 0.05,
        "E0s": reference_energies(),
        "max_num_epochs": epochs,
        "eval_interval": 2,
        "work_dir": work,
    }
    flags = [f"--{key}={value}" for key, value in options.items()]
    flags += ["--ema", "--amsgrad", "--save_cpu", "--restart_latest"]
    runner = "from mace.cli.run_train import main; main()"
    subprocess.run([sys.executable, "-c", runner, *flags], cwd=work, check=True)
    save_in_float64(work / f"{NAME}.model")


def save_in_float64(path):
    """Save the model in float64, as MACE-MP-0 is: trained numbers widened, constants exact.

    mace-torch rebuilds the module, so that Clebsch-Gordan coefficients, U matrices and Bessel
    frequencies are float64 numbers instead of widened float32 ones.
    """
    import torch
    from mace.modules import ScaleShiftMACE
    from mace.tools.scripts_utils import extract_config_mace_model

    trained = torch.load(path, weights_only=False, map_location="cpu")
    torch.set_default_dtype(torch.float64)
    model = ScaleShiftMACE(**extract_config_mace_model(trained))
    kept = dict(trained.named_parameters())
    kept |= {name: x for name, x in trained.named_buffers() if name.startswith(STATISTICS)}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in kept:
                tensor.copy_(kept.pop(name))
    if kept:
        raise SystemExit(f"the float64 module lacks {', '.join(kept)}")
    torch.save(model, MODEL)


def errors(calculator, frames):
    """Differences to the labels: energy per atom, force and stress components."""
    energy, forces, stress = [], [], []
    for frame in frames:
        frame = frame.copy()
        frame.calc = calculator
        energy.append((frame.get_potential_energy() - frame.info["REF_energy"]) / len(frame))
        forces.extend((frame.get_forces() - frame.arrays["REF_forces"]).ravel())
        if "REF_stress" in frame.info:
            difference = frame.get_stress(voigt=False) - frame.info["REF_stress"]
            stress.extend(difference.ravel())
    return [np.array(x) for x in (energy, forces, stress)]


def evaluate(path=MODEL):
    """Print RMSE and MAE of a model on the test files."""
    from mace.calculators import MACECalculator

    calculator = MACECalculator(model_paths=str(path), device="cpu", default_dtype="float64")
    print("| file | frames | E RMSE | E MAE | F RMSE | F MAE | stress RMSE | stress MAE | F std |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in ("base_test", "ethanol_test", "nacl_test"):
        frames = load(HERE / f"{name}.xyz")
        if not frames:
            continue
        cells = [name, str(len(frames))]
        for x in errors(calculator, frames):
            if len(x):
                cells += [f"{1e3 * np.sqrt(np.mean(x**2)):.1f}", f"{1e3 * np.mean(np.abs(x)):.1f}"]
            else:
                cells += ["-", "-"]
        spread = np.concatenate([f.arrays["REF_forces"].ravel() for f in frames]).std()
        print("| " + " | ".join([*cells, f"{1e3 * spread:.0f}"]) + " |")
    print("meV/atom, meV/Å, meV/Å^3; E of the DFT sets holds the gap between the levels")


def main():
    """Train or evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--widen", type=Path, help="only save this float32 model in float64")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="checkpoints and logs")
    args = parser.parse_args()
    if args.widen:
        save_in_float64(args.widen)
    elif not args.evaluate:
        train(args.work.resolve(), args.epochs)
    evaluate()


if __name__ == "__main__":
    main()
