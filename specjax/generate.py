"""Prompts -> texts: prefill, the loop on the device, streaming."""

import contextlib
import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import cache as kv
from specjax import processes
from specjax.checkpoints.load import Target
from specjax.checkpoints.pretrained import cache_dir
from specjax.config import MeshConfig, SamplingParams, SpeculativeConfig
from specjax.drafters import build_drafter, draft_model_for
from specjax.drafters.base import Drafter, Features
from specjax.drafters.paced import PacedParams
from specjax.errors import ConfigError, DraftWarning, SpecJAXError
from specjax.metrics import Metrics
from specjax.pacing import round_seconds
from specjax.sampling import Adjustment, SamplingState, ThinkingPhase
from specjax.sharding import fetch, on_mesh, put, state_shardings
from specjax.step import ERROR, LENGTH, PAD, RUNNING, STOP, DecodeState, Params, System, speculative_step
from specjax.target import decoder
from specjax.tokenizer import decode_text, encode_prompt, think_tokens
from specjax.trace import Round, empty_trace, row_rounds, spell
from specjax.verify import RULES, build_rule
from specjax.view import AnswerView

PREFILL_BUCKETS = (16, 32, 64, 128, 256, 512)
"""Window lengths that prefill is compiled for; a longer prompt runs through the last one several times."""

STREAM_ROUNDS = 4
"""Rounds between two looks at the device while streaming or looking for stop strings."""

FINISH_REASONS = {STOP: "stop", LENGTH: "length", ERROR: "error"}
MANY_DRAFTS, HARDLY_ANY = 200, 0.03
"""After so many drafts, fewer than so many accepted a round mean that something is wrong with the drafter."""

PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
STOP_TOKENS_MULTIPLE = 8
"""The stop token table is padded to a multiple of this, so that its size does not cause a compilation."""


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What generate returns; lists are in the order of the prompts.

    Attributes:
        texts: decoded output without special tokens and without the stop string ("" where the target has no tokenizer).
        token_ids: output tokens, a stop token included.
        finish_reasons: "stop", "length", or "error" for a row whose logits were not finite.
        metrics: of the whole call.
        lossless: whether the acceptance rule keeps the target's distribution.
        logprobs: for each prompt None, or where SamplingParams.logprobs asks for it the target's log-probability (nats,
            before bias, penalties and temperature) of each of token_ids.
        traces: for each prompt the rounds that gave token_ids; None unless generate was called with trace=True.
        tokenizer: the target's, for show().
    """

    texts: list[str]
    token_ids: list[list[int]]
    finish_reasons: list[str]
    metrics: Metrics
    lossless: bool
    logprobs: list[list[float] | None]
    traces: list[tuple[Round, ...]] | None = None
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False)

    def show(self, index: int | None = None) -> AnswerView:
        """The answers with each token coloured by its origin: in colour in notebooks and terminals.

        Args:
            index: of the one prompt to show; None shows all.

        Raises:
            SpecJAXError: the rounds were not recorded, or there is no such prompt.
        """
        if self.traces is None:
            raise SpecJAXError(
                "GenerationResult.traces=None: the rounds were not recorded, so the origin of tokens is not known; "
                "call generate(..., trace=True) and show() its result."
            )
        if index is not None and not 0 <= index < len(self.traces):
            raise SpecJAXError(f"index={index}: expected a prompt's, 0 <= index < {len(self.traces)}, or None for all.")
        chosen = self.traces if index is None else self.traces[index : index + 1]
        return AnswerView([spell(rounds, self.tokenizer) for rounds in chosen])


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """What became known of one prompt's output since the last chunk.

    Attributes:
        index: of the prompt.
        text: new text; never part of a character or of a stop string.
        finish_reason: None while the row goes on.
    """

    index: int
    text: str
    finish_reason: str | None


def init_state(
    system: System, init_cache: Callable[[int, int], Any], params: Params, rows: dict[str, Any]
) -> DecodeState:
    """The state before prefill, with empty caches.

    Args:
        init_cache: (batch, capacity) -> the target's empty cache.
        rows: inputs of each row, as batch_rows gives them.
    """
    batch, capacity = rows["tokens"].shape
    key = jax.vmap(lambda low, high: jax.random.fold_in(jax.random.key(low), high))(rows["seed_low"], rows["seed_high"])
    G = system.drafter.num_speculative_tokens
    return DecodeState(
        tokens=rows["tokens"],
        logprobs=jnp.zeros((batch, capacity)) if "logprobs" in rows else None,
        length=rows["length"],
        max_length=rows["max_length"],
        stop_tokens=rows["stop_tokens"],
        finish=rows["finish"],
        sampling=SamplingState(
            **{name: rows[name] for name in ("temperature", "top_k", "top_p", "min_p")},
            key=key,
            adjustment=_adjustment(rows),
            phase=_phase(rows),
        ),
        cache=init_cache(batch, capacity),
        drafter=system.drafter.init(params.drafter, batch, capacity),
        num_drafted=jnp.zeros(batch, jnp.int32),
        acceptance_counts=jnp.zeros((batch, G + 1), jnp.int32),
        trace=empty_trace(batch, capacity, G) if "trace" in rows else None,
    )


def prefill(system: System, params: Params, state: DecodeState, start: jax.Array, size: int) -> DecodeState:
    """Runs positions start .. start + size - 1 of every row's prompt into the caches.

    Rows with shorter prompts compute entries behind their length; the first rounds overwrite them, the mask hides them.
    """
    rows = state.length.size
    window = jax.lax.dynamic_slice_in_dim(state.tokens, start, size, axis=1)
    starts = jnp.full((rows,), start, jnp.int32)
    window = jnp.maximum(window, 0)
    out = system.forward(params.target, window, starts, state.cache, system.drafter.taps, False)
    features = Features(window, starts, out.taps, out.final)
    num_valid = jnp.clip(state.length - 1 - start, 0, size)
    drafter_state = system.drafter.prefill(params.drafter, state.drafter, state.context, features, num_valid)
    return state.replace(cache=out.cache.keep(starts, num_valid), drafter=drafter_state)


def decode(system: System, params: Params, state: DecodeState, num_rounds: jax.Array) -> DecodeState:
    """Rounds until every row is done, num_rounds at most, without a host read."""

    def unfinished(carry):
        index, state = carry
        return (index < num_rounds) & ~state.done.all()

    def one_round(carry):
        index, state = carry
        return index + 1, speculative_step(system, params, state)

    return jax.lax.while_loop(unfinished, one_round, (0, state))[1]


def place(state: DecodeState, fresh: DecodeState, rows: jax.Array) -> DecodeState:
    """Puts the rows of another state, of the same capacity, in the place of some rows; those beyond the batch nowhere.

    Args:
        rows: int32[B'], where each row of fresh goes.
    """

    def put(all_rows: jax.Array, new: jax.Array) -> jax.Array:
        return all_rows.at[rows].set(new, mode="drop") if all_rows.ndim else all_rows

    return jax.tree.map(put, state, fresh)


class Programs:
    """The compiled programs of one system: one for each shape, compiled when first needed, and never again.

    Attributes:
        compile_seconds: spent on compiling so far.
        num_compiled: programs so far.
    """

    def __init__(
        self,
        system: System,
        init_cache: Callable[[int, int], Any],
        enforce_eager: bool = False,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.system = system
        self.mesh = mesh
        self.compile_seconds = 0.0
        self.num_compiled = 0
        self._init_cache = init_cache
        self._eager = enforce_eager
        self._compiled: dict[tuple, Any] = {}

    def init(self, params: Params, rows: dict[str, np.ndarray]) -> DecodeState:
        """See init_state."""
        init = functools.partial(init_state, self.system, self._init_cache)
        shapes = tuple((name, *array.shape) for name, array in rows.items())
        out = self._shardings(jax.eval_shape(init, params, rows))
        return self._run(("init", *shapes), jax.jit(init, out_shardings=out), params, rows)

    def prefill(self, params: Params, state: DecodeState, start: int, size: int) -> DecodeState:
        """See prefill. The state is donated."""
        run = functools.partial(prefill, self.system, size=size)
        function = jax.jit(run, donate_argnums=1, out_shardings=self._shardings(state))
        return self._run(("prefill", size, *_state_key(state)), function, params, state, np.int32(start))

    def decode(self, params: Params, state: DecodeState, num_rounds: int) -> DecodeState:
        """See decode. The state is donated."""
        return self._run(("decode", *_state_key(state)), self.decoding(state), params, state, np.int32(num_rounds))

    def decoding(self, state: DecodeState) -> Any:
        """decode as what jax.jit gives, for this state or its shapes; to be lowered with the mesh set."""
        run = functools.partial(decode, self.system)
        return jax.jit(run, donate_argnums=1, out_shardings=self._shardings(state))

    def place(self, state: DecodeState, fresh: DecodeState, rows: np.ndarray) -> DecodeState:
        """See place. The state is donated."""
        key = "place", rows.size, *_state_key(state)
        function = jax.jit(place, donate_argnums=0, out_shardings=self._shardings(state))
        return self._run(key, function, state, fresh, rows)

    def _shardings(self, state: Any) -> Any:
        return None if self.mesh is None else state_shardings(state, self.mesh)

    def _run(self, key: tuple, function: Any, *args: Any) -> Any:
        if self._eager:
            with jax.disable_jit():
                return function(*args)
        args = on_mesh(args, self.mesh)
        if key not in self._compiled:
            began = time.perf_counter()
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                self._compiled[key] = function.lower(*args).compile()
            self.compile_seconds += time.perf_counter() - began
            self.num_compiled += 1
        return self._compiled[key](*args)


def _state_key(state: DecodeState) -> tuple:
    return (*state.tokens.shape, state.stop_tokens.shape[1], jax.tree.structure(state))


def _adjustment(rows: dict[str, jax.Array]) -> Adjustment | None:
    """The rows' bias and penalties, before any output; None where no row has one."""
    if "bias" not in rows:
        return None
    batch, capacity = rows["tokens"].shape
    prompt = jnp.arange(capacity) < rows["length"][:, None]
    tokens = jnp.where(prompt, rows["tokens"], rows["tokens"][:, :1])
    in_prompt = jnp.zeros(rows["bias"].shape, bool).at[jnp.arange(batch)[:, None], tokens].set(True)
    return Adjustment(
        **{name: rows[name] for name in ("bias", *PENALTIES)},
        in_prompt=in_prompt,
        counts=jnp.zeros(in_prompt.shape, jnp.int32),
    )


def _phase(rows: dict[str, jax.Array]) -> ThinkingPhase | None:
    """The phase that each row's prompt leaves it in; None where no rule asks.

    Prompts that neither open nor close the reasoning leave it open: models that reason begin with it.
    """
    if "think_tokens" not in rows:
        return None
    start, end = rows["think_tokens"]
    return ThinkingPhase(jnp.ones(rows["length"].shape, bool), start, end).observe(rows["tokens"], rows["length"])


class SpeculativeDecoder:
    """Decodes prompts with a target and a drafting method.

    Args:
        target: from load_target.
        config: a SpeculativeConfig, or None for plain decoding.
        mesh: how many devices to spread over; None for the target's own mesh, or one device.
        max_batch_size: prompts decoded side by side; more are decoded in groups.
        draft: a loaded draft model, instead of config.model.

    Raises:
        ConfigError: the config does not fit the target; names the field.

    Example:
        >>> target = specjax.load_target("smollm2-135m-instruct")
        >>> decoder = specjax.SpeculativeDecoder(target, specjax.SpeculativeConfig(method="ngram"))
        >>> decoder.generate(["Name three primary colours."]).texts[0]
    """

    def __init__(
        self,
        target: Target,
        config: SpeculativeConfig | None = None,
        mesh: MeshConfig | None = None,
        max_batch_size: int = 8,
        draft: Target | None = None,
    ):
        if max_batch_size < 1:
            raise ConfigError(f"max_batch_size={max_batch_size}: expected an integer >= 1.")
        if config is not None and config.enforce_eager and jax.process_count() > 1:
            raise ConfigError("SpeculativeConfig.enforce_eager=True: is for one process; expected False with several.")
        if mesh is not None:
            target = target.on(mesh)
        self.target = target
        self.config = config
        self.max_batch_size = max_batch_size
        enable_compilation_cache()
        drafter, draft_params = self._drafter(draft)
        self.rule_name, rule = build_rule(config)
        self.think_tokens = think_tokens(target.tokenizer) if RULES[self.rule_name].needs_phase else None
        if RULES[self.rule_name].needs_phase and self.think_tokens is None:
            raise ConfigError(
                f"SpeculativeConfig.rejection_sampling_strategy={self.rule_name!r}: the target's tokenizer "
                "has no tokens such as <think> and </think>, between which this rule applies; choose another rule for "
                "this model."
            )
        system = System(functools.partial(decoder.apply, target.config), drafter, rule)
        self.params = on_mesh(Params(target.params, draft_params), target.mesh)
        self._round_seconds: dict[int, np.ndarray] = {}
        self.programs = Programs(
            system,
            lambda batch, capacity: decoder.init_cache(target.config, batch, capacity, target.dtype),
            enforce_eager=config.enforce_eager if config else False,
            mesh=target.mesh,
        )

    def params_for(self, rows: dict[str, np.ndarray]) -> Params:
        """The weights that a batch of such rows decodes with; where the number of drafts is "auto", with what rounds of
        this batch size cost, which is measured once.
        """
        if not isinstance(self.params.drafter, PacedParams):
            return self.params
        batch = rows["length"].size
        if batch not in self._round_seconds:
            measured = round_seconds(self.programs, self.params, rows)
            self._round_seconds[batch] = np.array(processes.of_first(measured.tolist()), np.float32)
        seconds = jnp.asarray(self._round_seconds[batch])
        return self.params._replace(drafter=self.params.drafter._replace(seconds=seconds))

    def _drafter(self, draft: Target | None) -> tuple[Drafter, Any]:
        if draft is None:
            return build_drafter(self.config, self.target)
        if self.config is None or self.config.method != "draft_model":
            raise ConfigError("draft: a draft model was given; expected SpeculativeConfig(method='draft_model').")
        return draft_model_for(draft, self.target, self.config)

    def generate(
        self,
        prompts: str | Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        chat: bool = True,
        min_capacity: int = 0,
        trace: bool = False,
    ) -> GenerationResult:
        """Decodes prompts to their end.

        Args:
            prompts: one text, or a list whose items are texts, chat messages ([{"role", "content"}, ...]) or token ids.
            sampling_params: one for all prompts or one each; None is greedy.
            chat: put texts through the tokenizer's chat template.
            min_capacity: cache positions to reserve at least, so that calls of different length share one program.
            trace: record every round, for GenerationResult.traces and show().

        Raises:
            SpecJAXError: an empty or over-long prompt, parameters that don't fit; names the prompt.
        """
        requests = self.requests(prompts, sampling_params, chat)
        outputs: list[_Output] = []
        metrics: Metrics | None = None
        for first in range(0, len(requests), self.max_batch_size):
            batch = _Batch(self, requests[first : first + self.max_batch_size], min_capacity, trace)
            for _ in batch.run(looks=any(request.params.stop for request in batch.requests)):
                pass
            outputs += batch.outputs()
            metrics = batch.metrics() if metrics is None else metrics + batch.metrics()
        assert metrics is not None  # requests are never empty
        self.warn_if_nothing_is_accepted(metrics)
        return _result(outputs, metrics, RULES[self.rule_name].lossless, self.target.tokenizer)

    def stream(
        self,
        prompts: str | Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        chat: bool = True,
    ) -> "Stream":
        """Like generate, but an iterator of StreamChunk; its result attribute is set at the end.

        At most max_batch_size prompts.
        """
        requests = self.requests(prompts, sampling_params, chat)
        if len(requests) > self.max_batch_size:
            raise SpecJAXError(
                f"prompts: {len(requests)} to stream; expected at most max_batch_size={self.max_batch_size}."
            )
        return Stream(_Batch(self, requests, min_capacity=0, trace=False), RULES[self.rule_name].lossless)

    def warn_if_nothing_is_accepted(self, metrics: Metrics) -> None:
        """Says what to check where a head or draft model was of no use."""
        if self.config is None or self.config.method == "ngram" or metrics.drafted < MANY_DRAFTS:
            return
        if metrics.acceptance_length < 1.0 + HARDLY_ANY:
            warnings.warn(
                f"acceptance_length={metrics.acceptance_length:.2f}: of {metrics.drafted} drafts hardly any was "
                f"accepted, so speculation costs time. Check that the {self.config.method} drafter was made for "
                f"{self.target.name} (same weights, same tokenizer), that its config.json names the layers it was "
                "trained on in the right convention (state entering a layer, not leaving it) and its "
                "norm_before_residual, that prompts go through the chat template it was trained with (chat=True), and "
                "that the rule is lossless.",
                DraftWarning,
                stacklevel=3,
            )

    def requests(
        self,
        prompts: str | Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        chat: bool = True,
    ) -> list["Request"]:
        """Checks and tokenises prompts, as generate takes them.

        Raises:
            SpecJAXError: names the prompt and what is wrong with it.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise SpecJAXError("prompts=[]: expected at least one prompt.")
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise SpecJAXError(
                f"sampling_params: {len(sampling_params)} given for {len(prompts)} prompts; expected one, or one each."
            )
        return [
            self._request(index, prompt, params, chat)
            for index, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    def _request(self, index: int, prompt: Any, params: SamplingParams, chat: bool) -> "Request":
        try:
            tokens = encode_prompt(self.target.tokenizer, prompt, chat, self.target.config.vocab_size)
        except SpecJAXError as error:
            raise type(error)(f"prompts[{index}]: {error}") from error
        longest = self.target.config.max_position - 1
        if len(tokens) > longest:
            raise SpecJAXError(
                f"prompts[{index}]: has {len(tokens)} tokens; expected at most {longest}, the target's context less "
                "one token of output. Shorten it."
            )
        if RULES[self.rule_name].greedy_only and not params.greedy:
            raise ConfigError(
                f"SamplingParams.temperature={params.temperature}: rejection_sampling_strategy={self.rule_name!r} "
                "decodes at temperature 0 only; use 'residual' to sample."
            )
        if params.stop and self.target.tokenizer is None:
            raise ConfigError(f"SamplingParams.stop={params.stop}: the target has no tokenizer; use stop_token_ids.")
        vocab_size = self.target.config.vocab_size
        foreign = [token for token in params.stop_token_ids if token >= vocab_size]
        if foreign:
            raise ConfigError(
                f"SamplingParams.stop_token_ids: {foreign[0]} is no token; expected 0 <= id < {vocab_size}."
            )
        unknown = [token for token, _ in params.logit_bias if token >= vocab_size]
        if unknown:
            raise ConfigError(f"SamplingParams.logit_bias: {unknown[0]} is no token; expected 0 <= id < {vocab_size}.")
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.target.stop_token_ids))
        return Request(index, tokens, params, tuple(sorted(stops)))


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that has been checked and tokenised.

    Attributes:
        index: among the prompts of its call.
        tokens: of the prompt.
        params: how it decodes.
        stop_tokens: that end it.
    """

    index: int
    tokens: list[int]
    params: SamplingParams
    stop_tokens: tuple[int, ...]

    def longest(self, owner: "SpeculativeDecoder") -> int:
        """Cache positions that the row may write: its longest text, and the drafts of its last round."""
        context = owner.target.config.max_position
        drafter = owner.programs.system.drafter
        return min(len(self.tokens) + self.params.max_tokens, context) + max(
            drafter.num_speculative_tokens, drafter.reach
        )


@dataclasses.dataclass(frozen=True)
class _Output:
    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[float] | None
    trace: tuple[Round, ...] | None


class Stream:
    """An iterator of StreamChunk.

    Attributes:
        result: the GenerationResult, once the iterator is exhausted; None before.
    """

    def __init__(self, batch: "_Batch", lossless: bool):
        self.result: GenerationResult | None = None
        self._chunks = self._iterate(batch, lossless)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> StreamChunk:
        return next(self._chunks)

    def _iterate(self, batch: "_Batch", lossless: bool) -> Iterator[StreamChunk]:
        shown = [""] * len(batch.requests)
        finished: set[int] = set()
        for _ in batch.run(looks=True):
            for index, output in enumerate(batch.outputs()):
                if index in finished:
                    continue
                safe = output.text
                if output.finish_reason is None:
                    safe = _settled(output.text, batch.requests[index].params.stop)
                else:
                    finished.add(index)
                if len(safe) > len(shown[index]) or output.finish_reason:
                    yield StreamChunk(index, safe[len(shown[index]) :], output.finish_reason)
                    shown[index] = max(shown[index], safe, key=len)
        metrics = batch.metrics()
        batch.owner.warn_if_nothing_is_accepted(metrics)
        self.result = _result(batch.outputs(), metrics, lossless, batch.owner.target.tokenizer)


class _Batch:
    """Requests that decode side by side, from prompt to output."""

    def __init__(self, owner: SpeculativeDecoder, requests: list[Request], min_capacity: int, trace: bool):
        self.owner = owner
        self.requests = requests
        self.min_capacity = min_capacity
        self.trace = trace
        self.batch = min(owner.max_batch_size, 1 << (len(requests) - 1).bit_length())
        self.seconds = {"prefill": 0.0, "first_round": 0.0, "decode": 0.0}
        self.compile_seconds = 0.0
        self.snapshot: dict[str, Any] = {}
        self.stopped: dict[int, _Output] = {}

    def run(self, looks: bool) -> Iterator[None]:
        """Decodes; yields each time that outputs() has news: after every few rounds with looks, else only once."""
        programs = self.owner.programs
        compiled_before = programs.compile_seconds

        @contextlib.contextmanager
        def timed(*names):
            began, compiled = time.perf_counter(), programs.compile_seconds
            yield
            spent = time.perf_counter() - began - (programs.compile_seconds - compiled)
            for name in names:
                self.seconds[name] += spent

        windows = prefill_windows(max(len(request.tokens) for request in self.requests) - 1)
        rows = self._rows(windows)
        params = self.owner.params_for(rows)
        with timed("prefill"):
            state = programs.init(params, rows)
            for start, size in windows:
                state = programs.prefill(params, state, start, size)
            jax.block_until_ready(state.length if not windows else state.cache)
        with timed("first_round", "decode"):
            state = programs.decode(params, state, 1)
            self._look(state)
        state = self._stop_at_strings(state)
        while (self.snapshot["finish"] == RUNNING).any():
            if looks:
                yield
            with timed("decode"):
                state = programs.decode(params, state, STREAM_ROUNDS if looks else np.iinfo(np.int32).max)
                self._look(state)
            state = self._stop_at_strings(state)
        self.compile_seconds = programs.compile_seconds - compiled_before
        yield

    def _rows(self, windows: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        longest = max(request.longest(self.owner) for request in self.requests)
        prefilled = sum(windows[-1]) if windows else 0
        capacity = kv.round_capacity(max(longest, prefilled, self.min_capacity))
        rows = batch_rows(self.owner, self.requests, self.batch, capacity, self.requests)
        return rows | ({"trace": np.zeros(())} if self.trace else {})

    def _look(self, state: DecodeState) -> None:
        """The one place that reads the device."""
        names = ("tokens", "length", "finish", "num_drafted", "acceptance_counts", "logprobs", "trace")
        arrays = fetch([getattr(state, name) for name in names])
        self.snapshot = dict(zip(names, arrays, strict=True))

    def _stop_at_strings(self, state: DecodeState) -> DecodeState:
        """Ends rows whose text holds one of their stop strings."""
        tokenizer = self.owner.target.tokenizer
        newly = []
        for row, request in enumerate(self.requests):
            if row in self.stopped or not request.params.stop:
                continue
            tokens = self._tokens(row)
            if first_stop(decode_text(tokenizer, tokens), request.params.stop) is None:
                continue
            # The stop string that is complete first ends the row, however many tokens arrived since the last look.
            num = next(
                n
                for n in range(1, len(tokens) + 1)
                if first_stop(decode_text(tokenizer, tokens[:n]), request.params.stop) is not None
            )
            text = decode_text(tokenizer, tokens[:num])
            text = text[: first_stop(text, request.params.stop)]
            self.stopped[row] = _Output(text, tokens[:num], "stop", self._logprobs(row, num), self._rounds(row, num))
            newly.append(row)
        if not newly:
            return state
        self.snapshot["finish"] = self.snapshot["finish"].copy()
        self.snapshot["finish"][newly] = STOP
        return state.replace(finish=put(self.snapshot["finish"], state.finish.sharding))

    def _tokens(self, row: int) -> list[int]:
        prompt = len(self.requests[row].tokens)
        return self.snapshot["tokens"][row, prompt : self.snapshot["length"][row]].tolist()

    def _logprobs(self, row: int, num: int) -> list[float] | None:
        """Of the first num tokens of a row's output, if its request asks for them."""
        request = self.requests[row]
        if not request.params.logprobs:
            return None
        prompt = len(request.tokens)
        return self.snapshot["logprobs"][row, prompt : prompt + num].tolist()

    def _rounds(self, row: int, num: int) -> tuple[Round, ...] | None:
        """Of the first num tokens of a row's output, if they are recorded."""
        trace = self.snapshot["trace"]
        if trace is None:
            return None
        return row_rounds(
            trace.drafts[row], trace.num_new[row], len(self.requests[row].tokens), self._tokens(row)[:num]
        )

    def _output_tokens(self, row: int) -> list[int]:
        return self.stopped[row].token_ids if row in self.stopped else self._tokens(row)

    def outputs(self) -> list[_Output]:
        """What is known of each request's output."""
        tokenizer = self.owner.target.tokenizer
        outputs = []
        for row in range(len(self.requests)):
            tokens = self._tokens(row)
            reason = FINISH_REASONS.get(int(self.snapshot["finish"][row]))
            extras = self._logprobs(row, len(tokens)), self._rounds(row, len(tokens))
            outputs.append(self.stopped.get(row) or _Output(decode_text(tokenizer, tokens), tokens, reason, *extras))
        return outputs

    def metrics(self) -> Metrics:
        rows = len(self.requests)
        return Metrics(
            acceptance_counts=self.snapshot["acceptance_counts"][:rows].sum(axis=0).astype(np.int64),
            drafted=int(self.snapshot["num_drafted"][:rows].sum()),
            num_tokens=sum(len(self._output_tokens(row)) for row in range(rows)),
            prefill_seconds=self.seconds["prefill"],
            decode_seconds=self.seconds["decode"],
            first_round_seconds=self.seconds["first_round"],
            compile_seconds=self.compile_seconds,
        )


def batch_rows(
    owner: SpeculativeDecoder, requests: Sequence[Request], batch: int, capacity: int, peers: Sequence[Request]
) -> dict[str, np.ndarray]:
    """The per-row inputs of a state of so many rows. Rows beyond the requests are done from the start.

    Args:
        peers: all requests that states of this structure will hold: programs carry biases, penalties and
            log-probabilities only where one of them asks.
    """
    num_stops = max(len(request.stop_tokens) for request in peers)
    rows = finished_rows(batch, capacity, num_stops)
    for row, request in enumerate(requests):
        params, length, seed = request.params, len(request.tokens), request.params.seed or 0
        values = {
            "length": length,
            "max_length": min(length + params.max_tokens, owner.target.config.max_position),
            "finish": RUNNING,
            "temperature": params.temperature,
            "top_k": min(params.top_k, owner.target.config.vocab_size),
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed_low": seed & 0xFFFFFFFF,
            "seed_high": seed >> 32,
        }
        rows["tokens"][row, :length] = request.tokens
        rows["stop_tokens"][row, : len(request.stop_tokens)] = request.stop_tokens
        for name, value in values.items():
            rows[name][row] = value
    return rows | _optional_rows(owner, requests, batch, peers)


def finished_rows(batch: int, capacity: int, num_stops: int = 1) -> dict[str, np.ndarray]:
    """The per-row inputs of a state whose rows are all done from the start, with room for so many stop tokens."""
    num_stops = -(-max(num_stops, 1) // STOP_TOKENS_MULTIPLE) * STOP_TOKENS_MULTIPLE
    return {
        "tokens": np.zeros((batch, capacity), np.int32),
        "length": np.ones(batch, np.int32),
        "max_length": np.ones(batch, np.int32),
        "stop_tokens": np.full((batch, num_stops), PAD, np.int32),
        "finish": np.full(batch, LENGTH, np.int32),
        "temperature": np.zeros(batch, np.float32),
        "top_k": np.zeros(batch, np.int32),
        "top_p": np.ones(batch, np.float32),
        "min_p": np.zeros(batch, np.float32),
        "seed_low": np.zeros(batch, np.uint32),
        "seed_high": np.zeros(batch, np.uint32),
    }


def _optional_rows(
    owner: SpeculativeDecoder, requests: Sequence[Request], batch: int, peers: Sequence[Request]
) -> dict[str, np.ndarray]:
    """Inputs that are there only where a request or the rule asks: programs without them carry nothing."""
    rows: dict[str, np.ndarray] = {}
    if any(request.params.logprobs for request in peers):
        rows["logprobs"] = np.zeros(())
    if owner.think_tokens is not None:
        rows["think_tokens"] = np.array(owner.think_tokens, np.int32)
    if any(request.params.adjusts_logits for request in peers):
        rows["bias"] = np.zeros((batch, owner.target.config.vocab_size), np.float32)
        for name in PENALTIES:
            rows[name] = np.full(batch, SamplingParams.model_fields[name].default, np.float32)
        for row, request in enumerate(requests):
            for name in PENALTIES:
                rows[name][row] = getattr(request.params, name)
            for token, bias in request.params.logit_bias:
                rows["bias"][row, token] = bias
    return rows


def prefill_windows(num_positions: int, largest: int = PREFILL_BUCKETS[-1]) -> list[tuple[int, int]]:
    """(start, size) of the windows that cover so many positions, sizes from PREFILL_BUCKETS up to the largest."""
    windows = [(start, largest) for start in range(0, num_positions - largest + 1, largest)]
    rest = num_positions - len(windows) * largest
    if rest:
        windows.append((len(windows) * largest, next(size for size in PREFILL_BUCKETS if size >= rest)))
    return windows


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest of some strings begins in a text, or None."""
    found = [index for index in (text.find(stop) for stop in stops) if index >= 0]
    return min(found) if found else None


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of an unfinished text that later tokens can neither change nor turn into a stop string."""
    text = text.rstrip("\ufffd")
    held = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:length]):
                held = length
                break
    return text[: len(text) - held]


def _result(outputs: list[_Output], metrics: Metrics, lossless: bool, tokenizer: Any) -> GenerationResult:
    traces = [output.trace for output in outputs if output.trace is not None]
    return GenerationResult(
        texts=[output.text for output in outputs],
        token_ids=[output.token_ids for output in outputs],
        finish_reasons=[str(output.finish_reason) for output in outputs],
        metrics=metrics,
        lossless=lossless,
        logprobs=[output.logprobs for output in outputs],
        traces=traces or None,
        tokenizer=tokenizer,
    )


def enable_compilation_cache() -> None:
    """Turns jax's persistent compilation cache on, under the cache folder, unless the user has chosen one or none."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
