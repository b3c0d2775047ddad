"""Labels that a model makes: for replay without the original data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from jaxft.data import Frame
from jaxft.evaluate.predictions import predict_frames
from jaxft.potential import Potential
from jaxft.source import Source
from jaxft.typing import Params


def pseudolabel(
    model: Potential,
    params: Params,
    frames: Sequence[Frame],
    *,
    head: str | None = None,
    stress: Literal["labelled"] | None = None,
    batch_size: int = 16,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Frame]:
    """The frames with a model's predictions for labels; weights and all else stay.

    Energies are totals with the model's own isolated-atom energies.

    Args:
      model: the potential.
      params: its parameters, of the model that training starts from.
      frames: structures; energies and forces are replaced.
      head: of the model; not needed with one head.
      stress: by default all frames that are periodic in three directions are given one;
        ``labelled`` gives it only to those that had one, as mace-torch does.
      batch_size: largest frames per batch.
      dtype: of the computation, as in :func:`predict_frames`.
      progress: called with (frames done, frames in total) after every batch.

    Raises:
      ValueError: as :func:`predict_frames`, or a prediction is not finite: a frame that cannot be
        labelled never keeps the labels it came with.
    """
    if stress not in (None, "labelled"):
        raise ValueError(f"stress={stress!r} is unknown; use 'labelled', or None for all periodic.")
    results = predict_frames(
        model, params, frames, head=head, batch_size=batch_size, dtype=dtype, progress=progress
    )
    labelled = []
    for frame, result in zip(frames, results, strict=True):
        is_wanted = stress is None or frame.stress is not None
        made = replace(
            frame,
            energy=result.energy,
            forces=result.forces,
            stress=result.stress if is_wanted else None,
            hessian=None,
            moments=None,
        )
        numbers = [
            np.ravel(label)
            for label in (made.energy, made.forces, made.stress)
            if label is not None
        ]
        if not np.isfinite(np.concatenate(numbers)).all():
            raise ValueError(
                f"the model's prediction for {frame.source} is not finite, so it cannot be a "
                "label;\nlook for atoms on top of each other, and leave the frame out."
            )
        labelled.append(made)
    return labelled


def resolve(
    sources: Iterable[Source],
    model: Potential,
    params: Params,
    target_head: str | None = None,
    *,
    batch_size: int = 16,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Source, ...]:
    """The sources with the labels made that are to come from the starting model.

    Call it once, with the parameters that training starts from, before or after heads were added:
    a head that was copied says the same. Sources with ``labels="base"`` become ``"given"``, the
    others are returned as they are.

    Args:
      sources: of a recipe, :func:`jaxft.strategies.base.sources`.
      model: the potential that training starts from.
      params: its parameters.
      target_head: of sources that name none.
      batch_size: as in :func:`pseudolabel`, like the two that follow.
      dtype: of the computation.
      progress: called after every batch, source by source.

    Raises:
      ValueError: as :func:`pseudolabel`.
    """
    return tuple(
        replace(
            source,
            labels="given",
            frames=pseudolabel(
                model,
                params,
                source.frames,
                head=source.head or target_head,
                batch_size=batch_size,
                dtype=dtype,
                progress=progress,
            ),
        )
        if source.labels == "base"
        else source
        for source in sources
    )
