"""Files that a cell needs and that are made before it, once: Fishers, random parameters.

Their names are hashes of all that they follow from, so that a plan knows them before they exist,
and cells, also of other studies in the same folder, share them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxft.config import Config
from jaxft.fisherrun import estimate_fisher
from jaxft.study import scratch
from jaxft.study.config import FisherConfig
from jaxft.study.identity import LENGTH, with_contents
from jaxft.study.lock import Busy, hold
from jaxft.version import __version__

FOLDER = "made"
WAIT = 1.0
"""Seconds between two looks at what another process makes."""


@dataclass(frozen=True)
class FisherFile:
    """A Fisher that a recipe names."""

    path: Path
    config: Config
    """Of a cell: its model, loss, keys, head and precision matter."""
    given: FisherConfig

    def make(self, console: Console) -> None:
        """Estimate and write it.

        Raises:
          ValueError: input that cannot be used.
        """
        files = self.given.files if isinstance(self.given.files, list) else [self.given.files]
        options = self.given.model_dump(exclude={"files"})
        estimate_fisher(self.config, files, self.path, **options, strength=None, console=console)


@dataclass(frozen=True)
class ScratchBundle:
    """Random parameters of an architecture, with statistics of a cell's training frames."""

    path: Path
    config: Config
    """Of a cell: its frames and its seed."""
    like: Path
    """Bundle of the architecture."""

    def make(self, console: Console) -> None:
        """Draw and write it.

        Raises:
          ValueError: input that cannot be used.
        """
        scratch.write(self.config, self.like, self.path)
        console.print(f"wrote {self.path}")


Made = FisherFile | ScratchBundle


def ensure(files: Sequence[Made], console: Console) -> None:
    """Make what is not there; what another process makes is waited for.

    Raises:
      ValueError: as ``make`` of each.
    """
    for one in files:
        while not one.path.exists():
            try:
                with hold(one.path.parent / f".{one.path.stem}"):
                    if not one.path.exists():
                        one.make(console)
            except Busy:
                time.sleep(WAIT)


def contents(files: Sequence[Made]) -> dict[Path, str]:
    """What stands for the content of each in the id of a cell."""
    return {one.path: one.path.stem for one in files}


def fisher_file(
    folder: Path, config: Config, given: FisherConfig, made: Mapping[Path, str]
) -> FisherFile:
    """A Fisher in the folder of a study, called after all that it follows from.

    Args:
      folder: of the study.
      config: of the cell that needs it.
      given: how to estimate it.
      made: files that do not exist yet, by :func:`contents`: the model, say.
    """
    whose = config.model_dump(include={"model", "loss", "keys", "dtype", "head", "add_head"})
    return FisherFile(
        _path(folder, {"cell": whose, "fisher": given.model_dump()}, made, "fisher"), config, given
    )


def scratch_bundle(folder: Path, config: Config, like: Path) -> ScratchBundle:
    """A bundle in the folder of a study; a config of another seed or size has another."""
    whose = config.model_dump(include={"train", "valid", "train_size", "seed", "keys", "dtype"})
    facts = {"cell": whose, "like": like}
    return ScratchBundle(_path(folder, facts, {}, "jaxft"), config, like)


def _path(folder: Path, facts: dict[str, Any], made: Mapping[Path, str], ending: str) -> Path:
    known = with_contents(facts, made) | {"version": __version__}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return folder / FOLDER / f"{digest[:LENGTH]}.{ending}"
