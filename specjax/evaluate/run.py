"""One evaluation: prompts decoded plainly and with each method, interleaved; results on disk as they are measured."""

import dataclasses
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from specjax.checkpoints.load import Target, load_target
from specjax.config import SamplingParams, SpeculativeConfig
from specjax.errors import ConfigError, SpecJAXError
from specjax.evaluate.oracle import compare_greedy
from specjax.evaluate.prompts import Prompt, load_prompts
from specjax.generate import GenerationResult, SpeculativeDecoder
from specjax.metrics import Metrics
from specjax.tokenizer import encode_prompt
from specjax.verify import RULES

PLAIN = "plain"


def evaluate(config: ConfigDict, workdir: str | os.PathLike[str], progress: Any = None) -> dict[str, Any]:
    """Runs the experiment that a config describes and writes results.jsonl and summary.json into workdir.

    Every result is appended and synced as it is measured; the same command again goes on where it stopped.

    Args:
        config: see configs/eval_smollm2.py, which comments on every field.
        progress: called with (done, total, description) after each measurement.

    Returns:
        The summary.

    Raises:
        SpecJAXError: a bad config, an unwritable workdir, or one that holds results of another experiment.
    """
    sampling = SamplingParams.model_validate(plain_dict(config.sampling))
    methods = {name: SpeculativeConfig.model_validate(plain_dict(fields)) for name, fields in config.methods.items()}
    if PLAIN in methods:
        raise ConfigError(f"config.methods.{PLAIN}: the name is taken by plain decoding; choose another.")
    if config.repeats < 1:
        raise ConfigError(f"config.repeats={config.repeats}: expected an integer >= 1.")
    prompts = load_prompts(config.prompts, config.num_prompts)
    results = Results(Path(workdir), identity(config, prompts))
    target = load_target(config.target, dtype=config.dtype or None)
    decoders = {PLAIN: SpeculativeDecoder(target, None, max_batch_size=1)}
    decoders |= {name: SpeculativeDecoder(target, method, max_batch_size=1) for name, method in methods.items()}

    for decoder in decoders.values():
        decoder.generate(
            [prompts[0].text], sampling, config.chat
        )  # warm-up; compilation is never counted, whenever it happens
    total = len(prompts) * len(decoders) * config.repeats
    for prompt in prompts:
        for repeat in range(config.repeats):
            for name, decoder in decoders.items():
                if (prompt.id, name, repeat) not in results:
                    results.append(measure(decoder, prompt, sampling, config.chat, name, repeat))
                if progress:
                    progress(len(results), total, f"{name} on {prompt.id}")
    summary = summarise(target, config, prompts, methods, results, sampling)
    write_json(Path(workdir) / "summary.json", summary)
    return summary


def measure(
    decoder: SpeculativeDecoder, prompt: Prompt, sampling: SamplingParams, chat: bool, name: str, repeat: int
) -> dict[str, Any]:
    """One prompt decoded once, as a line of results.jsonl.

    Raises:
        SpecJAXError: logits were not finite.
    """
    result = decoder.generate([prompt.text], sampling, chat)
    check_finite(result, decoder.target.name)
    metrics = result.metrics
    return {
        "prompt": prompt.id,
        "category": prompt.category,
        "method": name,
        "repeat": repeat,
        "token_ids": result.token_ids[0],
        "text": result.texts[0],
        "finish_reason": result.finish_reasons[0],
        "acceptance_counts": metrics.acceptance_counts.tolist(),
        "drafted": metrics.drafted,
        "prefill_seconds": metrics.prefill_seconds,
        "decode_seconds": metrics.decode_seconds,
        "first_round_seconds": metrics.first_round_seconds,
        "compile_seconds": metrics.compile_seconds,
    }


class Results:
    """The lines of results.jsonl, on disk as soon as they are known; those of an earlier run are read back."""

    def __init__(self, workdir: Path, config: dict[str, Any]):
        self.path = workdir / "results.jsonl"
        self.lines: dict[tuple[str, str, int], dict[str, Any]] = {}
        prepare_workdir(workdir)
        self._check_config(workdir / "config.json", config)
        for line in self._complete_lines():
            self.lines[line["prompt"], line["method"], line["repeat"]] = line

    def _check_config(self, path: Path, config: dict[str, Any]) -> None:
        if not path.is_file():
            write_json(path, config)
            return
        try:
            before = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise SpecJAXError(f"{path}: is damaged ({error}); choose another workdir or remove it.") from error
        changed = [key for key in sorted(before.keys() | config.keys()) if before.get(key) != config.get(key)]
        if changed:
            raise SpecJAXError(
                f"workdir={str(path.parent)!r}: holds results of another experiment ({changed[0]} was "
                f"{before.get(changed[0])!r}, is {config.get(changed[0])!r}); choose another folder or remove it."
            )

    def _complete_lines(self) -> Iterator[dict[str, Any]]:
        """What is on disk, less a last line that a kill cut short; that one is measured again."""
        if not self.path.is_file():
            return
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(self.path, whole)
        yield from map(json.loads, whole.splitlines())

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[line["prompt"], line["method"], line["repeat"]] = line

    def of(self, prompt: Prompt, method: str, repeats: int) -> list[dict[str, Any]]:
        """A prompt's lines with a method, by repeat."""
        return [self.lines[prompt.id, method, repeat] for repeat in range(repeats)]

    def __contains__(self, key: tuple[str, str, int]) -> bool:
        return key in self.lines

    def __len__(self) -> int:
        return len(self.lines)


def summarise(
    target: Target,
    config: ConfigDict,
    prompts: list[Prompt],
    methods: dict[str, SpeculativeConfig],
    results: Results,
    sampling: SamplingParams,
) -> dict[str, Any]:
    """The content of summary.json. Counts are summed over prompts and divided once; of repeats the fastest counts."""
    plain = _total(prompts, PLAIN, results, config.repeats)
    summary: dict[str, Any] = {
        "target": config.target,
        "dtype": str(target.dtype),
        "device": device_name(),
        "prompts": len(prompts),
        "prompt_set": config.prompts,
        "baseline": {"tokens_per_second": plain.tokens_per_second, "num_tokens": plain.num_tokens},
        "methods": {},
    }
    for name, method in methods.items():
        total = _total(prompts, name, results, config.repeats)
        speedup = total.tokens_per_second / plain.tokens_per_second
        row = {
            "num_speculative_tokens": method.num_speculative_tokens,
            "rule": method.rejection_sampling_strategy,
            "lossless": RULES[method.rejection_sampling_strategy].lossless,
            "acceptance_length": total.acceptance_length,
            "acceptance_rate": total.acceptance_rate,
            "acceptance_rate_by_position": total.acceptance_rate_by_position,
            "acceptance_counts": total.acceptance_counts.tolist(),
            "tokens_per_second": total.tokens_per_second,
            "speedup": speedup,
            "efficiency": speedup / total.acceptance_length,
        }
        compared = prompts if row["lossless"] and sampling.greedy and not sampling.adjusts_logits else []
        found = [_agreement(target, prompt, name, results, config) for prompt in compared]
        for kind in ("identical", "near_tie", "mismatch"):
            row[kind] = found.count(kind) if compared else None
        summary["methods"][name] = row
    summary["by_category"] = _by_category(prompts, [PLAIN, *methods], results, config.repeats)
    return summary


def _total(prompts: list[Prompt], method: str, results: Results, repeats: int) -> Metrics:
    fastest = [min(results.of(prompt, method, repeats), key=lambda line: line["decode_seconds"]) for prompt in prompts]
    total = _metrics(fastest[0])
    for line in fastest[1:]:
        total += _metrics(line)
    return total


def _metrics(line: dict[str, Any]) -> Metrics:
    return Metrics(
        acceptance_counts=np.array(line["acceptance_counts"]),
        drafted=line["drafted"],
        num_tokens=len(line["token_ids"]),
        prefill_seconds=line["prefill_seconds"],
        decode_seconds=line["decode_seconds"],
        first_round_seconds=line["first_round_seconds"],
        compile_seconds=line["compile_seconds"],
    )


def _agreement(target: Target, prompt: Prompt, method: str, results: Results, config: ConfigDict) -> str:
    """The worst of a prompt's repeats against its first plain output."""
    tokens = encode_prompt(target.tokenizer, prompt.text, config.chat)
    plain = results.of(prompt, PLAIN, 1)[0]["token_ids"]
    outputs = {tuple(line["token_ids"]) for line in results.of(prompt, method, config.repeats)}
    found = {compare_greedy(target, tokens, plain, output) for output in outputs}
    return next(kind for kind in ("mismatch", "near_tie", "identical") if kind in found)


def _by_category(prompts: list[Prompt], names: list[str], results: Results, repeats: int) -> dict[str, Any]:
    categories: dict[str, Any] = {}
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        chosen = [prompt for prompt in prompts if prompt.category == category]
        totals = {name: _total(chosen, name, results, repeats) for name in names}
        categories[category] = {
            name: {"tokens_per_second": total.tokens_per_second, "acceptance_length": total.acceptance_length}
            for name, total in totals.items()
        }
    return categories


def device_name() -> str:
    """The kind and number of jax's devices; for CPU the processor and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} x {device.device_kind}"
    return f"cpu, {os.cpu_count()} cores, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check_finite(result: GenerationResult, name: str) -> None:
    """Refuses an output that ended because logits were not finite.

    Raises:
        SpecJAXError: there is one.
    """
    if "error" in result.finish_reasons:
        raise SpecJAXError(
            f"target={name!r}: gave logits that are not finite (NaN); expected numbers. The checkpoint may be damaged, "
            "or dtype too narrow: try --config.dtype=float32."
        )


def identity(config: ConfigDict, prompts: list[Prompt]) -> dict[str, Any]:
    """What must be equal for measurements to belong together, as JSON gives it back."""
    texts = json.dumps([dataclasses.astuple(prompt) for prompt in prompts])
    versions = {name: metadata.version(name) for name in ("specjax", "jax", "jaxlib", "flax")}
    parts = {
        **plain_dict(config),
        "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "device": device_name(),
        "versions": versions,
    }
    return json.loads(json.dumps(parts))


def plain_dict(config: ConfigDict) -> dict[str, Any]:
    """A ConfigDict as nested plain dicts, fields that are None left out."""
    return {
        key: plain_dict(value) if isinstance(value, ConfigDict) else value
        for key, value in config.items()
        if value is not None
    }


def prepare_workdir(workdir: Path) -> None:
    """Makes the folder and tries to write to it.

    Raises:
        SpecJAXError: it can't be made or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise SpecJAXError(
            f"workdir={str(workdir)!r}: cannot be written to ({error.strerror}); choose a folder that can."
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Writes JSON to a temporary name and renames it; NaN (a ratio without a denominator) becomes null."""
    write_text(path, json.dumps(_without_nan(content), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes text to a temporary name beside path and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content != content else content
