"""Strategies of fine-tuning: one idea each, composed by putting them in a tuple."""

from collections.abc import Callable

from jaxft.strategies.base import Recipe, Strategy
from jaxft.strategies.ewc import Fisher, ewc
from jaxft.strategies.freeze import freeze
from jaxft.strategies.l2sp import l2sp
from jaxft.strategies.lora import lora

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "freeze": freeze,
    "lora": lora,
    "l2sp": l2sp,
    "ewc": ewc,
}
"""What a config may name."""

__all__ = ["STRATEGIES", "Fisher", "Recipe", "Strategy", "ewc", "freeze", "l2sp", "lora"]
