"""Other libraries on the same prompts, through their public API."""

import copy
import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from specjax.checkpoints import pretrained
from specjax.checkpoints.load import Target
from specjax.config import SamplingParams
from specjax.errors import SpecJAXError
from specjax.evaluate.experiment import COMPARISONS, Experiment

LOOKUP_TOKENS = 10
"""Drafts of "transformers-lookup", the number in that library's documentation."""


class Generated(NamedTuple):
    """What another library gave.

    Attributes:
        token_ids: new tokens, the stop token included.
        timed_tokens: those that came after the first of them were there: decode_seconds is their time.
        prefill_seconds: from the call to the first tokens.
        decode_seconds: from the first tokens to the last.
    """

    token_ids: list[int]
    timed_tokens: int
    prefill_seconds: float
    decode_seconds: float


Generate = Callable[[list[int]], Generated]
"""Token ids of a prompt -> what was generated."""


def comparisons(experiment: Experiment, target: Target) -> tuple[dict[str, Generate], dict[str, str]]:
    """Loads the libraries that an experiment is compared with.

    Returns:
        Those that can run, by name, and why the others can't.
    """
    ready: dict[str, Generate] = {}
    not_run: dict[str, str] = {}
    load_model = functools.cache(load_transformers)  # one copy of the weights for all that use them
    for name in experiment.compare:
        reason = _reason_not_to_run(name, experiment)
        if reason is None:
            try:
                ready[name] = _load(name, experiment, target, load_model)
            except Exception as error:  # of another library's: any kind
                reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        if reason is not None:
            not_run[name] = reason
    return ready, not_run


def _reason_not_to_run(name: str, experiment: Experiment) -> str | None:
    sampling = experiment.sampling
    for package in COMPARISONS[name]:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if name == "transformers-assisted" and not experiment.assistant:
        return "config.assistant names no draft model"
    if experiment.batch_size > 1:
        return "other libraries are compared prompt by prompt: set batch_size to 1"
    if not sampling.greedy or sampling.adjusts_logits or sampling.stop:
        return "other libraries are compared at temperature 0, without bias, penalties and stop strings"
    return None


def _load(name: str, experiment: Experiment, target: Target, load_model: Callable[[Path, str], Any]) -> Generate:
    directory = pretrained.resolve(experiment.target)
    if name == "vllm":
        return vllm_generate(directory, target, experiment.sampling)
    model, assistant = load_model(directory, str(target.dtype)), None
    if name == "transformers-assisted":
        assistant = load_model(pretrained.resolve(experiment.assistant), str(target.dtype))
    return transformers_generate(
        model,
        experiment.sampling.max_tokens,
        target.config.max_position,
        _stops(target, experiment.sampling),
        lookup_tokens=LOOKUP_TOKENS if name == "transformers-lookup" else None,
        assistant=assistant,
    )


def _stops(target: Target, sampling: SamplingParams) -> list[int]:
    return sorted(set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(target.stop_token_ids)))


def load_transformers(directory: Path, dtype: str) -> Any:
    """A causal language model of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=getattr(torch, dtype))


def transformers_generate(
    model: Any,
    max_tokens: int,
    max_position: int,
    stop_token_ids: list[int] | None = None,
    lookup_tokens: int | None = None,
    assistant: Any = None,
) -> Generate:
    """Greedy generation by transformers, clocked by its streamer.

    Args:
        model: from load_transformers.
        max_tokens: exactly so many new tokens are generated unless the model stops before.
        max_position: the target's context in tokens.
        stop_token_ids: that end an output; None for those of the model's generation config.
        lookup_tokens: drafts a round by prompt lookup; None looks nothing up.
        assistant: a draft model from load_transformers; None decodes without one.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    settings = copy.deepcopy(model.generation_config)
    settings.do_sample = False
    settings.temperature = settings.top_k = settings.top_p = None  # only for sampling
    settings.prompt_lookup_num_tokens = lookup_tokens
    if stop_token_ids is not None:
        settings.eos_token_id = stop_token_ids or None

    class Clock(BaseStreamer):
        """Notes when which number of tokens is there: the prompt first, then the tokens of each round."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.counts: list[int] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            self.counts.append(value.numel())

        def end(self) -> None:
            pass

    def generate(prompt: list[int]) -> Generated:
        clock = Clock()
        ids = torch.tensor([prompt])
        room = min(max_tokens, max_position - len(prompt))
        if room < 1:
            raise SpecJAXError(f"the prompt has {len(prompt)} tokens; expected less than the context of {max_position}")
        settings.max_new_tokens = room
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            assistant_model=assistant,
            streamer=clock,
        )
        began, first, last = clock.times[0], clock.times[1], clock.times[-1]
        return Generated(output[0, len(prompt) :].tolist(), sum(clock.counts[2:]), first - began, last - first)

    return generate


def vllm_generate(directory: Path, target: Target, sampling: SamplingParams) -> Generate:
    """Greedy generation by vLLM, clocked as its documented API allows.

    vLLM does not run on the machine that this was written on: it follows the documentation of `LLM.generate` and
    `SamplingParams`, and nobody has seen it run. The prompt is generated from twice, once for a single token: what that
    takes is prefill, and the rest is decoding. The cache of prompts is off, so both prefill.

    Args:
        directory: of a Hugging Face checkpoint.
        target: the same model, loaded: its dtype, context and stop tokens are used.
    """
    import vllm

    model = vllm.LLM(
        model=str(directory),
        dtype=str(target.dtype),
        max_model_len=target.config.max_position,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )

    def timed(prompt: list[int], num: int) -> tuple[list[int], float]:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=num, stop_token_ids=_stops(target, sampling), ignore_eos=sampling.ignore_eos
        )
        began = time.perf_counter()
        outputs = model.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return list(outputs[0].outputs[0].token_ids), time.perf_counter() - began

    def generate(prompt: list[int]) -> Generated:
        room = min(sampling.max_tokens, target.config.max_position - len(prompt))
        _, first = timed(prompt, 1)
        tokens, whole = timed(prompt, room)
        return Generated(tokens, len(tokens) - 1, first, max(whole - first, 0.0))

    return generate
