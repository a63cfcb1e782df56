"""What the parts of a round cost, and what speed-up follows from that and the measured acceptance."""

import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from specjax import cache as kv
from specjax import step
from specjax.checkpoints.load import Target
from specjax.config import AUTO, SamplingParams, SpeculativeConfig
from specjax.errors import ConfigError
from specjax.evaluate.oracle import prefilled_cache, row_starts
from specjax.generate import SpeculativeDecoder, batch_rows, prefill_windows
from specjax.metrics import Metrics
from specjax.target import decoder

REPEATS = 5
"""Times that everything is measured, one after the other; the fastest counts."""

SCORES = 8
"""Passes of the target that are timed together."""

FIRST_ROUNDS, ROUNDS = 4, 16
"""Rounds before the clock starts, and rounds that are timed together."""

PHASES = "propose", "score", "verify", "commit"

Key = TypeVar("Key", bound=Hashable)


def fastest_seconds(runs: Mapping[Key, Callable[[], float]], repeats: int = REPEATS) -> dict[Key, float]:
    """The fastest of several measurements, which take turns so that a slow moment of the machine hits all."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for key, run in runs.items():
            best[key] = min(best[key], run())
    return best


def score_milliseconds(
    target: Target, tokens: Sequence[int], batches: Sequence[int], widths: Sequence[int]
) -> list[list[float]]:
    """What a pass of the target over a window costs.

    Args:
        tokens: token ids that each row's cache holds.
        batches: rows.
        widths: T, window lengths in tokens.

    Returns:
        Milliseconds [batch][width].
    """
    runs: dict[tuple[int, int], Callable[[], float]] = {}
    score = jax.jit(functools.partial(decoder.apply, target.config), donate_argnums=3)
    for batch in batches:
        held = [prefilled_cache(target, tokens, batch, max(widths))]
        for width in widths:
            runs[batch, width] = _score_run(score, target, held, row_starts(batch, len(tokens)), width)
    for run in runs.values():
        run()  # warm-up
    best = fastest_seconds(runs)
    return [[1e3 * best[batch, width] for width in widths] for batch in batches]


def _score_run(score: Any, target: Target, held: list[Any], start: jax.Array, width: int) -> Callable[[], float]:
    """Seconds of a pass. `held` holds the cache, which every pass takes and gives back."""
    window = np.ones((start.size, width), np.int32)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(SCORES):
            output = score(target.params, window, start, held[0])
            held[0] = output.cache
        jax.block_until_ready(output)
        return (time.perf_counter() - began) / SCORES

    return run


def phase_milliseconds(
    owner: SpeculativeDecoder, tokens: Sequence[int], sampling: SamplingParams, repeats: int = REPEATS
) -> dict[str, float]:
    """What each part of a round costs, and a whole round; each the fastest mean over some rounds.

    The parts are compiled one by one, so their sum is a little more than the whole.

    Args:
        tokens: the prompt of every row.
        sampling: how rows sample; they don't stop.

    Returns:
        "propose", "score", "verify", "commit" and "round" -> milliseconds.

    Raises:
        ConfigError: the prompt and the rounds outgrow the target's context.
    """
    check_context(owner, len(tokens))
    system, best = owner.programs.system, dict.fromkeys((*PHASES, "round"), float("inf"))
    parts = _parts(system)
    for _ in range(repeats + 1):  # the first one is the warm-up
        params, state = _running_state(owner, tokens, sampling)
        spent, _ = _timed_rounds(parts, system.drafter.widths, params, state)
        params, state = _running_state(owner, tokens, sampling)
        began, compiled = time.perf_counter(), owner.programs.compile_seconds
        for _ in range(ROUNDS):
            state = jax.block_until_ready(owner.programs.decode(params, state, 1))
        whole = time.perf_counter() - began - (owner.programs.compile_seconds - compiled)
        for name, seconds in (spent | {"round": whole / ROUNDS}).items():
            best[name] = min(best[name], 1e3 * seconds)
    return best


def check_context(owner: SpeculativeDecoder, num_tokens: int) -> None:
    """Refuses a prompt that the rounds that are timed would not fit behind.

    Raises:
        ConfigError: it outgrows the target's context.
    """
    longest, num_new = owner.target.config.max_position, _num_new(owner)
    if num_tokens + num_new > longest:
        raise ConfigError(
            f"config.step_context={num_tokens}: with {num_new} tokens behind it this outgrows the target's context of "
            f"{longest}; expected at most {longest - num_new}."
        )


def _num_new(owner: SpeculativeDecoder) -> int:
    """The most tokens that the timed rounds and those before them give."""
    return (FIRST_ROUNDS + ROUNDS) * (owner.programs.system.drafter.num_speculative_tokens + 1)


def _running_state(
    owner: SpeculativeDecoder, tokens: Sequence[int], sampling: SamplingParams
) -> tuple[step.Params, step.DecodeState]:
    """A full batch after prefill and some rounds, and its weights."""
    batch, num_new = owner.max_batch_size, _num_new(owner)
    endless = sampling.model_copy(update={"max_tokens": num_new, "ignore_eos": True, "stop_token_ids": (), "stop": ()})
    requests = owner.requests([list(tokens)] * batch, endless)
    windows = prefill_windows(len(tokens) - 1)
    capacity = kv.round_capacity(max(requests[0].longest(owner), sum(windows[-1]) if windows else 0))
    rows = batch_rows(owner, requests, batch, capacity, requests)
    params = owner.params_for(rows)
    state = owner.programs.init(params, rows)
    for start, size in windows:
        state = owner.programs.prefill(params, state, start, size)
    return params, jax.block_until_ready(owner.programs.decode(params, state, FIRST_ROUNDS))


def _parts(system: step.System) -> dict[str, Any]:
    """The four parts of the step, each compiled on its own, caches and drafter state donated as in the whole step."""

    return {
        "propose": jax.jit(
            lambda params, drafter, state: step.propose(system, params, state.replace(drafter=drafter)),
            donate_argnums=1,
        ),
        "score": jax.jit(
            lambda params, cache, state, drafts: step.score(system, params, state.replace(cache=cache), drafts),
            donate_argnums=1,
        ),
        "verify": jax.jit(lambda state, scores, drafts: step.verify(system, state, scores, drafts)),
        "commit": jax.jit(
            lambda params, models, state, scores, drafts, verdict: step.commit(
                system, params, state.replace(drafter=models[0]), scores._replace(cache=models[1]), drafts, verdict
            ),
            donate_argnums=1,
        ),
    }


def _timed_rounds(
    parts: dict[str, Any], widths: Sequence[int], params: step.Params, state: step.DecodeState
) -> tuple[dict[str, float], step.DecodeState]:
    """Seconds of each part, the mean over ROUNDS rounds, and the state behind them; widths are the drafter's."""
    seconds = dict.fromkeys(PHASES, 0.0)

    def timed(name: str, *arguments: Any) -> Any:
        began = time.perf_counter()
        output = jax.block_until_ready(parts[name](*arguments))
        seconds[name] += (time.perf_counter() - began) / ROUNDS
        return output

    for _ in range(ROUNDS):
        drafter, cache = state.drafter, state.cache
        state = state.replace(drafter=None, cache=None)
        proposal, drafter = timed("propose", params, drafter, state)
        drafts = proposal.first(min(width for width in widths if width >= proposal.width) - 1)
        scores = timed("score", params, cache, state, drafts)
        cache, scores = scores.cache, scores._replace(cache=None)
        verdict = timed("verify", state, scores, drafts)
        state = timed("commit", params, (drafter, cache), state, scores, drafts, verdict)
    return seconds, state


def rest_milliseconds(phases: Mapping[str, float]) -> float:
    """What a round costs beyond scoring, from what phase_milliseconds gives.

    Of whole rounds: a part that is compiled by itself writes to memory what the whole round keeps from it.
    """
    return max(phases["round"] - phases["score"], 0.0)


def predicted_speedups(
    acceptance_rate_by_position: Sequence[float],
    score: Sequence[float],
    draft: Sequence[float],
    rest: float,
    share: float = 1.0,
) -> list[float]:
    """Speed-up over plain decoding with K = 0, 1, ..., G drafts a round.

    expected tokens a round / (cost of a round / cost of a plain round), where K drafts bring
    1 + sum over i <= K of P(at least i are accepted), and a round costs score(K + 1) + draft(K) + rest.

    Args:
        acceptance_rate_by_position: G numbers, unconditional.
        score: what scoring T = 1 .. G + 1 tokens costs, in any unit.
        draft: what drafting K = 1 .. G tokens costs, in the same unit.
        rest: what is the same in every round.
        share: of the rounds that score their drafts; in the others, where no row has any, scoring is that of one token.
    """
    plain = score[0] + rest
    speedups = [1.0]
    for num in range(1, len(acceptance_rate_by_position) + 1):
        tokens = 1.0 + sum(acceptance_rate_by_position[:num])
        scored = share * score[num] + (1.0 - share) * score[0]
        speedups.append(tokens * plain / (scored + draft[num - 1] + rest))
    return speedups


def drafting_share(metrics: Metrics, batch: int) -> float:
    """The share of rounds in which some row of a batch has drafts, rows taken as independent."""
    G = metrics.acceptance_counts.size - 1
    rows = min(1.0, metrics.drafted / (metrics.rounds * G)) if metrics.rounds and G else 0.0
    return 1.0 - (1.0 - rows) ** batch


def measure_costs(
    decoders: Mapping[str, SpeculativeDecoder],
    phases: Mapping[str, Mapping[str, float]],
    tokens: Sequence[int],
    sampling: SamplingParams,
    batches: Sequence[int],
) -> dict[str, Any]:
    """The content of summary.json's "costs": the curve of scoring, what plain rounds cost beyond it ("rest_ms"), and
    what drafting costs: how much more that is in rounds with drafts.

    "idle" says that rounds in which no row has drafts score one token only. See has_draft_curve for which methods have
    such a cost.

    Args:
        decoders: of the methods, by name, at the batch size of the run; one of them decodes plainly.
        phases: what phase_milliseconds gives for each.
        tokens: token ids that the caches hold.
        batches: rows of the curve.
    """
    plain, owner = next((name, owner) for name, owner in decoders.items() if owner.config is None)
    rest = rest_milliseconds(phases[plain])
    largest = max(decoder.programs.system.drafter.num_speculative_tokens for decoder in decoders.values())
    widths = list(range(1, largest + 2))
    drafts = {
        name: _draft_curve(decoder, phases[name], tokens, sampling, rest)
        for name, decoder in decoders.items()
        if decoder.config is not None and has_draft_curve(decoder.config)
    }
    return {
        "context": len(tokens),
        "batch": list(batches),
        "widths": widths,
        "score_ms": score_milliseconds(owner.target, tokens, batches, widths),
        "rest_ms": rest,
        "draft_ms": drafts,
    }


def has_draft_curve(config: SpeculativeConfig) -> bool:
    """Whether a method's drafts cost the same in every round, and can be fewer: not so where how many there are follows
    the text ("auto", draft_confidence_threshold), or where synthetic acceptance is for one number of them.
    """
    varies = config.num_speculative_tokens == AUTO or bool(config.draft_confidence_threshold)
    return not varies and not config.uses_synthetic_acceptance()


def _draft_curve(
    owner: SpeculativeDecoder, phases: Mapping[str, float], tokens: Sequence[int], sampling: SamplingParams, rest: float
) -> dict[str, Any]:
    """What drafting costs for K = 1 .. G drafts a round; with G it is in the method's own phases."""
    assert owner.config is not None  # a drafting method
    drafter, fields = owner.programs.system.drafter, owner.config.model_dump(exclude_unset=True)
    spent = []
    for num in range(1, drafter.num_speculative_tokens):
        config = SpeculativeConfig.model_validate(fields | {"num_speculative_tokens": num})
        fewer = SpeculativeDecoder(owner.target, config, max_batch_size=owner.max_batch_size)
        spent.append(rest_milliseconds(phase_milliseconds(fewer, tokens, sampling, repeats=2)))
    spent.append(rest_milliseconds(phases))
    spent = [max(milliseconds - rest, 0.0) for milliseconds in spent]
    return {"K": list(range(1, len(spent) + 1)), "ms": spent, "idle": drafter.widths[0] == 1}


def predict(costs: Mapping[str, Any], totals: Mapping[str, Metrics], batch: int) -> dict[str, Any]:
    """The content of summary.json's "predicted", from costs as measure_costs gives them.

    Args:
        totals: name -> what was measured.
        batch: rows of the run.
    """
    score = costs["score_ms"][list(costs["batch"]).index(batch)]
    predicted = {}
    for name, metrics in totals.items():
        draft = costs["draft_ms"][name]
        share = drafting_share(metrics, batch) if draft["idle"] else 1.0
        rates = metrics.acceptance_rate_by_position
        speedups = predicted_speedups(rates, score, draft["ms"], costs["rest_ms"], share)
        predicted[name] = {"K": list(range(len(speedups))), "speedup": speedups}
    return predicted
