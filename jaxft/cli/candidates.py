"""What the commands that judge share: models named on the command line, results shown and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxft.cli.shared import Dtype, console, load, use

if TYPE_CHECKING:
    from jaxft.evaluate.candidate import Candidate
    from jaxft.evaluate.finding import Finding

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]MODEL...",
        help="Bundles; torch:FILE.model is judged through mace-torch's own calculator.",
    ),
]
Save = Annotated[Path | None, typer.Option(help="Write the result as JSON to this file.")]
Report = Annotated[Path | None, typer.Option(help="Write a page with pictures (HTML).")]

TORCH = "torch:"


def check_outputs(*paths: Path | None) -> None:
    """Before anything is computed: raises FileExistsError, or ValueError for a missing folder."""
    from jaxft.bundle import refuse_existing

    for path in paths:
        if path is not None:
            refuse_existing(path)
            if not path.parent.is_dir():
                raise ValueError(f"{path} cannot be written; its folder does not exist.")


def candidates(
    specs: Sequence[str], dtype: Dtype | None, head: str | None, batch_size: int = 16
) -> list[Candidate]:
    """The models of a command line, ``[NAME=]BUNDLE`` or ``[NAME=]torch:FILE.model``.

    A torch file is loaded by mace-torch, which executes what it says; that is for files of one's
    own, to compare. float64 if any is, unless ``dtype`` says otherwise.

    Raises:
      ValueError: two have one name, a bundle is none, or a head is unknown.
      ImportError: mace-torch is not installed.
    """
    from jaxft.evaluate.candidate import JaxCandidate, check_names

    named = [_named(spec) for spec in specs]
    wanted = dtype or common_dtype(specs)
    use(wanted.value)
    found: list[Candidate] = []
    for name, path in named:
        if path.startswith(TORCH):
            found.append(_torch(name, path.removeprefix(TORCH), wanted, head))
        else:
            model, params = load(Path(path), wanted, head)
            found.append(JaxCandidate(name, model, params, head, batch_size, wanted.value))
    check_names(found)
    return found


def common_dtype(specs: Sequence[str]) -> Dtype:
    """float64 if any bundle is stored so, or there are torch files alone."""
    from jaxft import bundle as bundles

    paths = [Path(path) for _, path in map(_named, specs) if not path.startswith(TORCH)]
    stored = [bundles.stored_dtype(bundles.load_numpy(path)[1]) for path in paths]
    return Dtype.float64 if "float64" in (stored or ["float64"]) else Dtype.float32


def per_head(
    specs: Sequence[str], dtype: Dtype | None, heads: Sequence[str | None], batch_size: int = 16
) -> list[Candidate]:
    """Each model under each of several heads, which its name then tells.

    Raises:
      ValueError, ImportError: as :func:`candidates`; every model must have every head.
    """
    from jaxft.evaluate.candidate import AseCandidate, JaxCandidate

    found: list[Candidate] = []
    for head in heads:
        for candidate in candidates(specs, dtype, head, batch_size):
            assert isinstance(candidate, JaxCandidate | AseCandidate)
            several = len(heads) > 1
            found.append(
                replace(candidate, name=f"{candidate.name} ({head})") if several else candidate
            )
    return found


def _named(spec: str) -> tuple[str, str]:
    name, separator, path = spec.partition("=")
    if separator and name and path and not Path(spec).exists():
        return name, path
    return Path(spec.removeprefix(TORCH)).stem, spec


def _torch(name: str, path: str, dtype: Dtype, head: str | None) -> Candidate:
    from converters.verify import torch_calculator
    from jaxft.evaluate.candidate import AseCandidate

    return AseCandidate(name, torch_calculator(path, dtype=dtype.value, head=head))


def show(
    finding: Finding,
    *,
    as_json: bool,
    save: Path | None,
    report: Path | None,
    tables: Sequence[Finding] = (),
) -> None:
    """Print and keep a result; the paths were looked at by :func:`check_outputs`.

    A result of many columns is printed as several ``tables``, which are split until they fit.

    Raises:
      typer.Exit: with 1, at the end, if nothing at all could be computed.
    """
    from jaxft.evaluate.layout import fitted

    document = json.dumps(finding.to_dict(), indent=1)
    if save is not None:
        save.write_text(document + "\n")
    if report is not None:
        from jaxft.report.findings import findings_page

        report.write_text(findings_page(f"jaxft evaluate {finding.check}", [finding]))
    if as_json:
        print(document)
    else:
        for table in tables or (finding,):
            for part in fitted(table, console):
                console.print(part)
        for note in finding.notes:
            console.print(note)
    if finding.rows and not any(row.values for row in finding.rows):
        raise typer.Exit(1)
