"""The command ``jaxft``."""

from jaxft.cli import data, judge, models, phonons, train  # each adds its commands
from jaxft.cli.shared import app, console

__all__ = ["app", "console", "data", "judge", "models", "phonons", "train"]
