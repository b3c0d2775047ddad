"""The facts of :func:`jaxft.inspection.facts`, laid out for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def page(found: Mapping[str, Any]) -> Group:
    """The facts for a terminal, readable without colour; keys that are absent are left out."""
    parts: list[RenderableType] = [_table(rows(found))]
    if found.get("e0s"):
        parts += [_heading("Heads"), _head_table(found)]
    if found.get("elements"):
        parts += [_heading(f"Elements ({len(found['elements'])})"), grid(found["elements"])]
    if found.get("e0s"):
        parts += [_heading("Isolated atoms, eV"), _e0_table(found["e0s"])]
    if found.get("parameters_per_layer"):
        parts += [_heading("Parameters"), _parameter_table(found)]
    if found.get("modules"):
        counts = [(name, f"{count}") for name, count in found["modules"].items()]
        parts += [_heading("Modules by class"), _table(counts)]
    file, provenance = found.get("file") or {}, found.get("provenance") or {}
    if provenance.get("sha256", "") != file.get("sha256"):  # a file's own is said above
        parts += [_heading("Provenance"), _table(_provenance_rows(provenance))]
    return Group(*parts)


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _shown(value: Any) -> Text:
    """Text of a value, with control characters of a file made visible."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value)))


def _table(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(_shown(key), _shown(value))
    return table


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The first part of the page, all but its tables, as names and texts."""
    lines: list[tuple[str, Any]] = []
    if file := found.get("file"):
        lines.append(("file", f"{file['name']} ({file['kind']}, {_size(file['bytes'])})"))
        lines.append(("sha256", file["sha256"]))
    if not found["convertible"]:
        lines.append(("NOT CONVERTIBLE", " ".join(found["reason"].split())))
    lines.append(("model", found["family"]))
    if published := found.get("published"):
        lines.append(("published", f"{published['relation']} {published['name']}"))
        lines += [(f"  {key}", published[key]) for key in ("licence", "citation", "url")]
    if found.get("nearest"):
        lines.append(("architecture", _nearest(found["nearest"])))
    if found.get("writer"):
        lines.append(("written by", found["writer"]["text"]))
    if "modules" in found:
        names = ("blocks", "radial_basis", "readouts", "heads")
        lines += [(key.replace("_", " "), _joined(found[key])) for key in names if found[key]]
    if "cutoff" in found:
        lines += _summary_of_layers(found) + _summary_of_distances(found) + _summary_of_ends(found)
    dtype = found["dtype"]
    lines.append(("parameters", f"{found['parameters']['total']:,} in {dtype['parameters']}"))
    lines.append(("constants", f"{dtype['constants']}, isolated atoms {dtype['e0s']}"))
    if "tensors" in found:
        lines.append(("tensors", found["tensors"]))
    return [(key, str(value)) for key, value in lines]


def _joined(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else value


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _nearest(nearest: Mapping[str, Any]) -> str:
    unknown = nearest["unknown"]
    if nearest["is_same"]:
        sure = ", ".join(name for name in nearest["names"] if name not in unknown)
        open_ = ", ".join(name for name in nearest["names"] if name in unknown)
        gaps = ", ".join(sorted({fact for facts in unknown.values() for fact in facts}))
        texts = [f"same architecture as {sure}"] if sure else []
        if open_:
            texts.append(f"{'' if sure else 'same architecture '}as far as published as {open_}")
            texts[-1] += f" (not published: {gaps})"
        return "; ".join(texts)
    names = ", ".join(nearest["names"])
    parts = [
        f"{key} ({_plain(here)}; there {_plain(there)})"
        for key, (here, there) in nearest["differs"].items()
    ]
    return f"closest: {names}; differs in {', '.join(parts)}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _summary_of_layers(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    norms = [
        "learned density" if is_density else f"{mean:.6g}"
        for is_density, mean in zip(found["is_density"], found["avg_num_neighbors"], strict=True)
    ]
    paths = ["  ".join(f"{ir} {_widths(n)}" for ir, n in layer.items()) for layer in found["paths"]]
    weights = ["shared" if shared else "per element" for shared in found["agnostic_product"]]
    rows = [
        ("interactions", _layers(found["blocks"])),
        ("hidden irreps", _layers(found["hidden_irreps"])),
        ("message irreps", _layers(found["message_irreps"])),
        ("sender irreps", _layers(found["sender_irreps"])),
        ("harmonics", found["edge_irreps"]),
        ("correlation", _layers(found["correlation"])),
        ("paths, ν = max … 1", _layers(paths)),
        ("product weights", _layers(weights)),
        ("radial network", _layers(map(_widths, found["radial_mlp"]))),
        ("neighbours divided by", _layers(norms)),
    ]
    if any(found["density_mlp"]):
        rows.append(("density network", _layers(map(_widths, found["density_mlp"]))))
    return rows


def _layers(values: Iterable[Any]) -> str:
    """One value where all layers agree, else all of them."""
    items = [str(value) for value in values]
    return items[0] if len(set(items)) == 1 else " | ".join(items)


def _widths(widths: Sequence[int]) -> str:
    return "-".join(map(str, widths)) or "none"


def _summary_of_distances(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    cutoff, basis = found["cutoff"], found["radial_basis"]
    coefficient = basis["coefficient"]
    extra = "" if coefficient is None else f", coefficient {coefficient:.6g} 1/Å²"
    return [
        ("cutoff", f"{cutoff['r_max']:g} Å, polynomial p = {cutoff['power']}"),
        ("cutoff applied to", cutoff["applied_to"]),
        ("radial basis", f"{basis['number']} {basis['kind']}{extra}"),
        ("distance transform", _named(found["distance_transform"])),
        ("pair repulsion", _named(found["pair_repulsion"])),
    ]


def _named(constants: Mapping[str, Any] | None) -> str:
    if constants is None:
        return "none"
    return f"{constants['kind']} " + ", ".join(
        f"{name} {_value(value)}" for name, value in constants.items() if name != "kind"
    )


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(map(_value, value)) + "]"
    return "–" if value is None else f"{value:.6g}"


def _summary_of_ends(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    readouts = [
        r["kind"] + ("" if r["kind"] == "linear" else f" {r['hidden_irreps']}")
        for r in found["readouts"]
    ]
    only = " (last layer only)" if found["last_readout_only"] else ""
    rows = [("readouts", " | ".join(readouts) + only), ("gate", found["gate"])]
    for item in found["embeddings"]:
        span = (
            f"{item['lowest']} … {item['highest']}"
            if item["kind"] == "categorical"
            else f"{item['in_dim']} number{'s' * (item['in_dim'] > 1)}"
        )
        default = "required" if item["default"] is None else f"default {item['default']}"
        text = f"{item['kind']}, per {item['per']}, {span}, {default}, width {item['emb_dim']}"
        rows.append((f"embeds {item['name']}", text))
    if found["embedding_readout"]:
        rows.append(("embedding readout", "yes"))
    if moments := found.get("moments"):
        adds = ", adds to the energy" if moments["energy"] else ""
        rows.append(("magnetic moments", f"{moments['kind']}{adds}"))
    return rows


def _head_table(found: Mapping[str, Any]) -> Table:
    table = Table("head", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("scale, eV", "shift, eV/atom", "E0 from, eV", "to, eV"):
        table.add_column(name, justify="right")
    for head in found["heads"]:
        scale, shift = ((found.get(key) or {}).get(head) for key in ("scale", "shift"))
        e0s = [e0 for e0 in found.get("e0s", {}).get(head, {}).values() if e0 is not None]
        span = (min(e0s), max(e0s)) if e0s else (None, None)
        table.add_row(_shown(head), *map(_value, (scale, shift)), *map(_energy, span))
    return table


def _energy(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _e0_table(e0s: Mapping[str, Mapping[str, float | None]]) -> RenderableType:
    rows = list(e0s.values())
    if len(rows) == 1:
        width = max(len(_energy(e0)) for e0 in rows[0].values())
        cells = [f"{symbol:<2} {_energy(e0):>{width}}" for symbol, e0 in rows[0].items()]
        return Columns(cells, padding=(0, 3, 0, 0), column_first=False)
    table = Table("", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in e0s:
        table.add_column(_shown(head), justify="right", overflow="fold")
    for symbol in rows[0]:
        table.add_row(symbol, *(_energy(row[symbol]) for row in rows))
    return table


def _parameter_table(found: Mapping[str, Any]) -> Table:
    counts = found["parameters"]
    layers = found["parameters_per_layer"]
    table = Table("", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("all", *(f"layer {i}" for i in range(len(layers)))):
        table.add_column(name, justify="right")
    for group, count in counts.items():
        per_layer = [layer.get(group.removesuffix("s")) for layer in layers]
        if count and group != "total":
            numbers = ["" if n is None else f"{n:,}" for n in per_layer]
            table.add_row(group, f"{count:,}", *numbers)
    table.add_row("total", f"{counts['total']:,}", *(f"{sum(x.values()):,}" for x in layers))
    return table


def _provenance_rows(provenance: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in provenance.items():
        if key == "config":  # a fine-tune's settings; --json has all of them
            recipe = value.get("recipe") if isinstance(value, Mapping) else value
            rows.append((f"{prefix}recipe", json.dumps(recipe)[:500]))
        elif isinstance(value, Mapping) and prefix.count(".") < DEPTH:
            rows += _provenance_rows(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


DEPTH = 8
"""Of a fine-tune of a fine-tune of …, as the page shows it."""

LAYOUT = """
H  -  -  -  -  -  -  -  -  -  -  -  -  -  -  -  -  He
Li Be -  -  -  -  -  -  -  -  -  -  B  C  N  O  F  Ne
Na Mg -  -  -  -  -  -  -  -  -  -  Al Si P  S  Cl Ar
K  Ca Sc Ti V  Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y  Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I  Xe
Cs Ba *  Hf Ta W  Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
Fr Ra ** Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
"""
SERIES = {
    "*": "La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu",
    "**": "Ac Th Pa U  Np Pu Am Cm Bk Cf Es Fm Md No Lr",
}


def grid(symbols: Iterable[str]) -> Table:
    """A small periodic table: known elements by symbol, others as dots."""
    known = set(symbols)
    shown = {mark: known & set(series.split()) for mark, series in SERIES.items()}

    def cell(symbol: str) -> Text:
        if symbol == "-":
            return Text("")
        if symbol in known or shown.get(symbol):
            return Text(symbol, style="bold")
        return Text("·", style="dim")

    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for line in LAYOUT.split("\n")[1:-1]:
        table.add_row(*map(cell, line.split()))
    for mark, series in SERIES.items():
        if shown[mark]:
            table.add_row("", Text(mark, style="bold"), *map(cell, series.split()))
    return table
