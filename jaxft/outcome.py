"""What a run shows when it is over: tables, pictures, a page, the works to cite."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ase.data import chemical_symbols
from rich.console import Console
from rich.table import Table

from jaxft import config as configs
from jaxft import optimizer
from jaxft.citation import citation, works
from jaxft.config import Config
from jaxft.describe import describe
from jaxft.evaluate.errors import errors
from jaxft.evaluate.plots import parity_plot
from jaxft.fit import FitResult
from jaxft.inputs import Inputs
from jaxft.progress import fingerprint_of_frames
from jaxft.report import Judged, Report, environment
from jaxft.report import write as write_report
from jaxft.strategies import Recipe

REPORT, CITATIONS = "report.html", "citations.bib"


def show(
    config: Config,
    given: Inputs,
    fitted: FitResult,
    judged: Sequence[Judged],
    output: Path,
    console: Console,
) -> None:
    """One page about the run, parity plots and the works to cite."""
    for item in judged if find_spec("matplotlib") else ():
        picture = output / f"parity-{configs.slug(item.name)}.png"
        picture.unlink(missing_ok=True)  # of the same run, before it was resumed
        parity_plot(item.frames, {"before": item.before, "after": item.after}, picture)
        console.print(f"wrote {picture}")
    base, model = given.start.base, given.model
    row = model.head_index(config.head)
    present = {int(z) for frame in given.train.dataset.frames for z in frame.atomic_numbers}
    symbols = {chemical_symbols[z]: i for i, z in enumerate(model.atomic_numbers) if z in present}
    chosen, check = config.e0s if isinstance(config.e0s, str) else "given", given.preflight
    report = Report(
        title=f"jaxft {output.name}",
        run=hashlib.sha256(configs.to_yaml(config).encode()).hexdigest()[:16],
        summary={
            "recipe": " + ".join(strategy.name for strategy in given.recipe) or "all parameters",
            "kept epoch": f"{fitted.best_epoch} of {len(fitted.history) - 1}",
            "training data": "; ".join(given.train.describe()),
        },
        warnings=[w for w in check.warnings if w.startswith(f"{chosen}:")] if check else (),
        tests=judged,
        history=fitted.history,
        best_epoch=fitted.best_epoch,
        trained=describe(given.recipe, given.params),
        e0s=check.to_dict() if check else {},
        e0s_used={
            symbol: {"model": float(base.e0s[row, i]), "now": float(model.e0s[row, i])}
            for symbol, i in symbols.items()
        },
        works=works(given.recipe, also=_also_cited(config)),
        settings=configs.to_yaml(config),
        environment={
            **environment(),
            "dtype": config.dtype,
            "base": f"{config.model} ({given.start.digest})",
            "training frames": fingerprint_of_frames(given.train.dataset),
        },
    )
    page = write_report(output / REPORT, report)
    (output / CITATIONS).write_text(citations(config, given.recipe))
    console.print(f"wrote {page}; please cite the works in {output / CITATIONS}")


def citations(config: Config, recipe: Recipe) -> str:
    """BibTeX of exactly the methods that a run uses."""
    return citation(recipe, also=_also_cited(config))


def _also_cited(config: Config) -> tuple[str, ...]:
    chosen = config.optimizer
    return optimizer.cites(
        chosen.name,
        weight_decay=chosen.weight_decay,
        decay_towards=chosen.decay_towards,
        alternation=chosen.alternation,
    )


def comparison(judged: Sequence[Judged]) -> Table:
    """RMSE of every test set before and after; of moments also that of each element's mean."""
    table = Table(title="RMSE before → after", title_justify="left")
    table.add_column("set")
    table.add_column("frames", justify="right")
    totals = [
        [errors(item.frames, results).total for results in (item.before, item.after)]
        for item in judged
    ]
    has_moments = any(after.moments.frames for _, after in totals)
    for heading in ("E meV/atom", "F meV/Å", "σ meV/Å³"):
        table.add_column(heading, justify="right")
    if has_moments:
        table.add_column("|µ| mµB (means)", justify="right")
    for item, (before, after) in zip(judged, totals, strict=True):
        row_before, row_after = before.rmse(), after.rmse()
        cells = [
            "–" if row_before[k] is None else f"{row_before[k]:.1f} → {row_after[k]:.1f}"
            for k in ("energy", "forces", "stress")
        ]
        if has_moments:
            spreads = (before.moments, after.moments, after.mean_moments)
            told = [f"{1e3 * s.rmse:.1f}" for s in spreads if s.rmse is not None]
            cells.append(f"{told[0]} → {told[1]} ({told[2]})" if told else "–")
        table.add_row(item.name, str(len(item.frames)), *cells)
    return table
