"""The command ``jaxft``."""

from jaxft.cli import (  # each adds its commands
    checks,
    compare,
    data,
    judge,
    md,
    models,
    phonons,
    physics,
    statics,
    study,
    surrogate,
    train,
)
from jaxft.cli.shared import app, console

__all__ = [
    "app",
    "checks",
    "compare",
    "console",
    "data",
    "judge",
    "md",
    "models",
    "phonons",
    "physics",
    "statics",
    "study",
    "surrogate",
    "train",
]
