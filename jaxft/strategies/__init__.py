"""Strategies of fine-tuning: one idea each, composed by putting them in a tuple."""

from collections.abc import Callable

from jaxft.strategies.base import Recipe, Strategy
from jaxft.strategies.freeze import freeze
from jaxft.strategies.lora import lora

STRATEGIES: dict[str, Callable[..., Strategy]] = {"freeze": freeze, "lora": lora}
"""What a config may name."""

__all__ = ["STRATEGIES", "Recipe", "Strategy", "freeze", "lora"]
