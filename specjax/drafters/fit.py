"""Whether a head fits its target: what its shapes say, and what a short text says."""

import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.checkpoints.load import Target
from specjax.drafters.head import HeadWeights
from specjax.errors import CheckpointError, DraftWarning
from specjax.heads import network
from specjax.heads.config import HeadConfig
from specjax.target import decoder
from specjax.target.families import ModelConfig
from specjax.target.layers import project

TEXT = (
    "The water cycle describes how water moves between the oceans, the air and the land. When the sun heats the "
    "surface of the sea, some of the water evaporates and rises into the air as vapor. As the vapor rises, it cools "
    "and condenses into tiny drops, which form clouds. When the drops become too heavy, they fall back to the ground "
    "as rain or snow. Some of the water flows into rivers and lakes, and from there it returns to the ocean."
)
"""Plain prose, most of whose words a language model expects."""

LENGTH = 96
"""Tokens of TEXT that are looked at."""

LEAST_ACCURACY = 0.05
"""A head that guesses less of the target's choices than this was not made for it."""

CLEARLY_BETTER = 1.25
"""A wiring that is accepted so many times more often than the one the checkpoint names is probably the right one."""


def check_shapes(config: HeadConfig, target: Target, name: str) -> None:
    """Raises:
    CheckpointError: the head cannot run on this target; names what differs.
    """
    ours, theirs = config.layer, target.config
    advice = f"{name} was made for another target than {target.name}; give the head of this one."
    if ours.vocab_size != theirs.vocab_size:
        raise CheckpointError(
            f"{name}: its vocabulary has {ours.vocab_size} tokens; expected {theirs.vocab_size}, the target's. {advice}"
        )
    if config.target_width != theirs.width:
        raise CheckpointError(
            f"{name}: reads hidden states of width {config.target_width}; expected {theirs.width}, the target's "
            f"hidden_size. {advice}"
        )
    borrowed = [part for part, own in (("embedding", config.own_embedding), ("head", config.own_head)) if not own]
    if borrowed and ours.width != theirs.width:
        raise CheckpointError(
            f"{name}: has hidden_size={ours.width} and no {' and no '.join(borrowed)} of its own; expected "
            f"{theirs.width}, the width of the target's. {advice}"
        )
    wrong = [tap for tap in config.taps if not 0 <= tap <= theirs.num_layers]
    if wrong:
        raise CheckpointError(
            f"{name}: reads the state entering layer {wrong[0]}; expected 0 to {theirs.num_layers}, the target's "
            f"layers. {advice}"
        )


def check_fit(config: HeadConfig, weights: HeadWeights, target: Target, name: str) -> None:
    """Warns where a short text shows that a head guesses nothing, or that it reads something else than it was made for.

    It compares the head's guesses for the second token ahead with the target's own, as the checkpoint says it is
    wired and in the wirings that are most often confused with it. Targets without a tokenizer are not checked.
    """
    if target.tokenizer is None:
        return
    tokens = np.asarray(target.tokenizer(TEXT)["input_ids"][:LENGTH], np.int32)[None]
    text = _read(target.config, target.params, tokens)
    wirings = {"as the checkpoint says": config} | _confusable(config, target.config.num_layers)
    agreements = {what: float(_agreement(wiring, weights, tokens, text)) for what, wiring in wirings.items()}
    stated = agreements.pop("as the checkpoint says")
    best = max(agreements, key=lambda what: agreements[what], default=None)
    if best is not None and agreements[best] > max(CLEARLY_BETTER * stated, stated + LEAST_ACCURACY):
        warnings.warn(
            f"{name}: guesses {stated:.0%} of the target's tokens on a test text, but {agreements[best]:.0%} {best}; "
            "its config.json probably names another convention than it was trained in. Correct the config, or ask "
            "its author.",
            DraftWarning,
            stacklevel=2,
        )
    elif stated < LEAST_ACCURACY:
        warnings.warn(
            f"{name}: guesses {stated:.0%} of the target's tokens on a test text; expected far more, so nearly every "
            f"draft will be rejected. Check that the head was trained for {target.name} (same weights, same chat "
            "tuning), and that its checkpoint is complete.",
            DraftWarning,
            stacklevel=2,
        )


def _confusable(config: HeadConfig, num_layers: int) -> dict[str, HeadConfig]:
    """Wirings with the same weights that a checkpoint's config is most often wrong about."""
    others: dict[str, dict[str, Any]] = {}
    for offset, convention in ((1, "later"), (-1, "earlier")):
        taps = tuple(tap + offset for tap in config.taps)
        if taps and min(taps) >= 0 and max(taps) <= num_layers:
            others[f"with taps one layer {convention}, {taps}"] = {"taps": taps}
    if config.method == "eagle3":
        flipped = not config.norm_before_residual
        others[f"with norm_before_residual={str(flipped).lower()}"] = {"norm_before_residual": flipped}
    if config.method == "mtp":
        others["with embedding and hidden state in the other order"] = {"embedding_first": not config.embedding_first}
    return {what: dataclasses.replace(config, **fields) for what, fields in others.items()}


class _Text(NamedTuple):
    """What the target makes of a text.

    Attributes:
        states: for each layer, and behind the last, the state that enters it: dtype[1, T, D].
        final: dtype[1, T, D], after the final norm.
        best: int32[1, T], its choice of the next token.
    """

    states: tuple[jax.Array, ...]
    final: jax.Array
    best: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _read(target: ModelConfig, params: Any, tokens: jax.Array) -> _Text:
    num = tokens.shape[1]
    causal = jnp.tril(jnp.ones((1, num, num), bool))
    everything = tuple(range(target.num_layers + 1))
    states, final = decoder.forward(target, params, tokens, jnp.arange(num)[None], causal, everything)
    return _Text(states, final, project(final, params["head"]).argmax(axis=-1))


@functools.partial(jax.jit, static_argnums=0)
def _agreement(config: HeadConfig, weights: HeadWeights, tokens: jax.Array, text: _Text) -> jax.Array:
    """How often, float32[], the head's best token for t + 2 is the target's, over int32[1, T] tokens."""
    num = tokens.shape[1] - 1
    states = [text.states[tap] for tap in config.taps] or [text.final]
    feature = network.fuse(config, weights.head, jnp.stack(states, axis=2))[:, :-1]
    causal = jnp.tril(jnp.ones((1, num, num), bool))
    attends = [decoder.AttendWithin(causal)] * config.layer.num_layers
    out = network.run(config, weights.head, weights.shared, tokens[:, 1:], feature, jnp.arange(num)[None], attends)
    guess = network.logits(config, weights.head, weights.shared, out.hidden).argmax(axis=-1)
    if weights.token_of is not None:
        guess = weights.token_of[guess]
    return (guess == text.best[:, 1:]).mean()
