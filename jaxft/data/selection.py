"""Which frames of a large set to replay: by their elements, at random, or far from one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
from ase.data import atomic_numbers as number_of
from ase.data import chemical_symbols

from jaxft.data.frames import Frame

Rule = Literal["none", "combinations", "inclusive", "exclusive"]
How = Literal["random", "farthest"]


def filter_elements(
    frames: Sequence[Frame], elements: Iterable[int | str], *, rule: Rule = "combinations"
) -> list[Frame]:
    """The frames whose elements stand in a relation to ``elements``, in their order.

    Args:
      frames: to choose from.
      elements: symbols or atomic numbers, those of the fine-tuning data say.
      rule: ``combinations``: nothing but these elements, not necessarily all; ``inclusive``: all
        of these, and perhaps others; ``exclusive``: exactly these; ``none``: any.

    Raises:
      ValueError: no frame passes, no element is named, one does not exist, or the rule is unknown.

    Reference: ``filter_type_pt`` of mace-torch. Where too few frames pass, it adds some that do
    not; here :func:`select` says so.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule={rule!r} is unknown; use {', '.join(map(repr, get_args(Rule)))}.")
    if rule == "none":
        return list(frames)
    if isinstance(elements, str):
        raise ValueError(f"elements={elements!r} is one string; give a list such as ['H', 'O'].")
    wanted = {_atomic_number(element) for element in elements}
    if not wanted:
        raise ValueError(f"rule={rule!r} needs elements, and none is named; give some.")
    found = [frame for frame in frames if _passes(set(frame.atomic_numbers.tolist()), wanted, rule)]
    if not found:
        raise ValueError(
            f"none of {len(frames)} frames passes the filter {rule!r} on "
            f"{' '.join(chemical_symbols[z] for z in sorted(wanted))};\n"
            "choose another rule or other elements, or give frames that hold them."
        )
    return found


def _passes(present: set[int], wanted: set[int], rule: Rule) -> bool:
    if rule == "combinations":
        return present <= wanted
    return present >= wanted if rule == "inclusive" else present == wanted


def _atomic_number(element: int | str) -> int:
    z = number_of.get(element, 0) if isinstance(element, str) else int(element)
    if not 1 <= z < len(chemical_symbols):
        raise ValueError(f"{element!r} is no element; give a symbol such as 'Na', or its number.")
    return z


def select(
    frames: Sequence[Frame],
    n: int,
    *,
    how: How = "random",
    seed: int = 0,
    descriptors: np.ndarray | None = None,
) -> list[Frame]:
    """``n`` of the frames, in the order of choice: a smaller selection begins a larger one.

    ``farthest`` is the greedy farthest-point rule, exact: the first frame is the one nearest to
    the mean of all, each next one that whose distance to the nearest chosen is largest; ties go to
    the earlier frame. It takes n passes over the descriptors and keeps one distance per frame.

    Args:
      frames: to choose from.
      n: how many.
      how: ``random`` or ``farthest``.
      seed: of ``random``.
      descriptors: [frames, …], for ``farthest``; the distance is Euclidean over all but the first
        axis. From :func:`jaxft.evaluate.descriptors`, say.

    Raises:
      ValueError: there are fewer frames than ``n``; descriptors are missing, not used, not
        finite, or not one per frame.
    """
    if how not in get_args(How):
        raise ValueError(f"how={how!r} is unknown; use {', '.join(map(repr, get_args(How)))}.")
    if not 1 <= n <= len(frames):
        raise ValueError(
            f"{n} frames were asked for and {len(frames)} are there; ask for 1 to {len(frames)}, "
            "or filter less. No others are taken in their place."
        )
    if how == "random":
        if descriptors is not None:
            raise ValueError("a random selection reads no descriptors; use how='farthest'.")
        order = np.random.default_rng(seed).permutation(len(frames))[:n].tolist()
    else:
        order = farthest_points(_checked(descriptors, len(frames)), n)
    return [frames[i] for i in order]


def _checked(descriptors: np.ndarray | None, count: int) -> np.ndarray:
    """[frames, d]."""
    if descriptors is None:
        raise ValueError(
            "how='farthest' needs a descriptor of each frame; pass "
            "descriptors=jaxft.evaluate.descriptors(model, params, frames)."
        )
    points = np.asarray(descriptors)
    if points.dtype.kind != "f":
        points = points.astype(np.float64)
    if points.ndim < 2 or len(points) != count:
        raise ValueError(
            f"descriptors have shape {points.shape} for {count} frames; expected ({count}, …)."
        )
    points = points.reshape(count, -1)
    wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"the descriptors of {len(wrong)} frames are not finite, the first is number "
            f"{wrong[0]}; leave these frames out."
        )
    return points


def farthest_points(points: np.ndarray, n: int) -> list[int]:
    """Rows of ``points`` [N, d] by the rule of :func:`select`, in the order of choice."""
    nearest = np.full(len(points), np.inf)
    middle = points.mean(axis=0, dtype=np.float64).astype(points.dtype)
    chosen = [int(np.argmin(_squared_distances(points, middle)))]
    while len(chosen) < n:
        nearest = np.minimum(nearest, _squared_distances(points, points[chosen[-1]]))
        nearest[chosen[-1]] = -1.0  # copies of a chosen point come before it again
        chosen.append(int(np.argmax(nearest)))
    return chosen


def _squared_distances(points: np.ndarray, point: np.ndarray, block: int = 256) -> np.ndarray:
    """[N], in the dtype of ``points`` and by differences: |x|² + |y|² - 2 x·y would be faster and
    would lose the distances of near points. In blocks that stay in the processor's cache."""
    found = np.empty(len(points), points.dtype)
    for start in range(0, len(points), block):
        difference = points[start : start + block] - point
        found[start : start + block] = np.einsum("nd,nd->n", difference, difference)
    return found
