"""The choice between a kernel for TPUs and something for other platforms, by what a program is compiled for."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

_choice = Primitive("on_tpu_or_elsewhere")
_choice.multiple_results = True


def on_tpu_or_elsewhere(tpu: Callable[..., Any], elsewhere: Callable[..., Any], like: Any, *arguments: Any) -> Any:
    """tpu(*arguments) in a program for TPUs, elsewhere(*arguments) in one for another platform.

    Only the one that is taken is ever traced, when the program is lowered, so that a kernel costs other platforms no
    time; jax.lax.platform_dependent traces all. What runs jax does not matter: programs may be for absent TPUs. It is
    neither differentiated nor vectorised by vmap.

    Args:
        like: arrays, or shapes and dtypes, of what both return.
    """
    leaves, tree = jax.tree.flatten(arguments)
    outputs, form = jax.tree.flatten(like)

    def flat(function: Callable[..., Any]) -> Callable[..., list]:
        return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    shapes = tuple((x.shape, x.dtype) for x in outputs)
    return jax.tree.unflatten(form, _choice.bind(*leaves, tpu=flat(tpu), elsewhere=flat(elsewhere), shapes=shapes))


@_choice.def_impl
def _run(*leaves: Any, **how: Any) -> list:
    found: list = jax.jit(functools.partial(_choice.bind, **how))(*leaves)
    return found


@_choice.def_abstract_eval
def _shapes(*leaves: Any, tpu: Any, elsewhere: Any, shapes: tuple) -> list:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes]


def _lowering(which: str) -> Any:
    return mlir.lower_fun(lambda *leaves, shapes, **ways: ways[which](*leaves), multiple_results=True)


mlir.register_lowering(_choice, _lowering("elsewhere"))
mlir.register_lowering(_choice, _lowering("tpu"), platform="tpu")
