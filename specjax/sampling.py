"""Logits -> the distribution that a row samples from: adjustments, truncation, random numbers.

The order is the same with and without speculation: logit bias, repetition, frequency and presence penalty, then
temperature, top-k, top-p over what is left, and min-p. The maths of truncating and drawing is the kernels' package's;
here it meets the rows' parameters.
"""

import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels.rejection_sampling import Truncation
from pallas_kernels.rejection_sampling.xla import Law, draw, local_argmax, probabilities, probability_of
from pallas_kernels.rejection_sampling.xla import truncate as _truncate
from specjax.config import GREEDY_TEMPERATURE

__all__ = [
    "ACCEPT",
    "PROPOSE",
    "RECOVER",
    "Adjustment",
    "Law",
    "SamplingState",
    "ThinkingPhase",
    "adjust",
    "draw",
    "entropy",
    "local_argmax",
    "probabilities",
    "probability_of",
    "record_log_probability",
    "truncate",
    "uniforms_at",
]

PROPOSE, ACCEPT, RECOVER = 1, 2, 3
"""Random domains: what is proposed, what is accepted and what replaces a rejection never share random bits."""


class Adjustment(flax.struct.PyTreeNode):
    """What changes the logits of each row before anything else, and what it depends on.

    Attributes:
        bias: float32[B, V], added.
        repetition_penalty: float32[B]; divides positive and multiplies negative logits of tokens in prompt or output.
        frequency_penalty: float32[B]; subtracted once for each time that the token is in the output.
        presence_penalty: float32[B]; subtracted if the token is in the output.
        in_prompt: bool[B, V].
        counts: int32[B, V], how often each token is in the output.
    """

    bias: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    in_prompt: jax.Array
    counts: jax.Array

    def observe(self, tokens: jax.Array, num_new: jax.Array) -> "Adjustment":
        """Counts the first num_new, int32[B], of int32[B, T] tokens as output."""
        rows = jnp.arange(tokens.shape[0])[:, None]
        new = jnp.arange(tokens.shape[1]) < num_new[:, None]
        return self.replace(counts=self.counts.at[rows, jnp.where(new, tokens, 0)].add(new))


class ThinkingPhase(flax.struct.PyTreeNode):
    """Whether each row is between the tokens that open and close a model's reasoning.

    Attributes:
        thinking: bool[B].
        start: int32[], the token that opens it.
        end: int32[], the token that closes it.
    """

    thinking: jax.Array
    start: jax.Array
    end: jax.Array

    def observe(self, tokens: jax.Array, num_new: jax.Array) -> "ThinkingPhase":
        """The phase behind the first num_new, int32[B], of int32[B, T] tokens: the last of the two tokens decides."""
        order = jnp.arange(1, tokens.shape[1] + 1)
        new = order <= num_new[:, None]
        opened = jnp.where(new & (tokens == self.start), order, 0).max(axis=1)
        closed = jnp.where(new & (tokens == self.end), order, 0).max(axis=1)
        return self.replace(thinking=jnp.where(opened == closed, self.thinking, opened > closed))


class SamplingState(flax.struct.PyTreeNode):
    """Sampling parameters of each row, and what they need to know of its text.

    Attributes:
        temperature: float32[B]; below GREEDY_TEMPERATURE the row is greedy.
        top_k: int32[B]; 0 keeps all.
        top_p: float32[B]; 1 keeps all.
        min_p: float32[B]; 0 keeps all.
        key: jax.random key[B], from the row's seed alone.
        adjustment: an Adjustment, or None where no row has one.
        phase: a ThinkingPhase, or None where nothing asks for it.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array
    adjustment: Adjustment | None = None
    phase: ThinkingPhase | None = None

    @property
    def greedy(self) -> jax.Array:
        """bool[B]."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def truncation(self) -> Truncation:
        """What the kernels take; temperature 0 stands for greedy there. A negative one stays, for them to refuse."""
        temperature = jnp.where(self.greedy, jnp.minimum(self.temperature, 0.0), self.temperature)
        return Truncation(temperature, self.top_k, self.top_p, self.min_p)

    @property
    def in_thinking_phase(self) -> jax.Array:
        """bool[B]."""
        return jnp.zeros_like(self.greedy) if self.phase is None else self.phase.thinking

    def observe(self, tokens: jax.Array, num_new: jax.Array) -> "SamplingState":
        """The state after the first num_new, int32[B], of int32[B, T] tokens were committed."""
        parts = {"adjustment": self.adjustment, "phase": self.phase}
        return self.replace(**{name: part and part.observe(tokens, num_new) for name, part in parts.items()})


def adjust(logits: jax.Array, sampling: SamplingState, drafts: jax.Array) -> jax.Array:
    """Applies bias and penalties to float32[B, G + 1, V]; position i sees the first i of int32[B, G] drafts."""
    adjustment = sampling.adjustment
    if adjustment is None:
        return logits
    T, V = logits.shape[1:]
    positions, tokens = jnp.arange(T)[:, None], jnp.arange(V)
    counts = adjustment.counts[:, None]
    for index in range(drafts.shape[1]):
        counts = counts + ((positions > index) & (drafts[:, index, None, None] == tokens))
    logits = logits + adjustment.bias[:, None]
    repeated = (counts > 0) | adjustment.in_prompt[:, None]
    penalty = adjustment.repetition_penalty[:, None, None]
    logits = jnp.where(repeated, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits - adjustment.frequency_penalty[:, None, None] * counts
    return logits - adjustment.presence_penalty[:, None, None] * (counts > 0)


def truncate(logits: jax.Array, sampling: SamplingState) -> Law:
    """The law of float32[B, V] or float32[B, T, V] logits under temperature, top-k, top-p and min-p."""
    leading = logits.shape[:-1]
    fields = (field.reshape(field.shape + (1,) * (len(leading) - 1)) for field in sampling.truncation)
    return _truncate(logits, Truncation(*(jnp.broadcast_to(field, leading) for field in fields)))


def entropy(law: Law) -> jax.Array:
    """float32[...]: the entropy of the truncated distribution in nats; 0 for greedy rows."""
    logs = law.log_probabilities()
    terms = jnp.where(logs > -jnp.inf, -logs * jnp.exp(logs), 0.0)
    return jnp.where(law.greedy, 0.0, terms.sum(axis=-1))


def record_log_probability(
    logprobs: jax.Array | None, places: tuple[jax.Array, jax.Array], logits: jax.Array, tokens: jax.Array
) -> jax.Array | None:
    """Writes the log-probabilities of tokens into float32[B, S], in nats; None stays None.

    Args:
        logprobs: float32[B, S] or None.
        places: rows int32[B, 1] and positions int32[B, T]; positions behind S are dropped.
        logits: float32[B, T, V] as the target gave them, before any adjustment or temperature.
        tokens: int32[B, T].
    """
    if logprobs is None:
        return None
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
    return logprobs.at[places].set(chosen - jax.nn.logsumexp(logits, axis=-1), mode="drop")


def uniforms_at(keys: jax.Array, length: jax.Array, domain: int, num: int) -> jax.Array:
    """float32[B, num] in [0, 1): random numbers of one domain for rows of a length, int32[B].

    They depend on the row's key, the length and the domain alone; the row's batch plays no part. Lengths only grow, so
    numbers named by the length at which a round begins are never met again. Rules that look behind the first rejection
    need that of the numbers that propose and accept.
    """

    def of_row(key, length):
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, length), domain), (num,))

    return jax.vmap(of_row)(keys, length)
