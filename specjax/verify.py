"""Acceptance rules: how many drafts are kept, and which token comes after them. One function each, and their table.

A rule sees target logits, the proposal, the rows' parameters and uniform numbers, and nothing of how they were made.
Three of them are one pass over the logits and exist as Pallas kernels: `residual`, `token_matching` and `block`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import rejection_sampling as kernels
from pallas_kernels.rejection_sampling import Truncation, Verdict, check_inputs
from pallas_kernels.rejection_sampling.base import leading
from specjax.config import SpeculativeConfig
from specjax.drafters.base import NO_DRAFT, Proposal
from specjax.sampling import (
    ACCEPT,
    RECOVER,
    SamplingState,
    draw,
    entropy,
    local_argmax,
    probabilities,
    probability_of,
    truncate,
    uniforms_at,
)
from specjax.sharding import per_device, vocab_axis

__all__ = [
    "RULES",
    "Rule",
    "RuleInfo",
    "Uniforms",
    "Verdict",
    "block",
    "build_rule",
    "conditional_rates",
    "geometric_rates",
    "greedy",
    "logit_comparison",
    "medusa_typical",
    "minimum_variance_rates",
    "relaxed",
    "residual",
    "round_uniforms",
    "synthetic",
    "token_matching",
]

LOGIT_TOLERANCE = 1e-5
"""By how much `logit_comparison` lets the draft's logit exceed the target's (MAX's constant)."""


class Uniforms(NamedTuple):
    """The random numbers of one round, each in [0, 1).

    Attributes:
        accept: float32[B, G], one for each draft's verdict.
        recover: float32[B, G + 1, 3]; those at num_accepted draw next_token.
    """

    accept: jax.Array
    recover: jax.Array

    def first(self, num: int) -> "Uniforms":
        """The numbers of a round's first so many drafts and of the token behind them."""
        return Uniforms(self.accept[:, :num], self.recover[:, : num + 1])


Rule = Callable[[jax.Array, Proposal, SamplingState, Uniforms], Verdict]


def greedy(logits: jax.Array, proposal: Proposal, sampling: SamplingState, uniforms: Uniforms) -> Verdict:
    """Accepts while the draft is the target's best token. Lossless at temperature 0, the only one it may be used at.

    Args:
        logits: float32[B, G + 1, V].
        proposal: drafts; their distribution plays no part.
    """
    del uniforms
    check_inputs(logits, proposal.tokens, None, sampling.truncation)
    best = best_token(logits)
    num_accepted = leading(best[:, :-1] == proposal.tokens)
    return Verdict(num_accepted, _at(best, num_accepted))


def residual(logits: jax.Array, proposal: Proposal, sampling: SamplingState, uniforms: Uniforms) -> Verdict:
    """Speculative sampling (Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318). Lossless.

    Draft d is accepted if u * draft_probs(d) < target_probs(d). The first rejected position draws from
    max(target_probs - draft_probs, 0), normalised; after full acceptance from target_probs. target_probs is the
    truncated distribution; greedy rows have it all on the best token, which makes this the greedy rule for them.

    Args:
        logits: float32[B, G + 1, V].
        proposal: drafts with the distribution that they were drawn from.

    Raises:
        ValueError: shapes disagree, or, outside jit, values that can't be.
    """
    return rejection_sample(logits, *proposal.drawn, *uniforms, sampling.truncation, rule="residual")


def token_matching(logits: jax.Array, proposal: Proposal, sampling: SamplingState, uniforms: Uniforms) -> Verdict:
    """The target draws a token at every position; a draft is accepted if it is that token. Lossless.

    MAX's typical-acceptance and vLLM's strict. Whatever is drafted, a row commits what the target drew with the numbers
    of that position: a seed gives the same text with every drafter and with none (up to rounding of the logits). The
    price: a sampled draft is accepted with probability sum(target_probs * draft_probs), less often than by `residual`.
    """
    return rejection_sample(logits, proposal.tokens, None, *uniforms, sampling.truncation, rule="matching")


def block(logits: jax.Array, proposal: Proposal, sampling: SamplingState, uniforms: Uniforms) -> Verdict:
    """Block verification (Sun et al. 2403.10444, algorithm 2): judges prefixes of the drafts as a whole. Lossless.

    On average it accepts at least as many drafts as `residual`, and as many where drafts are not sampled.
    """
    return rejection_sample(logits, *proposal.drawn, *uniforms, sampling.truncation, rule="block")


def logit_comparison(logits: jax.Array, proposal: Proposal, sampling: SamplingState, uniforms: Uniforms) -> Verdict:
    """Accepts a draft unless the drafter's logit of it exceeds the target's (MAX's logit-comparison). Lossy.

    Logits of two models have no common scale, so this is a heuristic; bias and penalties move the target's alone.
    next_token is drawn from the target.
    """
    check_inputs(logits, proposal.tokens, None, sampling.truncation, *uniforms)
    if proposal.logits is None or proposal.logits.shape != proposal.tokens.shape:
        shape = getattr(proposal.logits, "shape", None)
        raise ValueError(
            f"proposal.logits: has shape {shape}; expected {proposal.tokens.shape}, the drafter's logits of its drafts."
        )
    target = jnp.take_along_axis(logits[:, :-1], jnp.maximum(proposal.tokens, 0)[..., None], axis=-1)[..., 0]
    drafted = proposal.tokens != NO_DRAFT
    num_accepted = leading(drafted & (proposal.logits <= target + LOGIT_TOLERANCE))
    return Verdict(num_accepted, _draw_at(logits, num_accepted, sampling, uniforms))


def medusa_typical(
    logits: jax.Array,
    proposal: Proposal,
    sampling: SamplingState,
    uniforms: Uniforms,
    *,
    posterior_threshold: float,
    posterior_alpha: float,
) -> Verdict:
    """Accepts what the target finds plausible (Medusa's typical acceptance, Cai et al. 2401.10774, 2.3.1). Lossy.

    A draft is accepted if its target probability exceeds min(posterior_threshold, posterior_alpha * exp(-entropy));
    next_token is drawn from the tokens that do. Greedy rows decide greedily.
    """
    check_inputs(logits, proposal.tokens, None, sampling.truncation, *uniforms)
    law = truncate(logits, sampling)
    limit = jnp.minimum(posterior_threshold, posterior_alpha * jnp.exp(-entropy(law)))
    limit = jnp.where(law.greedy, 0.0, limit)
    drafts = jnp.pad(proposal.tokens, ((0, 0), (0, 1)), constant_values=NO_DRAFT)
    plausible = (drafts != NO_DRAFT) & (probability_of(law, jnp.maximum(drafts, 0)) > limit)
    num_accepted = leading(plausible[:, :-1])
    probs = probabilities(jax.tree.map(lambda field: _at(field, num_accepted), law))
    limit = jnp.minimum(_at(limit, num_accepted)[:, None], 0.999 * probs.max(axis=-1, keepdims=True))
    kept = jnp.where(probs > limit, probs, 0.0)
    return Verdict(num_accepted, draw(kept, _at(uniforms.recover, num_accepted)))


def relaxed(
    logits: jax.Array,
    proposal: Proposal,
    sampling: SamplingState,
    uniforms: Uniforms,
    *,
    topk: int,
    probability_delta: float | None = None,
    log_delta: float | None = None,
) -> Verdict:
    """While a row thinks, accepts drafts among the target's best few; other rows match tokens. Lossy.

    A row that samples and was thinking when the round began accepts a draft if it is one of the topk best tokens and
    its probability, after bias and penalties and before temperature, is at least the best one's minus probability_delta
    (MAX), or its log-probability at least the best one's minus log_delta (TensorRT-LLM). A rejection gives the best
    token, full acceptance a drawn one.
    """
    strict = token_matching(logits, proposal, sampling, uniforms)
    ones = jnp.ones_like(sampling.temperature)
    rows = sampling.replace(temperature=ones, top_k=jnp.full_like(sampling.top_k, topk), top_p=ones, min_p=0 * ones)
    law = truncate(logits, rows)
    best = best_token(logits)
    token = jnp.maximum(jnp.pad(proposal.tokens, ((0, 0), (0, 1)), constant_values=NO_DRAFT), 0)
    total = jax.nn.logsumexp(logits, axis=-1)
    log_prob = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - total
    log_best = logits.max(axis=-1) - total
    if log_delta is not None:
        near = log_prob >= log_best - log_delta
    else:
        assert probability_delta is not None
        near = jnp.exp(log_prob) >= jnp.exp(log_best) - probability_delta
    candidate = near & (probability_of(law, token) > 0)
    num_accepted = leading(candidate[:, :-1] & (proposal.tokens != NO_DRAFT))
    ended = num_accepted == proposal.num_drafts
    next_token = jnp.where(ended, _draw_at(logits, num_accepted, sampling, uniforms), _at(best, num_accepted))
    relaxes = sampling.in_thinking_phase & ~sampling.greedy
    return jax.tree.map(lambda a, b: jnp.where(relaxes, a, b), Verdict(num_accepted, next_token), strict)


def synthetic(
    logits: jax.Array,
    proposal: Proposal,
    sampling: SamplingState,
    uniforms: Uniforms,
    *,
    conditional_rates: tuple[float, ...],
    best_follows: bool,
) -> Verdict:
    """Accepts by coins alone, whatever was drafted: for measuring what an acceptance rate would be worth. Lossy.

    Args:
        conditional_rates: G probabilities or more; entry i that of accepting draft i after those before it.
        best_follows: next_token is the target's best (MAX); False draws it as `residual` would (vLLM).
    """
    check_inputs(logits, *proposal.drawn, sampling.truncation, *uniforms)
    rates = jnp.array(conditional_rates)[: proposal.tokens.shape[1]]
    num_accepted = leading((uniforms.accept < rates) & (proposal.tokens != NO_DRAFT))
    if best_follows:
        return Verdict(num_accepted, _at(best_token(logits), num_accepted))
    # `residual` at that position alone, with a coin that no draft passes.
    ended, probs = jnp.pad(proposal.tokens, ((0, 0), (0, 1)), constant_values=NO_DRAFT), proposal.probs
    if probs is not None:
        probs = _at(jnp.pad(probs, ((0, 0), (0, 1), (0, 0))), num_accepted)[:, None]
    recovered = rejection_sample(
        jnp.repeat(_at(logits, num_accepted)[:, None], 2, axis=1),
        _at(ended, num_accepted)[:, None],
        probs,
        jnp.full((num_accepted.size, 1), jnp.inf),
        jnp.repeat(_at(uniforms.recover, num_accepted)[:, None], 2, axis=1),
        sampling.truncation,
    )
    return Verdict(num_accepted, recovered.next_token)


def rejection_sample(
    logits: jax.Array,
    drafts: jax.Array,
    draft_probs: jax.Array | None,
    accept_uniforms: jax.Array,
    recover_uniforms: jax.Array,
    rows: Truncation,
    *,
    rule: str = "residual",
) -> Verdict:
    """The kernels' rejection_sample, where a mesh is set on each device's rows and part of the vocabulary."""
    law, row = ("batch", None, "vocab"), ("batch",)
    inputs = law, ("batch", None), law, ("batch", None), ("batch", None, None), row
    shape = logits.shape[:1]
    run = functools.partial(kernels.rejection_sample, rule=rule, axis=vocab_axis(logits.shape[-1]))
    arguments = logits, drafts, draft_probs, accept_uniforms, recover_uniforms, rows
    return Verdict(*per_device(lambda *parts: tuple(run(*parts)), inputs, ((row, shape), (row, shape)), *arguments))


def best_token(logits: jax.Array) -> jax.Array:
    """int32[...]: the argmax of float32[..., V]; the first of equal ones. Under a mesh no logits are gathered."""
    axes = ("batch", *(None,) * (logits.ndim - 2), "vocab")
    run = functools.partial(local_argmax, axis=vocab_axis(logits.shape[-1]))
    return per_device(run, (axes,), ((axes[:-1], logits.shape[:-1]),), logits)


def round_uniforms(sampling: SamplingState, length: jax.Array, num_speculative_tokens: int) -> Uniforms:
    """The uniforms of the round that begins at length, int32[B].

    Coins belong to the round. Numbers that draw a token belong to the token's position: whichever round commits it.
    """
    positions = length[:, None] + jnp.arange(num_speculative_tokens + 1)
    recover = jax.vmap(lambda at: uniforms_at(sampling.key, at, RECOVER, 3), in_axes=1, out_axes=1)(positions)
    return Uniforms(uniforms_at(sampling.key, length, ACCEPT, num_speculative_tokens), recover)


def geometric_rates(rate: float, num: int) -> tuple[float, ...]:
    """MAX's synthetic_acceptance_rate: unconditional rates a, a**2, ... whose mean is rate."""
    low, high = (rate, rate) if rate in (0.0, 1.0) else (0.0, 1.0)
    while high - low > 1e-12:
        base = (low + high) / 2
        mean = sum(base ** (i + 1) for i in range(num)) / num
        low, high = (base, high) if mean < rate else (low, base)
    return tuple(high ** (i + 1) for i in range(num))


def minimum_variance_rates(length: float, num: int) -> tuple[float, ...]:
    """vLLM's synthetic_acceptance_length: unconditional rates under which length - 1 drafts pass, rounded up or off."""
    return tuple(min(max(length - 1 - i, 0.0), 1.0) for i in range(num))


def conditional_rates(rates: tuple[float, ...]) -> tuple[float, ...]:
    """Unconditional rates P(at least i accepted) -> P(i-th accepted | those before it)."""
    before = (1.0, *rates[:-1])
    return tuple(rate / previous if previous > 0 else 0.0 for rate, previous in zip(rates, before, strict=True))


def _synthetic_of(config: SpeculativeConfig) -> Rule:
    num = config.max_drafts
    if config.synthetic_acceptance_rate is not None:
        rates = geometric_rates(config.synthetic_acceptance_rate, num)
    elif config.synthetic_acceptance_length is not None:
        rates = minimum_variance_rates(config.synthetic_acceptance_length, num)
    else:
        assert config.synthetic_acceptance_rates is not None  # the config holds exactly one of the three
        rates = config.synthetic_acceptance_rates
    return functools.partial(
        synthetic,
        conditional_rates=conditional_rates(rates),
        best_follows=config.synthetic_acceptance_rate is not None,
    )


def _relaxed_of(config: SpeculativeConfig) -> Rule:
    assert config.relaxed_topk is not None  # resolved
    return functools.partial(
        relaxed,
        topk=config.relaxed_topk,
        probability_delta=config.relaxed_probability_delta,
        log_delta=config.relaxed_log_delta,
    )


def _medusa_typical_of(config: SpeculativeConfig) -> Rule:
    assert config.posterior_threshold is not None and config.posterior_alpha is not None  # resolved
    return functools.partial(
        medusa_typical, posterior_threshold=config.posterior_threshold, posterior_alpha=config.posterior_alpha
    )


class RuleInfo(NamedTuple):
    """A row of the table of rules.

    Attributes:
        build: config -> the rule with the config's parameters.
        lossless: whether the output has exactly the target's (truncated) distribution.
        needs: what the rule uses besides the target's logits.
        greedy_only: whether every row must have temperature 0.
        needs_phase: whether rows must know if they are in their thinking phase.
    """

    build: Callable[[SpeculativeConfig], Rule]
    lossless: bool
    needs: str = "nothing"
    greedy_only: bool = False
    needs_phase: bool = False


RULES: dict[str, RuleInfo] = {
    "greedy": RuleInfo(lambda config: greedy, True, "temperature 0", greedy_only=True),
    "residual": RuleInfo(lambda config: residual, True, "the laws of sampled drafts"),
    "typical-acceptance": RuleInfo(lambda config: token_matching, True),
    "strict": RuleInfo(lambda config: token_matching, True),
    "block": RuleInfo(lambda config: block, True, "the laws of sampled drafts"),
    "logit-comparison": RuleInfo(lambda config: logit_comparison, False, "the drafter's logits of its drafts"),
    "medusa-typical": RuleInfo(_medusa_typical_of, False),
    "relaxed": RuleInfo(_relaxed_of, False, "think tokens in the tokenizer", needs_phase=True),
    "synthetic": RuleInfo(_synthetic_of, False),
}


def build_rule(config: SpeculativeConfig | None) -> tuple[str, Rule]:
    """Name and function of a config's rule; without one `residual`, which draws from the target if nothing drafts."""
    if config is None:
        return "residual", residual
    name = config.rejection_sampling_strategy
    return name, RULES[name].build(config)


def _at(x: jax.Array, position: jax.Array) -> jax.Array:
    """x[b, position[b]] of x[B, T, ...]; x as it is where it has no positions."""
    return x[jnp.arange(position.size), position] if x.ndim > 1 else x


def _draw_at(logits: jax.Array, position: jax.Array, sampling: SamplingState, uniforms: Uniforms) -> jax.Array:
    """int32[B]: a token from the target's law at one position of each row."""
    nothing = jnp.zeros((position.size, 0))
    return rejection_sample(
        _at(logits, position)[:, None],
        nothing.astype(jnp.int32),
        None,
        nothing,
        _at(uniforms.recover, position)[:, None],
        sampling.truncation,
    ).next_token
