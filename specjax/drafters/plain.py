"""No drafts: the step is then plain autoregressive decoding."""

import jax.numpy as jnp

from specjax.drafters.base import Drafter, Proposal


def plain() -> Drafter:
    """The drafter that proposes nothing, G = 0."""
    return Drafter(
        name="plain",
        parents=(),
        widths=(1,),
        init=lambda params, batch, capacity: (),
        propose=lambda params, state, context: (Proposal(jnp.zeros((context.length.size, 0), jnp.int32)), state),
    )
