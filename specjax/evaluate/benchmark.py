"""What the README claims of speed, measured: ratios within one run, best of several interleaved repeats."""

import functools
import importlib.util
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from specjax import cache as kv
from specjax.checkpoints import pretrained
from specjax.checkpoints.load import Target, load_target
from specjax.config import SamplingParams, SpeculativeConfig
from specjax.drafters.base import Proposal
from specjax.errors import SpecJAXError
from specjax.evaluate import compare
from specjax.evaluate.environment import device_name
from specjax.evaluate.files import plain_dict, prepare_workdir, write_json
from specjax.evaluate.prompts import load_prompts
from specjax.evaluate.run import BATCH_ROUNDS, check_finite
from specjax.generate import SpeculativeDecoder
from specjax.sampling import SamplingState
from specjax.slots import completions
from specjax.target import decoder
from specjax.tokenizer import encode_prompt
from specjax.train.students import student_for
from specjax.train.trainer import TrainConfig, Trainer
from specjax.verify import residual, round_uniforms

BARE_STEPS = 32
"""Steps of a bare compiled step that are timed together."""

AGAIN = "plain decoding again"
"""Measured against plain decoding in a batch: what shows the noise."""

MATRIX, PRODUCT = 2048, "product of matrices"
"""Side of the float32 matrices whose product training steps are compared with, and what it is called."""


def benchmark(config: ConfigDict, workdir: str | os.PathLike[str], progress: Any = None) -> dict[str, Any]:
    """Measures what configs/bench_smollm2.py describes and writes benchmark.json into workdir.

    Every system decodes every prompt once a repeat, one after the other, so that a slow minute of the machine hits all
    of them; each one's fastest repeat of each prompt counts. In a batch, whose rounds take long, systems that are to be
    compared exactly take turns every few rounds, and all repeats count.

    Args:
        config: see configs/bench_smollm2.py.
        progress: called with (done, total, description) after each measurement.
    """
    prepare_workdir(Path(workdir))
    target = load_target(config.target, dtype=config.dtype or None)
    prompts = [prompt.text for prompt in load_prompts(config.prompts, config.num_prompts)]
    in_batch = SpeculativeDecoder(target, max_batch_size=config.batch)
    systems = _decoding_systems(config, target, in_batch)
    text = " ".join(prompt.text for prompt in load_prompts(config.prompts, 0))
    training, operations = _training_systems(config, target, Path(workdir))
    steps = _step_systems(config, target) | _acceptance_systems(config, target, text) | training
    batched = _batched_systems(config, target, in_batch)
    batched_repeats = config.batched_repeats if batched else 0
    seconds: dict[str, dict[Any, float]] = {name: {} for name in [*systems, *steps]}
    tokens: dict[str, dict[Any, int]] = {name: {} for name in systems}
    in_turns: list[dict[str, dict[str, float]]] = []
    a_repeat = len(prompts) * len(systems) + config.step_repeats * len(steps) + batched_repeats
    total, done = config.repeats * a_repeat, 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total, name)

    def keep(name: str, key: Any, measured: float) -> None:
        seconds[name][key] = min(measured, seconds[name].get(key, float("inf")))
        count(name)

    for run in systems.values():
        run(prompts[0])  # warm-up
    _take_turns(batched, prompts, config, seed=0)  # warm-up
    for _ in range(config.repeats):
        for index, prompt in enumerate(prompts):
            for name, run in systems.items():
                num_tokens, spent = run(prompt)
                tokens[name][index] = num_tokens
                keep(name, index, spent)
        for _ in range(config.step_repeats):
            for name, step in steps.items():
                keep(name, 0, step())
        for _ in range(batched_repeats):
            in_turns.append(_take_turns(batched, prompts, config, seed=len(in_turns)))
            count(f"batch {config.batch}, in turns")

    rates = {name: sum(tokens[name].values()) / sum(seconds[name].values()) for name in systems}
    step_ms = {name: 1e3 * seconds[name][0] for name in steps}
    results = {
        "target": config.target,
        "dtype": str(target.dtype),
        "device": device_name(),
        "prompts": len(prompts),
        "max_tokens": config.max_tokens,
        "repeats": config.repeats,
        "tokens_per_second": rates,
        "step_milliseconds": step_ms,
        "step_operations": operations,
        "in_turns": in_turns,
        "rows": _rows(rates, step_ms, config) + _batched_rows(in_turns, config) + _training_rows(step_ms, operations),
    }
    write_json(Path(workdir) / "benchmark.json", results)
    return results


def _speculative(target: Target, fields: ConfigDict, batch: int) -> SpeculativeDecoder:
    method = SpeculativeConfig.model_validate(plain_dict(fields))
    return SpeculativeDecoder(target, method, max_batch_size=batch)


def _decoding_systems(
    config: ConfigDict, target: Target, in_batch: SpeculativeDecoder
) -> dict[str, Callable[[str], tuple[int, float]]]:
    """Name -> prompt -> (tokens, seconds of decoding)."""
    sampling = SamplingParams(max_tokens=config.max_tokens)

    def ours(system: SpeculativeDecoder) -> Callable[[str], tuple[int, float]]:
        def run(prompt: str) -> tuple[int, float]:
            result = system.generate([prompt] * system.max_batch_size, sampling, config.chat)
            check_finite(result.finish_reasons, target.name)
            metrics = result.metrics
            return metrics.num_tokens, metrics.decode_seconds

        return run

    systems = {"plain": ours(SpeculativeDecoder(target, max_batch_size=1))}
    for name, fields in config.methods.items():
        systems[name] = ours(_speculative(target, fields, 1))
    systems[f"plain, batch {config.batch}"] = ours(in_batch)
    if importlib.util.find_spec("torch") is not None:
        model = compare.load_transformers(pretrained.resolve(config.target), str(target.dtype))
        other = compare.transformers_generate(model, config.max_tokens, target.config.max_position)

        def transformers(prompt: str) -> tuple[int, float]:
            result = other(encode_prompt(target.tokenizer, prompt, config.chat))
            return result.timed_tokens, result.decode_seconds

        systems["transformers"] = transformers
    return systems


def _batched_systems(config: ConfigDict, target: Target, in_batch: SpeculativeDecoder) -> dict[str, SpeculativeDecoder]:
    """Name -> a system of config.batch rows: plain decoding, the same again, and config.batched_methods, if any."""
    methods = {name: _speculative(target, fields, config.batch) for name, fields in config.batched_methods.items()}
    return {"plain": in_batch, AGAIN: in_batch, **methods} if methods else {}


def _take_turns(
    systems: dict[str, SpeculativeDecoder], prompts: list[str], config: ConfigDict, seed: int
) -> dict[str, dict[str, float]]:
    """Name -> tokens and seconds of decoding all prompts, every system a few rounds before it is the next one's turn.

    So what else the machine does hits all of them, and what it does to them is seen in plain decoding's second time.
    """
    sampling, shuffle = SamplingParams(max_tokens=config.max_tokens), random.Random(seed).shuffle
    streams = {
        name: completions(system, prompts, sampling, config.chat, rounds=BATCH_ROUNDS)
        for name, system in systems.items()
    }
    tokens = dict.fromkeys(systems, 0)
    running = list(streams)
    while running:
        shuffle(running)
        for name in tuple(running):
            finished = streams[name].advance()
            if finished is None:
                running.remove(name)
            else:
                check_finite([done.finish_reason for done in finished], config.target)
                tokens[name] += sum(len(done.token_ids) for done in finished)
    return {name: {"tokens": tokens[name], "seconds": stream.decode_seconds} for name, stream in streams.items()}


def _step_systems(config: ConfigDict, target: Target) -> dict[str, Callable[[], float]]:
    """Name -> seconds of one plain step at equal context: a bare compiled one, and inside the loop by capacity."""
    context = config.step_context
    prompt = (np.arange(context) % 1000 + 100).tolist()

    def bare(capacity: int) -> Callable[[], float]:
        @functools.partial(jax.jit, donate_argnums=2)
        def step(params: Any, token: jax.Array, cache: kv.KVCache, position: jax.Array) -> Any:
            out = decoder.apply(target.config, params, token, position, cache)
            return jnp.argmax(out.logits[:, -1:], axis=-1).astype(jnp.int32), out.cache, position + 1

        def run() -> float:
            cache = decoder.init_cache(target.config, 1, capacity, target.dtype)
            token, position = jnp.ones((1, 1), jnp.int32), jnp.full(1, context, jnp.int32)
            token, cache, position = jax.block_until_ready(step(target.params, token, cache, position))
            began = time.perf_counter()
            for _ in range(BARE_STEPS):
                token, cache, position = step(target.params, token, cache, position)
            jax.block_until_ready(token)
            return (time.perf_counter() - began) / BARE_STEPS

        return run

    def loop(capacity: int) -> Callable[[], float]:
        system = SpeculativeDecoder(target, None, max_batch_size=1)
        sampling = SamplingParams(max_tokens=BARE_STEPS + 1, ignore_eos=True)

        def run() -> float:
            metrics = system.generate([prompt], sampling, min_capacity=capacity).metrics
            return (metrics.decode_seconds - metrics.first_round_seconds) / BARE_STEPS

        return run

    small, large = config.capacities
    steps = {"bare step": bare(small), f"loop, capacity {small}": loop(small), f"loop, capacity {large}": loop(large)}
    for step in steps.values():
        step()  # warm-up
    return steps


def _acceptance_systems(config: ConfigDict, target: Target, text: str) -> dict[str, Callable[[], float]]:
    """Name -> seconds of scoring a window of real text, and of `residual` on the scores, its drafts that text."""
    G, context = config.acceptance_drafts, config.step_context
    tokens = encode_prompt(target.tokenizer, text, False)[: context + G + 1]
    if len(tokens) < context + G + 1:
        raise SpecJAXError(
            f"config.step_context={context}: the prompts together have fewer tokens; expected a smaller context."
        )
    cache = decoder.init_cache(target.config, 1, kv.round_capacity(len(tokens)), target.dtype)
    apply = jax.jit(functools.partial(decoder.apply, target.config))
    cache = apply(target.params, jnp.array([tokens[:context]]), jnp.zeros(1, jnp.int32), cache).cache
    window, start = jnp.array([tokens[context:]]), jnp.array([context])
    logits, drafts = apply(target.params, window, start, cache).logits, window[:, 1:]

    def timed(run: Callable[[int], Any]) -> Callable[[], float]:
        jax.block_until_ready(run(0))

        def average() -> float:
            began = time.perf_counter()
            for number in range(BARE_STEPS):
                out = run(number)
            jax.block_until_ready(out)
            return (time.perf_counter() - began) / BARE_STEPS

        return average

    def accepting(params: SamplingParams) -> Callable[[], float]:
        fields = jnp.array([params.temperature]), jnp.array([params.top_k]), jnp.array([params.top_p])
        rows = SamplingState(*fields, jnp.array([params.min_p]), jax.random.key(params.seed)[None])

        @jax.jit
        def accept(logits: jax.Array, drafts: jax.Array, rows: SamplingState, length: jax.Array) -> Any:
            return residual(logits, Proposal(drafts), rows, round_uniforms(rows, length, G))

        return timed(lambda number: accept(logits, drafts, rows, jnp.array([number])))

    systems = {"score": timed(lambda _: apply(target.params, window, start, cache).logits)}
    for name, fields in config.acceptance.items():
        systems[f"acceptance, {name}"] = accepting(SamplingParams.model_validate(plain_dict(fields)))
    return systems


class _Noise:
    """Random tokens and states in the place of a training's data; see specjax.train.data.Store."""

    def __init__(self, target: Target, taps: tuple[int, ...], length: int, num: int):
        self.lengths = np.full(num, length)
        self.names = [f"noise-{index}#0" for index in range(num)]
        self._target, self._taps = target.config, taps

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, length: int) -> dict[str, np.ndarray]:
        random, T, D = np.random.default_rng(index), length, self._target.width
        part: dict[str, np.ndarray] = {"tokens": random.integers(self._target.vocab_size, size=T, dtype=np.int32)}
        part |= {"best": np.roll(part["tokens"], -1), "positions": np.arange(T, dtype=np.int32)}
        part |= {"loss_mask": np.ones(T, bool), "final": random.standard_normal((T, D), np.float32)}
        if self._taps:
            part["taps"] = random.standard_normal((T, len(self._taps), D), np.float32)
        return part


def _training_systems(
    config: ConfigDict, target: Target, workdir: Path
) -> tuple[dict[str, Callable[[], float]], dict[str, float]]:
    """Name -> seconds of one training step, and of a product; and name -> floating-point operations.

    A step's are those of its program before XLA simplifies it, in which products are all but a few in a hundred.
    """
    systems: dict[str, Callable[[], float]] = {}
    operations: dict[str, float] = {}
    for method, name in config.training.items():
        fields = importlib.import_module(f"specjax.configs.{name}").get_config()
        fields.update({"target": config.target, "dtype": config.dtype, "init_from": "", "features": "cache"})
        fields.data.held_out_every = 0
        made = TrainConfig.from_config(fields)
        student = student_for(target.config, **made.head)
        store = _Noise(target, student.taps, made.data.length, made.data.rows)
        trainer = Trainer(made, workdir, target, student, store)
        step = f"training step, {method}"
        systems[step], operations[step] = trainer.timed_step(num_unrolled=1)
    if systems:
        matrix = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
        square = jax.jit(jnp.dot).lower(matrix, matrix).compile()

        def product() -> float:
            began = time.perf_counter()
            jax.block_until_ready(square(matrix, matrix))
            return time.perf_counter() - began

        systems[PRODUCT], operations[PRODUCT] = product, 2.0 * MATRIX**3
    for run in systems.values():
        run()  # warm-up
    return systems, operations


def _row(claim: str, measured: str, ratio: float | None, goal: str) -> dict[str, Any]:
    return {"claim": claim, "measured": measured, "ratio": ratio, "goal": goal}


def _batched_rows(in_turns: list[dict[str, dict[str, float]]], config: ConfigDict) -> list[dict[str, Any]]:
    rates = {
        name: sum(turns[name]["tokens"] for turns in in_turns) / sum(turns[name]["seconds"] for turns in in_turns)
        for name in (in_turns[0] if in_turns else ())
    }
    return [
        _row(
            f"{name} over plain decoding, batch {config.batch}",
            f"{rate:.1f} / {rates['plain']:.1f} tokens/s",
            rate / rates["plain"],
            "noise" if name == AGAIN else ">= 0.97",
        )
        for name, rate in rates.items()
        if name != "plain"
    ]


def _training_rows(step_ms: dict[str, float], operations: dict[str, float]) -> list[dict[str, Any]]:
    rates = {name: num / step_ms[name] / 1e6 for name, num in operations.items()}
    return [
        _row(
            f"{name}, over a product of {MATRIX} x {MATRIX} matrices",
            f"{rate:.0f} / {rates[PRODUCT]:.0f} GFLOP/s",
            rate / rates[PRODUCT],
            ">= 0.60",
        )
        for name, rate in rates.items()
        if name != PRODUCT
    ]


def _rows(rates: dict[str, float], step_ms: dict[str, float], config: ConfigDict) -> list[dict[str, Any]]:
    """One row a claim."""
    plain = rates["plain"]
    small, large = (step_ms[f"loop, capacity {capacity}"] for capacity in config.capacities)
    other = rates.get("transformers")
    batched = rates[f"plain, batch {config.batch}"]

    rows = [
        _row(
            "plain decoding over transformers",
            f"{plain:.1f} / {other:.1f} tokens/s" if other else "torch is not installed",
            plain / other if other else None,
            ">= 2.0",
        )
    ]
    rows += [
        _row(f"{name} over plain decoding", f"{rates[name]:.1f} / {plain:.1f} tokens/s", rates[name] / plain, ">= 1.25")
        for name in config.methods
    ]
    rows.append(
        _row(f"batch {config.batch} over batch 1", f"{batched:.1f} / {plain:.1f} tokens/s", batched / plain, ">= 3.0")
    )
    bare = step_ms["bare step"]
    rows.append(_row("a step in the loop over a bare step", f"{small:.2f} / {bare:.2f} ms", small / bare, "<= 1.05"))
    names = f"capacity {config.capacities[1]} over {config.capacities[0]}, equal context"
    rows.append(_row(names, f"{large:.2f} / {small:.2f} ms", large / small, "<= 1.10"))
    for name in config.acceptance:
        spent = step_ms[f"acceptance, {name}"]
        whole = spent + step_ms["score"]
        rows.append(_row(f"acceptance of a round, {name}", f"{spent:.2f} / {whole:.2f} ms", spent / whole, "<= 0.05"))
    return rows
