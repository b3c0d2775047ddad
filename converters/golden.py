"""Does a converted published model give the published numbers? No torch, one command.

The figures of four models and their origin are in ``converters/figures``. A file is recognised by
its sha256; a bundle by the hash of the file that it was converted from.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ase
import ase.io
import jax
import jax.numpy as jnp
import numpy as np

from converters.to_jax import convert_with_provenance
from converters.verify import Result, ours
from jaxft import __version__, bundle, data
from jaxft.potential import Potential
from jaxft.typing import Params

FIGURES = Path(__file__).parent / "figures"

ABSOLUTE = {"energy": 1e-6, "node_energy": 1e-6, "forces": 1e-6, "stress": 1e-6}
"""eV, eV, eV/Å, eV/Å³: what the source itself allows between machines."""

RELATIVE = 1e-9
"""Of the largest force, energy or stress of a structure: a dimer deep in the repulsive wall has
forces of 1e5 eV/Å."""


@dataclass(frozen=True)
class Comparison:
    """One quantity of one structure: what was published, what jaxft says."""

    structure: str
    quantity: str
    published: np.ndarray
    found: np.ndarray

    @property
    def deviation(self) -> float:
        """The largest absolute difference."""
        return float(np.abs(self.found - self.published).max())

    @property
    def allowed(self) -> float:
        return ABSOLUTE[self.quantity] + RELATIVE * float(np.abs(self.published).max())

    @property
    def agrees(self) -> bool:
        return bool(self.deviation <= self.allowed)  # False for NaN


@dataclass(frozen=True)
class GoldenReport:
    """All comparisons of one model; printed, a table, and everything a bug report needs."""

    path: Path
    model: str
    head: str | None
    sha256: str
    architecture: Mapping[str, Any]
    rows: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        return all(row.agrees for row in self.rows)

    def __str__(self) -> str:
        head = "" if self.head is None else f", head {self.head}"
        lines = [
            f"{self.path} is {self.model}{head}; largest differences from the published figures",
            f"{'structure':<18}{'quantity':<14}{'published up to':>16}{'difference':>12}"
            f"{'allowed':>10}",
        ]
        for row in self.rows:
            size = float(np.abs(row.published).max())
            lines.append(
                f"{row.structure:<18}{row.quantity:<14}{size:>16.6g}{row.deviation:>12.1e}"
                f"{row.allowed:>10.0e}{'' if row.agrees else '  <- differs'}"
            )
        if self.agrees:
            lines.append("agrees")
        else:
            lines.append(
                "DIFFERS. Please report this, with everything below, at the project's issue "
                f"tracker.\n{json.dumps(self.to_dict(), indent=1)}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Figures, versions and architecture, as JSON-like values; units eV and Å."""
        names = ("jax", "jaxlib", "numpy", "flax", "e3nn-jax", "matscipy")
        return {
            "model": self.model,
            "head": self.head,
            "file": self.path.name,
            "sha256": self.sha256,
            "agrees": self.agrees,
            "versions": {"jaxft": __version__} | {name: version(name) for name in names},
            "python": platform.python_version(),
            "machine": f"{platform.platform()}, jax on {jax.default_backend()}",
            "comparisons": [
                {
                    "structure": row.structure,
                    "quantity": row.quantity,
                    "difference": row.deviation,
                    "allowed": row.allowed,
                    "agrees": row.agrees,
                    **(
                        {}
                        if row.agrees
                        else {"published": row.published.tolist(), "found": row.found.tolist()}
                    ),
                }
                for row in self.rows
            ],
            "architecture": dict(self.architecture),
        }


def check(path: str | Path) -> GoldenReport:
    """Compare a converted model with its published figures, in float64.

    Args:
      path: a published ``.model`` file, or the bundle that it was converted into.

    Raises:
      ModelFileError: the file cannot be converted.
      ValueError: there are no figures for this file, the bundle is no plain conversion, or JAX has
        float64 switched off.
    """
    bundle.require_dtype("float64")
    path = Path(path)
    model, params, sha256 = _loaded(path)
    figures = _figures_of(path, sha256)
    frames = {atoms.info["name"]: atoms for atoms in ase.io.read(FIGURES / "structures.xyz", ":")}
    chosen = [frames[name] for name in figures["frames"]]
    dataset = data.prepare(
        [data.from_atoms(atoms) for atoms in chosen], model, head=figures["head"]
    )
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), params)
    results = ours(model, params, dataset, "float64")
    e0s = dict(zip(model.atomic_numbers, model.e0s[model.head_index(figures["head"])], strict=True))
    rows: list[Comparison] = []
    for atoms, result, published in zip(chosen, results, figures["frames"].values(), strict=True):
        rows += _compared(atoms, result, published, e0s, model.r_max)
    return GoldenReport(
        path,
        figures["model"],
        figures["head"],
        sha256,
        model.config.model_dump(mode="json"),
        tuple(rows),
    )


def known() -> dict[str, str]:
    """``{sha256: model}`` of all published figures."""
    return {figures["sha256"]: figures["model"] for figures in _all_figures()}


def _all_figures() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(FIGURES.glob("*.json"))]


def _figures_of(path: Path, sha256: str) -> dict[str, Any]:
    for figures in _all_figures():
        if figures["sha256"] == sha256:
            return figures
    listed = "\n".join(f"  {f['model']}: {f['file']}, {f['source_url']}" for f in _all_figures())
    raise ValueError(
        f"{path} has sha256 {sha256}, for which no figures are published;\nthere are some for\n"
        f"{listed}\nDownload one of these, or compare with torch: jaxft verify FILE.model"
    )


def _loaded(path: Path) -> tuple[Potential, Params, str]:
    if not path.is_dir():
        model, params, provenance = convert_with_provenance(path)
        return model, params, provenance["sha256"]
    model, params, provenance = bundle.load_numpy(path)
    if set(provenance) != {"source", "sha256", "dtype"}:
        raise ValueError(
            f"{path} is not the plain conversion of a file (its provenance holds "
            f"{', '.join(provenance) or 'nothing'}), so published figures do not apply;\n"
            "convert the file again, without options."
        )
    if provenance["dtype"] != bundle.stored_dtype(params):
        raise ValueError(
            f"{path} holds {bundle.stored_dtype(params)} numbers, its file {provenance['dtype']};\n"
            "convert the file again, without --dtype."
        )
    return model, params, provenance["sha256"]


def _compared(
    atoms: ase.Atoms,
    result: Result,
    published: Mapping[str, Any],
    e0s: Mapping[int, float],
    r_max: float,
) -> list[Comparison]:
    own = np.array([e0s[z] for z in atoms.numbers.tolist()])
    found = {
        "energy": np.asarray(result.energy + own.sum()),
        "node_energy": result.node_energy,
        "forces": result.forces,
    }
    if published["stress"] is not None:
        found["stress"] = result.virial / _volume(atoms, r_max)
    name = atoms.info["name"]
    return [
        Comparison(name, quantity, np.asarray(published[quantity], np.float64), value)
        for quantity, value in found.items()
    ]


def _volume(atoms: ase.Atoms, r_max: float) -> float:
    """Å³, with the source's row in place of a missing third one (converters/figures/README.md)."""
    cell = np.array(atoms.cell.array)
    if not cell[2].any():
        cell[2, 2] = np.ptp(atoms.positions[:, 2]) + 2 * r_max + 1
    return abs(float(np.linalg.det(cell)))
