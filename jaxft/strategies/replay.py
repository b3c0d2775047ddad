"""Replay: train on other frames too, so that what the model knew of them is kept.

Sources only: nothing about parameters. How frames are mixed is in :mod:`jaxft.data.mixture`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from jaxft.source import LabelsFrom, Schedule, Source
from jaxft.strategies.base import Strategy


def replay(
    frames: Sequence[Any],
    *,
    head: str | None = None,
    fraction: float = 0.5,
    schedule: Schedule = "mixed",
    batch_size: int | None = None,
    steps: int = 1,
    weight: float = 1.0,
    labels: Literal["given", "none"] = "given",
    name: str = "replay",
) -> Strategy:
    """Experience replay: train on stored frames, of the pretraining data say, beside the target's.

    On the target's own head this asks for labels of the same level of theory, with the same
    isolated-atom energies. Nothing in the frames could prove that, and nothing checks it: frames
    of another level of theory belong to a head of their own, :func:`multihead_replay`.

    ``mixed`` gives every batch ``fraction`` of these frames. Each is seen once per pass over the
    target, on average, with ``fraction = len(frames) / (len(frames) + len(target))``, which is
    what concatenating both sets does. ``alternate`` makes updates of their own after each one of
    the target, with one optimiser state: with :func:`ewc`, this is reEWC.

    Args:
      frames: :class:`jaxft.data.Frame` with labels.
      head: of the model, that they belong to; by default the target's.
      fraction: ``mixed``: their share of every batch, in [0, 1). 0 is plain fine-tuning, bitwise.
      schedule: ``mixed`` or ``alternate``.
      batch_size: ``alternate``: frames per update; by default the target's.
      steps: ``alternate``: updates after each one of the target.
      weight: factor on the weights of these frames; 2 is each of them twice in its batch.
      labels: ``given``, or ``none`` for structures that only a penalty looks at.
      name: of the strategy and of its source.

    Returns:
      A strategy that trains everything, owns no coordinates, and brings one source.

    Raises:
      ValueError: there are no frames, a number is out of range, or an option is given that the
        schedule does not read.

    Example:
      >>> import ase.build
      >>> water = jaxft.data.unlabelled(ase.build.molecule("H2O"))
      >>> recipe = (replay([water], schedule="alternate", batch_size=8),)

    Reference: Chaudhry et al., arXiv:1902.10486; for potentials reEWC, Kim et al., npj Comput.
    Mater. 12, 26 (2026), which alternates.
    """
    source = Source(
        name=name,
        frames=frames,
        head=head,
        schedule=schedule,
        fraction=fraction,
        batch_size=batch_size,
        steps=steps,
        weight=weight,
        labels=labels,
    )
    return Strategy(name=name, sources=(source,), cites=("chaudhry2019er", "kim2026reewc"))


def multihead_replay(
    frames: Sequence[Any],
    *,
    head: str,
    fraction: float = 0.5,
    schedule: Schedule = "mixed",
    batch_size: int | None = None,
    steps: int = 1,
    weight: float = 1.0,
    labels: LabelsFrom = "given",
    name: str = "multihead_replay",
) -> Strategy:
    """Replay on a head of its own: the layers below the readouts are shared, E0s are not.

    So the replayed frames may be of another level of theory than the target. Add the target's
    head first, :func:`jaxft.surgery.add_head`; what it was copied from is ``head``. Watch the
    errors of both: where the learning rate is too large, the replayed head suffers unseen.

    Args:
      frames: :class:`jaxft.data.Frame`.
      head: of the model, that they belong to, not the target's (the mixture checks it).
      fraction: as in :func:`replay`, like the four that follow.
      schedule: ``mixed`` or ``alternate``.
      batch_size: ``alternate``: frames per update.
      steps: ``alternate``: updates after each one of the target.
      weight: factor on the weights of these frames.
      labels: ``given``, or ``base`` as in :func:`pseudolabel_replay`.
      name: of the strategy and of its source.

    Returns:
      A strategy that trains everything, owns no coordinates, and brings one source.

    Raises:
      ValueError: as :func:`replay`.

    Example:
      >>> import ase.build
      >>> water = jaxft.data.unlabelled(ase.build.molecule("H2O"))
      >>> recipe = (multihead_replay([water], head="Default", fraction=0.25),)

    Reference: Batatia et al., arXiv:2401.00096, appendix C.2. Nothing is ever duplicated to
    balance the sets, as mace-torch does: the mixture is ``fraction``.
    """
    source = Source(
        name=name,
        frames=frames,
        head=head,
        is_apart=True,
        schedule=schedule,
        fraction=fraction,
        batch_size=batch_size,
        steps=steps,
        weight=weight,
        labels=labels,
    )
    return Strategy(name=name, sources=(source,), cites=("batatia2024foundation",))


def pseudolabel_replay(
    frames: Sequence[Any],
    *,
    head: str | None = None,
    fraction: float = 0.5,
    schedule: Schedule = "mixed",
    batch_size: int | None = None,
    steps: int = 1,
    weight: float = 1.0,
    name: str = "pseudolabel_replay",
) -> Strategy:
    """Replay with the starting model's own energies, forces and stresses as labels.

    Any structures will do: neither pretraining data nor a common level of theory is needed. The
    labels are made once, before training (:func:`jaxft.evaluate.resolve`), so the first error is
    zero to rounding and what is restrained is the change of the function on these structures.
    Losses that are not smooth at zero error, MAE and norms, have noise for gradients there.

    Args:
      frames: :class:`jaxft.data.Frame`; labels of theirs are replaced.
      head: of the model, that labels them and is trained on them; by default the target's.
      fraction: as in :func:`replay`, like the four that follow.
      schedule: ``mixed`` or ``alternate``.
      batch_size: ``alternate``: frames per update.
      steps: ``alternate``: updates after each one of the target.
      weight: factor on the weights of these frames.
      name: of the strategy and of its source.

    Returns:
      A strategy that trains everything, owns no coordinates, and brings one source.

    Raises:
      ValueError: as :func:`replay`.

    Example:
      >>> import ase.build
      >>> water = jaxft.data.unlabelled(ase.build.molecule("H2O"))
      >>> recipe = (pseudolabel_replay([water], head="Default", fraction=0.25),)

    Reference: Tompa et al., arXiv:2606.12704.
    """
    source = Source(
        name=name,
        frames=frames,
        head=head,
        schedule=schedule,
        fraction=fraction,
        batch_size=batch_size,
        steps=steps,
        weight=weight,
        labels="base",
    )
    return Strategy(name=name, sources=(source,), cites=("tompa2026finetuning",))
