"""The entries of the operation: they check what they are given and pick an implementation."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.base import suits
from pallas_kernels.platforms import on_tpu_or_elsewhere

IMPLEMENTATIONS = ("tpu", "xla", "reference")
"""tpu is a Pallas kernel, xla jax.numpy for any platform, reference the slow twin of both."""


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    *,
    sliding_window: int | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
    **options: Any,
) -> jax.Array:
    """What each query mixes of the values that it sees.

    Token t of a window stands in slot start + t, and its entries are already there. It sees all slots before start and,
    of the window, itself and the tokens before it, or those that mask allows. Slots behind the window hold anything
    finite.

    Args:
        queries: dtype[B, T, K, Q, H], already scaled by 1 / sqrt(H).
        keys, values: dtype[B, K, S, H].
        start: int32[B]; start + T must not exceed S.
        sliding_window: None, or how many positions back a query sees, its own included.
        mask: bool[B, T, T], which tokens of the window (last axis) a token may see: itself and, in a tree of drafts,
            its ancestors, whose number is how far behind start its position then is. None is a chain.
        implementation: one of IMPLEMENTATIONS, or None for the best on the platform that this is compiled for.
        options: passed on to the implementation (interpret=True runs the kernel on any platform).

    Returns:
        dtype[B, T, K, Q, H].

    Raises:
        ValueError: shapes disagree, or an unknown name: see check_inputs.
        NotImplementedError: the named implementation does not take these shapes.
    """
    check_inputs(queries, keys, values, start, sliding_window, mask, implementation)
    arrays = {"queries": queries, "keys": keys, "values": values, "start": start, "mask": mask}
    static = options | {"sliding_window": sliding_window}
    mixed: jax.Array = _run("attention", implementation, queries, arrays, static)
    return mixed


def write_and_attend(
    queries: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    *,
    sliding_window: int | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same where the window's entries have still to be written, in place if keys and values are donated.

    Args:
        k, v: dtype[B, T, K, H], the window's entries, for slots start .. start + T - 1; finite.
        The others: as in attention.

    Returns:
        dtype[B, T, K, Q, H], as attention gives it.
        keys and values with the entries.
    """
    check_inputs(queries, keys, values, start, sliding_window, mask, implementation)
    B, T, K, _, H = queries.shape
    for name, array in (("k", k), ("v", v)):
        _expect(name, array, (B, T, K, H), "[B, T, K, H] with queries [B, T, K, Q, H]")
    arrays = {"queries": queries, "k": k, "v": v, "keys": keys, "values": values, "start": start, "mask": mask}
    static = options | {"sliding_window": sliding_window}
    mixed, keys, values = _run("write_and_attend", implementation, (queries, keys, values), arrays, static)
    return mixed, keys, values


def _run(name: str, implementation: str | None, like: Any, arrays: dict[str, Any], static: dict[str, Any]) -> Any:
    def run(which: str, arrays: dict[str, Any]) -> Any:
        module = importlib.import_module(f"pallas_kernels.attention.{which}")
        return getattr(module, name)(**arrays, **static)

    if implementation is not None or not suits(arrays["queries"], arrays["keys"]):
        return run(implementation or "xla", arrays)
    return on_tpu_or_elsewhere(functools.partial(run, "tpu"), functools.partial(run, "xla"), like, arrays)


def check_inputs(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    start: jax.Array,
    sliding_window: int | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> None:
    """Refuses shapes and dtypes that disagree. Values are never looked at.

    Raises:
        ValueError: names the argument, what it has, and what was expected.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}, or None.")
    if queries.ndim != 5 or 0 in queries.shape:
        raise ValueError(f"queries: has shape {tuple(queries.shape)}; expected [B, T, K, Q, H], no dimension empty.")
    B, T, K, _, H = queries.shape
    if keys.ndim != 4 or keys.shape[2] < T:
        raise ValueError(f"keys: has shape {tuple(keys.shape)}; expected [B, K, S, H] with S >= T, which is {T}.")
    for name, array in (("keys", keys), ("values", values)):
        _expect(name, array, (B, K, keys.shape[2], H), "[B, K, S, H] with queries [B, T, K, Q, H]")
        if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype != keys.dtype:
            raise ValueError(f"{name}: has dtype {array.dtype}, keys {keys.dtype}; expected the same float for both.")
    _expect("start", start, (B,), "[B]")
    if not jnp.issubdtype(start.dtype, jnp.signedinteger):
        raise ValueError(f"start: has dtype {start.dtype}; expected int32.")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}: expected at least 1, a query's own position, or None.")
    if mask is not None:
        _expect("mask", mask, (B, T, T), "[B, T, T] with queries [B, T, K, Q, H]")
        if mask.dtype != bool:
            raise ValueError(f"mask: has dtype {mask.dtype}; expected bool.")


def _expect(name: str, array: jax.Array, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{name}: has shape {tuple(array.shape)}; expected {shape}, that is {meaning}.")
