"""What a cell is: a hash of everything that its result follows from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft import bundle
from jaxft.adapter import digest_of
from jaxft.config import Config
from jaxft.version import __version__

LENGTH = 16
"""Of a cell's id, in hexadecimal digits."""

WITHOUT_EFFECT = (
    "output",
    "cache",
    "workers",
    "tensorboard",
    "wandb",
    "keep_checkpoints",
    "checkpoint_every",
)
"""Keys of a config that change no number."""


def identity(config: Config, made: Mapping[Path, str] | None = None) -> str:
    """Hash of a config with every file replaced by its content, and of jaxft's version.

    Files may be renamed or moved, and bundles may come from elsewhere, without changing it.

    Args:
      config: of a cell.
      made: what stands for the content of files that are made when they are needed.

    Raises:
      FileNotFoundError: a file that the config names does not exist.
    """
    plain = config.model_dump(exclude=set(WITHOUT_EFFECT), by_alias=True)
    facts = {"config": with_contents(plain, made or {}), "version": __version__}
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def with_contents(value: Any, made: Mapping[Path, str]) -> Any:
    """A tree with the content of every file in place of its name."""
    if isinstance(value, Path):
        return made[value] if value in made else content(value)
    if isinstance(value, dict):
        return {str(key): with_contents(entry, made) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [with_contents(entry, made) for entry in value]
    return value


def content(path: Path) -> str:
    """Hash of what a file, a folder or a bundle holds; of a bundle not where it came from.

    Raises:
      FileNotFoundError: it does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; a study names it.")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    looks = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _content(path, looks)


@functools.lru_cache(maxsize=256)
def _content(path: Path, looks: tuple[tuple[str, int, int], ...]) -> str:
    """``looks`` tells a changed file from one that was read before."""
    digest = hashlib.sha256()
    if (path / bundle.MODEL).is_file():
        model, params, _ = bundle.load_numpy(path)
        digest.update(digest_of(model, params).encode())
        digest.update(model.e0s.tobytes())
        return digest.hexdigest()
    for name, size, _ in looks:
        relative = Path(name).relative_to(path).as_posix()
        digest.update(f"{relative} {size}\n".encode())
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()
