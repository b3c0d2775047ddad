"""What ``jaxft info`` says: facts, page, nearest published model, writer."""

from __future__ import annotations

import dataclasses
import io
import json
import lzma
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.data import chemical_symbols
from rich.console import Console

import jaxft
from converters import inspect as inspecting
from converters.architectures import ARCHITECTURES, nearest
from converters.inspect import inspect
from converters.published import PUBLISHED
from converters.reader import ModelFile, ModelFileError, read
from converters.to_jax import convert_with_provenance
from converters.writer import VERSIONS, writer
from jaxft import inspection, page
from jaxft.models.config import (
    EmbeddingConfig,
    GateConfig,
    InteractionConfig,
    MACEConfig,
    ProductConfig,
    ReadoutConfig,
)

ROOT = Path(__file__).parents[1]
GFN2 = ROOT / "benchmarks" / "data" / "gfn2_small.model"
WRITERS = sorted((Path(__file__).parent / "data" / "writers").glob("*.model.xz"))

TINY_PAGE = """\
file                   tiny.model (torch model, 0.9 MB)
sha256                 78cc9d156dec02e6c0bcb6b3c77a91212254e21a992f5f34e0c784ef3e7cd704
model                  ScaleShiftMACE
architecture           closest: mace-mp-0-medium; differs in elements (5; there 89), harmonics
                       (1x0e+1x1o+1x2e; there 1x0e+1x1o+1x2e+1x3o), hidden irreps (4x0e+4x1o; there
                       128x0e+128x1o), r_max (4.5; there 6), radial functions (6; there 10),
                       readouts (linear | nonlinear 4; there linear | nonlinear 16)
written by             mace-torch 0.3.15 or newer
interactions           RealAgnosticResidualInteractionBlock
hidden irreps          4x0e+4x1o | 4x0e
message irreps         4x0e+4x1o+4x2e
sender irreps          4x0e | 4x0e+4x1o
harmonics              1x0e+1x1o+1x2e
correlation            3
paths, ν = max … 1     0e 11-3-1  1o 21-4-1 | 0e 11-3-1
product weights        per element
radial network         64-64-64
neighbours divided by  8
cutoff                 4.5 Å, polynomial p = 5
cutoff applied to      radial functions
radial basis           6 bessel
distance transform     none
pair repulsion         none
readouts               linear | nonlinear 4x0e
gate                   silu
parameters             21,292 in float64
constants              float64, isolated atoms float64

Heads
head     scale, eV  shift, eV/atom  E0 from, eV  to, eV
Default         10          0.1641     -10.0000  0.0000

Elements (5)
H                                   ·
·  ·                     · C · O ·  ·
Na ·                     · · · · Cl ·
·  · · · · · · · · · · · · · · · ·  ·
·  · · · · · · · · · · · · · · · ·  ·
·  · · · · · · · · · · · · · · · ·  ·
·  · · · · · · · · · · · · · · · ·  ·

Isolated atoms, eV
H  -10.0000   C   -7.5000   O   -5.0000   Na  -2.5000   Cl   0.0000

Parameters
                   all  layer 0  layer 1
node_embedding      20
interactions    20,080    9,488   10,592
products         1,168      852      316
readouts            24        4       20
total           21,292   10,344   10,928"""

GFN2_PAGE = """\
file                   gfn2_small.model (torch model, 1.6 MB)
sha256                 ce8bb23ea03a9385e168cf1001d224c18fa044fb733e4b1b9264db3aecc49281
model                  ScaleShiftMACE
architecture           closest: mace-off23-medium; differs in elements (11; there 10), harmonics
                       (1x0e+1x1o+1x2e; there 1x0e+1x1o+1x2e+1x3o), hidden irreps (32x0e+32x1o;
                       there 128x0e+128x1o), interactions (RealAgnosticResidual |
                       RealAgnosticResidual; there RealAgnostic | RealAgnosticResidual)
written by             mace-torch 0.3.15 or newer
interactions           RealAgnosticResidualInteractionBlock
hidden irreps          32x0e+32x1o | 32x0e
message irreps         32x0e+32x1o+32x2e
sender irreps          32x0e | 32x0e+32x1o
harmonics              1x0e+1x1o+1x2e
correlation            3
paths, ν = max … 1     0e 11-3-1  1o 21-4-1 | 0e 11-3-1
product weights        per element
radial network         64-64-64
neighbours divided by  17.4817
cutoff                 5 Å, polynomial p = 5
cutoff applied to      radial functions
radial basis           8 bessel
distance transform     none
pair repulsion         none
readouts               linear | nonlinear 16x0e
gate                   silu
parameters             97,424 in float64
constants              float64, isolated atoms float64

Heads
head     scale, eV  shift, eV/atom  E0 from, eV   to, eV
Default    1.72865        -4.33737    -125.6986  -4.5103

Elements (11)
H                                    ·
Li ·                     · C  N O F  ·
Na ·                     · Si · S Cl ·
K  · · · · · · · · · · · · ·  · · ·  ·
·  · · · · · · · · · · · · ·  · · ·  ·
·  · · · · · · · · · · · · ·  · · ·  ·
·  · · · · · · · · · · · · ·  · · ·  ·

Isolated atoms, eV
H   -10.7072   Li   -4.9000   C   -48.7981   N   -70.9081   O  -102.5218   F  -125.6986
Na   -4.5469   Si  -42.7113   S   -85.6195   Cl -121.9757   K    -4.5103

Parameters
                   all  layer 0  layer 1
node_embedding     352
interactions    73,728   30,208   43,520
products        22,784   16,480    6,304
readouts           560       32      528
total           97,424   46,720   50,352"""

TINY_JSON = """
{
"format": 2,
"units": {"r_max": "Å", "scale": "eV", "shift": "eV per atom", "e0s": "eV", "bytes": "byte"},
"file": {"name": "tiny.model", "kind": "torch model", "bytes": 924455, "sha256":
  "78cc9d156dec02e6c0bcb6b3c77a91212254e21a992f5f34e0c784ef3e7cd704"},
"convertible": true,
"reason": null,
"published": null,
"nearest": {"names": ["mace-mp-0-medium"], "is_same": false, "differs": {"elements": [5, 89],
  "harmonics": ["1x0e+1x1o+1x2e", "1x0e+1x1o+1x2e+1x3o"], "hidden irreps": ["4x0e+4x1o",
  "128x0e+128x1o"], "r_max": [4.5, 6.0], "radial functions": [6, 10], "readouts":
  ["linear | nonlinear 4", "linear | nonlinear 16"]}, "unknown": {}},
"writer": {"text": "mace-torch 0.3.15 or newer", "at_least": "0.3.15", "at_most": null},
"family": "ScaleShiftMACE",
"blocks": ["RealAgnosticResidualInteractionBlock", "RealAgnosticResidualInteractionBlock"],
"hidden_irreps": ["4x0e+4x1o", "4x0e"],
"sender_irreps": ["4x0e", "4x0e+4x1o"],
"message_irreps": ["4x0e+4x1o+4x2e", "4x0e+4x1o+4x2e"],
"edge_irreps": "1x0e+1x1o+1x2e",
"correlation": [3, 3],
"paths": [{"0e": [11, 3, 1], "1o": [21, 4, 1]}, {"0e": [11, 3, 1]}],
"radial_mlp": [[64, 64, 64], [64, 64, 64]],
"density_mlp": [[], []],
"is_density": [false, false],
"avg_num_neighbors": [8.0, 8.0],
"agnostic_product": [false, false],
"gate": "silu",
"readouts": [{"kind": "linear", "irreps_in": "4x0e+4x1o", "hidden_irreps": "0x0e"}, {"kind":
  "nonlinear", "irreps_in": "4x0e", "hidden_irreps": "4x0e"}],
"last_readout_only": false,
"embeddings": [],
"embedding_readout": false,
"cutoff": {"r_max": 4.5, "power": 5, "applied_to": "radial functions"},
"radial_basis": {"kind": "bessel", "number": 6, "coefficient": null},
"distance_transform": null,
"pair_repulsion": null,
"heads": ["Default"],
"scale": {"Default": 10.0},
"shift": {"Default": 0.1641},
"elements": ["H", "C", "O", "Na", "Cl"],
"e0s": {"Default": {"H": -10.0, "C": -7.5, "O": -5.0, "Na": -2.5, "Cl": 0.0}},
"parameters": {"node_embedding": 20, "joint_embedding": 0, "embedding_readout": 0,
  "interactions": 20080, "products": 1168, "readouts": 24, "total": 21292},
"parameters_per_layer": [{"interaction": 9488, "product": 852, "readout": 4}, {"interaction":
  10592, "product": 316, "readout": 20}],
"dtype": {"parameters": "float64", "constants": "float64", "e0s": "float64"},
"provenance": {"source": "tiny.model", "sha256":
  "78cc9d156dec02e6c0bcb6b3c77a91212254e21a992f5f34e0c784ef3e7cd704", "dtype": "float64"}
}
"""


def shown(found: Any) -> str:
    """The page as it stands in a file: no colours, no spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=100, markup=False, highlight=False)
    console.print(inspection.page(found))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


# Facts and page


def test_the_page_of_a_torch_file(tiny_file: Path) -> None:
    assert shown(inspect(tiny_file)) == TINY_PAGE


def test_the_page_of_a_trained_file() -> None:
    assert shown(inspect(GFN2)) == GFN2_PAGE


def test_the_json_of_a_torch_file(tiny_file: Path) -> None:
    found = json.loads(json.dumps(inspect(tiny_file), allow_nan=False))
    assert found == json.loads(TINY_JSON)


def test_numbers_are_those_of_the_file() -> None:
    found, file = inspect(GFN2), read(GFN2)
    tensors = file.tensors
    e0s = np.ravel(tensors["atomic_energies_fn.atomic_energies"])
    assert list(found["e0s"]["Default"].values()) == list(e0s)
    assert found["scale"] == {"Default": float(np.ravel(tensors["scale_shift.scale"])[0])}
    assert found["shift"] == {"Default": float(np.ravel(tensors["scale_shift.shift"])[0])}
    assert found["parameters"]["total"] == sum(tensors[name].size for name in file.parameters)
    assert found["file"]["bytes"] == GFN2.stat().st_size


def test_counts_add_up() -> None:
    found = inspect(GFN2)
    groups = found["parameters"].copy()
    total = groups.pop("total")
    assert total == sum(groups.values())
    for group, key in {
        "interactions": "interaction",
        "products": "product",
        "readouts": "readout",
    }.items():
        assert groups[group] == sum(layer[key] for layer in found["parameters_per_layer"])


def test_a_bundle_and_its_file_agree(tiny_file: Path, tmp_path: Path) -> None:
    model, params, provenance = convert_with_provenance(tiny_file)
    path = jaxft.save(tmp_path / "tiny.jaxft", model, params, provenance=provenance)
    of_file, of_bundle = inspect(tiny_file), inspect(path)
    assert {key for key in of_file if of_file[key] != of_bundle[key]} == {"file", "writer"}
    assert of_bundle["file"]["kind"] == "bundle"
    assert of_bundle["file"]["bytes"] == sum(f.stat().st_size for f in path.iterdir())
    assert "sha256     78cc9d156dec" not in shown(of_file)
    assert re.search(r"Provenance\nsource +tiny.model\nsha256 +78cc9d156dec", shown(of_bundle))


OFF = PUBLISHED["mace-off23-small"]


@pytest.mark.parametrize(
    ("provenance", "relation"),
    [
        ({"sha256": OFF.sha256, "source": "a.model", "dtype": "float64"}, "converted from"),
        ({"sha256": OFF.sha256, "surgery": ["select_head"]}, "derived from"),
        ({"base": {"sha256": OFF.sha256}, "config": {"recipe": [{"rank": 4}]}}, "derived from"),
        ({"base": {"base": {"sha256": OFF.sha256}, "config": {}}}, "derived from"),
    ],
)
def test_a_bundle_names_the_published_file_that_it_came_from(
    provenance: dict, relation: str, tiny: tuple, tmp_path: Path
) -> None:
    found = inspect(jaxft.save(tmp_path / "b", *tiny, provenance=provenance))
    assert found["published"]["name"] == "mace-off23-small"
    assert found["published"]["relation"] == relation
    page = shown(found)
    assert f"{relation} mace-off23-small" in page
    assert OFF.licence in page
    assert OFF.url in page.replace("\n", "").replace(" ", "")
    if "config" in provenance:
        assert re.search(r'recipe +\[\{"rank": 4\}\]', page)


def test_a_published_file_is_recognised_by_its_digest(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inspect(tiny_file)["published"] is None
    changed(monkeypatch, tiny_file, lambda file: dataclasses.replace(file, sha256=OFF.sha256))
    assert inspect(tiny_file)["published"]["relation"] == "is"


def changed(
    monkeypatch: pytest.MonkeyPatch, path: Path, change: Callable[[ModelFile], ModelFile | None]
) -> None:
    """Let :func:`inspect` find another content in the file."""
    file = read(path)
    file = change(file) or file
    monkeypatch.setattr(inspecting, "read", lambda _: file)


def test_a_model_that_cannot_be_built_is_still_described(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = "RealAgnosticAttResidualInteractionBlock"

    def attend(file: ModelFile) -> None:
        file.root.module("interactions.1").qualname = f"mace.modules.blocks.{block}"

    changed(monkeypatch, tiny_file, attend)
    found = inspect(tiny_file)
    json.dumps(found, allow_nan=False)
    assert not found["convertible"]
    assert block in found["reason"]
    assert found["blocks"] == ["RealAgnosticResidualInteractionBlock", block]
    assert found["readouts"] == ["LinearReadoutBlock", "NonLinearReadoutBlock"]
    assert found["heads"] == ["Default"]
    assert found["elements"] == ["H", "C", "O", "Na", "Cl"]
    assert found["parameters"] == {"total": 21292}
    assert found["tensors"] == len(read(tiny_file).tensors)
    assert found["modules"]["mace.modules.radial.BesselBasis"] == 1
    assert found["dtype"] == {"parameters": "float64", "constants": "float64", "e0s": "float64"}
    page = shown(found)
    assert "NOT CONVERTIBLE" in page
    assert "78cc9d156dec" in page


@pytest.mark.parametrize("heads", [None, [1, 2], "Default", ["a"] * 1000])
def test_a_damaged_list_of_heads_is_left_out(
    heads: Any, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(file: ModelFile) -> None:
        file.root.state["heads"] = heads
        file.root.module("readouts.0").qualname = "mace.modules.blocks.Unknown"

    changed(monkeypatch, tiny_file, damage)
    assert inspect(tiny_file)["heads"] == []


def test_numbers_that_are_not_finite_are_null_and_a_reason_not_to_convert(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(file: ModelFile) -> None:
        file.tensors["scale_shift.scale"] = np.asarray(np.nan)

    changed(monkeypatch, tiny_file, spoil)
    found = inspect(tiny_file)
    json.dumps(found, allow_nan=False)
    assert not found["convertible"]
    assert "scale_shift.scale" in found["reason"]
    assert found["scale"] == {"Default": None}
    assert found["blocks"] == ["RealAgnosticResidualInteractionBlock"] * 2


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(b"no model")
    with pytest.raises(ModelFileError, match="text file"):
        inspect(tmp_path / "a.model")
    with pytest.raises(jaxft.bundle.BundleError, match="not a jaxft bundle"):
        inspect(tmp_path)


def test_control_characters_of_a_file_do_not_reach_the_terminal(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(file: ModelFile) -> None:
        file.root.state["heads"] = ["\x1b[2J"]

    changed(monkeypatch, tiny_file, rename)
    page = shown(inspect(tiny_file))
    assert "\x1b" not in page
    assert r"\x1b[2J" in page


def drawn(symbols: list[str]) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=100)
    console.print(page.grid(symbols))
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_the_grid_holds_every_element_once() -> None:
    words = [word for line in drawn(chemical_symbols[1:]) for word in line]
    assert sorted(set(words) - {"*", "**"}) == sorted(chemical_symbols[1:])
    assert len(words) == 118 + 4


def test_the_grid_shows_rare_earths_and_actinides_only_where_there_are_some() -> None:
    assert [len(drawn(symbols)) for symbols in (["H"], ["Gd"], ["U"], ["Gd", "U"])] == [7, 8, 8, 9]
    assert drawn(["Fe"])[3] == ["·"] * 7 + ["Fe"] + ["·"] * 10
    assert drawn(["U"])[-1] == ["**", "·", "·", "·", "U", *["·"] * 11]


# Nearest published model

MP = (*range(1, 84), *range(89, 95))
OFF_NUMBERS = (1, 6, 7, 8, 9, 15, 16, 17, 35, 53)
SHORT = {"A": "", "R": "Residual", "D": "Density", "DR": "DensityResidual"}
SHORT["NL"] = "ResidualNonLinear"


def architecture(
    blocks: str, hidden: str, *, edges: str | None = None, bias: bool = False, **changes: Any
) -> MACEConfig:
    """A full-size MACE without weights, as mace's constructor would lay it out."""
    names = [f"RealAgnostic{SHORT[short]}InteractionBlock" for short in blocks.split()]
    channels = hidden.split("x")[0]
    scalars = f"{channels}x0e"
    order = changes.pop("correlation", 3)
    count = len(changes.get("heads", ("Default",)))
    outs = [hidden] * (len(names) - 1) + [scalars]
    ins = [scalars, *outs[:-1]]
    gate = GateConfig(scalar_constant=1.0, gate_constant=1.0)
    target = "+".join(f"{channels}x{ir}" for ir in ("0e", "1o", "2e", "3o"))
    sent = [edges and edges.split("+")[0], *[edges] * (len(names) - 1)]
    kinds = ["linear"] * (len(names) - 1) + ["bias" if bias else "nonlinear"]
    fields: dict[str, Any] = {
        "atomic_numbers": MP,
        "heads": ("Default",),
        "r_max": 6.0,
        "num_bessel": 10,
        "cutoff_power": 5,
        "edge_irreps": "1x0e+1x1o+1x2e+1x3o",
        "silu_constant": 1.0,
        "gate_constant": 1.0,
        "interactions": tuple(
            InteractionConfig(
                block=name,
                node_feats_irreps=node,
                target_irreps=target,
                hidden_irreps=out,
                radial_mlp=(64, 64, 64),
                avg_num_neighbors=30.0,
                sender_irreps=send,
                gate=gate if "NonLinear" in name else None,
            )
            for name, node, out, send in zip(names, ins, outs, sent, strict=True)
        ),
        "products": tuple(
            ProductConfig(
                irreps_in=target,
                irreps_out=out,
                paths=((1,) * order,) * len(out.split("+")),
                is_agnostic=bias,
            )
            for out in outs
        ),
        "readouts": tuple(
            ReadoutConfig(
                kind=kind,
                irreps_in=out,
                hidden_irreps="0x0e" if kind == "linear" else f"{16 * count}x0e",
            )
            for kind, out in zip(kinds, outs, strict=True)
        ),
    }
    return MACEConfig(**fields | changes)


AGNESI_ZBL = {"distance_transform": "Agnesi", "pair_repulsion": True}
MEDIUM = "128x0e+128x1o"
LARGE = "128x0e+128x1o+128x2e"
CHARGE_AND_SPIN = tuple(
    EmbeddingConfig(
        name=name, kind="categorical", per="graph", emb_dim=1024, num_classes=n, offset=offset
    )
    for name, n, offset in (("total_spin", 101, 0), ("total_charge", 201, 100))
)
DENSITY_MEDIUM = ["mace-mpa-0-medium", "mace-omat-0-medium"]
DENSITY_MEDIUM += ["mace-matpes-pbe-0", "mace-matpes-r2scan-0"]
MH_1 = {
    "blocks": "NL NL",
    "hidden": "512x0e+512x1o",
    "edges": MEDIUM,
    "bias": True,
    "apply_cutoff": False,
    "heads": tuple("abcdef"),
    **AGNESI_ZBL,
}
OMOL = {
    "blocks": "NL NL NL",
    "hidden": "1024x0e+1024x1o+1024x2e",
    "edges": LARGE,
    "bias": True,
    "correlation": 2,
    "apply_cutoff": False,
    "num_bessel": 8,
    "atomic_numbers": tuple(range(1, 84)),
    "embeddings": CHARGE_AND_SPIN,
    "heads": ("omol",),
}
B0 = {"blocks": "A R", "num_bessel": 8, **AGNESI_ZBL}
B2 = {"blocks": "D DR", "num_bessel": 8, "r_max": 5.0, **AGNESI_ZBL}
B3 = {"blocks": "D DR", "hidden": MEDIUM, **AGNESI_ZBL}
OFF23 = {
    "blocks": "A R",
    "hidden": MEDIUM,
    "num_bessel": 8,
    "r_max": 5.0,
    "atomic_numbers": OFF_NUMBERS,
}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"blocks": "R R", "hidden": "128x0e"}, ["mace-mp-0-small"]),
        ({"blocks": "R R", "hidden": MEDIUM}, ["mace-mp-0-medium"]),
        ({"blocks": "R R", "hidden": LARGE}, ["mace-mp-0-large"]),
        (B0 | {"hidden": "128x0e"}, ["mace-mp-0b-small"]),
        (B0 | {"hidden": MEDIUM}, ["mace-mp-0b-medium"]),
        (B2 | {"hidden": "128x0e"}, ["mace-mp-0b2-small"]),
        (B2 | {"hidden": MEDIUM}, ["mace-mp-0b2-medium"]),
        (B2 | {"hidden": LARGE}, ["mace-mp-0b2-large"]),
        (B3, ["mace-mp-0b3-medium", *DENSITY_MEDIUM]),
        (B3 | {"num_bessel": 8}, DENSITY_MEDIUM),
        (B3 | {"hidden": "128x0e", "num_bessel": 8}, ["mace-omat-0-small"]),
        (MH_1, ["mace-mh-1"]),
        (MH_1 | {"heads": tuple("ab")}, None),
        (OFF23, ["mace-off23-medium"]),
        (OFF23 | {"atomic_numbers": (1, 6, 7, 8)}, None),
        (OMOL, ["mace-omol-0-extra-large"]),
    ],
)
def test_published_architectures_are_recognised(arguments: dict, names: list | None) -> None:
    found = nearest(architecture(**arguments))
    assert found["is_same"] == (names is not None)
    assert names is None or found["names"] == names


def test_every_architecture_in_the_table_is_a_published_model() -> None:
    assert set(ARCHITECTURES) <= set(PUBLISHED)


@pytest.mark.parametrize(
    ("base", "change", "name", "differs"),
    [
        (B3, {"r_max": 5.5}, "mace-mp-0b3-medium", {"r_max": [5.5, 6.0]}),
        (B3, {"cutoff_power": 6}, "mace-mp-0b3-medium", {"cutoff power": [6, 5]}),
        (B3, {"heads": ("a", "b")}, "mace-mp-0b3-medium", {"heads": [2, 1]}),
        (B3, {"atomic_numbers": (1, 8)}, "mace-mp-0b3-medium", {"elements": [2, 89]}),
        (OFF23, {"atomic_numbers": (1, 6, 8)}, "mace-off23-medium", {"elements": [3, 10]}),
        (MH_1, {"heads": ("omol",)}, "mace-mh-1", {"heads": [1, 6]}),
        (MH_1, {"hidden": "256x0e+256x1o"}, "mace-mh-1", None),
        (OMOL, {"embeddings": ()}, "mace-omol-0-extra-large", None),
        (B3, {"distance_transform": "Soft"}, "mace-mp-0b3-medium", None),
        (B3, {"radial_type": "chebyshev"}, "mace-mp-0b3-medium", None),
        (B3, {"gate": "tanh"}, "mace-mp-0b3-medium", {"gate": ["tanh", "silu"]}),
        (B3, {"family": "MACE"}, "mace-mp-0b3-medium", {"class": ["MACE", "ScaleShiftMACE"]}),
        (B3, {"apply_cutoff": False}, "mace-mp-0b3-medium", None),
        (B3, {"correlation": 2}, "mace-mp-0b3-medium", {"correlation": ["2", "3"]}),
    ],
)
def test_a_changed_architecture_is_closest_and_says_in_what_it_differs(
    base: dict, change: dict, name: str, differs: dict | None
) -> None:
    found = nearest(architecture(**base | change))
    assert not found["is_same"]
    assert found["names"][0] == name
    assert len(found["differs"]) == 1
    assert differs is None or found["differs"] == differs


def test_the_page_tells_same_closest_and_unpublished_apart(tiny_file: Path) -> None:
    found = inspect(tiny_file)

    def line(config: MACEConfig) -> str:
        return dict(page.rows(found | {"nearest": nearest(config)}))["architecture"]

    assert line(architecture(**B3)) == (
        "same architecture as mace-mp-0b3-medium; as far as published as mace-mpa-0-medium, "
        "mace-omat-0-medium, mace-matpes-pbe-0, mace-matpes-r2scan-0 "
        "(not published: radial functions)"
    )
    assert line(architecture(**OMOL)).startswith(
        "same architecture as far as published as mace-omol-0-extra-large (not published: product"
    )
    assert line(architecture(**B3 | {"r_max": 5.5})) == (
        "closest: mace-mp-0b3-medium, mace-mpa-0-medium, mace-omat-0-medium, mace-matpes-pbe-0, "
        "mace-matpes-r2scan-0; differs in r_max (5.5; there 6)"
    )


# Writer


def without(*names: str) -> Callable[[ModelFile], None]:
    """Take attributes off the model, its interactions and its readouts."""

    def peel(file: ModelFile) -> None:
        nodes = [file.root, *file.root.module("readouts").children.values()]
        for node in [*nodes, *file.root.module("interactions").children.values()]:
            for name in names:
                node.state.pop(name, None)

    return peel


def without_zeroed(file: ModelFile) -> None:
    for name in [name for name in file.tensors if name.endswith("_zeroed")]:
        del file.tensors[name]


def without_cueq_products(file: ModelFile) -> None:
    for product in file.root.module("products").children.values():
        del product.state["cueq_config"]


def with_float_power(file: ModelFile) -> None:
    file.tensors["radial_embedding.cutoff_fn.p"] = np.asarray(5.0)


PEELED = [
    ([], "mace-torch 0.3.15 or newer"),
    ([without("use_edge_irreps_first")], "mace-torch 0.3.14"),
    ([without("apply_cutoff", "oeq_config"), without_zeroed], "mace-torch 0.3.13"),
    ([without("lammps_mliap")], "mace-torch 0.3.11 to 0.3.12"),
    ([without_cueq_products], "mace-torch 0.3.10"),
    ([with_float_power], "mace-torch 0.3.9"),
    ([without("cueq_config")], "mace-torch 0.3.7 to 0.3.8"),
    ([without("heads", "num_heads")], "mace-torch 0.3.6 or older"),
]
"""What to take off, one after the other, and which versions write such a model."""


def test_the_writer_is_bracketed_by_what_its_modules_have(tiny_file: Path) -> None:
    file = read(tiny_file)
    for steps, text in PEELED:
        for step in steps:
            step(file)
        assert writer(file)["text"] == text


def test_a_model_between_releases_has_an_unknown_writer(tiny_file: Path) -> None:
    file = read(tiny_file)
    without_cueq_products(file)
    found = writer(file)
    assert found["text"].startswith("unknown, between releases or changed by hand")
    assert (found["at_least"], found["at_most"]) == (None, None)


def test_the_flag_that_lammps_scripts_set_is_no_mark(tiny_file: Path) -> None:
    file = read(tiny_file)
    for steps, _ in PEELED[:-1]:
        for step in steps:
            step(file)
    file.root.state["lammps_mliap"] = True
    assert writer(file)["text"] == "mace-torch 0.3.7 to 0.3.8"


def test_a_damaged_tree_has_an_unknown_writer(tiny_file: Path) -> None:
    file = read(tiny_file)
    file.root.state["_modules"].pop("products")
    assert writer(file)["text"] == "unknown"


@pytest.mark.skipif(not WRITERS, reason="no files of other writers")
def test_files_of_all_writers_are_within_their_brackets(tmp_path: Path) -> None:
    """The file says nothing of its writer; the name of the fixture does."""
    sharp = set()
    for path in WRITERS:
        version = path.name.partition("-")[0]
        file = tmp_path / path.name.removesuffix(".xz")
        with lzma.open(path) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        found = writer(read(file))
        low = VERSIONS.index(found["at_least"] or VERSIONS[0])
        high = VERSIONS.index(found["at_most"] or VERSIONS[-1])
        assert low <= VERSIONS.index(version) <= high, path.name
        assert high - low <= 2, path.name
        if low == high:
            sharp.add(version)
    assert {"0.3.10", "0.3.13", "0.3.14"} <= sharp


# Models built by torch


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """``name, **changes -> facts`` of a reference model with random weights."""
    pytest.importorskip("torch")
    pytest.importorskip("mace")
    from parity import reference

    folder = tmp_path_factory.mktemp("built")

    def build(name: str, **changes: Any) -> dict[str, Any]:
        path = folder / f"{name}.model"
        return inspect(reference.save(reference.build(name, **changes), path))

    return build


@pytest.mark.parametrize(
    ("name", "published", "differs"),
    [
        ("mp0-small", "mace-mp-0-small", {"elements"}),
        (
            "small-omol",
            "mace-omol-0-extra-large",
            {"elements", "harmonics", "hidden irreps", "r_max"},
        ),
    ],
)
def test_a_published_architecture_of_few_elements_differs_in_these(
    name: str, published: str, differs: set, built: Callable[..., dict[str, Any]]
) -> None:
    found = built(name, elements=(1, 8, 26))["nearest"]
    assert not found["is_same"]
    assert found["names"] == [published]
    assert set(found["differs"]) == differs


def test_heads_embeddings_and_constants_are_on_the_page(
    built: Callable[..., dict[str, Any]],
) -> None:
    found = built("small-embedding-readout")
    page = shown(found)
    assert "embeds total_charge    categorical, per graph, -100 … 100, default 0, width 8" in page
    assert "embeds total_spin      categorical, per graph, 0 … 100, default 1, width 8" in page
    assert re.search(r"embedding readout +yes", page)
    assert re.search(r"Isolated atoms, eV\n +dft +cc\nH ", page)
    assert re.search(r"joint_embedding +2,544\n", page)
    groups = {k: n for k, n in found["parameters"].items() if k != "total"}
    assert found["parameters"]["total"] == sum(groups.values())
    zbl = shown(built("small-mh-1"))
    assert "Agnesi a 1.0805, p 4.5791, q 0.9183" in zbl
    assert "ZBL a_exp 0.3, a_prefactor 0.4543, c [0.1818 0.5099 0.2802 0.02817], p 5" in zbl
    assert re.search(r"cutoff applied to +output of the radial network", zbl)


def test_a_plain_mace_has_neither_scale_nor_shift(built: Callable[..., dict[str, Any]]) -> None:
    found = built("small-mace")
    assert (found["family"], found["scale"], found["shift"]) == ("MACE", None, None)
    assert re.search(r"Default +– +– +-10.0000", shown(found))


def test_readouts_of_the_last_layer_count_for_the_last_layer(
    built: Callable[..., dict[str, Any]],
) -> None:
    found = built("small-last-readout")
    assert found["last_readout_only"]
    assert [layer["readout"] for layer in found["parameters_per_layer"]] == [0, 36]


def test_an_attention_block_of_torch_cannot_be_converted_but_is_described(
    built: Callable[..., dict[str, Any]],
) -> None:
    found = built("small-attention")
    assert not found["convertible"]
    assert found["blocks"] == ["RealAgnosticAttResidualInteractionBlock"] * 2
    assert found["writer"]["at_least"] == "0.3.15"
