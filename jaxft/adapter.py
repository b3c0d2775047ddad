"""Adapters: what a run trained, saved without the model that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxft import bundle, surgery, tree
from jaxft.data import Keys
from jaxft.document import loads
from jaxft.fisherfile import UNREADABLE
from jaxft.potential import Potential
from jaxft.recipe import Entry, Setting, StrategyConfig
from jaxft.strategies import base
from jaxft.strategies.ewc import digest
from jaxft.train import Trainable
from jaxft.typing import Params

FORMAT, VERSION = "jaxft-adapter", "1"
DOCUMENT, ARRAYS = "adapter.json", "adapter.safetensors"
MAX_BYTES = 1 << 20
"""Of the document."""


@dataclass(frozen=True)
class Adapter:
    """What to change in a base model."""

    base: str
    """:func:`digest_of` the base, before surgery."""
    recipe: Sequence[Entry]
    """The strategies that own coordinates, in order."""
    trainable: Trainable
    """Base leaves that were trained, the others None; coordinates by strategy."""
    heads: tuple[str, ...]
    """Of the tuned model."""
    e0s: np.ndarray
    """[heads, elements] eV, of the tuned model."""
    like: str | None = None
    """The head that the last one was added as a copy of; None if none was added."""
    moments: Mapping[str, Any] | None = None
    """Arguments of :func:`jaxft.surgery.add_moments` but the means; None if no head was added."""
    mean_moments: np.ndarray | None = None
    """[elements] µB, with such a head."""

    @property
    def dtype(self) -> str:
        """Of what was trained."""
        return str(jax.tree.leaves(self.trainable)[0].dtype)


def save(path: str | Path, adapter: Adapter) -> Path:
    """Write an adapter as a folder with ``adapter.json`` and ``adapter.safetensors``.

    Raises:
      FileExistsError: ``path`` exists; nothing is overwritten.
    """
    path = Path(path)
    bundle.refuse_existing(path)
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "base": adapter.base,
        "heads": list(adapter.heads),
        "like": adapter.like,
        "recipe": [
            entry.portable(_leaves(adapter.trainable.coords[entry.name])).model_dump(
                mode="json", by_alias=True, exclude_none=True
            )
            for entry in adapter.recipe
        ],
    }
    if adapter.moments is not None:
        document["moments"] = dict(adapter.moments)
    arrays = {f"params/{name}": leaf for name, leaf in _present(adapter.trainable.params).items()}
    for strategy, coords in adapter.trainable.coords.items():
        arrays |= {f"coords/{strategy}/{name}": leaf for name, leaf in tree.flatten(coords).items()}
    arrays["e0s"] = adapter.e0s
    if adapter.mean_moments is not None:
        arrays["mean_moments"] = adapter.mean_moments
    with bundle.whole_folder(path) as scratch:
        save_file(
            {name: np.array(leaf, order="C") for name, leaf in arrays.items()}, scratch / ARRAYS
        )
        (scratch / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
    return path


def load(path: str | Path) -> Adapter:
    """Read an adapter; nothing in it is executed.

    Raises:
      ValueError: the folder is no adapter, or a damaged one.
    """
    path = Path(path)
    try:
        document = _document(path / DOCUMENT)
        with safe_open(path / ARRAYS, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recipe = TypeAdapter(list[StrategyConfig]).validate_python(document["recipe"])
        nested = tree.unflatten(arrays)
        coords = {entry.name: nested.get("coords", {})[entry.name] for entry in recipe}
        return Adapter(
            base=str(document["base"]),
            recipe=recipe,
            trainable=Trainable(nested.get("params", {}), coords),
            heads=tuple(map(str, document["heads"])),
            e0s=np.asarray(nested["e0s"], np.float64),
            like=document["like"],
            moments=document.get("moments"),
            mean_moments=nested.get("mean_moments"),
        )
    except UNREADABLE as error:
        what = _short(error)
        raise ValueError(
            f"{path} is not an adapter that this jaxft reads: {what}.\nexpected a folder with "
            f"{DOCUMENT} and {ARRAYS}, as `jaxft finetune` writes beside its model."
        ) from error


def merge(adapter: Adapter, model: Potential, params: Params) -> tuple[Potential, Params]:
    """The tuned model: the base with its new head and E0s, and everything trained merged in.

    Args:
      adapter: from :func:`load`.
      model, params: of the base.

    Raises:
      ValueError: the adapter belongs to another base, or its arrays do not fit this one.
    """
    if (found := digest_of(model, params)) != adapter.base:
        raise ValueError(
            f"the adapter was trained on the model {adapter.base}, this one is {found};\n"
            "merge it with the bundle that its run started from."
        )
    params = jax.tree.map(jnp.asarray, params)
    if adapter.like is not None:
        model, params = surgery.add_head(model, params, adapter.heads[-1], like=adapter.like)
    if adapter.moments is not None:
        model, params = _with_moments(adapter, model, params)
    if model.heads != adapter.heads or model.e0s.shape != adapter.e0s.shape:
        raise ValueError(
            f"the adapter has heads {', '.join(adapter.heads)} and E0s of shape "
            f"{adapter.e0s.shape}; the base has {', '.join(model.heads)} and {model.e0s.shape}."
        )
    for head, row in zip(model.heads, adapter.e0s, strict=True):
        model = surgery.set_e0s(model, dict(zip(model.atomic_numbers, row, strict=True)), head=head)
    trained = tree.flatten(adapter.trainable.params)
    _check_leaves(trained, tree.flatten(params))
    start = {path: trained.get(path, leaf) for path, leaf in tree.flatten(params).items()}
    setting = Setting(model, params, Keys())
    recipe = [entry.build(setting) for entry in adapter.recipe]
    coords, consts = base.init(recipe, jax.random.key(0), params)
    _check_coords(adapter.trainable.coords, coords)
    whole = jax.tree.map(jnp.asarray, tree.unflatten(start))
    given = jax.tree.map(jnp.asarray, adapter.trainable.coords)
    return model, base.apply(recipe, whole, given, consts)


def _with_moments(adapter: Adapter, model: Potential, params: Params) -> tuple[Potential, Params]:
    means = np.zeros(0) if adapter.mean_moments is None else adapter.mean_moments
    if len(means) != len(model.atomic_numbers):
        raise ValueError(
            f"the adapter has mean moments of {len(means)} elements, the base "
            f"{len(model.atomic_numbers)} elements; the adapter is damaged."
        )
    table = dict(zip(model.atomic_numbers, map(float, means), strict=True))
    try:
        return surgery.add_moments(model, params, means=table, **dict(adapter.moments or {}))
    except TypeError as error:
        raise ValueError(f"the adapter's moments are not understood ({error}).") from error


def digest_of(model: Potential, params: Params) -> str:
    """Hash of parameters, architecture and constants; isolated-atom energies left out, since an
    adapter brings its own."""
    return f"{digest(params)}-{model.digest}"


def _document(path: Path) -> Mapping[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    found = loads(path.read_text())
    given = found["format"], found["version"]
    if given != (FORMAT, VERSION):
        raise ValueError(f"it says format {given[0]!r}, version {given[1]!r}")
    return found


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
    return f"{error!s:.300}" or type(error).__name__


def _leaves(coords: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(path.rpartition("/")[0] for path in tree.flatten(coords)))


def _present(params: Params) -> dict[str, Any]:
    return {path: leaf for path, leaf in tree.flatten(params).items() if leaf is not None}


def _check_leaves(given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    wrong = [
        f"{path} {np.shape(leaf)}"
        for path, leaf in given.items()
        if path not in expected or np.shape(leaf) != np.shape(expected[path])
    ]
    if wrong:
        raise ValueError(
            f"the adapter holds leaves that the base does not have: {', '.join(wrong)}."
        )


def _check_coords(given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    kinds = [
        [f"{path} {np.shape(leaf)}" for path, leaf in tree.flatten(coords).items()]
        for coords in (given, expected)
    ]
    if diff := tree.name_diff(*kinds):
        raise ValueError(
            f"the adapter's arrays are not those of its recipe (- recipe, + given):\n{diff}"
        )
