"""ELoRA: low-rank updates of every weight of an equivariant network, the products' included."""

from __future__ import annotations

from jaxft import tree
from jaxft.strategies.base import Strategy
from jaxft.strategies.lora import Start, adapter, check_numbers, layer_kind, own_factors
from jaxft.typing import Array, Mask, Params


def elora(*, rank: int = 16, alpha: float = 16.0, name: str = "elora") -> Strategy:
    r"""Path-dependent low-rank adaptation: :math:`W + (\alpha/r) A B` for every path's weights.

    ============================================== ====================== ============ ============
    leaves                                         A                      B            std of A
    ============================================== ====================== ============ ============
    linears, radial and density networks           [in, r]                [r, out]     1
    ``skip_tp`` that is a tensor product           [elements, in, r]      [r, out]     1
    ``symmetric_contractions/*/weights_max``       [elements, paths, r]   [r, channels] 1/paths
    ``symmetric_contractions/*/weights_0``, ``_1`` trained in full
    ============================================== ====================== ============ ============

    B is shared by all elements (and paths), so the update of a table of elements is of rank r as a
    whole. Every leaf is adapted at any rank, as in the released code: the default of 16 gives a
    readout with one column more numbers than it has. All else (biases, layer norms, embedding
    tables) is frozen. The released code also trains the radial basis, which is a constant here. It
    knows no layers of ``torch.nn``; those of non-linear blocks and joint embeddings are adapted
    like the networks that they stand for.

    Args:
      rank: r.
      alpha: α; the released code fixes α = r = 16.
      name: of the strategy.

    Returns:
      A strategy that trains its factors ``<leaf>/A`` and ``<leaf>/B``, and the contraction weights
      of lower order in full.

    Raises:
      ValueError: a number makes no sense; or, when the recipe is set up, the model has none of
        these layers.

    Example:
      >>> print(jaxft.describe((elora(rank=2),), params).splitlines()[-1])
      trainable params: 2,728 || all params: 21,292 || trainable%: 12.81

    Reference: Wang et al., ICML 2025; github.com/hyjwpk/ELoRA, whose recipe is a rate of 5e-3 with
    an EMA of 0.995, gradients clipped at 100, batches of 5 and energy : forces 1 : 1000.
    """
    check_numbers("elora", rank=rank, alpha=alpha)

    def plan(params: Params) -> dict[str, Start]:
        flat = tree.flatten(params)
        return {path: _factors(path, flat[path], rank) for path in tree.select(params, _is_adapted)}

    def trains(params: Params) -> Mask:
        # No pattern: a contraction of order one has no lower orders, and that is no mistake.
        flat = tree.flatten(params)
        return tree.unflatten({path: _is_lower_order(path) for path in flat})

    return adapter(name, plan, lambda path: alpha / rank, trains, ("wang2025elora",))


def _is_adapted(path: str, leaf: Array) -> bool:
    shared = path.endswith("/weights_max") or (_is_skip(path) and leaf.ndim == 3)
    return shared or layer_kind(path, leaf) is not None


def _is_skip(path: str) -> bool:
    return path.split("/")[1:2] == ["skip_tp"]


def _is_lower_order(path: str) -> bool:
    return "/symmetric_contractions/" in path and not path.endswith("/weights_max")


def _factors(path: str, leaf: Array, rank: int) -> Start:
    if leaf.ndim == 2:
        return own_factors(leaf, rank, 1.0)
    *lead, n_in, n_out = leaf.shape
    std = 1.0 if _is_skip(path) else 1.0 / n_in
    return Start((*lead, n_in, rank), (rank, n_out), std, leaf.dtype)
