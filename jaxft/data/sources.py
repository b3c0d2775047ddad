"""Target and sources become one dataset, and a plan of its batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from jaxft.data.batches import prepare
from jaxft.data.curvatures import Probes
from jaxft.data.frames import ISOLATED_ATOM, Frame
from jaxft.data.mixture import TARGET, Mixture, Part, target_part
from jaxft.source import Source
from jaxft.typing import Domain


def mixture(
    frames: Sequence[Frame],
    model: Domain,
    *,
    size: int,
    head: str | None = None,
    sources: Sequence[Source] = (),
    row_width: int | None = None,
    cache: Path | None = None,
    workers: int | None = None,
    probes: Probes | None = None,
) -> Mixture:
    """Prepare target and sources as one dataset, and plan its batches.

    Args:
      frames: of the target.
      model: as in :func:`jaxft.data.prepare`.
      size: frames per batch of the target.
      head: of the target; not needed with one head.
      sources: of a recipe, :func:`jaxft.strategies.base.sources`; labels that the model is to
        make must be made, :func:`jaxft.evaluate.resolve`. Whether the loss finds the labels that
        it needs is not looked at.
      row_width: as in :func:`jaxft.data.prepare`, like the next.
      cache: a folder where neighbour lists are kept between runs.
      workers: as in :func:`jaxft.data.prepare`, like the next.
      probes: with it batches carry displacements.

    Raises:
      ValueError: as :func:`jaxft.data.prepare`; two sources share a name or are called "target";
        their fractions leave nothing for the target, or a batch cannot be shared; a head that must
        not be the target's is; labels were not made yet; or a frame is an isolated atom.
    """
    _check(frames, model, size, head, sources)
    share = 1 - sum((_exact(s.fraction) for s in sources if s.schedule == "mixed"), Fraction(0))
    parts = [target_part(len(frames), share, head)]
    gathered, heads = list(frames), [head] * len(frames)
    for source in sources:
        is_idle = source.schedule == "mixed" and source.fraction == 0
        added = [] if is_idle else [_frame(frame, source) for frame in source.frames]
        start = len(gathered)
        gathered += added
        heads += [source.head or head] * len(added)
        parts.append(_part(source, range(start, len(gathered)), model, head, size))
    dataset = prepare(
        gathered,
        model,
        head=heads,
        row_width=row_width,
        cache=cache,
        workers=workers,
        probes=probes,
    )
    return Mixture(dataset, size, tuple(parts))


def _exact(fraction: float) -> Fraction:
    """1/3 is meant where 0.333… is given."""
    return Fraction(fraction).limit_denominator(1_000_000)


def _frame(frame: Frame, source: Source) -> Frame:
    if source.labels == "none":
        frame = replace(frame, energy=None, forces=None, stress=None, hessian=None, moments=None)
    return replace(frame, weight=frame.weight * source.weight)


def _is_shared(source: Source, model: Domain, head: str | None) -> bool:
    """Whether source and target have one head."""
    return source.head is None or model.head_index(source.head) == model.head_index(head)


def _part(source: Source, indices: range, model: Domain, head: str | None, size: int) -> Part:
    own = source.head or head
    whose = " of the target's head" if _is_shared(source, model, head) else " of head"
    told = f"{len(source.frames)} frames{whose}" + (f" {own!r}" if own else "")
    if source.labels == "none":
        told += ", without labels"
    if source.weight != 1:
        told += f", weight {source.weight:g}"
    if source.schedule == "mixed":
        share = _exact(source.fraction)
        return Part(name=source.name, told=told, indices=indices, share=share)
    return Part(
        name=source.name,
        told=told,
        indices=indices,
        schedule="alternate",
        size=source.batch_size or size,
        steps=source.steps,
    )


def _check(
    frames: Sequence[Frame],
    model: Domain,
    size: int,
    head: str | None,
    sources: Sequence[Source],
) -> None:
    """Raises ValueError for what :func:`mixture` refuses, before any neighbour list is built."""
    if not len(frames):
        raise ValueError("the target has no frames; give at least one.")
    if size < 1:
        raise ValueError(f"batches of {size} frames are not possible; use a size >= 1.")
    model.head_index(head)
    names = [TARGET, *(source.name for source in sources)]
    twice = [repr(name) for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ValueError(
            f"more than one set of frames is called {', '.join(sorted(twice))};\n"
            f"names must be unique, and {TARGET!r} is that of the target: pass name=… to one."
        )
    for source in sources:
        _check_source(source, model, head)
    _check_shares([s for s in sources if s.schedule == "mixed" and s.fraction], size)
    origins = [(TARGET, frames), *((source.name, source.frames) for source in sources)]
    for name, members in origins:
        for frame in members:
            if frame.config_type == ISOLATED_ATOM:
                raise ValueError(
                    f"{name!r} holds an isolated atom, {frame.source}, which gives an E0 and is "
                    "never trained on;\nleave it out: jaxft.data.without_isolated_atoms."
                )


def _check_source(source: Source, model: Domain, head: str | None) -> None:
    if _is_shared(source, model, head) and source.is_apart:
        raise ValueError(
            f"{source.name!r} is to have a head of its own, but {source.head!r} is the target's;\n"
            "add one for the target (jaxft.surgery.add_head), or use replay(…) on the same head."
        )
    if source.labels == "base":
        raise ValueError(
            f"the frames of {source.name!r} are to be labelled by the model that training starts "
            "from, and are not yet;\nlabel them first: jaxft.pseudolabel, or jaxft.evaluate."
            "resolve for all sources."
        )


def _check_shares(sources: Sequence[Source], size: int) -> None:
    total = sum((_exact(source.fraction) for source in sources), Fraction(0))
    if total >= 1:
        listed = ", ".join(f"{source.name} {source.fraction:g}" for source in sources)
        raise ValueError(
            f"the fractions of the sources ({listed}) add up to {float(total):g} of every batch; "
            "something must be left for the target: use less than 1 together."
        )
    if sources and size < 2:
        raise ValueError(
            f"batches of {size} frame cannot be shared with {sources[0].name!r}; use a size >= 2, "
            "or schedule='alternate'."
        )
