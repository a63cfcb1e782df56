"""One evaluation: prompts decoded plainly and with each method, interleaved; results on disk as they are measured."""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from ml_collections import ConfigDict

from specjax import processes
from specjax.checkpoints.load import Target, load_target
from specjax.errors import ConfigError, SpecJAXError
from specjax.evaluate import costs, environment
from specjax.evaluate.compare import Generate, comparisons
from specjax.evaluate.experiment import PLAIN, Experiment, identity
from specjax.evaluate.files import write_json
from specjax.evaluate.prompts import Prompt, load_prompts
from specjax.evaluate.report import write_report
from specjax.evaluate.results import FILES, Answer, Pass, Results
from specjax.evaluate.summary import Run, fastest, summarise
from specjax.generate import GenerationResult, SpeculativeDecoder
from specjax.metrics import Metrics
from specjax.slots import Completions, completions
from specjax.tokenizer import decode_text, encode_prompt
from specjax.trace import spell

REFRESH_SECONDS = 60.0
"""Time between two writings of summary.json while a run goes on."""

BATCH_ROUNDS = 8
"""Rounds of a batch between two looks for rows that have finished."""

NUM_EXAMPLES = 6

Progress = Callable[[int, int, str], None]
Measured = TypeVar("Measured")


def evaluate(config: ConfigDict, workdir: str | os.PathLike[str], progress: Progress | None = None) -> dict[str, Any]:
    """Runs the experiment that a config describes; writes results.jsonl, summary.json and a report into workdir.

    Every result is appended and synced as it is measured; the same command again goes on where it stopped. After
    Ctrl-C summary and report hold what there is. What fails is recorded, and the run goes on.

    Prompts of several turns are answered turn by turn. The history of a turn holds plain decoding's own answers of
    repeat 0, for every method and every repeat, so that all of them decode the same prompt.

    Several processes (config.distributed) measure together; process 0 writes.

    Args:
        config: see configs/eval_smollm2.py, which comments on every field.
        progress: called with (done, total, description) after each measurement.

    Returns:
        The summary.

    Raises:
        SpecJAXError: a bad config, an unwritable workdir, or one that holds results of another experiment.
    """
    processes.join(config.get("distributed"))
    experiment = Experiment.from_config(config)
    _check_one_process(experiment)
    prompts = load_prompts(experiment.prompts, experiment.num_prompts, experiment.categories)
    same = identity(experiment, prompts)
    processes.same_everywhere(same, "config")
    with processes.own_folder(Path(workdir), FILES) as folder:
        results = Results(folder, same, environment.source_commit())
        target = load_target(experiment.target, dtype=experiment.dtype or None, mesh=experiment.mesh)
        if target.tokenizer is None:
            raise ConfigError(f"config.target={experiment.target!r}: has no tokenizer; expected its files beside it.")
        evaluation = _Evaluation(experiment, target, prompts, results, folder, progress)
        try:
            evaluation.measure()
            evaluation.measure_extras()
            summary = evaluation.write_summary(finished=True)
        except KeyboardInterrupt:
            evaluation.write_summary(finished=False)
            write_report([folder])
            raise
        if processes.is_writer():
            write_report([folder])
        processes.barrier("the end")
    return summary


class _Evaluation:
    """A run in progress."""

    def __init__(
        self,
        experiment: Experiment,
        target: Target,
        prompts: list[Prompt],
        results: Results,
        workdir: Path,
        progress: Progress | None,
    ):
        self.experiment, self.target, self.prompts, self.results = experiment, target, prompts, results
        self.workdir, self.progress = workdir, progress
        batch = experiment.batch_size
        self.decoders = {PLAIN: SpeculativeDecoder(target, None, max_batch_size=batch)}
        for name, method in experiment.methods.items():
            self.decoders[name] = SpeculativeDecoder(target, method, max_batch_size=batch)
        for decoder in self.decoders.values():
            decoder.requests([[0]], experiment.sampling)  # a parameter that fits no prompt is an error at once,
        self.others, not_run = _others(experiment, target)
        self.not_measured: dict[str, str] = {}
        self.run = Run(experiment, target, prompts, results, self.prompt_tokens, not_run, self.not_measured)
        self.total = len(self.run.units) * experiment.repeats * len([*self.decoders, *self.others])
        self.running: dict[str, Metrics] = {}
        self.encoded: dict[tuple[str, int], list[int]] = {}
        self.refreshed = self.mark = time.perf_counter()
        self.prompt_tokens(prompts[0], 0)  # and so are a missing chat template
        if experiment.costs or experiment.profile:
            for decoder in self.decoders.values():
                costs.check_context(decoder, experiment.step_context)  # and a context that is too long for costs
        self.warm: set[str] = set()
        self.capacity = self._capacity()

    def prompt_tokens(self, prompt: Prompt, turn: int) -> list[int]:
        """The token ids of a turn, earlier turns and plain decoding's answers to them included.

        Raises:
            SpecJAXError: an earlier turn has no answer, or the chat template refuses the messages.
        """
        key = prompt.id, turn
        if key not in self.encoded:
            answers = []
            for earlier in range(turn):
                answer = self.results.answers.get((prompt.id, earlier, PLAIN, 0))
                if answer is None or answer.error is not None:
                    raise SpecJAXError(f"turn {earlier} of prompt {prompt.id!r} has no answer that this could follow.")
                answers.append(answer.text)
            self.encoded[key] = self._encode(prompt.turns[: turn + 1], answers)
        return self.encoded[key]

    def _encode(self, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
        """The token ids of a conversation of turns and the answers to all of them but the last."""
        texts = [text for pair in itertools.zip_longest(turns, answers) for text in pair if text is not None]
        asked: Any = "\n\n".join(texts)
        if self.experiment.chat:
            asked = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
        return encode_prompt(self.target.tokenizer, asked, self.experiment.chat)

    def _capacity(self) -> int:
        """Positions that the longest conversation can need, so that the same programs serve all prompts."""
        longest, limit = 0, self.target.config.max_position
        for prompt in self.prompts:
            with contextlib.suppress(SpecJAXError):  # what is wrong with a prompt is recorded with its answers
                asked = len(self._encode(prompt.turns, [""] * (len(prompt.turns) - 1)))
                needed = asked + len(prompt.turns) * self.experiment.sampling.max_tokens
                longest = max(longest, needed if needed <= limit else 0)
        return longest

    def measure(self) -> None:
        """Measures what results.jsonl lacks."""
        self.mark = time.perf_counter()
        if self.experiment.batch_size == 1:
            for prompt, turn in self.run.units:
                for repeat in range(self.experiment.repeats):
                    for name in [*self.decoders, *self.others]:
                        if (prompt.id, turn, name, repeat) not in self.results.answers:
                            self._keep(self._answer(prompt, turn, name, repeat))
                        self._advance(name)
            return
        for turn in range(max(len(prompt.turns) for prompt in self.prompts)):
            for repeat in range(self.experiment.repeats):
                for name in self.decoders:
                    if (turn, name, repeat) not in self.results.passes:
                        self._keep(self._pass(turn, name, repeat))
                    self._advance(name)

    def _keep(self, measured: Answer | Pass) -> None:
        """Writes a measurement down, with the time since the last one that was neither prefill, decoding nor compiling.

        What writing takes counts for the next one.
        """
        now = time.perf_counter()
        spent = measured.prefill_seconds + measured.decode_seconds + measured.compile_seconds
        harness, self.mark = max(0.0, now - self.mark - spent), now
        self.results.append(dataclasses.replace(measured, harness_seconds=harness))
        metrics = measured.metrics
        if metrics is not None and metrics.num_tokens:
            name = measured.method
            self.running[name] = self.running[name] + metrics if name in self.running else metrics

    def _advance(self, name: str) -> None:
        if time.perf_counter() - self.refreshed > REFRESH_SECONDS:
            self.write_summary(finished=False)
        if self.progress:
            self.progress(len(self.results), self.total, _description(name, self.running.get(name)))

    def _answer(self, prompt: Prompt, turn: int, name: str, repeat: int) -> Answer:
        """One turn answered once by one method; what fails is an answer with an error."""
        answer = Answer(prompt.id, turn, prompt.category, name, repeat)
        if name in self.others:
            try:
                tokens = self.prompt_tokens(prompt, turn)
                if name not in self.warm:
                    self.others[name](tokens)
                    self.warm.add(name)
                return _answer_of_another(self.others[name], tokens, answer, self.target)
            except Exception as error:  # another library's: any kind
                return dataclasses.replace(answer, error=_text(error))
        with _recorded() as errors:
            return self._answer_of_ours(name, self.prompt_tokens(prompt, turn), answer)
        return dataclasses.replace(answer, error=errors[0])

    def _decode(self, name: str, tokens: list[int]) -> GenerationResult:
        """One prompt decoded by itself; drafts are traced, so that the examples need no program of their own."""
        sampling, traced = self.experiment.sampling, name != PLAIN
        return self.decoders[name].generate([tokens], sampling, min_capacity=self.capacity, trace=traced)

    def _answer_of_ours(self, name: str, tokens: list[int], answer: Answer) -> Answer:
        def generate() -> tuple[GenerationResult, float]:
            result = self._decode(name, tokens)
            return result, result.metrics.compile_seconds

        result, compile_seconds = _warmed_up(generate)
        check_finite(result.finish_reasons, self.target.name)
        metrics = result.metrics
        return dataclasses.replace(
            answer,
            token_ids=result.token_ids[0],
            text=result.texts[0],
            finish_reason=result.finish_reasons[0],
            acceptance_counts=metrics.acceptance_counts.tolist(),
            drafted=metrics.drafted,
            prefill_seconds=metrics.prefill_seconds,
            decode_seconds=metrics.decode_seconds,
            first_round_seconds=metrics.first_round_seconds,
            compile_seconds=compile_seconds,
        )

    def _pass(self, turn: int, name: str, repeat: int) -> Pass:
        """One turn of every prompt that has it, through the rows of a batch."""
        decoder = self.decoders[name]
        answers: dict[str, Answer] = {}
        asked: list[tuple[Answer, list[int]]] = []
        for prompt in self.prompts:
            if turn >= len(prompt.turns):
                continue
            answer = Answer(prompt.id, turn, prompt.category, name, repeat)
            with _recorded() as errors:
                tokens = self.prompt_tokens(prompt, turn)
                decoder.requests([tokens], self.experiment.sampling)
                asked.append((answer, tokens))
            answers[prompt.id] = dataclasses.replace(answer, error=errors[0] if errors else None)
        done = Pass(turn, name, repeat)
        if asked:
            with _recorded() as errors:
                (found, stream), compile_seconds = _warmed_up(lambda: self._complete(decoder, asked))
                answers |= found
                done = Pass(turn, name, repeat, stream.prefill_seconds, stream.decode_seconds, compile_seconds)
            for answer, _ in asked if errors else ():
                answers[answer.prompt] = dataclasses.replace(answer, error=errors[0])
        return dataclasses.replace(done, answers=list(answers.values()))

    def _complete(
        self, decoder: SpeculativeDecoder, prompts: list[tuple[Answer, list[int]]]
    ) -> tuple[tuple[dict[str, Answer], Completions], float]:
        """Answers by prompt, the iterator that they came from, which holds its times, and seconds of compiling."""
        found = {}
        stream = completions(decoder, [tokens for _, tokens in prompts], self.experiment.sampling, rounds=BATCH_ROUNDS)
        for done in stream:
            answer = prompts[done.index][0]
            found[answer.prompt] = dataclasses.replace(
                answer,
                error=_not_finite(self.target.name) if done.finish_reason == "error" else None,
                token_ids=done.token_ids,
                text=decode_text(self.target.tokenizer, done.token_ids),
                finish_reason=done.finish_reason,
                acceptance_counts=done.acceptance_counts.tolist(),
                drafted=done.drafted,
            )
        return (found, stream), stream.compile_seconds

    def measure_extras(self) -> None:
        """Measures what is measured once a run: costs, the profile, and the examples. What fails is tried again when
        the run is gone on with.
        """
        experiment, extras, context = self.experiment, self.results.extras, self._context()

        def phases() -> dict[str, Any]:
            return {
                name: costs.phase_milliseconds(decoder, context, experiment.sampling)
                for name, decoder in self.decoders.items()
            }

        def curves() -> dict[str, Any]:
            batches = sorted({1, experiment.batch_size, *experiment.cost_batches})
            return costs.measure_costs(self.decoders, extras["phases"], context, experiment.sampling, batches)

        if experiment.costs or experiment.profile:
            self._measure_once("phases", "parts of a round", phases)
        if experiment.costs and "phases" in extras:
            self._measure_once("costs", "costs", curves)
        if experiment.methods:
            self._measure_once("examples", "examples", lambda: list(self._examples()))

    def _measure_once(self, name: str, what: str, measure: Callable[[], Any]) -> None:
        if name in self.results.extras:
            return
        if self.progress:
            self.progress(self.total, self.total, what)
        with _recorded() as errors:
            self.results.append_extra(name, measure())
        if errors:
            self.not_measured[what] = errors[0]

    def _context(self) -> list[int]:
        """step_context token ids of the prompts' own text, again from the start where they are fewer."""
        encoded = (encode_prompt(self.target.tokenizer, prompt.text, False) for prompt in self.prompts)
        tokens = itertools.cycle(itertools.chain.from_iterable(encoded))
        return list(itertools.islice(tokens, self.experiment.step_context))

    def _examples(self) -> Iterator[dict[str, Any]]:
        """One answer a category, of the fastest method, round by round."""

        def rate(name: str) -> float:
            measured = self.run.measured(name)
            total = fastest(measured, measured)
            return total.tokens_per_second if total else 0.0

        name = processes.of_first(max(self.experiment.methods, key=rate))
        first = {prompt.category: prompt for prompt in reversed(self.prompts)}
        for category in list(dict.fromkeys(prompt.category for prompt in self.prompts))[:NUM_EXAMPLES]:
            prompt = first[category]
            with _recorded():
                result = self._decode(name, self.prompt_tokens(prompt, 0))
                rounds = spell(result.traces[0], self.target.tokenizer) if result.traces else []
                yield {
                    "prompt": prompt.id,
                    "category": category,
                    "method": name,
                    "question": prompt.text,
                    "rounds": [round_._asdict() for round_ in rounds],
                }

    def write_summary(self, finished: bool) -> dict[str, Any]:
        """Writes summary.json."""
        summary = summarise(self.run, finished)
        write_json(self.workdir / "summary.json", summary)
        self.refreshed = time.perf_counter()
        return summary


def _check_one_process(experiment: Experiment) -> None:
    """Raises:
    ConfigError: what is asked for is measured by one process only, and there are more.
    """
    for name in ("costs", "profile"):
        if getattr(experiment, name) and jax.process_count() > 1:
            raise ConfigError(f"config.{name}=True: is measured in one process; expected False with several of them.")


def _others(experiment: Experiment, target: Target) -> tuple[dict[str, Generate], dict[str, str]]:
    """See comparisons; other libraries know nothing of our processes."""
    if jax.process_count() > 1:
        return {}, dict.fromkeys(experiment.compare, "other libraries are compared in one process")
    return comparisons(experiment, target)


@contextlib.contextmanager
def _recorded() -> Iterator[list[str]]:
    """Takes down what went wrong with one measurement, so that the run can go on."""
    errors: list[str] = []
    try:
        yield errors
    except (SpecJAXError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() > 1 and not isinstance(error, SpecJAXError):
            raise  # it need not have happened in the others
        errors.append(_text(error))


def _warmed_up(run: Callable[[], tuple[Measured, float]]) -> tuple[Measured, float]:
    """What a run gives, done again if something had to be compiled for it: the first time is then the warm-up.

    Args:
        run: gives its result and seconds of compiling.

    Returns:
        The result, and seconds of the warm-up; 0 without one.
    """
    began = time.perf_counter()
    result, compile_seconds = run()
    if not compile_seconds:
        return result, 0.0
    warming_up = time.perf_counter() - began
    return run()[0], warming_up


def _text(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _answer_of_another(generate: Generate, tokens: list[int], answer: Answer, target: Target) -> Answer:
    result = generate(tokens)
    return dataclasses.replace(
        answer,
        token_ids=result.token_ids,
        text=decode_text(target.tokenizer, result.token_ids),
        finish_reason="stop" if result.token_ids[-1] in target.stop_token_ids else "length",
        timed_tokens=result.timed_tokens,
        prefill_seconds=result.prefill_seconds,
        decode_seconds=result.decode_seconds,
    )


def _description(name: str, running: Metrics | None) -> str:
    if running is None:
        return name
    accepted = f", {running.acceptance_length:.2f} tokens a round" if running.drafted else ""
    return f"{name}: {running.tokens_per_second:.1f} tokens/s{accepted}"


def check_finite(finish_reasons: Sequence[str], name: str) -> None:
    """Refuses outputs of which one ended because the logits of a target of this name were not finite.

    Raises:
        SpecJAXError: there is one.
    """
    if "error" in finish_reasons:
        raise SpecJAXError(_not_finite(name))


def _not_finite(name: str) -> str:
    return (
        f"target={name!r}: gave logits that are not finite (NaN); expected numbers. The checkpoint may be damaged, "
        "or dtype too narrow: try --config.dtype=float32."
    )
