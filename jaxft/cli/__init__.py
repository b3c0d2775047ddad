"""The command ``jaxft``."""

from jaxft.cli import compare, data, judge, models, physics, train  # each adds its commands
from jaxft.cli.shared import app, console

__all__ = ["app", "compare", "console", "data", "judge", "models", "physics", "train"]
