"""``python -m jaxft``."""

from jaxft.cli import app

app()
