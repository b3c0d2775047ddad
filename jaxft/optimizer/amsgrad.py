"""AMSGrad as torch computes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.typing import Array


class AmsgradState(NamedTuple):
    """Moments of the gradient."""

    count: Array
    """[] int32, updates made."""
    mu: Any
    """First moment, uncorrected."""
    nu: Any
    """Second moment, uncorrected."""
    nu_max: Any
    """Its elementwise maximum over all updates."""


def scale_by_amsgrad(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""Adam whose second moment never falls, in torch's order of maximum and bias correction.

    .. math:: \hat v_t = \max_{s \le t} v_s, \qquad
              u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v_t / (1 - \beta_2^t)} + \epsilon}

    optax corrects each :math:`v_s` before the maximum. Then one large gradient in the first updates
    counts in full for ever, here with the weight :math:`1 - \beta_2` that it has in the mean:
    steps can differ by :math:`(1 - \beta_2)^{-1/2}`, a factor of 30.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.

    Reference: Reddi et al., ICLR 2018, algorithm 2, with the corrections of ``torch.optim.Adam``.
    """

    def init(params: Any) -> AmsgradState:
        return AmsgradState(
            jnp.zeros((), jnp.int32), *(optax.tree.zeros_like(params) for _ in range(3))
        )

    def update(updates: Any, state: AmsgradState, params: Any = None) -> tuple[Any, AmsgradState]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        nu_max = jax.tree.map(jnp.maximum, state.nu_max, nu)
        scaled = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps),
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu_max, b2, count),
        )
        return scaled, AmsgradState(count, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)
