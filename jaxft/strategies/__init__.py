"""Strategies of fine-tuning: one idea each, composed by putting them in a tuple."""

from collections.abc import Callable

from jaxft.strategies.base import Recipe, Strategy
from jaxft.strategies.delta import delta
from jaxft.strategies.distill import distill
from jaxft.strategies.dora import dora
from jaxft.strategies.elora import elora
from jaxft.strategies.ewc import Fisher, ewc
from jaxft.strategies.freeze import GROUPS, freeze, groups
from jaxft.strategies.l2sp import l2sp
from jaxft.strategies.lora import lora, lora_torch
from jaxft.strategies.rates import rates
from jaxft.strategies.replay import multihead_replay, pseudolabel_replay, replay
from jaxft.strategies.sparse import sparse

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "freeze": freeze,
    "rates": rates,
    "lora": lora,
    "lora_torch": lora_torch,
    "elora": elora,
    "dora": dora,
    "delta": delta,
    "sparse": sparse,
    "l2sp": l2sp,
    "ewc": ewc,
    "distill": distill,
    "replay": replay,
    "multihead_replay": multihead_replay,
    "pseudolabel_replay": pseudolabel_replay,
}
"""What a config may name."""

__all__ = [
    "GROUPS",
    "STRATEGIES",
    "Fisher",
    "Recipe",
    "Strategy",
    "delta",
    "distill",
    "dora",
    "elora",
    "ewc",
    "freeze",
    "groups",
    "l2sp",
    "lora",
    "lora_torch",
    "multihead_replay",
    "pseudolabel_replay",
    "rates",
    "replay",
    "sparse",
]
