"""The preset configs that ship with jaxft: YAML files, never code paths."""

from __future__ import annotations

import difflib
from importlib import resources
from importlib.resources.abc import Traversable


def _folder() -> Traversable:
    """``configs`` inside the installed package; in a checkout it lies beside the package."""
    package = resources.files("jaxft")
    inside = package / "configs"
    return inside if inside.is_dir() else package / ".." / "configs"


def names() -> list[str]:
    """All presets."""
    files = (item.name for item in _folder().iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def text(name: str) -> str:
    """The YAML of a preset.

    Raises:
      ValueError: there is none of that name; the message lists them.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(known)}.{hint}")
    return (_folder() / f"{name}.yaml").read_text()


def summaries() -> dict[str, str]:
    """``{name: first line of its header}``."""
    return {name: text(name).splitlines()[0].lstrip("# ") for name in names()}
