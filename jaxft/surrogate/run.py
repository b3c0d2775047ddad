"""From a teacher to a surrogate, stage by stage.

A stage's file is called by a hash of all that it follows from: what is there is used again, a run
that was killed goes on where it was, and other settings write other files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ase
import ase.io
import numpy as np
from rich.console import Console

from jaxft import bundle, data, inputs, run, scratchrun
from jaxft.adapter import digest_of
from jaxft.config import Config
from jaxft.data import Frame, Keys
from jaxft.display import Display
from jaxft.e0s import own_e0s
from jaxft.evaluate.candidate import JaxCandidate
from jaxft.evaluate.finding import Finding
from jaxft.report.findings import findings_page
from jaxft.surrogate import hessians, report
from jaxft.surrogate import pool as pools
from jaxft.surrogate.config import SurrogateConfig
from jaxft.version import __version__

TEACHER, STUDENT = "teacher", "student"


@dataclass(frozen=True)
class Stages:
    """The files of a surrogate, in the order in which they are made."""

    structures: Path
    """Everything that was made, unlabelled."""
    pool: Path
    """What was kept, with the teacher's labels."""
    train: Path
    """What the student learns from: the pool, or, where Hessians are asked for, a copy of it with
    them."""
    start: Path
    """The student before training, a bundle."""
    run: Path
    """The folder of its training."""
    report: Path
    """JSON; the page lies beside it."""

    @property
    def student(self) -> Path:
        """The trained bundle."""
        return self.run / run.MODEL


@dataclass(frozen=True, eq=False)
class Given:
    """What a config names, read and checked."""

    teacher: JaxCandidate
    provenance: Mapping[str, Any]
    """Of the teacher."""
    digest: str
    seeds: Sequence[ase.Atoms]
    tests: Mapping[str, Sequence[Frame]]
    training: Config
    stages: Stages


def distill(config: SurrogateConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Make, train and judge a surrogate, as far as that has not been done.

    Returns:
      The headline of the report: errors of both models, speed-ups.

    Raises:
      ValueError: input that cannot be used; before anything is compiled, but for a pool of which
        too little is left.
      NonFiniteError, Preempted: as in ``jaxft finetune``; the same command goes on.
    """
    console = console or Console(quiet=True)
    given = read(config)
    stages = given.stages
    Path(config.output).mkdir(parents=True, exist_ok=True)
    _stage(console, stages.structures, lambda: _make_structures(config, given))
    _stage(console, stages.pool, lambda: _make_pool(config, given))
    if config.hessian is not None:
        _stage(console, stages.train, lambda: _make_hessians(config, given, console))
    _stage(console, stages.start, lambda: _make_start(config, given))
    _stage(
        console,
        stages.student,
        lambda: run.finetune(given.training, console=console, restart="auto"),
    )
    _stage(console, stages.report, lambda: _make_report(config, given))
    found: dict[str, Any] = json.loads(stages.report.read_text())["headline"]
    console.print_json(json.dumps(found))
    return found


def read(config: SurrogateConfig) -> Given:
    """Everything that the config names, checked; compiles nothing."""
    files, names = _files(config.seeds), Keys(**config.keys.model_dump())
    plain = config.training_config(Path("s"), Path("p"), Path("r"))
    model, params = bundle.load(config.teacher, dtype=plain.parameter_dtype)
    head = model.heads[model.head_index(config.head)]
    teacher = JaxCandidate(
        TEACHER, model, params, head=head, batch_size=16, dtype=plain.compute_dtype
    )
    seeds = [atoms for path in files for atoms in data.read_atoms(path)]
    frames = [data.unlabelled(atoms, source=f"seed {i}") for i, atoms in enumerate(seeds)]
    data.check_elements(frames, model.atomic_numbers)
    tests = {}
    for name, entry in config.test.items():
        tests[name] = data.without_isolated_atoms(data.read(_files(entry), keys=names))
        data.check_elements(tests[name], model.atomic_numbers)
        data.require_any_label(tests[name], keys=names)
    like = scratchrun.template(config.student)
    scratchrun.shape_of(config.student, None if like is None else like.config)
    digest = f"{digest_of(model, params)} {model.e0s[model.head_index(head)].tolist()}"
    stages = _stages(config, digest, [data.structure_key(frame).hex() for frame in frames])
    output = Path(config.output)
    if output.exists() and (
        not output.is_dir() or (any(output.iterdir()) and not _is_ours(output))
    ):
        raise ValueError(f"{output} exists and is no folder of jaxft distill; give another output.")
    training = config.training_config(stages.start, stages.train, stages.run)
    _, _, provenance = bundle.load_numpy(config.teacher)
    return Given(teacher, provenance, digest, seeds, tests, training, stages)


def _files(paths: list[Path] | Path) -> list[Path]:
    return paths if isinstance(paths, list) else [paths]


def _is_ours(folder: Path) -> bool:
    return any(folder.glob("structures-*")) or any(folder.glob(".structures-*"))


def _stages(config: SurrogateConfig, digest: str, seeds: Sequence[str]) -> Stages:
    """Every key hashes the one before it and what the stage adds."""
    settings = config.model_dump(mode="json")
    tests = {name: [_hash(p) for p in _files(entry)] for name, entry in config.test.items()}
    like = "" if config.student.like is None else _hash(config.student.like / bundle.ARRAYS)
    structures = _key(digest, seeds, settings["md"], settings["rattle"], config.seed)
    pool = _key(structures, settings["keep"])
    start = _key(pool, settings["student"], like)
    curved = [] if config.hessian is None else [settings["hessian"]]
    training = _key(start, config.training, *curved)
    last = _key(training, tests, settings["keys"], settings["speed"])
    output = Path(config.output)
    return Stages(
        output / f"structures-{structures}.xyz",
        output / f"pool-{pool}.xyz",
        output / (f"hessian-{_key(pool, *curved)}.xyz" if curved else f"pool-{pool}.xyz"),
        output / f"start-{start}.jaxft",
        output / f"run-{training}",
        output / f"report-{last}.json",
    )


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _stage(console: Console, path: Path, make: Any) -> None:
    if path.exists():
        console.print(f"{path} is there already", highlight=False)
        return
    make()
    console.print(f"wrote {path}", highlight=False)


def _make_structures(config: SurrogateConfig, given: Given) -> None:
    made: list[ase.Atoms] = []
    ended = 0
    if config.md is not None:
        made, ended = pools.moved(given.teacher, given.seeds, config.md, config.seed)
    if config.rattle is not None:
        made += pools.rattled(given.seeds, config.rattle, config.seed)
    _write(given.stages.structures, made, {"replicas_ended_early": ended})


def _make_pool(config: SurrogateConfig, given: Given) -> None:
    """Of structures as the file has them, so that labels are those of the very positions."""
    made = data.read_atoms(given.stages.structures)
    found = pools.labelled(given.teacher, made, config.keep, config.seed)
    known = json.loads(given.stages.structures.with_suffix(".json").read_text())
    facts = {
        "made_by": f"jaxft {__version__}",
        "teacher": {"path": str(config.teacher), "digest": given.digest.partition(" ")[0]}
        | {"head": given.teacher.head, "provenance": given.provenance},
        "seeds": {str(path): _hash(path) for path in _files(config.seeds)},
        "settings": config.model_dump(mode="json", include={"md", "rattle", "keep", "seed"}),
        "counts": {**known, **found.counts},
        "units": "eV, eV/Å, eV/Å³ (positive under tension)",
    }
    _write(given.stages.pool, found.structures, facts)


def _make_hessians(config: SurrogateConfig, given: Given, console: Console) -> None:
    """Of structures as the file of the pool has them, too."""
    assert config.hessian is not None
    pool = data.read_atoms(given.stages.pool)
    with Display(console).counter(label="Hessians") as advance:
        found = hessians.labelled(given.teacher, pool, config.hessian, config.seed, advance)
    facts = json.loads(given.stages.pool.with_suffix(".json").read_text())
    asked = config.hessian.model_dump(mode="json") | {"units": hessians.FILE_UNITS}
    _write(given.stages.train, found, facts | {"hessian": asked})


def _write(path: Path, structures: Sequence[ase.Atoms], facts: Mapping[str, Any]) -> None:
    """Structures, complete or not at all, and before them what is to be known of them."""
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    scratch = path.with_name(f".{path.name}.part")
    ase.io.write(scratch, structures, format="extxyz")
    scratch.rename(path)


def _make_start(config: SurrogateConfig, given: Given) -> None:
    """The student's isolated-atom energies are its teacher's; its statistics the pool's."""
    teacher = given.teacher
    model, params = scratchrun.drawn(
        config.student,
        data.read(given.stages.pool),
        own_e0s(teacher.model, teacher.head),
        scratchrun.template(config.student),
    )
    facts = json.loads(given.stages.pool.with_suffix(".json").read_text())
    provenance = {"made_by": f"jaxft {__version__}", "random": True, "surrogate_of": facts}
    bundle.save(given.stages.start, model, params, provenance=provenance)


def _make_report(config: SurrogateConfig, given: Given) -> None:
    model, params = bundle.load(given.stages.student, dtype=given.training.parameter_dtype)
    student = JaxCandidate(STUDENT, model, params, dtype=given.training.compute_dtype)
    models = (given.teacher, student)
    facts = json.loads(given.stages.train.with_suffix(".json").read_text())
    findings: list[Finding] = [
        report.pool(facts["counts"], TEACHER),
        *report.errors(models, given.tests),
    ]
    if config.hessian is not None:
        _, valid = inputs.labelled_frames(given.training)
        sets = [("validation frames", data.without_isolated_atoms(valid)), *given.tests.items()]
        findings.append(hessians.errors(models, sets, config.hessian, config.seed))
    if config.speed is not None:
        findings.append(report.speed(models, probe(given.seeds[0], config), config.speed))
    shown = findings
    if find_spec("matplotlib") is None:
        shown = [replace(finding, pictures=()) for finding in findings]
    page = given.stages.report.with_suffix(".html")
    page.write_text(findings_page(f"surrogate of {config.teacher.name}", shown), encoding="utf-8")
    document = {
        "headline": report.headline(findings, models),
        "student": str(given.stages.student),
        "pool": facts,
        "findings": [finding.to_dict() for finding in findings],
    }
    scratch = given.stages.report.with_name(f".{given.stages.report.name}.part")
    scratch.write_text(json.dumps(document, indent=1) + "\n")
    scratch.rename(given.stages.report)


def probe(seed: ase.Atoms, config: SurrogateConfig) -> ase.Atoms:
    """What is timed: the first seed, repeated where it is a crystal."""
    assert config.speed is not None
    bare = ase.Atoms(seed.numbers, seed.positions, cell=seed.cell, pbc=seed.pbc)
    return bare.repeat(config.speed.repeat) if np.all(seed.pbc) else bare
