"""Control flow inside compiled programs."""

import functools
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


def run_if(condition: jax.Array, run: Callable[[Any], tuple[Any, Any]], carry: Any) -> tuple[Any, Any]:
    """run(carry), or zeros and the same carry where condition, bool[], is false.

    Args:
        run: carry -> (a pytree of arrays, the new carry).
        carry: a pytree whose large arrays are updated in place.
    """
    trips, nothing = condition.astype(jnp.int32), zero_outputs(run, carry)
    result: tuple[Any, Any] = jax.lax.fori_loop(0, trips, lambda _, operand: run(operand[1]), (nothing, carry))
    return result


def zero_outputs(run: Callable[[Any], tuple[Any, Any]], carry: Any) -> Any:
    """The first of run(carry)'s two results with zeros everywhere, without running it."""
    shapes, _ = jax.eval_shape(run, carry)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def narrowest_window(
    outputs: Callable[[int, Any], tuple[Any, Any]], widths: Sequence[int], num_needed: jax.Array, carry: Any
) -> tuple[Any, Any]:
    """outputs(width, carry) for the smallest of some widths that is enough, padded with zeros to the largest.

    Args:
        outputs: (width, carry) -> (a pytree of arrays [B, width, ...], the new carry).
        widths: increasing; a program for each is compiled in.
        num_needed: int32[], at most the largest width.
        carry: a pytree whose large arrays are updated in place.
    """
    empty = zero_outputs(functools.partial(outputs, widths[-1]), carry)

    def at_width(width):
        def run(operand):
            whole, carry = operand
            part, carry = outputs(width, carry)
            return jax.tree.map(lambda rows, new: rows.at[:, :width].set(new), whole, part), carry

        return run

    narrowest = (num_needed > jnp.array(widths[:-1], jnp.int32)).sum()
    return switch_in_place(narrowest, [at_width(width) for width in widths], (empty, carry))
