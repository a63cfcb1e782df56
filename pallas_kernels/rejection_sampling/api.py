"""The entry of the operation: checks what it is given and picks an implementation."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rejection_sampling.base import CHUNK, LANES, NO_DRAFT, Axis, Truncation, Verdict

RULES = ("residual", "matching", "block")
"""residual: accept a draft if u * draft_prob < target_prob, else draw from what the draft's law leaves of the target's.
matching: the target draws at every position; a draft is accepted if it equals that.
block: residual over prefixes as a whole, never accepts fewer on average. All keep the target's truncated law."""

IMPLEMENTATIONS = ("tpu", "gpu", "xla", "reference")
"""tpu and gpu are Pallas kernels, xla is sort-free jax.numpy for any platform, reference the slow twin of them all."""


def default_implementation(vocab_size: int) -> str:
    """The best implementation for a vocabulary and the platform of the mesh, or where none is set jax's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform == "tpu" and vocab_size > LANES * CHUNK:
        return "xla"
    return {"tpu": "tpu", "gpu": "gpu"}.get(platform, "xla")


def rejection_sample(
    logits: jax.Array,
    drafts: jax.Array,
    draft_probs: jax.Array | None,
    accept_uniforms: jax.Array,
    recover_uniforms: jax.Array,
    rows: Truncation,
    *,
    rule: str = "residual",
    axis: Axis = None,
    implementation: str | None = None,
    **options: Any,
) -> Verdict:
    """Decides how many drafts of each row are kept and which token follows them.

    Args:
        logits: float32 or bfloat16[B, G + 1, V], the target's; row i predicts the token after i drafts. G may be 0:
            then this draws one token a row.
        drafts: int32[B, G], NO_DRAFT (-1) from the first position on where a row has none.
        draft_probs: float32[B, G, V], the laws that the drafts were drawn from; None where they were chosen and not
            drawn, so that each law is all on its draft.
        accept_uniforms: float32[B, G] in [0, 1).
        recover_uniforms: float32[B, G + 1, 3] in [0, 1); those at num_accepted draw next_token.
        rows: how each row truncates the target's law. Rows of temperature 0 decide greedily.
        rule: one of RULES.
        axis: the mesh axis over which logits and draft_probs are split by vocabulary, inside shard_map. Only "xla".
        implementation: one of IMPLEMENTATIONS, or None for the platform's best.
        options: passed on to the kernel (interpret=True runs one on any platform).

    Raises:
        ValueError: shapes disagree, an unknown name, or, outside jit, values that can't be: see check_inputs.
        NotImplementedError: the named implementation does not have the rule, the axis or the vocabulary's size.

    References: residual, Leviathan et al. 2211.17192; block, Sun et al. 2403.10444.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(RULES)}.")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}, or None.")
    check_inputs(logits, drafts, draft_probs, rows, accept_uniforms, recover_uniforms, axis=axis)
    name = implementation or ("xla" if axis is not None else default_implementation(logits.shape[-1]))
    if axis is not None:
        if name != "xla":
            raise NotImplementedError(f"implementation={name!r}: has no vocabulary-sharded form; use 'xla' or None.")
        options["axis"] = axis
    static = (name, rule, tuple(sorted(options.items())))
    return _run(static, logits, drafts, draft_probs, accept_uniforms, recover_uniforms, rows)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(static: tuple, *arrays: Any) -> Verdict:
    """Compiled as a whole, so that calls outside jit do not compile its loops anew each time."""
    name, rule, options = static
    module = importlib.import_module(f"pallas_kernels.rejection_sampling.{name}")
    return module.rejection_sample(*arrays, rule=rule, **dict(options))


def check_inputs(
    logits: jax.Array,
    drafts: jax.Array,
    draft_probs: jax.Array | None,
    rows: Truncation,
    accept_uniforms: jax.Array | None = None,
    recover_uniforms: jax.Array | None = None,
    axis: Axis = None,
) -> None:
    """Refuses shapes and dtypes that disagree and, outside jit, values that can't be.

    Inside jit values are not known, and under jax.disable_jit not looked at: there a row whose logits are not finite
    gets some token, and its caller has to look at the logits. Uniforms are never looked at.

    Raises:
        ValueError: names the argument, what it has, and what was expected.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits: has shape {logits.shape}; expected [B, G + 1, V].")
    B, T, V = logits.shape
    if B == 0 or T == 0 or V == 0:
        raise ValueError(f"logits: has shape {logits.shape}; expected no empty dimension.")
    _expect_float("logits", logits)
    _expect("drafts", drafts, (B, T - 1), "[B, G] with logits [B, G + 1, V]")
    if not jnp.issubdtype(drafts.dtype, jnp.signedinteger):
        raise ValueError(f"drafts: has dtype {drafts.dtype}; expected int32.")
    if draft_probs is not None:
        _expect("draft_probs", draft_probs, (B, T - 1, V), "[B, G, V] with logits [B, G + 1, V]")
        _expect_float("draft_probs", draft_probs)
    if accept_uniforms is not None:
        _expect("accept_uniforms", accept_uniforms, (B, T - 1), "[B, G]")
    if recover_uniforms is not None:
        _expect("recover_uniforms", recover_uniforms, (B, T, 3), "[B, G + 1, 3]")
    for name, field in rows._asdict().items():
        _expect(name, field, (B,), "[B]")
    eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]
    if eager or any(isinstance(x, jax.core.Tracer) for x in (logits, drafts, draft_probs, *rows)):
        return
    _check_values(np.asarray(logits, np.float32), np.asarray(drafts), draft_probs, rows, sharded=axis is not None)


def _check_values(logits: np.ndarray, drafts: np.ndarray, draft_probs: Any, rows: Truncation, sharded: bool) -> None:
    V = logits.shape[-1]
    for row, row_logits in enumerate(logits):
        if np.isnan(row_logits).any() or not np.isfinite(row_logits.max(axis=-1)).all():
            raise ValueError(f"logits[{row}]: has NaN, +inf or nothing finite at a position; expected finite logits.")
    _refuse("drafts", drafts, (drafts < NO_DRAFT) | (drafts >= V), f"token ids below {V}, or {NO_DRAFT} for none")
    for name, holds, expected in (
        ("temperature", lambda x: np.isfinite(x) & (x >= 0), "a finite number >= 0, where 0 is greedy"),
        ("top_k", lambda x: x >= 0, "an integer >= 0, where 0 keeps all"),
        ("top_p", lambda x: (x > 0) & (x <= 1), "a number in (0, 1]"),
        ("min_p", lambda x: (x >= 0) & (x <= 1), "a number in [0, 1]"),
    ):
        field = np.asarray(getattr(rows, name))
        _refuse(name, field, ~holds(field), expected)
    if draft_probs is not None and not sharded:
        probs = np.asarray(draft_probs, np.float32)
        drafted = drafts != NO_DRAFT
        _refuse("draft_probs", probs, ~(probs >= 0) & drafted[..., None], "probabilities >= 0")
        totals = probs.sum(axis=-1)
        _refuse("draft_probs.sum(-1)", totals, ~(np.abs(totals - 1) < 1e-3) & drafted, "1")


def _refuse(name: str, values: np.ndarray, wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{name}[{', '.join(map(str, index))}]={values[index]}: expected {expected}.")


def _expect(name: str, array: jax.Array, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(array.shape) != shape:
        raise ValueError(f"{name}: has shape {tuple(array.shape)}; expected {shape}, that is {meaning}.")


def _expect_float(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name}: has dtype {array.dtype}; expected a float.")
