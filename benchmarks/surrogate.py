"""A surrogate of a fine-tuned model: errors of teacher and student against DFT, and the speed-up.

    python benchmarks/surrogate.py --write                        configs/surrogate/nacl.yaml
    python benchmarks/surrogate.py --write --speed-only mp0-small

The first form runs the commands of that config from the model file on: convert, fine-tune the
teacher with frozen layers, distill; what lies in ``--folder`` already is used. Errors are those of
``jaxft distill``'s report, on test frames that neither model saw.

The second times the student of the first form against a teacher of a published architecture with
random weights, which costs what any weights cost; errors would mean nothing and are not given.

Times are medians of alternating turns in one process, of one structure and of replicas in a batch:
energy, forces and stress with the neighbour list, and steps of molecular dynamics. float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ase.io
from common import confine, finish, output_options, settings

from jaxft.surrogate.config import Speed

HERE = Path(__file__).parent
ROOT = HERE.parent
CONFIG = ROOT / "configs" / "surrogate" / "nacl.yaml"
SEEDS = HERE / "data" / "nacl_train.xyz"
BIG = {
    "mp0-small": {"hidden": "128x0e"},
    "mp0-medium": {"hidden": "128x0e+128x1o"},
}
"""Of MACE-MP-0: two layers, l_max 3, ν 3, 6 Å, 10 Bessel functions."""


def jaxft(*words: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-m", "jaxft", *words], check=True, cwd=ROOT)


def whole(folder: Path) -> dict[str, Any]:
    """The headline, the pool's counts and the times of the config."""
    base, teacher, output = folder / "base.jaxft", folder / "nacl-teacher", folder / "nacl"
    if not base.exists():
        jaxft("convert", str(HERE / "data" / "gfn2_small.model"), str(base), "--elements", "Na,Cl")
    words = [f"model={base}", f"output={teacher}"]
    if not (teacher / "model.jaxft").exists():
        jaxft("finetune", str(CONFIG.with_name("nacl-teacher.yaml")), *words, "--restart", "auto")
    jaxft("distill", str(CONFIG), f"teacher={teacher / 'model.jaxft'}", f"output={output}")
    (report,) = output.glob("report-*.json")
    document = json.loads(report.read_text())
    speed = [finding for finding in document["findings"] if finding["check"] == "speed"]
    return {
        "errors": {k: v for k, v in document["headline"].items() if k != "speedup"},
        "units": "energy meV/atom, forces meV/Å, stress meV/Å³",
        "pool": document["pool"]["counts"],
        "speed": {"units": speed[0]["units"], "rows": speed[0]["rows"]},
    }


def against(name: str, folder: Path, turns: int) -> dict[str, Any]:
    """Times of the trained student and of a large random teacher."""
    import jaxft as package
    from jaxft import data, scratch
    from jaxft.architecture import Architecture
    from jaxft.evaluate.candidate import JaxCandidate
    from jaxft.surrogate import config, report, run

    chosen = config.load(CONFIG, [f"teacher={folder / 'nacl-teacher' / 'model.jaxft'}"])
    chosen = chosen.model_copy(update={"output": folder / "nacl"})
    student = JaxCandidate("student", *package.load(run.read(chosen).stages.student))
    frames = data.read(SEEDS)
    shape = Architecture(**BIG[name], r_max=6.0, num_bessel=10)
    model, params = scratch.new(shape, frames, e0s={11: 0.0, 17: 0.0}, scale=1e-3, shift=0.0)
    teacher = JaxCandidate(f"{name}, random", model, params)
    plan = chosen.speed.model_copy(update={"turns": turns})
    probe = run.probe(ase.io.read(SEEDS), chosen)
    found = report.speed((teacher, student), probe, plan)
    return {"speed": {"units": dict(found.units), "rows": found.to_dict()["rows"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "surrogates")
    parser.add_argument("--speed-only", choices=sorted(BIG))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    output_options(parser)
    parser.set_defaults(dtype="float32")
    args = parser.parse_args()
    confine(args.threads)
    is_whole = args.speed_only is None
    result = whole(args.folder) if is_whole else against(args.speed_only, args.folder, args.turns)
    turns = Speed().turns if is_whole else args.turns
    options = {"config": str(CONFIG.relative_to(ROOT)), "turns": turns}
    result["settings"] = settings(args, torch=False, **options)
    if not is_whole:  # in this process, not by the command, which sets its allocator
        result["settings"]["malloc"] = {"jaxft": "default"}
    finish("surrogate", "nacl" if is_whole else args.speed_only, result, args)


if __name__ == "__main__":
    main()
