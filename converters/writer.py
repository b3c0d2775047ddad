"""Which versions of mace-torch can have written a file, from what its modules have."""

from __future__ import annotations

from dataclasses import dataclass

from converters.reader import MALFORMED, ModelFile, irreps
from converters.unpickle import Node


@dataclass(frozen=True)
class Mark:
    """A feature of the tree of modules that one version of mace-torch introduced."""

    since: str
    is_there: bool | None
    """None: the model has no module that could show it."""


VERSIONS = ("0.3.4", *(f"0.3.{i}" for i in range(5, 17)))
"""All that the Python package index has of 0.3; the table below was read off their sources."""


def writer(file: ModelFile) -> dict[str, str | None]:
    """The versions of mace-torch that can have built the model, from what its modules have.

    A model keeps the attributes with which it was built when a later version loads and saves it.

    ===========  ==============================================================================
    since        mark
    ===========  ==============================================================================
    0.3.5        Agnesi or Soft transform, Chebyshev basis, ZBL repulsion
    0.3.7        attribute ``heads``; ``num_heads`` of non-linear readouts; density blocks
    0.3.9        ``cueq_config`` of interactions
    0.3.10       the cutoff's ``p`` is an integer; ZBL without a ``cutoff`` of its own; Soft with
                 ``alpha`` instead of ``a`` and ``b``
    0.3.11       ``cueq_config`` of products
    0.3.13       attribute ``lammps_mliap``
    0.3.14       attribute ``apply_cutoff``; ``…_zeroed`` flags of contractions; ``oeq_config`` of
                 interactions; non-linear blocks
    0.3.15       attribute ``use_edge_irreps_first``; other irreps sent than received in layer 0
    0.3.16       gates of ``mace.modules.gate`` in non-linear blocks; irreps other than scalars
                 behind the last layer
    ===========  ==============================================================================

    Within these, versions are not told apart (0.3.5 and 0.3.6; 0.3.7 and 0.3.8; 0.3.11 and 0.3.12);
    0.3.15 and 0.3.16 only by a non-linear block. Before 0.3.4 nothing was on the index.

    Returns:
      ``text``, and ``at_least`` and ``at_most``, each a version or None.
    """
    try:
        marks = _marks(file)
    except MALFORMED:
        marks = []
    there = [mark.since for mark in marks if mark.is_there]
    absent = [mark.since for mark in marks if mark.is_there is False]
    low = max(there, key=VERSIONS.index, default=None)
    first_absent = min(absent, key=VERSIONS.index, default=None)
    high = VERSIONS[VERSIONS.index(first_absent) - 1] if first_absent else None
    if low and high and VERSIONS.index(low) > VERSIONS.index(high):
        text = (
            f"unknown, between releases or changed by hand: it has what mace-torch {low} brought, "
            f"but not all that {first_absent} brought"
        )
        return {"text": text, "at_least": None, "at_most": None}
    return {"text": _between(low, high), "at_least": low, "at_most": high}


def _between(low: str | None, high: str | None) -> str:
    if low is None and high is None:
        return "unknown"
    if low is None:
        return f"mace-torch {high} or older"
    if high is None:
        return f"mace-torch {low} or newer"
    return f"mace-torch {low}" if low == high else f"mace-torch {low} to {high}"


def _marks(file: ModelFile) -> list[Mark]:
    root = file.root
    blocks = list(root.module("interactions").children.values())
    products = list(root.module("products").children.values())
    nonlinear = [r for r in root.module("readouts").children.values() if "NonLinear" in r.name]
    gates = [b.module("equivariant_nonlin").qualname for b in blocks if b.has("equivariant_nonlin")]
    transforms = _named(root, "radial_embedding.distance_transform")
    repulsions = _named(root, "pair_repulsion_fn")
    soft = [node for node in transforms if node.name == "SoftTransform"]
    power = file.tensors.get("radial_embedding.cutoff_fn.p")
    chebyshev = [n for n in _named(root, "radial_embedding.bessel_fn") if n.name[:4] == "Cheb"]
    names = {block.name for block in blocks}
    received, sent = (
        irreps(blocks[0].module("linear_up").get(f"irreps_{x}")) for x in ("in", "out")
    )
    last = irreps(products[-1].module("linear").get("irreps_out"))

    def attribute(name: str) -> bool:
        return name in root.state

    def optional(has: bool) -> bool | None:
        return True if has else None

    return [
        Mark("0.3.5", optional(bool(transforms or repulsions or chebyshev))),
        Mark("0.3.7", attribute("heads")),
        Mark("0.3.7", all("num_heads" in r.state for r in nonlinear) if nonlinear else None),
        Mark("0.3.7", optional(any("Density" in name for name in names))),
        Mark("0.3.9", all("cueq_config" in block.state for block in blocks)),
        Mark("0.3.10", None if power is None else power.dtype.kind == "i"),
        Mark("0.3.10", not repulsions[0].has("cutoff") if repulsions else None),
        Mark("0.3.10", soft[0].get("alpha", None) is not None if soft else None),
        Mark("0.3.11", all("cueq_config" in product.state for product in products)),
        # LAMMPS scripts set it to True in models of any version
        Mark(
            "0.3.13", None if root.get("lammps_mliap", None) is True else attribute("lammps_mliap")
        ),
        Mark("0.3.14", attribute("apply_cutoff")),
        Mark("0.3.14", any(name.endswith("_zeroed") for name in file.tensors)),
        Mark("0.3.14", all("oeq_config" in block.state for block in blocks)),
        Mark("0.3.14", optional(any("NonLinear" in name for name in names))),
        Mark("0.3.15", attribute("use_edge_irreps_first")),
        Mark("0.3.15", optional(sent != received)),
        Mark("0.3.16", gates[0].startswith("mace.modules.gate.") if gates else None),
        Mark("0.3.16", optional(len(products) > 1 and any(degree for _, degree, _ in last))),
    ]


def _named(root: Node, path: str) -> list[Node]:
    return [root.module(path)] if root.has(path) else []
