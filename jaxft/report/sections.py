"""The parts of a report; each is markup, or nothing where there is nothing to say."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence

from jaxft.evaluate.curves import curves_svg
from jaxft.evaluate.errors import ErrorTable, GroupErrors, Spread, errors
from jaxft.evaluate.plots import parity_svg
from jaxft.report.contents import Judged, Report, timings
from jaxft.report.html import Markup, facts, folded, join, table, tag

QUANTITIES = {
    "energy": "energy, meV/atom",
    "forces": "forces, meV/Å",
    "stress": "stress, meV/Å³",
    "moments": "magnetic moments, mµB",
}
MILLI = 1e3
MISSING = "–"
NO_PLOTS = "Not drawn: matplotlib is not installed; use pip install 'jaxft[plots]'."

PLOT_LIMIT = 3_500_000
"""Bytes of all parity plots together; sets beyond have their table and a sentence."""

NOTABLE = 0.02
"""Relative change of an error that is worth a colour."""

Tables = Sequence[tuple[ErrorTable, ErrorTable]]
"""Errors of each test set before and after."""


def tables(report: Report) -> Tables:
    """Errors of the test sets of a report, in their order."""
    return [(errors(t.frames, t.before), errors(t.frames, t.after)) for t in report.tests]


def warnings(lines: Sequence[str]) -> Markup:
    """A box for each, at the top of the page."""
    items = (tag("li", line) for line in lines)
    return tag("ul", *items, class_="warnings") if lines else Markup()


def changes(report: Report, tables: Tables) -> Markup:
    """Errors before and after, per set and quantity."""
    if not report.tests:
        return Markup()
    pairs = {
        test.name: (before.total, after.total)
        for test, (before, after) in zip(report.tests, tables, strict=True)
    }
    details = (
        folded(f"{test.name}: by config_type and element", _by_group(before, after))
        for test, (before, after) in zip(report.tests, tables, strict=True)
        if len(before.groups) > 1 or len(before.elements) > 1
    )
    return join([_change_table("set", pairs), *details])


def _by_group(before: ErrorTable, after: ErrorTable) -> Markup:
    groups = {a.name: (a, b) for a, b in zip(before.groups, after.groups, strict=True)}
    elements = [
        [a.symbol, str(a.atoms), *_change(MILLI * a.rmse, MILLI * b.rmse)]
        for a, b in zip(before.elements, after.elements, strict=True)
    ]
    headings = ("element", "atoms", "force RMSE before, meV/Å", "after", "after / before")
    return join([_change_table("config_type", groups), table(headings, elements)])


def _change_table(heading: str, pairs: Mapping[str, tuple[GroupErrors, GroupErrors]]) -> Markup:
    rows = []
    for name, (before, after) in pairs.items():
        for quantity, title in QUANTITIES.items():
            a, b = getattr(before, quantity), getattr(after, quantity)
            if a.frames:
                rows.append([name, title, str(a.frames), *_spread_cells(a, b)])
    headings = (
        heading,
        "quantity",
        "labels",
        "MAE before",
        "after",
        "RMSE before",
        "after",
        "after / before",
    )
    return table(headings, rows, text=2)


def _spread_cells(before: Spread, after: Spread) -> list[str]:
    mae = [_number(_milli(s.mae)) for s in (before, after)]
    return [*mae, *_change(_milli(before.rmse), _milli(after.rmse))]


def _change(before: float | None, after: float | None) -> list[str]:
    """Before, after and their ratio, the latter coloured where it is notable."""
    ratio = after / before if before and after is not None else math.nan
    colour = "good" if ratio < 1 - NOTABLE else "bad" if ratio > 1 + NOTABLE else None
    text = f"{ratio:.2f}" if math.isfinite(ratio) else MISSING
    return [_number(before), _number(after), tag("td", text, class_=colour)]


def _milli(value: float | None) -> float | None:
    return None if value is None else MILLI * value


def _number(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3e}"


def forgetting(report: Report, tables: Tables) -> Markup:
    """How errors grew on what the base model knew, and on sets that were watched in training."""
    base = [
        [test.name, QUANTITIES[q], *_change(*(_milli(getattr(t.total, q).rmse) for t in pair))]
        for test, pair in zip(report.tests, tables, strict=True)
        for q in QUANTITIES
        if test.is_base and getattr(pair[0].total, q).frames
    ]
    parts: list[str] = []
    if base:
        parts += [
            tag("p", "Test sets labelled as the base model's training data were.", class_="note"),
            table(("set", "RMSE", "before", "after", "after / before"), base, text=2),
        ]
    if watched := _watched(report):
        parts += [
            tag("p", "Sets watched during training, from epoch 0 to the kept one.", class_="note"),
            table(("set", "RMSE", "epoch 0", "kept", "kept / epoch 0"), watched, text=2),
        ]
    return join(parts)


def _watched(report: Report) -> list[list[str]]:
    """The rows of sets beside the target, where an epoch was kept."""
    rows = {row["epoch"]: row for row in report.history}
    first, kept = rows.get(0), rows.get(report.best_epoch if report.best_epoch is not None else -1)
    if first is None or kept is None:
        return []
    names = dict.fromkeys(key.rpartition("/")[0] for key in first if "/" in key)
    return [
        [name, title, *_change(MILLI * first[f"{name}/{q}"], MILLI * kept[f"{name}/{q}"])]
        for name in names
        for q, title in QUANTITIES.items()
        if name not in ("train", "valid") and f"{name}/{q}" in first and f"{name}/{q}" in kept
    ]


def learning_curves(report: Report, tables: Tables) -> Markup:
    """Curves, and the numbers of all epochs below them."""
    if not report.history:
        return Markup()
    if importlib.util.find_spec("matplotlib") is None:
        figure: str = tag("p", NO_PLOTS, class_="note")
    else:
        svg = curves_svg(report.history, best=report.best_epoch)
        kept = "" if report.best_epoch is None else f" The thin line is epoch {report.best_epoch}, "
        note = f"{kept}whose parameters were kept." if kept else ""
        figure = tag("figure", Markup(svg), tag("figcaption", note)) if svg else ""
    columns = list(dict.fromkeys(key for row in report.history for key in row))
    rows = [[_plain(row.get(name)) for name in columns] for row in report.history]
    return join([figure, folded("numbers of all epochs", table(columns, rows, text=0))])


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return MISSING if value is None else str(value)


def parity(report: Report, tables: Tables) -> Markup:
    """Predictions against labels of each set, before and after."""
    if not report.tests:
        return Markup()
    if importlib.util.find_spec("matplotlib") is None:
        return tag("p", NO_PLOTS, class_="note")
    parts: list[str] = []
    room = PLOT_LIMIT
    for i, (test, (before, _)) in enumerate(zip(report.tests, tables, strict=True)):
        parts.append(tag("h3", test.name))
        if not any(getattr(before.total, quantity).frames for quantity in QUANTITIES):
            parts.append(tag("p", "No label to compare with.", class_="note"))
            continue
        svg = _parity(test, ids=f"parity-{i}") if room > 0 else ""
        room -= len(svg)
        too_large = tag("p", "Not drawn: the page would become too large.", class_="note")
        parts.append(tag("figure", Markup(svg)) if svg and room >= 0 else too_large)
    return join(parts)


def _parity(test: Judged, *, ids: str) -> str:
    return parity_svg(test.frames, {"before": test.before, "after": test.after}, ids=ids)


def trained(report: Report, tables: Tables) -> Markup:
    """The totals; leaf by leaf if asked for."""
    lines = report.trained.splitlines()
    if not lines:
        return Markup()
    return join([tag("p", lines[-1]), folded("leaf by leaf", tag("pre", report.trained))])


def isolated_atoms(report: Report, tables: Tables) -> Markup:
    """What was used, and what each choice would have started from."""
    parts: list[str] = []
    if used := report.e0s_used:
        columns = list(dict.fromkeys(key for row in used.values() for key in row))
        rows = [[s, *(_energy(row.get(name)) for name in columns)] for s, row in used.items()]
        parts.append(table(("element", *(f"{name}, eV" for name in columns)), rows))
    choices = report.e0s.get("choices", {})
    if choices:
        best = report.e0s.get("recommendation")
        kinds = ("rmse", "mae", "worst")
        rows = [
            [f"{name} (recommended)" if name == best else name, *(_number(c[k]) for k in kinds)]
            for name, c in choices.items()
        ]
        headings = ("choice", *(f"{kind}, meV/atom" for kind in ("RMSE", "MAE", "largest")))
        parts += [tag("h3", "Energies before training, by choice"), table(headings, rows)]
        symbols = dict.fromkeys(symbol for c in choices.values() for symbol in c["e0s"])
        values = [[s, *(_energy(c["e0s"].get(s)) for c in choices.values())] for s in symbols]
        parts.append(folded("values, eV", table(("element", *choices), values)))
    parts += [
        tag("p", f"No {name}: {why}.", class_="note")
        for name, why in report.e0s.get("missing", {}).items()
    ]
    parts += [tag("p", note, class_="note") for note in report.e0s.get("notes", ())]
    return join(parts)


def _energy(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def durations(report: Report, tables: Tables) -> Markup:
    """Of epochs, and whatever else was measured."""
    found = {**timings(report.history), **report.timings}
    return facts(found) if found else Markup()


def settings(report: Report, tables: Tables) -> Markup:
    """The YAML, as it was read."""
    return tag("pre", report.settings) if report.settings else Markup()


def environment(report: Report, tables: Tables) -> Markup:
    """Versions, devices and hashes."""
    shown = {
        name: json.dumps(value, ensure_ascii=False, default=str)
        if isinstance(value, Mapping | list | tuple)
        else value
        for name, value in report.environment.items()
    }
    return facts(shown) if shown else Markup()


def works(report: Report, tables: Tables) -> Markup:
    """A line per work, and the BibTeX."""
    if not report.works:
        return Markup()
    items = (
        tag("li", *_linked(work.line.removesuffix(work.url), work.url)) for work in report.works
    )
    bibtex = "\n\n".join(work.bibtex for work in report.works)
    return join([tag("ul", *items), folded("BibTeX", tag("pre", bibtex))])


def _linked(text: str, url: str) -> list[str]:
    return [text, tag("a", url, href=url, rel="noreferrer")] if url else [text]


SECTIONS: Mapping[str, Callable[[Report, Tables], Markup]] = {
    "Errors before and after": changes,
    "Forgetting": forgetting,
    "Learning curves": learning_curves,
    "Predictions against labels": parity,
    "What was trained": trained,
    "Isolated-atom energies": isolated_atoms,
    "Timings": durations,
    "Settings": settings,
    "Environment": environment,
    "Please cite": works,
}
"""In the order of the page."""
