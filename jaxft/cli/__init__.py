"""The command ``jaxft``."""

from jaxft.cli import checks, data, judge, models, phonons, statics, train  # each adds its commands
from jaxft.cli.shared import app, console

__all__ = [
    "app",
    "checks",
    "console",
    "data",
    "judge",
    "models",
    "phonons",
    "statics",
    "train",
]
