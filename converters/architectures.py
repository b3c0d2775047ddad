"""The published architectures, and which of them is nearest to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxft.models.config import MACEConfig

MP_ELEMENTS = tuple(z for z in range(1, 95) if not 84 <= z <= 88)
OFF_ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)

A, R, D, DR, NL = (
    f"RealAgnostic{kind}InteractionBlock"
    for kind in ("", "Residual", "Density", "DensityResidual", "ResidualNonLinear")
)
SMALL, MEDIUM, LARGE = "128x0e", "128x0e+128x1o", "128x0e+128x1o+128x2e"

_COMMON: dict[str, Any] = {
    "class": "ScaleShiftMACE",
    "harmonics": "1x0e+1x1o+1x2e+1x3o",
    "correlation": "3",
    "cutoff power": 5,
    "radial basis": "bessel",
    "distance transform": "None",
    "repulsion": "none",
    "cutoff applied to": "radial functions",
    "radial network": "64-64-64",
    "gate": "silu",
    "readouts": "linear | nonlinear 16",
    "sender irreps": "all",
    "product weights": "per element",
    "embeddings": "none",
    "heads": 1,
}
_MP = _COMMON | {"elements": MP_ELEMENTS, "r_max": 6.0}
_ZBL = _MP | {"distance transform": "Agnesi", "repulsion": "ZBL"}
_MP0 = _MP | {"interactions": f"{R} | {R}", "radial functions": 10}
_0B = _ZBL | {"interactions": f"{A} | {R}", "radial functions": 8}
_DENSITY = _ZBL | {"interactions": f"{D} | {DR}"}
_0B2 = _DENSITY | {"radial functions": 8, "r_max": 5.0}
_OFF = _COMMON | {
    "elements": OFF_ELEMENTS,
    "interactions": f"{A} | {R}",
    "radial functions": 8,
    "r_max": 5.0,
}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "mace-mp-0-small": _MP0 | {"hidden irreps": SMALL},
    "mace-mp-0-medium": _MP0 | {"hidden irreps": MEDIUM},
    "mace-mp-0-large": _MP0 | {"hidden irreps": LARGE},
    "mace-mp-0b-small": _0B | {"hidden irreps": SMALL},
    "mace-mp-0b-medium": _0B | {"hidden irreps": MEDIUM},
    "mace-mp-0b2-small": _0B2 | {"hidden irreps": SMALL},
    "mace-mp-0b2-medium": _0B2 | {"hidden irreps": MEDIUM},
    "mace-mp-0b2-large": _0B2 | {"hidden irreps": LARGE},
    "mace-mp-0b3-medium": _DENSITY | {"hidden irreps": MEDIUM, "radial functions": 10},
    "mace-mpa-0-medium": _DENSITY | {"hidden irreps": MEDIUM},
    "mace-omat-0-small": _DENSITY | {"hidden irreps": SMALL},
    "mace-omat-0-medium": _DENSITY | {"hidden irreps": MEDIUM},
    "mace-matpes-pbe-0": _DENSITY | {"hidden irreps": MEDIUM},
    "mace-matpes-r2scan-0": _DENSITY | {"hidden irreps": MEDIUM},
    "mace-mh-1": {key: value for key, value in _ZBL.items() if key != "readouts"}
    | {
        "interactions": f"{NL} | {NL}",
        "hidden irreps": "512x0e+512x1o",
        "sender irreps": "128x0e | 128x0e+128x1o",
        "radial functions": 10,
        "cutoff applied to": "output of the radial network",
        "product weights": "shared",
        "heads": 6,
    },
    "mace-off23-medium": _OFF | {"hidden irreps": MEDIUM},
    "mace-omol-0-extra-large": {
        key: value
        for key, value in _COMMON.items()
        if key not in ("readouts", "sender irreps", "product weights")
    }
    | {
        "elements": 83,
        "interactions": f"{NL} | {NL} | {NL}",
        "hidden irreps": "1024x0e+1024x1o+1024x2e",
        "correlation": "2",
        "radial functions": 8,
        "r_max": 6.0,
        "cutoff applied to": "output of the radial network",
        "embeddings": "total_spin (101, offset 0) | total_charge (201, offset 100)",
    },
}
"""What is published of the architectures, by name of the registry; what is not is left out.

MH-0, OFF23 small and large, OFF23b, OFF24 and ANI-cc are missing: their irreps or blocks are not
public. Sources: the training scripts in ACEsuit/mace-foundations, the release notes, and
arXiv:2401.00096, 2312.15211, 2510.25380. The number of radial functions of MPA-0, OMAT-0 and MatPES
and the readouts of MH-1 and OMOL are not published.
"""


def nearest(config: MACEConfig) -> dict[str, Any]:
    """The entry ``nearest``: all published models whose known facts agree, or else the closest.

    A fact that is not published counts as half a difference when the closest is chosen. All models
    that differ in the same way are named.
    """
    found = _features(config)
    differs = {
        name: {k: (found[k], there) for k, there in known.items() if not _agree(found, k, there)}
        for name, known in ARCHITECTURES.items()
    }
    unknown = {name: sorted(found.keys() - known) for name, known in ARCHITECTURES.items()}
    degrees = _degrees(found["hidden irreps"])

    def distance(name: str) -> tuple[bool, int, bool]:
        other = _degrees(ARCHITECTURES[name]["hidden irreps"]) != degrees
        return bool(differs[name]), 2 * len(differs[name]) + len(unknown[name]), other

    best = differs[min(differs, key=distance)]
    names = [name for name, difference in differs.items() if difference == best]
    return {
        "names": names,
        "is_same": not best,
        "differs": {k: [_brief(here), _brief(there)] for k, (here, there) in sorted(best.items())},
        "unknown": {name: unknown[name] for name in names if unknown[name]},
    }


def _features(config: MACEConfig) -> dict[str, Any]:
    """The facts of ``ARCHITECTURES``, of a model."""
    blocks, products = config.interactions, config.products
    one = {product.is_agnostic for product in products} == {True}
    sent = " | ".join(block.sent_irreps for block in blocks)
    is_all = all(block.sender_irreps is None for block in blocks)
    where = "radial functions" if config.apply_cutoff else "output of the radial network"
    embeddings = [
        f"{item.name} ({item.num_classes}, offset {item.offset})"
        if item.num_classes
        else f"{item.name} ({item.in_dim})"
        for item in config.embeddings
    ]
    widths = {"-".join(map(str, block.radial_mlp)): None for block in blocks}
    return {
        "class": config.family,
        "interactions": " | ".join(block.block for block in blocks),
        "hidden irreps": _hidden(config),
        "sender irreps": "all" if is_all else sent,
        "harmonics": config.edge_irreps,
        "correlation": " | ".join({str(p.correlation): None for p in products}),
        "r_max": config.r_max,
        "cutoff power": config.cutoff_power,
        "cutoff applied to": where,
        "radial basis": config.radial_type,
        "radial functions": config.num_bessel,
        "distance transform": config.distance_transform,
        "repulsion": "ZBL" if config.pair_repulsion else "none",
        "radial network": " | ".join(widths),
        "gate": config.gate,
        "readouts": _readouts(config),
        "product weights": "shared" if one else "per element",
        "embeddings": " | ".join(embeddings) or "none",
        "heads": len(config.heads),
        "elements": config.atomic_numbers,
    }


def _hidden(config: MACEConfig) -> str:
    """Of all layers but the last, which is expected to keep the scalars alone."""
    *inner, last = [product.irreps_out for product in config.products]
    first = inner[0] if inner else last
    expected = [first] * len(inner) + [first.split("+")[0]]
    return first if [*inner, last] == expected else " | ".join([*inner, last])


def _readouts(config: MACEConfig) -> str:
    """Kinds and hidden widths per head."""
    heads = len(config.heads)
    shown = [
        r.kind if r.kind == "linear" else f"{r.kind} {int(r.hidden_irreps.split('x')[0]) // heads}"
        for r in config.readouts
    ]
    return " | ".join(shown)


def _degrees(hidden: str) -> list[str]:
    """``["0e", "1o"]`` of ``"128x0e+128x1o"``."""
    return [term.rpartition("x")[2] for term in hidden.split("+")]


def _agree(found: Mapping[str, Any], key: str, there: Any) -> bool:
    here = found[key]
    if key == "elements":
        return len(here) == there if isinstance(there, int) else set(here) == set(there)
    return bool(here == there)


def _brief(value: Any) -> Any:
    """Elements by number, blocks without what all their names share."""
    if isinstance(value, tuple):
        return len(value)
    if isinstance(value, str):
        return value.replace("InteractionBlock", "")
    return value
