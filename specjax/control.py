"""Control flow inside compiled programs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def switch_in_place(index: jax.Array, branches: Sequence[Callable[[Any], Any]], operand: Any) -> Any:
    """branches[index](operand), for branches that update large arrays of the operand in place.

    lax.switch makes XLA copy what its branches update: a whole KV cache a step on CPU. A while loop of one or no trips
    updates in place, so this is a row of those.

    Args:
        index: int32[], which branch runs.
        branches: each maps a pytree to one of the same structure, shapes and dtypes.
        operand: the pytree.
    """
    if len(branches) == 1:
        return branches[0](operand)
    for number, branch in enumerate(branches):
        trips = (index == number).astype(jnp.int32)
        operand = jax.lax.fori_loop(0, trips, lambda _, x, branch=branch: branch(x), operand)
    return operand
