"""Several models under several checks, from a file or from results of earlier runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field, field_validator

from jaxft.cli.candidates import candidates, check_outputs, common_dtype
from jaxft.cli.shared import Dtype, app, command, console, evaluate_app
from jaxft.recipe import KeysConfig, Strict

if TYPE_CHECKING:
    from jaxft.evaluate.bindings import BoundCheck
    from jaxft.evaluate.compare import Axes

REPORT, CSV, JSON = "report.html", "numbers.csv", "findings.json"
"""In the folder of a comparison."""


class AxesConfig(Strict):
    """Two numbers, as ``check.column``; both are to be small."""

    x: str = Field("errors.forces_rmse", pattern=r"^[^.]+\..+$")
    y: str = Field("forget.forces_ratio", pattern=r"^[^.]+\..+$")


class ModelConfig(Strict):
    """A model with a head of its own."""

    file: str
    head: str


class ComparisonConfig(Strict):
    """Models and the checks that they undergo."""

    models: dict[str, str | ModelConfig] = Field(min_length=1)
    """Bundles by name, or ``torch:FILE.model``."""
    base: str | None = None
    """The model that the others were made of."""
    dtype: Literal["float32", "float64"] | None = None
    """By default float64 if any bundle is."""
    head: str | None = None
    """Of all models that say none of their own."""
    batch_size: int = Field(16, ge=1)
    keys: KeysConfig = KeysConfig()
    """Labels of all frames."""
    checks: dict[str, dict[str, Any] | None] = Field(min_length=1)
    """Options of every check, by its name; each is checked as strictly as this."""
    probe: Path | None = None
    """A structure to take the time of an evaluation."""
    pareto: AxesConfig = AxesConfig()

    @field_validator("models")
    @classmethod
    def _are_names(cls, models: dict[str, Any]) -> dict[str, Any]:
        if wrong := [name for name in models if "=" in name or not name.strip()]:
            raise ValueError(f"{wrong[0]!r} is no name of a model: empty, or with an =")
        return models


def load(path: Path) -> ComparisonConfig:
    """Read a comparison.

    Raises:
      ConfigError: as :func:`jaxft.config.load`; also for options of a check.
    """
    from jaxft import config

    found = config.checked(
        ComparisonConfig, config.read_yaml(path, hint="docs/evaluate/compare.md"), str(path)
    )
    if found.base is not None and found.base not in found.models:
        names = ", ".join(map(repr, found.models))
        raise config.ConfigError(f"{path}:\n  base: {found.base!r} is none of {names}")
    return found


def bound_checks(comparison: ComparisonConfig, source: str) -> dict[str, BoundCheck]:
    """The checks with their options, whose files are read.

    Raises:
      ConfigError: a check or an option is not known, or a value is not what is expected.
      ValueError: a file cannot be read.
    """
    import difflib

    from jaxft import config, data
    from jaxft.evaluate.checks import CHECKS

    keys = data.Keys(**comparison.keys.model_dump())
    found = {}
    for name, options in comparison.checks.items():
        if name not in CHECKS:
            (close,) = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.0)
            raise config.ConfigError(
                f"{source}:\n  checks: unknown check {name!r}; did you mean {close!r}? (known: "
                f"{', '.join(CHECKS)})"
            )
        check = CHECKS[name]
        given = dict(options or {})
        if "base" in check.options.model_fields and comparison.base is not None:
            given.setdefault("base", comparison.base)
        wanted = config.checked(check.options, given, f"{source}, checks.{name}")
        found[name] = check.bind(wanted, keys)
    return found


@evaluate_app.command("compare")
@app.command("compare")
@command
def compare(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG.yaml]", help="Models and checks.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="New folder: page, CSV, JSON.")
    ] = None,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", help="JSON that --save of a check or a comparison wrote; repeatable."
        ),
    ] = None,
    title: str = "Comparison of models",
) -> None:
    """All checks of several models on one page, with the Pareto front."""
    from jaxft.evaluate.compare import Axes, Comparison
    from jaxft.evaluate.joining import merge, read_findings
    from jaxft.evaluate.svg import new_figure

    check_outputs(output)
    if config is None and not earlier:
        raise ValueError("nothing to compare; give CONFIG.yaml, --from FILE.json, or both.")
    if output is not None:
        new_figure(1, 1)  # says what to install before anything is computed
    findings = [finding for path in earlier or [] for finding in read_findings(path)]
    if config is None:
        found = Comparison(tuple(merge(findings)), Axes())
    else:
        found = _run(load(config), str(config), findings)
    if output is not None:
        _write(output, found, title)
    console.print(found.render())
    for note in found.summary.notes:
        console.print(note)
    for finding in found.findings:
        for row in finding.flags:
            console.print(f"{finding.check}: {row.model}, {row.subject}: {row.flag}")
    if output is not None:
        console.print(f"wrote {output / REPORT}, {CSV}, {JSON}", highlight=False)


def _run(comparison: ComparisonConfig, source: str, earlier: list[Any]) -> Any:
    from jaxft.evaluate.bindings import one_structure
    from jaxft.evaluate.compare import compare

    checks = bound_checks(comparison, source)
    axes = _axes(comparison)
    probe = None if comparison.probe is None else one_structure(comparison.probe)
    models = _models(comparison)
    return compare(
        models,
        checks,
        base=comparison.base,
        probe=probe,
        earlier=earlier,
        axes=axes,
        told=lambda name: console.print(f"{name} …", highlight=False),
    )


def _models(comparison: ComparisonConfig) -> list[Any]:
    given = {
        name: (f"{name}={said.file}", said.head)
        if isinstance(said, ModelConfig)
        else (f"{name}={said}", comparison.head)
        for name, said in comparison.models.items()
    }
    specs = [spec for spec, _ in given.values()]
    dtype = common_dtype(specs) if comparison.dtype is None else Dtype(comparison.dtype)
    return [
        candidate
        for spec, head in given.values()
        for candidate in candidates([spec], dtype, head, comparison.batch_size)
    ]


def _axes(comparison: ComparisonConfig) -> Axes:
    from jaxft.evaluate.compare import Axes

    return Axes(comparison.pareto.x, comparison.pareto.y)


def _write(folder: Path, found: Any, title: str) -> None:
    from jaxft.bundle import whole_folder

    with whole_folder(folder) as scratch:
        (scratch / REPORT).write_text(found.page(title))
        (scratch / CSV).write_text(found.to_csv())
        (scratch / JSON).write_text(json.dumps(found.to_dict(), indent=1) + "\n")
