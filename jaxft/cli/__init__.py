"""The command ``jaxft``."""

from jaxft.cli import data, judge, md, models, train  # each adds its commands
from jaxft.cli.shared import app, console

__all__ = ["app", "console", "data", "judge", "md", "models", "train"]
