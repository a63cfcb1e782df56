"""summary.json: counts are summed over prompts and divided once, and of repeats the fastest counts."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from specjax.checkpoints.load import Target
from specjax.evaluate import environment
from specjax.evaluate.costs import has_draft_curve, predict
from specjax.evaluate.experiment import PLAIN, Experiment
from specjax.evaluate.oracle import Comparison, compare_greedy
from specjax.evaluate.prompts import Prompt
from specjax.evaluate.results import Answer, Pass, Results, add
from specjax.evaluate.statistics import bootstrap_interval, median_and_range
from specjax.metrics import Metrics
from specjax.verify import RULES

SCHEMA = 2

Group = tuple[Any, ...]
"""What is measured with one pair of clocks: a turn of a prompt, or in batches that turn of all prompts."""

Measured = Mapping[Group, Mapping[int, Metrics]]
"""What one method measured, by group and repeat; what failed is not in it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment with what it has measured so far.

    Attributes:
        experiment: what is measured.
        target: the loaded model.
        prompts: of the experiment.
        results: so far.
        prompt_tokens: (prompt, turn) -> the token ids that every method was given.
        not_run: comparisons that cannot run here -> why.
        not_measured: what else could not be measured -> why.
    """

    experiment: Experiment
    target: Target
    prompts: Sequence[Prompt]
    results: Results
    prompt_tokens: Callable[[Prompt, int], list[int]]
    not_run: Mapping[str, str]
    not_measured: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def units(self) -> list[tuple[Prompt, int]]:
        """What is answered by every method: the turns of each prompt."""
        return [(prompt, turn) for prompt in self.prompts for turn in range(len(prompt.turns))]

    def answers(self, method: str, units: Iterable[tuple[Prompt, int]] | None = None) -> list[list[Answer]]:
        """Of each unit with an output the answers of a method, by repeat; those that failed are left out."""
        keys = [
            [(prompt.id, turn, method, repeat) for repeat in range(self.experiment.repeats)]
            for prompt, turn in (self.units if units is None else units)
        ]
        known = self.results.answers
        found = [[known[key] for key in repeats if key in known and known[key].error is None] for repeats in keys]
        return [answers for answers in found if answers]

    def measured(self, method: str, units: Iterable[tuple[Prompt, int]] | None = None) -> Measured:
        """A method's counts and times by group and repeat."""
        if self.experiment.batch_size == 1:
            return {
                (answers[0].prompt, answers[0].turn): {answer.repeat: answer.metrics for answer in answers}
                for answers in self.answers(method, units)
            }
        groups: dict[Group, dict[int, Metrics]] = {}
        for one in self.results.passes.values():
            if one.method == method and one.metrics is not None:
                groups.setdefault((one.turn,), {})[one.repeat] = one.metrics
        return groups


def summarise(run: Run, finished: bool) -> dict[str, Any]:
    """The content of summary.json; None is what was not measured.

    Args:
        finished: whether all has been measured. Texts are compared only then.
    """
    experiment, results = run.experiment, run.results
    plain = run.measured(PLAIN)
    rows = {name: _method(run, name, plain) for name in experiment.methods}
    differences: list[dict[str, Any]] = []
    if finished and experiment.compares_texts:
        for name in experiment.methods:
            if rows[name]["lossless"]:
                counts, found = _agreement(run, name)
                rows[name] |= counts
                differences += found
    commits, costs = results.commits, results.extras.get("costs")
    return {
        "schema": SCHEMA,
        "target": experiment.target,
        "dtype": str(run.target.dtype),
        "device": environment.device_name(),
        "commit": commits[-1] if commits else None,
        "warnings": _warnings(commits, run.not_measured),
        "versions": experiment.versions(),
        "config": experiment.as_json(),
        "prompts": len(run.prompts),
        "turns": len(run.units),
        "prompt_set": experiment.prompts,
        "batch_size": experiment.batch_size,
        "repeats": experiment.repeats,
        "max_tokens": experiment.sampling.max_tokens,
        "temperature": experiment.sampling.temperature,
        "finished": finished,
        "baseline": _times(plain, plain, experiment.repeats),
        "methods": rows,
        "comparisons": {name: _comparison(run, name, plain) for name in experiment.compare},
        "by_category": _by_category(run),
        "failed": [
            {name: getattr(answer, name) for name in ("prompt", "turn", "method", "repeat", "error")}
            for answer in results.answers.values()
            if answer.error is not None
        ],
        "differences": differences,
        "costs": costs,
        "predicted": _predicted(run, costs) if costs else None,
        "profile": _profile(results.extras.get("phases")) if experiment.profile else None,
        "examples": results.extras.get("examples", []),
        "harness_overhead": _harness_overhead(results),
    }


def _profile(phases: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[str, float]] | None:
    if phases is None:
        return None
    return {name: {f"{part}_ms": spent for part, spent in parts.items()} for name, parts in phases.items()}


def _predicted(run: Run, costs: Mapping[str, Any]) -> dict[str, Any]:
    """Of methods that draft as many tokens every round: what is accepted of others depends on what they chose."""
    totals = {}
    for name, method in run.experiment.methods.items():
        measured = run.measured(name)
        total = fastest(measured, measured)
        if total is not None and has_draft_curve(method):
            totals[name] = total
    return predict(costs, totals, run.experiment.batch_size)


def _warnings(commits: Sequence[str | None], not_measured: Mapping[str, str]) -> list[str]:
    found = [f"{what} could not be measured: {why}" for what, why in not_measured.items()]
    if len(commits) > 1:
        found.append(f"measured by several states of the code: {', '.join(str(commit) for commit in commits)}")
    return found


def fastest(measured: Measured, groups: Iterable[Group]) -> Metrics | None:
    """The sum over groups of each one's fastest repeat; None for no groups."""
    best = [min(measured[group].values(), key=lambda metrics: metrics.decode_seconds) for group in groups]
    return add(best) if best else None


def repeat_rates(measured: Measured, groups: Iterable[Group], repeats: int) -> list[float]:
    """Tokens a second of each repeat, over the groups that were measured in all of them."""
    whole = [measured[group] for group in groups if len(measured[group]) == repeats]
    return [add([group[repeat] for group in whole]).tokens_per_second for repeat in range(repeats)] if whole else []


def _times(measured: Measured, groups: Iterable[Group], repeats: int) -> dict[str, Any]:
    """What plain decoding and methods have in common."""
    total = fastest(measured, groups)
    median, rates = median_and_range(repeat_rates(measured, groups, repeats))
    return {
        "tokens_per_second": total.tokens_per_second if total else None,
        "tokens_per_second_median": median,
        "tokens_per_second_range": rates,
        "num_tokens": total.num_tokens if total else 0,
        "prefill_seconds": total.prefill_seconds if total else 0.0,
        "decode_seconds": total.decode_seconds if total else 0.0,
    }


def _method(run: Run, name: str, plain: Measured) -> dict[str, Any]:
    """A method against plain decoding, over what both have measured."""
    method = run.experiment.methods[name]
    measured = run.measured(name)
    common = [group for group in plain if group in measured]
    total, baseline = fastest(measured, common), fastest(plain, common)
    G: int | str = str(method.num_speculative_tokens)
    if G != "auto":  # a head may name its own number
        G = total.acceptance_counts.size - 1 if total else int(G)
    row = {
        "method": method.method,
        "num_speculative_tokens": G,
        "rule": method.rejection_sampling_strategy,
        "lossless": RULES[str(method.rejection_sampling_strategy)].lossless,
        **_times(measured, common, run.experiment.repeats),
    }
    row |= dict.fromkeys(("identical", "near_tie", "mismatch"))
    derived = ("acceptance_length", "acceptance_rate", "acceptance_rate_by_position")
    if total is None or baseline is None:
        missing = (
            "speedup",
            "speedup_interval",
            *derived,
            "acceptance_length_interval",
            "acceptance_counts",
            "efficiency",
        )
        return row | dict.fromkeys(missing) | {"drafted": 0}
    speedup = total.tokens_per_second / baseline.tokens_per_second
    return row | {
        "speedup": speedup,
        "speedup_interval": _speedup_interval(run, measured, plain, common),
        **{field: getattr(total, field) for field in derived},
        "acceptance_length_interval": _acceptance_interval(run, name),
        "acceptance_counts": total.acceptance_counts.tolist(),
        "drafted": total.drafted,
        "efficiency": speedup / total.acceptance_length,
    }


def _speedup_interval(
    run: Run, measured: Measured, plain: Measured, common: Sequence[Group]
) -> tuple[float, float] | None:
    """Over prompts; None in batches, where a prompt has no time of its own."""
    if run.experiment.batch_size > 1:
        return None
    sums: dict[str, np.ndarray] = {}
    for group in common:
        pair = fastest(measured, [group]), fastest(plain, [group])
        row = np.array([number for total in pair if total for number in (total.num_tokens, total.decode_seconds)])
        sums[group[0]] = sums.get(group[0], 0) + row
    return bootstrap_interval(np.array(list(sums.values())), lambda t: (t[:, 0] / t[:, 1]) / (t[:, 2] / t[:, 3]))


def _acceptance_interval(run: Run, name: str) -> tuple[float, float] | None:
    sums: dict[str, np.ndarray] = {}
    for answers in run.answers(name):
        metrics = answers[0].metrics
        row = np.array([metrics.accepted, metrics.rounds], np.float64)
        sums[answers[0].prompt] = sums.get(answers[0].prompt, 0) + row
    return bootstrap_interval(np.array(list(sums.values())), lambda t: 1 + t[:, 0] / t[:, 1])


def _comparison(run: Run, name: str, plain: Measured) -> dict[str, Any]:
    if name in run.not_run:
        return {"not_run": run.not_run[name]}
    measured = run.measured(name)
    common = [group for group in plain if group in measured]
    total, baseline = fastest(measured, common), fastest(plain, common)
    if total is None or baseline is None:
        return {"not_run": "nothing has been measured"}
    ours = {answers[0].key[:2]: answers[0].token_ids for answers in run.answers(PLAIN)}
    theirs = {answers[0].key[:2]: answers[0].token_ids for answers in run.answers(name)}
    median, rates = median_and_range(repeat_rates(measured, common, run.experiment.repeats))
    return {
        "tokens_per_second": total.tokens_per_second,
        "tokens_per_second_median": median,
        "tokens_per_second_range": rates,
        "speedup": total.tokens_per_second / baseline.tokens_per_second,
        "num_tokens": sum(len(tokens) for key, tokens in theirs.items() if key in common),
        "identical": sum(tokens == ours.get(key) for key, tokens in theirs.items()),
        "turns": len(common),
    }


def _agreement(run: Run, method: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Counts of how a method's outputs relate to plain decoding's, and where they differ; of repeats the worst."""
    kinds = "identical", "near_tie", "mismatch"
    counts = dict.fromkeys(kinds, 0)
    differences = []
    for prompt, turn in run.units:
        plain = next(iter(run.answers(PLAIN, [(prompt, turn)])), None)
        ours = next(iter(run.answers(method, [(prompt, turn)])), None)
        if plain is None or ours is None:
            continue
        tokens = run.prompt_tokens(prompt, turn)
        outputs = {tuple(answer.token_ids) for answer in ours}
        compared = [(compare_greedy(run.target, tokens, plain[0].token_ids, output), output) for output in outputs]
        worst, output = max(compared, key=lambda pair: kinds.index(pair[0].kind))
        counts[worst.kind] += 1
        if worst.at is not None:
            where = {"prompt": prompt.id, "turn": turn, "method": method}
            differences.append(where | _difference(run.target.tokenizer, worst, plain[0].token_ids, output))
    return counts, differences


def _difference(tokenizer: Any, found: Comparison, plain: Sequence[int], output: Sequence[int]) -> dict[str, Any]:
    assert found.at is not None  # else they are identical
    texts = [tokenizer.decode(tokens[found.at : found.at + 1]) for tokens in (list(plain), list(output))]
    return {
        "kind": found.kind,
        "at": found.at,
        "plain_text": texts[0],
        "text": texts[1],
        "gap": found.gap,
        "noise": found.noise,
    }


def _by_category(run: Run) -> dict[str, Any]:
    """Rates by category; in batches, where categories share their rounds, only what is accepted."""
    batched = run.experiment.batch_size > 1
    categories: dict[str, Any] = {}
    for category in dict.fromkeys(prompt.category for prompt in run.prompts):
        units = [unit for unit in run.units if unit[0].category == category]
        plain = run.measured(PLAIN, units)
        categories[category] = {}
        for name in (PLAIN, *run.experiment.methods):
            answers = run.answers(name, units)
            if not answers:
                continue
            accepted = add([repeats[0].metrics for repeats in answers])
            row: dict[str, Any] = {"acceptance_length": accepted.acceptance_length, "turns": len(answers)}
            row |= {"tokens_per_second": None, "speedup": None}
            measured = run.measured(name, units)
            common = [group for group in plain if group in measured]
            total, baseline = fastest(measured, common), fastest(plain, common)
            if not batched and total and baseline:
                rates = total.tokens_per_second, baseline.tokens_per_second
                row |= {"tokens_per_second": rates[0], "speedup": rates[0] / rates[1]}
            categories[category][name] = row
    return categories


def _harness_overhead(results: Results) -> float | None:
    """The share of the run's time that was neither prefill, decoding nor compilation."""
    clocks: list[Answer | Pass] = [*results.passes.values(), *results.answers.values()]
    harness = sum(clock.harness_seconds for clock in clocks)
    decoding = sum(clock.prefill_seconds + clock.decode_seconds + clock.compile_seconds for clock in clocks)
    return harness / (harness + decoding) if harness + decoding else None
