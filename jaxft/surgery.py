"""What changes a model's structure or constants; pure, done once, before training.

Heads and elements are blocks of a few leaves, so adding, choosing and copying them is a choice of
blocks. The forward pass divides by the square root of how many there are, and a change from n to
n' blocks is undone by factors of √(n'/n): what stays gives the results that it gave, to rounding.
Factors are computed in float64 and leaves keep their dtype. What does not change is not copied.

Reference: mace-torch's ``remove_pt_head`` (``mace/tools/scripts_utils.py``) and
``load_foundations_elements`` (``mace/tools/finetuning_utils.py``).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from jaxft import tree
from jaxft.models.config import MACEConfig
from jaxft.models.contraction import weight_names
from jaxft.models.irreps import multiplicities
from jaxft.momenthead import add_moments as add_moments
from jaxft.momenthead import remove_moments as remove_moments
from jaxft.potential import E0_BUFFER, MEANS_BUFFER, Potential
from jaxft.typing import Array, Params

MAX_NAME = 200
"""Characters of a head's name."""


def set_e0s(model: Potential, e0s: Mapping[int, float], *, head: str | None = None) -> Potential:
    """The model with other isolated-atom energies; all other elements keep theirs.

    Forces and stresses do not change, energies change by Σ ΔE0.

    Args:
      model: the potential.
      e0s: ``{atomic number: eV}``.
      head: whose; not needed with one head.

    Raises:
      ValueError: the head is unknown, an element is not in the model's table, or a value is not
        finite.
    """
    _check_known(model, e0s, "E0s were given for")
    wrong = [chemical_symbols[z] for z, e0 in e0s.items() if not np.isfinite(e0)]
    if wrong:
        raise ValueError(f"the E0s of {', '.join(wrong)} are not finite; give energies in eV.")
    table = np.array(model.buffers[E0_BUFFER], np.float64)
    row = table.reshape(len(model.heads), -1)[model.head_index(head)]
    for z, e0 in e0s.items():
        row[model.atomic_numbers.index(z)] = e0
    return replace(model, buffers={**model.buffers, E0_BUFFER: table})


def set_scale_shift(
    model: Potential, *, scale: float, shift: float, head: str | None = None
) -> Potential:
    """The model with another scale (eV) and shift (eV per atom) of its interaction energy.

    Raises:
      ValueError: a value is not finite, the scale is not positive, the head is unknown, or the
        model is a plain MACE, which has neither.
    """
    if "scale_shift/scale" not in model.buffers:
        raise ValueError("a plain MACE has no scale and shift; only ScaleShiftMACE models do.")
    index = model.head_index(head)
    if not (np.isfinite([scale, shift]).all() and scale > 0):
        raise ValueError(f"scale={scale}, shift={shift}; use a positive scale and a finite shift.")
    values = {"scale_shift/scale": scale, "scale_shift/shift": shift}
    buffers = {}
    for name, value in values.items():
        buffers[name] = np.array(model.buffers[name])
        buffers[name].reshape(-1)[index] = value
    return replace(model, buffers={**model.buffers, **buffers})


def select_head(model: Potential, params: Params, head: str) -> tuple[Potential, Params]:
    """The single-head model that a multi-head one is at ``head``.

    Energies, forces and stresses are those of that head, to rounding. Of H heads with M hidden
    scalars each, a readout keeps the columns ``[C, H]`` or ``[C, H·M]`` of the head; its later
    layers keep the blocks ``[H·M, H·M]`` and ``[H·M, H]`` of the head with itself, times 1/√H.
    E0s, scale and shift keep the head's entries.

    Args:
      model: the potential.
      params: its parameters, numpy or jax.
      head: one of ``model.heads``.

    Raises:
      ValueError: there is no such head, or the parameters are not this model's.
    """
    row = model.head_index(head)
    if len(model.heads) == 1:
        return model, params
    return _with_heads(model, params, [row], (head,))


def add_head(
    model: Potential,
    params: Params,
    name: str,
    *,
    like: str | None = None,
    e0s: Mapping[int, float] | None = None,
) -> tuple[Potential, Params]:
    """One more head, the last, that begins as a copy of another.

    The other heads' results do not change, to rounding, and the new one's are those of ``like``
    but for its E0s. From H to H + 1 heads the later layers of non-linear readouts take a factor
    √((H + 1)/H). Their blocks between different heads, which a mask keeps from ever acting or
    receiving a gradient, are copied along, as mace-torch does: the new head's row and column are
    those of ``like``, and its block with itself is that of ``like`` with itself.

    Args:
      model: the potential.
      params: its parameters, numpy or jax.
      name: of the new head.
      like: the head to copy; not needed with one head.
      e0s: ``{atomic number: eV}`` of the new head; elements left out have the E0s of ``like``.

    Raises:
      ValueError: the name is empty or taken, there is no head ``like``, an E0 is not finite or
        of an unknown element, the parameters are not this model's, or the model is a plain MACE
        with an embedding readout, whose heads mace-torch cannot tell apart.
    """
    _check_name(model, name)
    row = model.head_index(like)
    if model.config.embedding_readout and model.config.family == "MACE":
        raise ValueError(
            f"head {name!r} cannot be added: a plain MACE with an embedding readout has one head "
            "in mace-torch;\nfine-tune that one."
        )
    rows = [*range(len(model.heads)), row]
    model, params = _with_heads(model, params, rows, (*model.heads, name))
    return (set_e0s(model, e0s, head=name) if e0s else model), params


def rename_head(model: Potential, head: str, name: str) -> Potential:
    """The model with ``head`` called ``name``; no number changes.

    Raises:
      ValueError: there is no such head, or the new name is empty or another head's.
    """
    row = model.head_index(head)
    if name == head:
        return model
    _check_name(model, name)
    heads = (*model.heads[:row], name, *model.heads[row + 1 :])
    return replace(model, config=_changed(model.config, heads=heads))


def select_elements(
    model: Potential, params: Params, elements: Iterable[int | str]
) -> tuple[Potential, Params]:
    """The model of fewer elements: smaller tables, the same results on structures of these.

    From S to S' elements, rows of the element embeddings and of the self-connections per element
    (``skip_tp``) take a factor √(S'/S); rows of the product weights and columns of the E0s do
    not. Agnostic products have no elements and stay.

    Args:
      model: the potential.
      params: its parameters, numpy or jax.
      elements: symbols or atomic numbers, in any order and as often as you like (the numbers of a
        structure will do); the model's own order is kept.

    Raises:
      ValueError: no element is named, one is unknown, or the parameters are not this model's.
    """
    if isinstance(elements, str):
        raise ValueError(f"elements={elements!r} is one string; give a list such as ['H', 'O'].")
    chosen = {_atomic_number(element) for element in elements}
    if not chosen:
        raise ValueError(f"no elements were named; choose among {_listed(model.atomic_numbers)}.")
    _check_known(model, chosen, "the model was to be restricted to")
    rows = [row for row, z in enumerate(model.atomic_numbers) if z in chosen]
    if len(rows) == len(model.atomic_numbers):
        return model, params
    return _with_elements(model, params, rows, [model.atomic_numbers[row] for row in rows])


def add_element(
    model: Potential,
    params: Params,
    element: int | str,
    *,
    like: int | str,
    e0s: float | Mapping[str, float],
) -> tuple[Potential, Params]:
    """One more element, UNTRAINED: a copy of ``like`` under another number.

    Nothing is known of the new element but its atomic number, which is its charge in a pair
    repulsion, its covalent radius, from the model file's own table, and the E0s given here. Its
    interactions are those of ``like`` (with that radius), which are wrong until trained on data
    of the new element: never simulate with what this returns. The results on structures without
    the new element do not change, to rounding: factors as in :func:`select_elements`, with
    S' = S + 1.

    Args:
      model: the potential.
      params: its parameters, numpy or jax.
      element: symbol or atomic number. An ascending table stays ascending; to any other the new
        element is appended.
      like: the known element, symbol or atomic number, to begin from; best a chemical neighbour.
      e0s: eV, of the isolated atom, for all heads, or ``{head: eV}`` with every head.

    Raises:
      ValueError: the element is known already, ``like`` is unknown, heads are missing from
        ``e0s`` or unknown, a value is not finite, or the parameters are not this model's.
    """
    z, source = _atomic_number(element), _atomic_number(like)
    numbers = list(model.atomic_numbers)
    if z in numbers:
        raise ValueError(
            f"{chemical_symbols[z]} is one of the model's elements, {_listed(numbers)};\n"
            "there is nothing to add: train it, or use set_e0s."
        )
    _check_known(model, [source], f"{chemical_symbols[z]} was to begin as")
    values = e0s if isinstance(e0s, Mapping) else dict.fromkeys(model.heads, e0s)
    diff = tree.name_diff(map(str, values), model.heads)
    if diff:
        raise ValueError(
            f"the E0s of {chemical_symbols[z]} are not those of the model's heads "
            f"(- missing, + unknown):\n{diff}\nGive one energy per head, or one for all."
        )
    is_ascending = numbers == sorted(numbers)
    position = bisect.bisect(numbers, z) if is_ascending else len(numbers)
    rows = list(range(len(numbers)))
    rows.insert(position, numbers.index(source))
    numbers.insert(position, z)
    model, params = _with_elements(model, params, rows, numbers)
    for head, e0 in values.items():
        model = set_e0s(model, {z: e0}, head=head)
    return model, params


class _Blocks(NamedTuple):
    """Where a leaf holds one block per head, or per element."""

    sizes: Mapping[int, int]
    """{axis: its length}."""
    is_normalised: bool
    """The forward pass divides by √(number of blocks)."""


def _head_blocks(config: MACEConfig) -> dict[str, _Blocks]:
    heads = len(config.heads)
    found = {}
    if config.embedding_readout:
        found["embedding_readout/linear/0e"] = _Blocks({1: heads}, False)
    for i, readout in enumerate(config.readouts):
        path = f"readouts_{i}"
        if readout.kind == "linear":
            found[f"{path}/linear/0e"] = _Blocks({1: heads}, False)
            continue
        hidden = multiplicities(readout.hidden_irreps)["0e"]
        found[f"{path}/linear_1/0e"] = _Blocks({1: hidden}, False)
        found[f"{path}/linear_2/0e"] = _Blocks({0: hidden, 1: heads}, True)
        if readout.kind == "bias":
            found[f"{path}/linear_2/bias"] = _Blocks({0: heads}, False)
            found[f"{path}/linear_mid/0e"] = _Blocks({0: hidden, 1: hidden}, True)
            found[f"{path}/linear_mid/bias"] = _Blocks({0: hidden}, False)
    return found


def _element_blocks(config: MACEConfig) -> dict[str, _Blocks]:
    plain, normalised = (_Blocks({0: config.num_elements}, flag) for flag in (False, True))
    found = {"node_embedding/linear/0e": normalised}
    for i, (block, product) in enumerate(zip(config.interactions, config.products, strict=True)):
        path = f"interactions_{i}"
        if block.is_nonlinear:
            found[f"{path}/source_embedding/0e"] = normalised
            found[f"{path}/target_embedding/0e"] = normalised
        else:
            target = block.target_irreps
            ends = (block.node_feats_irreps, block.hidden_irreps)
            inputs, outputs = ends if block.is_residual else (target, target)
            for name in multiplicities(inputs):
                if name in multiplicities(outputs):
                    found[f"{path}/skip_tp/{name}"] = normalised
        if not product.is_agnostic:
            for name in multiplicities(product.irreps_out):
                for weights in weight_names(product.correlation):
                    found[f"products_{i}/symmetric_contractions/{name}/{weights}"] = plain
    if config.moments is not None:
        found |= {"moments/linear_2/0e": normalised, "moments/bias": plain}
        if config.moments.energy:
            found |= {"moments/onsite": plain, "moments/exchange_bias": plain}
            found["moments/exchange_linear/0e"] = normalised
    return found


def _with_heads(
    model: Potential, params: Params, rows: Sequence[int], names: tuple[str, ...]
) -> tuple[Potential, Params]:
    """The model whose head ``names[i]`` is the old ``rows[i]``."""
    config, count = model.config, len(model.heads)
    blocks = _head_blocks(config)
    params = _gathered(params, blocks, rows, count)
    buffers = dict(model.buffers)
    buffers[E0_BUFFER] = np.asarray(buffers[E0_BUFFER]).reshape(count, -1)[rows]
    for path in ("scale_shift/scale", "scale_shift/shift"):
        if path in buffers:
            values = np.asarray(buffers[path]).reshape(-1)
            buffers[path] = np.broadcast_to(values, (count,))[rows]
    for path in blocks:  # e3nn's ones, as long as the outputs; nothing of ours reads them
        mask = f"{path.rpartition('/')[0]}/output_mask"
        if path.endswith("/0e") and mask in buffers:
            buffers[mask] = _gather(buffers[mask], [0], rows, count, 1.0)
    readouts = []
    for readout in config.readouts:
        width = multiplicities(readout.hidden_irreps).get("0e", 0) // count
        hidden = f"{len(rows) * width}x0e"
        readouts.append(readout.model_copy(update={"hidden_irreps": hidden}))
    config = _changed(config, heads=names, readouts=tuple(readouts))
    return replace(model, config=config, buffers=buffers), params


def _with_elements(
    model: Potential, params: Params, rows: Sequence[int], numbers: Sequence[int]
) -> tuple[Potential, Params]:
    """The model whose element ``numbers[i]`` is the old row ``rows[i]``."""
    blocks = _element_blocks(model.config)
    params = _gathered(params, blocks, rows, len(model.atomic_numbers))
    table = np.asarray(model.buffers["atomic_numbers"])
    buffers = {
        **model.buffers,
        "atomic_numbers": np.asarray(numbers, table.dtype),
        E0_BUFFER: np.asarray(model.buffers[E0_BUFFER])[..., rows],
    }
    if MEANS_BUFFER in buffers:
        buffers[MEANS_BUFFER] = np.asarray(buffers[MEANS_BUFFER])[rows]
    config = _changed(model.config, atomic_numbers=tuple(numbers))
    return replace(model, config=config, buffers=buffers), params


def _gathered(
    params: Params, blocks: Mapping[str, _Blocks], rows: Sequence[int], count: int
) -> Params:
    """Parameters with the blocks ``rows`` of ``count``, normalised for their new number."""
    flat = tree.flatten(params)
    for path, (sizes, is_normalised) in blocks.items():
        shape = flat[path].shape if path in flat else None
        if shape is None or any(shape[axis : axis + 1] != (n,) for axis, n in sizes.items()):
            found = "is missing" if shape is None else f"has shape {shape}"
            expected = " and ".join(f"{n} in axis {axis}" for axis, n in sizes.items())
            raise ValueError(
                f"{path!r} {found}; expected {expected}.\n"
                "Give the parameters of this model, merged (jaxft.merge) after training."
            )
        factor = (len(rows) / count) ** 0.5 if is_normalised else 1.0
        flat[path] = _gather(flat[path], sizes, rows, count, factor)
    return tree.unflatten(flat)


def _gather(
    leaf: Array, axes: Iterable[int], rows: Sequence[int], count: int, factor: float
) -> Array:
    """Blocks ``rows`` of the ``count`` equal ones along each axis, times a factor."""
    array = np.asarray(leaf)
    for axis in axes:
        width = array.shape[axis] // count
        index = np.asarray(rows)[:, None] * width + np.arange(width)
        array = array.take(index.reshape(-1), axis)
    if factor != 1.0:
        array = (array.astype(np.float64) * factor).astype(array.dtype)
    return jnp.asarray(array) if isinstance(leaf, jax.Array) else array


def _changed(config: MACEConfig, **changes: Any) -> MACEConfig:
    return MACEConfig.model_validate(config.model_dump() | changes)


def _check_name(model: Potential, name: str) -> None:
    """Raises unless a head may be called so."""
    if not isinstance(name, str) or not name or name != name.strip():
        raise ValueError(
            f"a head was to be called {name!r}; expected a string, not empty and without spaces "
            "around it, such as 'water'."
        )
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(
            f"a head was to be called {name[:60]!r}; expected at most {MAX_NAME} printable "
            "characters."
        )
    if name in model.heads:
        raise ValueError(
            f"there is a head {name!r} already; the heads are "
            f"{', '.join(map(repr, model.heads))}.\nChoose another name."
        )


def _check_known(model: Potential, numbers: Iterable[int], what: str) -> None:
    """Raises unless all are in the model's table."""
    unknown = sorted(set(numbers) - set(model.atomic_numbers), key=str)
    if unknown:
        raise ValueError(
            f"{what} {', '.join(_symbol(z) for z in unknown)}, which the model does not know; its "
            f"elements are {_listed(model.atomic_numbers)}."
        )


def _atomic_number(element: int | str) -> int:
    z = atomic_numbers.get(element, 0) if isinstance(element, str) else element
    is_int = isinstance(z, int | np.integer) and not isinstance(z, bool)
    if is_int and 0 < z < len(chemical_symbols):
        return int(z)
    raise ValueError(
        f"{element!r} is no element; give a symbol such as 'O' or an atomic number such as 8."
    )


def _symbol(z: int) -> str:
    is_number = isinstance(z, int | np.integer) and 0 < z < len(chemical_symbols)
    return chemical_symbols[z] if is_number else repr(z)


def _listed(numbers: Iterable[int]) -> str:
    return " ".join(map(_symbol, numbers))
