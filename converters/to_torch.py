"""A potential and its parameters become an ordinary mace-torch ``.model`` file again.

mace-torch builds the module; then every number and constant in it is replaced by ours, so that
its ``state_dict()`` is, name by name and bit by bit, that of the file the model came from. What was
written is read back, without torch, before the file gets its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.reader import ModelFile, read
from converters.rules import buffer_path, parameter_rules
from converters.to_jax import from_file
from jaxft import bundle, surgery, tree
from jaxft.models.config import EmbeddingConfig, MACEConfig
from jaxft.models.irreps import multiplicities
from jaxft.potential import E0_BUFFER, Potential
from jaxft.typing import Params

DTYPES = ("float32", "float64")
UNSEEN = "._compiled_main"
"""In the names of e3nn's own constants, which files hold as compiled code and we never read."""

OPTIONAL = "_zeroed"
"""Flags at the end of whose names nothing in mace-torch looks; older writers lack them."""

UNUSED = re.compile(r"pair_repulsion_fn/(r_max|cutoff/.*)")
"""Constants that mace-torch wrote until 0.3.9 and never read."""

DTYPE = "r_max"
"""A constant that has the dtype of the file."""

READOUTS = {"nonlinear": "NonLinearReadoutBlock", "bias": "NonLinearBiasReadoutBlock"}


def export(
    source: str | Path | tuple[Potential, Params],
    path: str | Path,
    *,
    state_dict: bool = False,
    without_moments: bool = False,
) -> Path:
    """Write a ``.model`` that mace-torch's ``MACECalculator`` and command-line tools load.

    Parameters and constants are the model's own, bit for bit. Where the parameters were cast to
    another dtype, the constants follow; isolated-atom energies stay as they are stored.

    Args:
      source: a bundle's folder, or a potential and its (merged) parameters.
      path: of the new file, by custom ``NAME.model``; it appears complete or not at all.
      state_dict: write only the module's ``state_dict()``, by custom ``NAME.pt``.
      without_moments: leave out the head for magnetic moments, for which mace-torch has nothing.

    Returns:
      ``path``.

    Raises:
      FileExistsError: ``path`` exists; nothing is overwritten.
      ImportError: torch or mace-torch is not installed.
      ValueError: the model has a head for magnetic moments that was not to be left out, or that
        adds to the energy; the parameters are not those of the model; or what was read back is not
        what was to be written.
    """
    path = Path(path)
    bundle.refuse_existing(path)
    model, params = source if isinstance(source, tuple) else _stored(Path(source))
    if model.moments is not None:
        model, params = _without_moments(model, params, is_wanted=without_moments)
    leaves = _checked_leaves(model.config, params)
    # Widening is exact, rounding the constants is not: a float64 model that was fine-tuned in
    # float32 is exported in float64.
    dtype = np.result_type(*leaves.values(), model.buffers[DTYPE]).name
    leaves = {name: leaf.astype(dtype) for name, leaf in leaves.items()}
    buffers = _cast(model.buffers, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with torch_and_mace(dtype) as (torch, modules):
            module = _build(modules, torch, model.config, buffers)
            _fill(torch, module, _tensors(model.config, module, leaves, buffers))
            torch.save(module, scratch / "whole.model")
            torch.save(module.state_dict(), scratch / "numbers.pt")
        _check(read(scratch / "whole.model"), Potential(model.config, buffers), leaves)
        if state_dict:
            numbers = read(scratch / "numbers.pt", like=scratch / "whole.model")
            _check(numbers, Potential(model.config, buffers), leaves)
        bundle.refuse_existing(path)
        os.rename(scratch / ("numbers.pt" if state_dict else "whole.model"), path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _without_moments(
    model: Potential, params: Params, *, is_wanted: bool
) -> tuple[Potential, Params]:
    if model.moments is not None and not model.moments.energy and not is_wanted:
        raise ValueError(
            "the model has a head for magnetic moments, for which mace-torch has no counterpart;\n"
            "export it without (--without-moments): energies, forces and stresses stay the same."
        )
    return surgery.remove_moments(model, params)


def _stored(path: Path) -> tuple[Potential, Params]:
    """A bundle with its parameters as they are stored, even where JAX has float64 switched off."""
    model, params, _ = bundle.load_numpy(path)
    return model, params


@contextlib.contextmanager
def torch_and_mace(dtype: str) -> Iterator[tuple[Any, Any]]:
    """``torch`` and ``mace.modules``, with ``dtype`` as torch's default and its random state kept.

    Everything global is as before afterwards; importing mace alone would leave torch's
    ``weights_only`` protection switched off for the whole process.
    """
    variable = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    previous = os.environ.get(variable)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ[variable] = "1"  # e3nn 0.4.4 cannot be imported under torch >= 2.6 without it
        try:
            torch, modules = _import()
        finally:
            if previous is None:
                del os.environ[variable]
            else:
                os.environ[variable] = previous
        default = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]):
            torch.set_default_dtype(getattr(torch, dtype))
            try:
                yield torch, modules
            finally:
                torch.set_default_dtype(default)


def _import() -> tuple[Any, Any]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # mace prints what it could not import
            import torch
            from mace import modules
    except ImportError as error:
        raise ImportError(
            f"torch and mace-torch are needed here, and only here ({error});\n"
            "install them with `pip install 'jaxft[torch]'`."
        ) from error
    return torch, modules


def _checked_leaves(config: MACEConfig, params: Params) -> dict[str, np.ndarray]:
    leaves = {name: np.asarray(leaf) for name, leaf in tree.flatten(params).items()}
    expected = [
        f"{block.path} {tuple(block.shape[axis] for axis in block.axes)}"
        for rule in parameter_rules(config)
        for block in rule.blocks
    ]
    diff = tree.name_diff((f"{name} {leaf.shape}" for name, leaf in leaves.items()), expected)
    if diff:
        raise ValueError(
            "these are not the parameters of this model (- expected, + given):\n"
            f"{diff}\nGive merged parameters, from jaxft.merge or jaxft.load."
        )
    dtypes = sorted({leaf.dtype.name for leaf in leaves.values()})
    if len(dtypes) != 1 or dtypes[0] not in DTYPES:
        raise ValueError(
            f"the parameters have the dtypes {', '.join(dtypes)}; expected one of "
            f"{' or '.join(DTYPES)} for all. Load the bundle with dtype=…."
        )
    return leaves


def _cast(buffers: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The constants in one dtype; E0s are not rounded."""
    stored = buffers[DTYPE].dtype
    found = {
        path: array.astype(dtype) if array.dtype == stored else array
        for path, array in buffers.items()
        if not UNUSED.fullmatch(path)
    }
    e0s = buffers[E0_BUFFER]
    found[E0_BUFFER] = e0s if e0s.dtype.name in DTYPES else e0s.astype(np.float64)
    return found


def _build(modules: Any, torch: Any, config: MACEConfig, buffers: Mapping[str, np.ndarray]) -> Any:
    """mace-torch's module of this architecture; its numbers are still to be replaced."""
    module = getattr(modules, config.family)(**_arguments(modules, torch, config, buffers))
    for name, value in config.mace_attributes.items():
        setattr(module, name, value)
    for block, interaction in zip(module.interactions, config.interactions, strict=True):
        block.avg_num_neighbors = interaction.avg_num_neighbors
        if interaction.gate is not None:
            block.equivariant_nonlin._scalar_cst = interaction.gate.scalar_constant
            block.equivariant_nonlin._gate_cst = interaction.gate.gate_constant
            for layer in (*block.conv_tp_weights.net, *block.density_fn.net):
                if isinstance(layer, torch.nn.LayerNorm):
                    layer.eps = interaction.layer_norm_eps
        else:
            for layer in block.conv_tp_weights:
                _set_constant(getattr(layer, "act", None), config.silu_constant)
    for product, wanted in zip(module.products, config.products, strict=True):
        product.use_sc = wanted.use_sc
    for readout in module.readouts:
        if "non_linearity" in dict(readout.named_children()):
            _set_constant(readout.non_linearity.acts[0], config.gate_constant)
    if config.gaussian_coefficient is not None:
        module.radial_embedding.bessel_fn.coeff = config.gaussian_coefficient
    return module


def _arguments(
    modules: Any, torch: Any, config: MACEConfig, buffers: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Of mace-torch's constructor."""
    from e3nn import o3

    if config.distance_transform == "Soft 0.3.6":
        raise ValueError(
            "this model has the distance transform that mace-torch called Soft until 0.3.9; the "
            "mace-torch of today has another, so there is no file of today for it."
        )
    first, last = config.interactions[0], config.interactions[-1]
    edges = o3.Irreps(config.edge_irreps)
    hidden, final = (o3.Irreps(config.products[i].irreps_out) for i in (0, -1))
    readout = config.readouts[-1]
    mlp = o3.Irreps(f"{multiplicities(readout.hidden_irreps)['0e'] // len(config.heads)}x0e")
    gates = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "abs": torch.abs, "None": None}
    arguments = {
        "r_max": config.r_max,
        "num_bessel": config.num_bessel,
        "num_polynomial_cutoff": config.cutoff_power,
        "max_ell": edges.lmax,
        "interaction_cls": getattr(modules.blocks, last.block),
        "interaction_cls_first": getattr(modules.blocks, first.block),
        "num_interactions": len(config.interactions),
        "num_elements": config.num_elements,
        "hidden_irreps": hidden,
        "MLP_irreps": mlp,
        "atomic_energies": np.asarray(buffers[E0_BUFFER]),
        "avg_num_neighbors": first.avg_num_neighbors,
        "atomic_numbers": list(config.atomic_numbers),
        "correlation": [product.correlation for product in config.products],
        "gate": gates[config.gate],
        "radial_MLP": list(first.radial_mlp),
        "heads": list(config.heads),
        "use_reduced_cg": False,  # the file's own coupling tensors take the place of these
        "use_so3": edges.lmax > 0 and "1e" in multiplicities(config.edge_irreps),
        "pair_repulsion": config.pair_repulsion,
        "apply_cutoff": config.apply_cutoff,
        "distance_transform": config.distance_transform,
        "radial_type": config.radial_type,
        "use_agnostic_product": config.products[0].is_agnostic,
        "use_last_readout_only": len(config.readouts) < len(config.products),
        "keep_last_layer_irreps": len(config.products) > 1 and len(final) > 1,
        **_edge_irreps(config),
    }
    if readout.kind in READOUTS:
        arguments["readout_cls"] = getattr(modules.blocks, READOUTS[readout.kind])
    if config.family == "ScaleShiftMACE":
        for name in ("scale", "shift"):
            arguments[f"atomic_inter_{name}"] = np.asarray(buffers[f"scale_shift/{name}"])
    if config.embeddings:
        arguments["embedding_specs"] = {spec.name: _embedding(spec) for spec in config.embeddings}
        arguments["use_embedding_readout"] = config.embedding_readout
    return arguments


def _edge_irreps(config: MACEConfig) -> dict[str, Any]:
    from e3nn import o3

    first, last = config.interactions[0], config.interactions[-1]
    if last.sender_irreps is None:
        return {}
    edges = o3.Irreps(last.sender_irreps)
    return {"edge_irreps": edges, "use_edge_irreps_first": first.sender_irreps is not None}


def _embedding(spec: EmbeddingConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"type": spec.kind, "per": spec.per, "emb_dim": spec.emb_dim}
    if spec.kind == "categorical":
        return found | {"num_classes": spec.num_classes, "offset": spec.offset}
    return found | {"in_dim": spec.in_dim, "use_bias": spec.use_bias}


def _set_constant(activation: Any, constant: float) -> None:
    if activation is not None:
        activation.cst = constant
        activation._is_id = constant == 1.0


def _tensors(
    config: MACEConfig,
    module: Any,
    leaves: Mapping[str, np.ndarray],
    buffers: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """What belongs under every name of the module's ``state_dict()``."""
    rules = {rule.name: rule for rule in parameter_rules(config)}
    found: dict[str, np.ndarray] = {}
    for name, tensor in module.state_dict().items():
        if name in rules:
            flat = rules[name].to_tensor(leaves)
            # Files of another mace-torch may hold fewer coupling paths than ours would make.
            is_whole = flat.size == tensor.numel()
            shape = tuple(tensor.shape) if is_whole else rules[name].blocks[0].shape
            found[name] = flat.reshape(shape)
        elif buffer_path(config, name) in buffers:
            found[name] = buffers[buffer_path(config, name)]
        elif not name.endswith(OPTIONAL) and UNSEEN not in name:
            raise ValueError(
                f"mace-torch's module has the tensor {name!r}, which this model lacks; export with "
                "the mace-torch that jaxft pins: `pip install 'jaxft[torch]'`."
            )
    given = {*rules, *buffers} - {*found, *(buffer_path(config, name) for name in found)}
    if given:
        raise ValueError(
            f"mace-torch's module has no place for {', '.join(sorted(given))}; export with the "
            "mace-torch that jaxft pins: `pip install 'jaxft[torch]'`."
        )
    return found


def _fill(torch: Any, module: Any, tensors: Mapping[str, np.ndarray]) -> None:
    for name in module.state_dict():
        prefix, _, leaf = name.rpartition(".")
        owner = module.get_submodule(prefix)
        if name in tensors:
            tensor = torch.from_numpy(np.array(tensors[name]))
            if leaf in owner._parameters:
                trained = owner._parameters[leaf].requires_grad  # not where a coupling is zero
                owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=trained)
            else:
                owner._buffers[leaf] = tensor
        elif name.endswith(OPTIONAL):
            del owner._buffers[leaf]


def _check(file: ModelFile, model: Potential, leaves: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless the file holds exactly this model."""
    found, params = from_file(file, allow_nonfinite=True)
    written = {**_prefixed("params", leaves), **_prefixed("buffers", model.buffers)}
    back = {
        **_prefixed("params", tree.flatten(params)),
        **_prefixed("buffers", found.buffers),
    }
    diff = tree.name_diff(map(_fingerprint, back.items()), map(_fingerprint, written.items()))
    config = model.config.model_copy(update={"r_max": float(model.buffers["r_max"])})
    same = {"mace_attributes": config.mace_attributes}  # versions differ in them
    if diff or found.config.model_copy(update=same) != config:
        raise ValueError(
            "mace-torch cannot write this model: read back, the file differs "
            f"(- to be written, + found):\n{diff or f'- {config}{chr(10)}+ {found.config}'}\n"
            "Nothing was written. Please report this."
        )


def _prefixed(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def _fingerprint(item: tuple[str, np.ndarray]) -> str:
    name, array = item
    bits = int.from_bytes(hashlib.sha256(array.tobytes()).digest()[:4])
    return f"{name} {array.dtype} {array.shape} bits {bits:08x}"
