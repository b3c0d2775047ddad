"""The Fisher information of a loss: which parameters matter to the data of pretraining."""

from __future__ import annotations

import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxft import tree
from jaxft.graph import Batch
from jaxft.strategies.ewc import Fisher, digest
from jaxft.typing import Array, LossFn, Params

FORMAT, VERSION = "jaxft-fisher", "1"

SELF_LABELLED = 1e-5
"""Residuals below this fraction of the predictions are rounding, of float32 or of a file with
eight decimals; models are wrong by a hundred times as much."""

_UNREADABLE = (
    SafetensorError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)
"""What a file that is none, or a damaged one, raises."""


def _say_nothing(done: int, total: int | None) -> None:
    pass


def fisher(
    objective: LossFn,
    params: Params,
    batches: Iterable[Any],
    *,
    n: int | None = None,
    threshold: float | None = None,
    normalise: Literal["mean", "max"] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int | None], None] = _say_nothing,
) -> Fisher:
    r"""The empirical diagonal Fisher information, for :func:`jaxft.strategies.ewc`.

    .. math:: F_i = \frac{1}{N}\sum_{n:\,L_n<L_{\max}} \left(\partial L_n/\partial\theta_i\right)^2

    :math:`L_n` is the whole weighted loss of *one* frame, N the number of frames in the sum. It is
    the Fisher of the loss, not of a likelihood: twice the loss is four times F. The frames must be
    of the pretraining data, with its labels; residuals of labels that the model made itself are
    zero. Use a smooth loss: gradients of absolute errors do not vanish with them.

    Args:
      objective: ``(params, batch) -> scalar, info``, the loss of the fine-tuning to come.
      params: where the gradients are taken, θ* of the fine-tuning to come.
      batches: of one frame each, e.g. ``data.epoch(dataset, 1, seed=0)``. The square of a mean is
        no mean of squares. Compiled once per static shape.
      n: take the first n; None takes all.
      threshold: :math:`L_{\max}`; frames with a loss of at least this are outliers and left out.
      normalise: divide by the mean or the largest of all values, so that λ is one of
        :func:`jaxft.strategies.l2sp` on average, or at most.
      provenance: what cannot be seen from here and should be kept: loss weights, data.
      progress: called with (done, total or None) after each frame.

    Returns:
      Values in float64, summed on the host; bound to ``params``. Its provenance holds ``frames``
      (N), ``skipped``, ``mean_loss``, ``threshold``, ``normalise`` and ``scale`` (what the values
      were divided by).

    Raises:
      ValueError: a batch holds more than one frame, a loss or gradient is not finite, no frame is
        left, or the result is zero because the labels are the model's own.

    Example:
      >>> def loss(params, x):
      ...     return 0.5 * (params["w"] * x - 1.0) ** 2, {}
      >>> float(jaxft.fisher(loss, {"w": np.zeros(())}, [1.0, 2.0]).values["w"])
      2.5

    Reference: reEWC, arXiv:2506.15223; its filter of outliers and lack of normalisation as in
    SevenNet.
    """
    if n is not None and n < 1:
        raise ValueError(f"fisher(n={n}) takes no frame; use n >= 1, or None for all.")
    if normalise not in (None, "mean", "max"):
        raise ValueError(f"fisher(normalise={normalise!r}) is unknown; use 'mean', 'max' or None.")
    squares = {path: np.zeros(np.shape(leaf)) for path, leaf in tree.flatten(params).items()}
    losses: list[float] = []
    skipped: list[float] = []
    total_blank = 0.0
    for index, batch in enumerate(itertools.islice(batches, n)):
        _check_is_one_frame(batch, index)
        loss, blank, gradient = _measure(objective, params, batch)
        if not np.isfinite(loss):
            raise ValueError(f"the loss of batch {index} is {loss}; leave this frame out.")
        if threshold is None or loss < threshold:
            losses.append(float(loss))
            total_blank += float(blank)
            _add_squares(squares, gradient, index)
        else:
            skipped.append(float(loss))
        progress(index + 1, n)
    _check_is_some(losses, skipped, threshold)
    _check_labels(squares, losses, total_blank)
    scale = _scale(squares, len(losses), normalise)
    found = {
        "frames": len(losses),
        "skipped": len(skipped),
        "mean_loss": float(np.mean(losses)),
        "threshold": threshold,
        "normalise": normalise,
        "scale": scale,
    }
    values = {path: total / len(losses) / scale for path, total in squares.items()}
    return Fisher(tree.unflatten(values), digest(params), {**(provenance or {}), **found})


@functools.partial(jax.jit, static_argnums=0)
def _measure(objective: LossFn, params: Params, batch: Any) -> tuple[Array, Array, Params]:
    """Loss, what it were if all labels were 0 (nan: unknown), gradient."""
    (loss, _), gradient = jax.value_and_grad(objective, has_aux=True)(params, batch)
    if not isinstance(batch, Batch):
        return loss, jnp.nan, gradient
    blank = batch._replace(labels=jax.tree.map(jnp.zeros_like, batch.labels))
    return loss, objective(params, blank)[0], gradient


def _check_is_one_frame(batch: Any, index: int) -> None:
    if isinstance(batch, Batch) and (count := int(np.sum(batch.graph.is_graph))) != 1:
        raise ValueError(
            f"batch {index} holds {count} frames; fisher() wants one frame per batch, since the "
            "square of a mean gradient is not the mean of squares:\nuse data.epoch(dataset, 1)."
        )


def _add_squares(squares: dict[str, np.ndarray], gradient: Params, index: int) -> None:
    for path, leaf in tree.flatten(gradient).items():
        # Squared in float64, on the host: 1e-20 squared is 0 in float32.
        squares[path] += np.asarray(leaf, np.float64) ** 2
        if not np.isfinite(squares[path]).all():
            raise ValueError(f"the gradient of batch {index} at {path!r} is not finite.")


def _check_is_some(losses: list[float], skipped: list[float], threshold: float | None) -> None:
    if skipped and not losses:
        raise ValueError(
            f"the losses of all {len(skipped)} frames reach the threshold {threshold}; "
            f"the smallest is {min(skipped):.3g}. Raise it."
        )
    if not losses:
        raise ValueError("fisher() was given no batches.")


def _check_labels(squares: dict[str, np.ndarray], losses: list[float], blank: float) -> None:
    if sum(losses) <= SELF_LABELLED**2 * blank or not any(s.any() for s in squares.values()):
        raise ValueError(
            f"the loss of these {len(losses)} frames is {np.mean(losses):.1e} on average: they are "
            "labelled by this model itself, or hardly at all. A Fisher of self-labelled data is "
            "zero, since nothing is left to fit;\nuse frames with the labels of the pretraining "
            "data."
        )


def _scale(squares: dict[str, np.ndarray], frames: int, normalise: str | None) -> float:
    if normalise is None:
        return 1.0
    numbers = np.concatenate([total.ravel() for total in squares.values()])
    return float(numbers.mean() if normalise == "mean" else numbers.max()) / frames


def save(path: str | Path, fisher: Fisher) -> Path:
    """Write a Fisher as one safetensors file, the rest as JSON in its header.

    Args:
      path: of the new file, by custom ``NAME.fisher``, beside the model.
      fisher: from :func:`jaxft.fisher`.

    Raises:
      FileExistsError: ``path`` exists; nothing is overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; nothing was overwritten. Give another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"parameters": fisher.parameters, "provenance": dict(fisher.provenance)}
    header = {"format": FORMAT, "version": VERSION, "record": json.dumps(record)}
    arrays = {name: np.array(leaf, order="C") for name, leaf in tree.flatten(fisher.values).items()}
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file(arrays, scratch, metadata=header)
        Path(scratch).chmod(0o644)
        os.rename(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def load(path: str | Path) -> Fisher:
    """Read a Fisher; nothing in the file is executed.

    Raises:
      ValueError: the file is not a Fisher, or a damaged one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            given = header.get("format"), header.get("version")
            if given != (FORMAT, VERSION):
                raise ValueError(f"it says format {given[0]!r}, version {given[1]!r}")
            record = json.loads(header["record"])
            parameters, provenance = record["parameters"], dict(record["provenance"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Fisher(tree.unflatten(arrays), parameters, provenance)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} is not a Fisher that this jaxft reads: {error}.\n"
            "Estimate one with jaxft.fisher, and write it with `save` of that module."
        ) from error
