"""Figures as SVG elements that belong to a page: its colours, its light or dark, its text."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import Any

INK = "#010203"
"""Stands for the colour of the text around the figure; nothing else has this colour."""

LOOK: Any = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxft",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
"""Of matplotlib. Text stays text; the salt makes a figure the same in every run."""

DPI = 110
"""Of scattered points, which are drawn as one picture each."""


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed;\nuse pip install 'jaxft[plots]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def inline(draw: Callable[[], Any], *, ids: str, label: str) -> str:
    """An ``<svg>`` element for the body of a page.

    Args:
      draw: makes the figure.
      ids: begins every id in it, so that several figures can share a page.
      label: what a reader hears who does not see it.

    Raises:
      ImportError: matplotlib is not installed.
    """
    new_figure(1, 1)  # says what to install
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(LOOK):
        draw().savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    # a page needs no namespaces, and they look like addresses
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{ids}-', text)
    text = re.sub(r'href="#', f'href="#{ids}-', text)
    text = text.replace("url(#", f"url(#{ids}-").replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def literal(text: str) -> str:
    """A name as a label: no mathematics between dollars, no hiding by an underscore in front."""
    shown = "".join(c if c.isprintable() else "�" for c in text).replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown
