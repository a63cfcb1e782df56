"""Control flow inside compiled programs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def switch_in_place(index: jax.Array, branches: Sequence[Callable[[Any], Any]], operand: Any) -> Any:
    """branches[index](operand), for branches that update large arrays of the operand in place.

    lax.switch makes XLA copy what its branches update: a whole KV cache a step on CPU. A while loop of one or no trips
    updates in place, so this is a row of those. What does not change in such a loop XLA would compute before it, even
    where it has no trips: here nothing counts as unchanged.

    Args:
        index: int32[], which branch runs.
        branches: each maps a pytree to one of the same structure, shapes and dtypes.
        operand: the pytree.
    """
    if len(branches) == 1:
        return branches[0](operand)
    for number, branch in enumerate(branches):
        operand = _loop(index == number, branch, operand)
    return operand


def run_if(condition: jax.Array, run: Callable[[Any], tuple[Any, Any]], carry: Any) -> tuple[Any, Any]:
    """run(carry), or zeros and the same carry where condition, bool[], is false.

    Args:
        run: carry -> (a pytree of arrays, the new carry).
        carry: a pytree whose large arrays are updated in place.
    """
    result: tuple[Any, Any] = _loop(condition, lambda operand: run(operand[1]), (zero_outputs(run, carry), carry))
    return result


def _loop(condition: jax.Array, body: Callable[[Any], Any], operand: Any) -> Any:
    """body(operand), or the operand where condition, bool[], is false: a loop of one or no trips."""
    program, shapes = jax.make_jaxpr(body, return_shape=True)(operand)

    def trip(carry):
        trips, captured, leaves = jax.lax.optimization_barrier((carry[0], program.consts, jax.tree.leaves(carry[1])))
        result = jax.core.eval_jaxpr(program.jaxpr, captured, *leaves)
        return trips - 1, jax.tree.unflatten(jax.tree.structure(shapes), result)

    return jax.lax.while_loop(lambda carry: carry[0] > 0, trip, (condition.astype(jnp.int32), operand))[1]


def zero_outputs(run: Callable[[Any], tuple[Any, Any]], carry: Any) -> Any:
    """The first of run(carry)'s two results with zeros everywhere, without running it."""
    shapes, _ = jax.eval_shape(run, carry)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def in_narrowest(run: Callable[[int, Any], Any], widths: Sequence[int], num_needed: jax.Array, operand: Any) -> Any:
    """run(width, operand) for the smallest of some widths that is enough; see switch_in_place.

    Args:
        widths: increasing; a program for each is compiled in.
        num_needed: int32[], at most the largest width.
    """
    index = (num_needed > jnp.array(widths[:-1], jnp.int32)).sum()
    return switch_in_place(index, [functools.partial(run, width) for width in widths], operand)
