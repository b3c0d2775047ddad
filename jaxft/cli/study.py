"""Many fine-tunes: studies and searches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from jaxft.cli.shared import Json, Overrides, app, command, console, use

if TYPE_CHECKING:
    from jaxft.study.config import Common, StudyConfig
    from jaxft.study.plan import Cell
    from jaxft.study.tune import Search


class _OrAll(TyperGroup):
    """``jaxft study CONFIG`` is ``jaxft study all CONFIG``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["all", *args]
        return super().parse_args(ctx, args)


study_app = typer.Typer(
    cls=_OrAll,
    help="Compare recipes on data: plan, run and collect, or all of it (jaxft study CONFIG).",
    no_args_is_help=True,
)
app.add_typer(study_app, name="study")

Small = Annotated[bool, typer.Option("--small", help="The short form that CONFIG describes.")]
Jobs = Annotated[
    int, typer.Option(min=1, help="Processes that share the cells, cores and GPUs of this machine.")
]
Stacked = Annotated[
    bool,
    typer.Option("--stacked", help="Train cells that differ in numbers alone as one step."),
]
Retry = Annotated[bool, typer.Option("--retry", help="Run cells again that did not end well.")]


@study_app.command("plan")
@command
def study_plan(
    config: Path,
    overrides: Overrides = None,
    small: Small = False,
    ids: Annotated[bool, typer.Option("--ids", help="Print one id per line.")] = False,
    as_json: Json = False,
) -> None:
    """The cells of CONFIG, and how far each is; nothing is run."""
    from jaxft.study.work import status

    _, cells = _planned(config, overrides, small)
    if ids:
        print("\n".join(cell.id for cell in cells))
    elif as_json:
        print(json.dumps([_facts(cell, status(cell)) for cell in cells], indent=1))
    else:
        _show(cells, [status(cell) for cell in cells])


@study_app.command("run")
@command
def study_run(
    config: Path,
    overrides: Overrides = None,
    small: Small = False,
    cell: Annotated[str | None, typer.Option(help="This one alone: its id.")] = None,
    index: Annotated[
        int | None, typer.Option(min=0, help="This one alone: its place in the plan, from 0.")
    ] = None,
    jobs: Jobs = 1,
    retry: Retry = False,
    stacked: Stacked = False,
) -> None:
    """Run the cells that are not finished; any number of processes may do so at once."""
    _, cells = _planned(config, overrides, small)
    if cell is not None or index is not None:
        cells = [_chosen(cells, cell, index)]
    _run(config, overrides, small, cells, jobs, retry, stacked)


@study_app.command("collect")
@command
def study_collect(config: Path, overrides: Overrides = None, small: Small = False) -> None:
    """Tables, figures and one page of what is finished."""
    study, cells = _planned(config, overrides, small)
    _collect(study, cells)


@study_app.command("all")
@command
def study_all(
    config: Path,
    overrides: Overrides = None,
    small: Small = False,
    jobs: Jobs = 1,
    retry: Retry = False,
    stacked: Stacked = False,
) -> None:
    """Run CONFIG and collect what it found."""
    from jaxft.evaluate.svg import new_figure

    new_figure(1, 1)  # says what to install before anything is computed
    study, cells = _planned(config, overrides, small)
    _run(config, overrides, small, cells, jobs, retry, stacked)
    _collect(study, cells)


@app.command()
@command
def tune(
    config: Path,
    overrides: Overrides = None,
    small: Small = False,
    jobs: Jobs = 1,
) -> None:
    """Search for the hyperparameters of recipes: random, with successive halving."""
    from jaxft.study import work
    from jaxft.study.search import TuneConfig
    from jaxft.study.tune import search

    settings = _load(config, overrides, small, TuneConfig)
    if jobs > 1:
        work.spawn(["tune", *_words(config, overrides, small)], jobs)
    use(None)
    _show_searches(settings, search(settings, _tell))


def _planned(
    config: Path, overrides: list[str] | None, small: bool
) -> tuple[StudyConfig, list[Cell]]:
    from jaxft.study.config import StudyConfig
    from jaxft.study.plan import plan

    study = _load(config, overrides, small, StudyConfig)
    return study, plan(study)


def _load(config: Path, overrides: list[str] | None, small: bool, kind: type[Any]) -> Any:
    """The checked study; a torch file becomes a bundle in its folder, called after its content."""
    from jaxft.study import config as studies

    study = studies.load(config, overrides or (), small=small, kind=kind)
    return study.model_copy(update={"base": _bundle(study)})


def _bundle(study: Common) -> Path:
    from converters.to_jax import convert_with_provenance
    from jaxft import bundle
    from jaxft.study.identity import content

    if not study.base.is_file():
        return study.base
    path = study.output / f"{study.base.stem}-{content(study.base)[:8]}.jaxft"
    if not path.exists():
        model, params, provenance = convert_with_provenance(study.base)
        try:
            bundle.save(path, model, params, provenance=provenance)
        except OSError:  # another process was faster
            if not path.exists():
                raise
    return path


def _words(config: Path, overrides: list[str] | None, small: bool) -> list[str]:
    return [str(config), *(overrides or []), *(["--small"] if small else [])]


def _run(
    config: Path,
    overrides: list[str] | None,
    small: bool,
    cells: list[Cell],
    jobs: int,
    retry: bool,
    stacked: bool,
) -> None:
    from jaxft.study import work

    if jobs > 1:
        command = ["study", "run", *_words(config, overrides, small)]
        flags = [*(["--retry"] if retry else []), *(["--stacked"] if stacked else [])]
        work.spawn([*command, *flags], min(jobs, len(cells)))
        return
    backends = {cell.config.backend for cell in cells}
    use(None, "cueq" if "cueq" in backends else "auto")
    work.work(cells, _tell, retry=retry, together=stacked)


def _tell(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _chosen(cells: list[Cell], cell: str | None, index: int | None) -> Cell:
    if cell is not None and index is not None:
        raise ValueError("--cell and --index name a cell each; give one of them.")
    if index is not None:
        if index >= len(cells):
            raise ValueError(f"--index {index} of {len(cells)} cells, which count from 0.")
        return cells[index]
    found = [one for one in cells if one.id == cell]
    if not found:
        raise ValueError(
            f"--cell {cell} is none of the plan's {len(cells)}; jaxft study plan CONFIG --ids "
            "lists them. A changed file or setting changes ids."
        )
    return found[0]


def _facts(cell: Cell, status: str) -> dict[str, Any]:
    return {
        "id": cell.id,
        "dataset": cell.dataset,
        "recipe": cell.recipe,
        "size": cell.size,
        "seed": cell.seed,
        "varied": dict(cell.varied),
        "epochs": cell.config.epochs,
        "status": status,
        "folder": str(cell.folder),
    }


def _show(cells: list[Cell], states: list[str]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    axes = list(dict.fromkeys(axis for cell in cells for axis in cell.varied))
    for heading in ("", "id", "dataset", "recipe", *axes, "frames", "seed", "epochs", "status"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "id")
    for number, (cell, state) in enumerate(zip(cells, states, strict=True)):
        chosen = [cell.varied.get(axis, "") for axis in axes]
        frames = "all" if cell.size is None else str(cell.size)
        timed = cell.config.max_seconds
        epochs = str(cell.config.epochs) if timed is None else f"{timed:g} s"
        row = [str(number), cell.id, cell.dataset, cell.recipe, *chosen, frames, str(cell.seed)]
        table.add_row(*row, epochs, state)
    console.print(table)
    console.print(f"{len(cells)} cells: {_counted(states)}", highlight=False)


def _counted(states: list[str]) -> str:
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _collect(study: StudyConfig, cells: list[Cell]) -> None:
    from jaxft.study import page, tables
    from jaxft.study.collect import outcomes

    found = outcomes(cells)
    written = page.write(study, found)
    groups = tables.grouped(found)
    for name in study.datasets:
        own = [group for group in groups if group.group.dataset == name]
        console.print(tables.render(name, own, list(study.base_test)))
    for group in groups:
        for reason in group.reasons:
            _tell(reason.splitlines()[0])
    _tell(f"{len(cells)} cells: {_counted([outcome.status for outcome in found])}")
    _tell(f"wrote {', '.join(map(str, written))}")


def _show_searches(settings: Any, found: list[Search]) -> None:
    """The winners, and their configs as files that ``jaxft finetune`` takes."""
    from jaxft import config as configs
    from jaxft.study import collect
    from jaxft.study.page import RESULTS
    from jaxft.study.tune import rows

    folder = settings.output / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    written = [collect.replace(folder / "search.csv", collect.to_csv(rows(found)))]
    for one in found:
        if one.best is None:
            _tell(f"{one.dataset} {one.recipe}: every candidate failed: {one.trials[0].reason}")
            continue
        chosen = " ".join(f"{k}={v}" for k, v in one.best.cell.varied.items()) or "as it is"
        metric = one.best.cell.config.metric
        _tell(f"{one.dataset} {one.recipe}: {chosen}, {metric} {one.best.score:.5g}")
        name = f"best-{configs.slug(one.dataset)}-{configs.slug(one.recipe)}"
        best = one.best.cell.config.model_copy(update={"output": Path("runs") / name})
        written.append(collect.replace(folder / f"{name}.yaml", configs.to_yaml(best)))
    _tell(f"wrote {', '.join(map(str, written))}")
