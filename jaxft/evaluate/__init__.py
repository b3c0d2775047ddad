"""What a model says of frames, how far off it is, and pictures of it."""

from jaxft.evaluate.descriptors import descriptors
from jaxft.evaluate.errors import ErrorTable, GroupErrors, errors
from jaxft.evaluate.plots import parity_plot
from jaxft.evaluate.predictions import (
    FrameResult,
    predict_batch,
    predict_energies,
    predict_file,
    predict_frames,
    with_results,
)
from jaxft.evaluate.pseudolabel import pseudolabel, resolve

__all__ = [
    "ErrorTable",
    "FrameResult",
    "GroupErrors",
    "descriptors",
    "errors",
    "parity_plot",
    "predict_batch",
    "predict_energies",
    "predict_file",
    "predict_frames",
    "pseudolabel",
    "resolve",
    "with_results",
]
