"""Training state on disk: Orbax checkpoints, and the record of what they belong to.

Orbax is imported when there is something to save or to restore: a new run starts without it.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import jax

from jaxft import parallel
from jaxft.tree import name_diff

PART = 0.05
"""Of the time, at most, goes into checkpoints at the ends of epochs."""


class Checkpoints:
    """The newest training states of a run; saving is atomic, so a kill leaves the previous one.

    Args:
      directory: made if absent.
      identity: JSON-like facts of the run (settings, hashes of model and data). A checkpoint is
        only restored by a run with the same identity.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], *, keep: int = 1) -> None:
        self.identity = identity
        self._directory = directory.absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._saved = self._took = 0.0

    @functools.cached_property
    def _manager(self) -> Any:
        import orbax.checkpoint as ocp

        # Synchronous: the state's buffers are donated to the next step.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._directory, options=options)

    @property
    def is_due(self) -> bool:
        """Whether the last save is so long ago that another one keeps to :data:`PART`; processes
        agree."""
        since = time.monotonic() - self._saved
        return parallel.said_by_first(since * PART >= self._took)

    @property
    def latest(self) -> int | None:
        """The number of updates at the newest checkpoint."""
        is_new = next(self._directory.iterdir(), None) is None
        return None if is_new else self._manager.latest_step()

    def save(self, step: int, arrays: Any, progress: dict[str, Any]) -> None:
        """Save a tree of arrays and a JSON-like record of where the run stands."""
        import orbax.checkpoint as ocp

        began = time.monotonic()
        self._manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays),
                progress=ocp.args.JsonSave({"identity": self.identity, "progress": progress}),
            ),
            force=True,
        )
        self._saved = time.monotonic()
        self._took = self._saved - began

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest arrays, structured as ``like``, and their record.

        Raises:
          ValueError: the checkpoint belongs to a run with another identity.
        """
        import orbax.checkpoint as ocp

        composite = ocp.args.Composite
        record = self._restore(composite(progress=ocp.args.JsonRestore()))["progress"]
        self._check_identity(record["identity"])
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arrays = self._restore(composite(arrays=ocp.args.StandardRestore(target)))["arrays"]
        return arrays, record["progress"]

    def _restore(self, what: Any) -> Any:
        step = self._manager.latest_step()
        try:
            return self._manager.restore(step, args=what)
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise ValueError(
                f"the checkpoint {self._directory / str(step)} is damaged, or of another version "
                f"of jaxft ({error!s:.300});\nremove it to resume from an older one, if there is "
                "one, or start a new output."
            ) from error

    def close(self) -> None:
        if "_manager" in vars(self):
            self._manager.close()

    def _check_identity(self, saved: dict[str, Any]) -> None:
        now = {f"{k}: {v}" for k, v in self.identity.items()}
        then = {f"{k}: {v}" for k, v in saved.items()}
        diff = name_diff(now, then)
        if diff:
            raise ValueError(
                "the checkpoint belongs to another run (- then, + now):\n"
                f"{diff}\nResume with the same settings, model and data, or use a new folder."
            )
