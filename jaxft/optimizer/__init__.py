"""Optimisers, learning-rate schedules and what may stand in front of or behind them."""

from jaxft.optimizer.alternation import add_previous, project_gradients
from jaxft.optimizer.amsgrad import scale_by_amsgrad
from jaxft.optimizer.build import OPTIMIZERS, cites, evaluated, is_averaging, optimizer
from jaxft.optimizer.decay import decay
from jaxft.optimizer.muon import scale_by_muon
from jaxft.optimizer.plateau import Plateau, get_factor, scale_by_factor, set_factor
from jaxft.optimizer.schedules import SCHEDULES, schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Plateau",
    "add_previous",
    "cites",
    "decay",
    "evaluated",
    "get_factor",
    "is_averaging",
    "optimizer",
    "project_gradients",
    "scale_by_amsgrad",
    "scale_by_factor",
    "scale_by_muon",
    "schedule",
    "set_factor",
]
