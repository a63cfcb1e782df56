"""Other libraries on the same prompts, through their public API."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def transformers_generate(directory: Path, max_tokens: int) -> Callable[[list[int]], tuple[list[int], float]] | None:
    """Greedy float32 generation by transformers, or None where torch is not installed.

    Args:
        directory: a Hugging Face directory.
        max_tokens: exactly so many new tokens are generated unless the model stops before.

    Returns:
        token ids of a prompt -> (new token ids, seconds from the first new token to the last). Its prefill gives the
        first token, so the time of n - 1 decoding steps is what is measured.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    model: Any = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)

    class Clock(StoppingCriteria):
        """Notes when each token is there; stops nothing."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def generate(prompt: list[int]) -> tuple[list[int], float]:
        clock = Clock()
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, stopping_criteria=[clock]
        )
        return output[0, len(prompt) :].tolist(), clock.times[-1] - clock.times[0]

    return generate
