"""What a run did, on one page."""

from jaxft.report.contents import Judged, Report, environment, timings
from jaxft.report.page import render, write

__all__ = ["Judged", "Report", "environment", "render", "timings", "write"]
