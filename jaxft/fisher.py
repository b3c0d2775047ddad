"""The Fisher information of a loss: which parameters matter to the data of pretraining."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.fisherfile import load, save
from jaxft.graph import Batch
from jaxft.strategies.ewc import Fisher, digest
from jaxft.typing import Array, LossFn, Params

__all__ = ["fisher", "load", "sampled", "save"]

SELF_LABELLED = 1e-5
"""Residuals below this fraction of the predictions are rounding, of float32 or of a file with
eight decimals; models are wrong by a hundred times as much."""


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
      Values in float64, summed on the host; bound to ``params``. Its provenance holds ``kind``
      "empirical", ``frames`` (N), ``skipped``, ``mean_loss``, ``threshold``, ``normalise`` and
      ``scale`` (what the values were divided by).

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
    _check_request(n, normalise)
    squares = _zeros(params)
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
    found = {
        "kind": "empirical",
        "frames": len(losses),
        "skipped": len(skipped),
        "mean_loss": float(np.mean(losses)),
        "threshold": threshold,
    }
    return _finished(squares, len(losses), params, normalise, {**(provenance or {}), **found})


def sampled(
    outputs: Callable[[Params, Any], Array],
    params: Params,
    batches: Iterable[Any],
    *,
    n: int | None = None,
    probes: int | None = 1,
    at_once: int = 1,
    seed: int = 0,
    normalise: Literal["mean", "max"] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int | None], None] = _say_nothing,
) -> Fisher:
    r"""The diagonal of the Gauss-Newton matrix, for :func:`jaxft.strategies.ewc`; needs no labels.

    .. math:: F_i = \frac{1}{N}\sum_n \sum_o \left(\partial y_{no}/\partial\theta_i\right)^2
              = \frac{1}{N}\sum_n \mathbb{E}_v
                \left[\left(\partial (v\cdot y_n)/\partial\theta_i\right)^2\right]

    :math:`y_n` are the outputs of frame n, each times the square root of its weight, and v random
    signs. It is the true Fisher of labels with Gaussian noise of variance one over the weights. The
    residuals do not enter, so it is right where :func:`fisher` is zero: for structures that the
    model labels itself. One probe is one backward pass; the relative standard error of every value
    is at most :math:`\sqrt{2/P}` with P probes, and falls with the number of frames too.

    Weights count once, not squared: outputs times c give c² F, a loss times c gives c F. Terms add
    up: F of energies and forces is F of energies plus F of forces, each from ``outputs`` with one
    weight alone. F is half of the Gauss-Newton Hessian of the sum of squares.

    Args:
      outputs: ``(params, batch) -> [o]``, e.g. ``loss.outputs(model, energy=10.0, forces=10.0)``.
      params: where they are differentiated, θ* of the fine-tuning to come.
      batches: of one frame each, as in :func:`fisher`; their labels are not looked at.
      n: take the first n; None takes all.
      probes: P, per frame. None: one per output, :math:`v=e_o`, which is exact and as expensive.
      at_once: probes that share one forward pass, by ``jax.vmap``; memory grows with them.
      seed: of the signs, which depend on it, on the frame and on the probe's number.
      normalise: as in :func:`fisher`.
      provenance: as in :func:`fisher`.
      progress: called with (done, total or None) after each frame.

    Returns:
      As :func:`fisher`; the provenance holds ``kind`` "sampled", ``frames``, ``probes``, ``seed``,
      ``normalise`` and ``scale``.

    Raises:
      ValueError: a batch holds more than one frame, the outputs are not a vector, a gradient is not
        finite, there are no frames, or no output depends on any parameter.

    Example:
      >>> def outputs(params, x):
      ...     return params["w"] * x
      >>> x = np.array([1.0, 2.0])
      >>> float(sampled(outputs, {"w": np.ones(())}, [x], probes=None).values["w"])
      5.0

    Reference: van de Ven, arXiv:2502.11756, on how much the choice of F matters; the estimator is
    Hutchinson's, Commun. Stat. Simul. Comput. 19, 433 (1990).
    """
    _check_request(n, normalise)
    if (probes is not None and probes < 1) or at_once < 1:
        raise ValueError(
            f"sampled(probes={probes}, at_once={at_once}) samples nothing; use numbers >= 1, or "
            "probes=None for one per output."
        )
    squares, frames = _zeros(params), 0
    for index, batch in enumerate(itertools.islice(batches, n)):
        _check_is_one_frame(batch, index)
        like = jax.jit(outputs).eval_shape(params, batch)
        if like.ndim != 1:
            raise ValueError(
                f"the outputs of batch {index} have shape {like.shape}; expected a vector, each "
                "output times the square root of its weight."
            )
        signs = np.random.default_rng([seed, _number(batch, index)])
        one = _zeros(params)
        for chunk in _probes(like.shape[0], probes, at_once, signs):
            _add_squares(one, _pull(outputs, params, batch, chunk.astype(like.dtype)), index)
        for path, total in one.items():
            squares[path] += total / (probes or 1)
        frames += 1
        progress(frames, n)
    _check_depends(squares, frames)
    found = {"kind": "sampled", "frames": frames, "probes": probes, "seed": seed}
    return _finished(squares, frames, params, normalise, {**(provenance or {}), **found})


def _check_request(n: int | None, normalise: str | None) -> None:
    if n is not None and n < 1:
        raise ValueError(f"fisher(n={n}) takes no frame; use n >= 1, or None for all.")
    if normalise not in (None, "mean", "max"):
        raise ValueError(f"fisher(normalise={normalise!r}) is unknown; use 'mean', 'max' or None.")


def _zeros(params: Params) -> dict[str, np.ndarray]:
    return {path: np.zeros(np.shape(leaf)) for path, leaf in tree.flatten(params).items()}


def _number(batch: Any, index: int) -> int:
    """What tells a frame from the others, in whatever order they come."""
    return int(np.max(batch.frame)) if isinstance(batch, Batch) else index


def _probes(
    size: int, probes: int | None, at_once: int, signs: np.random.Generator
) -> Iterator[np.ndarray]:
    """[at_once, size] each: rows of the identity, or random signs; the last is filled with 0."""
    total = size if probes is None else probes
    for start in range(0, total, at_once):
        count = min(at_once, total - start)
        chunk = np.zeros((at_once, size))
        if probes is None:
            chunk[np.arange(count), start + np.arange(count)] = 1.0
        else:
            chunk[:count] = 2.0 * signs.integers(0, 2, (count, size)) - 1.0
        yield chunk


@functools.partial(jax.jit, static_argnums=0)
def _pull(
    outputs: Callable[[Params, Any], Array], params: Params, batch: Any, probes: Array
) -> Params:
    """Gradients of v·y, with one more axis in front: [probes, …]."""
    _, pull = jax.vjp(lambda p: jax.jit(outputs)(p, batch), params)
    return jax.vmap(lambda v: pull(v)[0])(probes)


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
    """Of one gradient, or of several along a first axis."""
    for path, leaf in tree.flatten(gradient).items():
        # Squared in float64, on the host: 1e-20 squared is 0 in float32.
        square = np.asarray(leaf, np.float64) ** 2
        squares[path] += square if square.ndim == squares[path].ndim else square.sum(axis=0)
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


def _check_depends(squares: dict[str, np.ndarray], frames: int) -> None:
    if not frames:
        raise ValueError("sampled() was given no batches.")
    if not any(total.any() for total in squares.values()):
        raise ValueError(
            f"no output of these {frames} frames depends on any parameter, so the Fisher is zero;\n"
            "give the energy, the forces or the stress a weight."
        )


def _finished(
    squares: dict[str, np.ndarray],
    frames: int,
    params: Params,
    normalise: str | None,
    provenance: dict[str, Any],
) -> Fisher:
    """The mean of the squares, normalised."""
    numbers = [total.ravel() / frames for total in squares.values()]
    scale = 1.0
    if normalise is not None:
        flat = np.concatenate(numbers)
        scale = float(flat.mean() if normalise == "mean" else flat.max())
    values = {path: total / frames / scale for path, total in squares.items()}
    noted = {**provenance, "normalise": normalise, "scale": scale}
    return Fisher(tree.unflatten(values), digest(params), noted)
