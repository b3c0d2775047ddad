"""What a model file or a bundle holds: plain facts and a page about them; nothing is compiled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jaxft import bundle, tree
from jaxft.data.batches import USUAL
from jaxft.models.config import EmbeddingConfig, MACEConfig
from jaxft.models.irreps import multiplicities
from jaxft.potential import E0_BUFFER, Potential
from jaxft.typing import Params

FORMAT = 2
"""Of the facts: raised when a key changes its meaning or goes."""

GROUPS = (
    "node_embedding",
    "joint_embedding",
    "embedding_readout",
    "interactions",
    "products",
    "readouts",
)
UNITS = {"r_max": "Å", "scale": "eV", "shift": "eV per atom", "e0s": "eV", "bytes": "byte"}


def facts(model: Potential, params: Params, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is, as a document that JSON can hold; numbers that are not finite become None.

    Energies are in eV, lengths in Å; ``units`` repeats it. Lists called "per layer" begin with the
    first layer.

    Returns:
      A dict with, in this order,

      - ``format``: version of this document; ``units``: by key;
      - ``file``: ``name``, ``kind`` ("bundle" or "torch model"), ``bytes`` on disk and ``sha256``
        (of a bundle: of its arrays), or None; filled in by whoever read the file;
      - ``convertible``: whether jaxft computes with it; ``reason``: None, or why not;
      - ``published``: None, or of the published file that this is, or was made from, ``name``,
        ``relation`` ("is", "converted from", "derived from"), ``licence``, ``citation``, ``url``;
      - ``nearest``: None, or ``names`` of published models, ``is_same``, whether all that is known
        of their architecture agrees, or else ``differs``: ``{fact: [here, there]}``; ``unknown``:
        ``{name: facts}`` that are not published;
      - ``writer``: None, or ``text``, ``at_least``, ``at_most``: versions of mace-torch, or None;
      - ``family``; per layer ``blocks``, ``hidden_irreps``, ``sender_irreps`` (of what enters the
        tensor product), ``message_irreps``, ``correlation``, ``paths`` (``{irrep: counts}`` of the
        file's own coupling paths for ν = correlation … 1), ``radial_mlp`` and ``density_mlp``
        (hidden widths), ``is_density`` and ``avg_num_neighbors`` (used where not ``is_density``),
        ``agnostic_product``; ``edge_irreps``, the spherical harmonics;
      - ``cutoff``: ``r_max``, polynomial ``power``, ``applied_to`` ("radial functions" or "output
        of the radial network");
      - ``radial_basis``: ``kind``, ``number``, ``coefficient`` (1/Å², Gaussians only);
      - ``distance_transform``, ``pair_repulsion``: None, or ``kind`` and its constants by name;
      - ``gate``, ``readouts`` (``kind``, ``irreps_in``, ``hidden_irreps`` of all heads together),
        ``last_readout_only``;
      - ``embeddings``: ``name``, ``kind``, ``per``, ``emb_dim``; ``lowest``, ``highest`` of
        categorical, ``in_dim`` of continuous ones, ``default`` (None: it must be given);
        ``embedding_readout``;
      - ``heads``: names; ``scale``, ``shift``: ``{head: value}``, None for a plain MACE;
        ``elements``: symbols in the model's order; ``e0s``: ``{head: {symbol: E0}}``;
      - ``parameters``: counts by group and ``total``; ``parameters_per_layer``: ``interaction``,
        ``product``, ``readout``;
      - ``dtype``: of ``parameters``, ``constants`` and ``e0s``; ``provenance``: of the model.
    """
    return {
        "format": FORMAT,
        "units": UNITS,
        "file": None,
        "convertible": True,
        "reason": None,
        "published": None,
        "nearest": None,
        "writer": None,
        **_architecture(model.config),
        **_distances(model),
        **_heads(model),
        **_counts(model.config, params),
        "dtype": _dtypes(model, params),
        "provenance": dict(provenance),
    }


def of_bundle(path: str | Path) -> dict[str, Any]:
    """The facts of a bundle; errors as :func:`jaxft.load`."""
    path = Path(path)
    found = facts(*bundle.load_numpy(path))
    with (path / bundle.ARRAYS).open("rb") as arrays:
        sha256 = hashlib.file_digest(arrays, "sha256").hexdigest()
    size = sum((path / name).stat().st_size for name in (bundle.MODEL, bundle.ARRAYS))
    return found | {"file": file_facts(path.name, "bundle", size, sha256)}


def file_facts(name: str, kind: str, size: int, sha256: str) -> dict[str, Any]:
    """The entry ``file``."""
    return {"name": name, "kind": kind, "bytes": size, "sha256": sha256}


def number(value: Any) -> float | None:
    """None unless finite: JSON knows neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def _architecture(config: MACEConfig) -> dict[str, Any]:
    blocks, products = config.interactions, config.products
    return {
        "family": config.family,
        "blocks": [block.block for block in blocks],
        "hidden_irreps": [product.irreps_out for product in products],
        "sender_irreps": [block.sent_irreps for block in blocks],
        "message_irreps": [product.irreps_in for product in products],
        "edge_irreps": config.edge_irreps,
        "correlation": [product.correlation for product in products],
        "paths": [
            dict(zip(multiplicities(p.irreps_out), map(list, p.paths), strict=True))
            for p in products
        ],
        "radial_mlp": [list(block.radial_mlp) for block in blocks],
        "density_mlp": [list(block.density_mlp) for block in blocks],
        "is_density": [block.has_density for block in blocks],
        "avg_num_neighbors": [block.avg_num_neighbors for block in blocks],
        "agnostic_product": [product.is_agnostic for product in products],
        "gate": config.gate,
        "readouts": [readout.model_dump(mode="json") for readout in config.readouts],
        "last_readout_only": len(config.readouts) < len(products),
        "embeddings": [_embedding(feature) for feature in config.embeddings],
        "embedding_readout": config.embedding_readout,
    }


def _embedding(feature: EmbeddingConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": feature.name,
        "kind": feature.kind,
        "per": feature.per,
        "emb_dim": feature.emb_dim,
        "default": USUAL[feature.name][1] if feature.name in USUAL else None,
    }
    if feature.num_classes is None:
        return found | {"in_dim": feature.in_dim}
    return found | {
        "lowest": -feature.offset,
        "highest": feature.num_classes - 1 - feature.offset,
    }


def _distances(model: Potential) -> dict[str, Any]:
    config = model.config
    where = "radial functions" if config.apply_cutoff else "output of the radial network"
    transform = repulsion = None
    if config.distance_transform != "None":
        transform = {"kind": config.distance_transform}
        transform |= _constants(model, "radial_embedding/distance_transform")
    if config.pair_repulsion:
        repulsion = {"kind": "ZBL"} | _constants(model, "pair_repulsion_fn")
    return {
        "cutoff": {"r_max": config.r_max, "power": config.cutoff_power, "applied_to": where},
        "radial_basis": {
            "kind": config.radial_type,
            "number": config.num_bessel,
            "coefficient": config.gaussian_coefficient,
        },
        "distance_transform": transform,
        "pair_repulsion": repulsion,
    }


def _constants(model: Potential, module: str) -> dict[str, Any]:
    """The constants of a module, except for the table of all elements' radii."""
    found: dict[str, Any] = {}
    for path, buffer in sorted(model.buffers.items()):
        parent, _, name = path.rpartition("/")
        if parent == module and name != "covalent_radii":
            values = [number(value) for value in np.ravel(buffer)]
            found[name] = values if np.ndim(buffer) else values[0]
    return found


def _heads(model: Potential) -> dict[str, Any]:
    symbols = [chemical_symbols[z] for z in model.atomic_numbers]
    found: dict[str, Any] = {"heads": list(model.heads)}
    for name in ("scale", "shift"):
        buffer = model.buffers.get(f"scale_shift/{name}")
        found[name] = None
        if buffer is not None:
            values = np.broadcast_to(np.ravel(np.asarray(buffer, np.float64)), len(model.heads))
            found[name] = dict(zip(model.heads, map(number, values), strict=True))
    found["elements"] = symbols
    found["e0s"] = {
        head: dict(zip(symbols, map(number, row), strict=True))
        for head, row in zip(model.heads, model.e0s, strict=True)
    }
    return found


def _counts(config: MACEConfig, params: Params) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for path, leaf in tree.flatten(params).items():
        module = path.partition("/")[0]
        sizes[module] = sizes.get(module, 0) + int(np.size(leaf))
    groups = {
        group: sum(n for name, n in sizes.items() if name.startswith(group)) for group in GROUPS
    }
    last = len(config.interactions) - 1
    first = last + 1 - len(config.readouts)  # the layer of the first readout
    layers = [
        {
            "interaction": sizes.get(f"interactions_{i}", 0),
            "product": sizes.get(f"products_{i}", 0),
            "readout": sizes.get(f"readouts_{i - first}", 0),
        }
        for i in range(last + 1)
    ]
    total = sum(sizes.values())
    return {"parameters": groups | {"total": total}, "parameters_per_layer": layers}


def _dtypes(model: Potential, params: Params) -> dict[str, str]:
    constants = [a for name, a in model.buffers.items() if name != E0_BUFFER]
    return {
        "parameters": names_of(np.asarray(leaf).dtype for leaf in tree.flatten(params).values()),
        "constants": names_of(
            np.asarray(a).dtype for a in constants if np.asarray(a).dtype != bool
        ),
        "e0s": np.asarray(model.buffers[E0_BUFFER]).dtype.name,
    }


def names_of(dtypes: Iterable[np.dtype]) -> str:
    """The floating ones, e.g. ``"float32+float64"``."""
    return "+".join(
        sorted({dtype.name for dtype in dtypes if dtype.name.lstrip("b")[:5] == "float"})
    )


# The page


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
    for group in GROUPS:
        per_layer = [layer.get(group.removesuffix("s")) for layer in layers]
        if counts[group]:
            numbers = ["" if n is None else f"{n:,}" for n in per_layer]
            table.add_row(group, f"{counts[group]:,}", *numbers)
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
