"""The respond command: the target's answers to training prompts, from a config."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from specjax import processes
from specjax.checkpoints.load import Target, load_target
from specjax.errors import ConfigError, SpecJAXError
from specjax.evaluate.files import plain_dict, prepare_workdir, write_json
from specjax.evaluate.prompts import load_prompts
from specjax.generate import SpeculativeDecoder
from specjax.sharding import read_mesh
from specjax.train import responses

FILE = "responses.jsonl"
CONFIG = "responses.config.json"
FILES = FILE, CONFIG
"""What a run goes on from."""


@dataclasses.dataclass(frozen=True)
class RespondConfig:
    """How training prompts are answered.

    Attributes:
        prompts: a JSONL file of prompts.
        num_prompts: use only so many; 0 for all.
        max_tokens: of a response.
        max_prompt_tokens: longer prompts are left out.
        temperatures: prompt i is answered at the i-th of them, round and round.
        max_batch_size: rows that decode at once.
    """

    prompts: str = ""
    num_prompts: int = 0
    max_tokens: int = 256
    max_prompt_tokens: int = 600
    temperatures: tuple[float, ...] = (0.0,)
    max_batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ConfigError("temperatures=(): expected at least one number >= 0, such as (0.0,).")
        for field in ("max_tokens", "max_prompt_tokens", "max_batch_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: expected an integer >= 1.")


def respond(config: ConfigDict, workdir: str | os.PathLike[str], progress: Any = None) -> dict[str, Any]:
    """Answers the prompts of a config (see configs/respond_smollm2.py) into workdir/responses.jsonl.

    The same command again goes on where it stopped. Several processes answer together; process 0 writes.

    Args:
        progress: called with (done, total, description) after each answer.

    Returns:
        Counts: prompts, responses, tokens, and tokens_per_second of this run.

    Raises:
        SpecJAXError: a bad config or an unwritable workdir.
    """
    fields = plain_dict(config)
    processes.join(fields.pop("distributed", None))
    processes.same_everywhere(fields, "config")
    name, dtype, mesh = fields.pop("target", ""), fields.pop("dtype", "") or None, read_mesh(fields.pop("mesh", None))
    if not name:
        raise ConfigError("target='': expected the model that answers, such as 'smollm2-135m-instruct'.")
    settings = respond_config(fields)
    with processes.own_folder(Path(workdir), FILES) as folder:
        prepare_workdir(folder)
        counts = answer(settings, load_target(name, dtype=dtype, mesh=mesh), folder / FILE, progress)
        processes.barrier("the end")
    return counts


def respond_config(fields: dict[str, Any]) -> RespondConfig:
    """The frozen form of a config's fields.

    Raises:
        ConfigError: an unknown field, or a wrong value.
    """
    known = {field.name for field in dataclasses.fields(RespondConfig)}
    for name in fields:
        if name not in known:
            raise ConfigError(f"{name}={fields[name]!r}: is no field; expected one of {', '.join(sorted(known))}.")
    if "temperatures" in fields:
        fields = fields | {"temperatures": tuple(fields["temperatures"])}
    return RespondConfig(**fields)


def answer(settings: RespondConfig, target: Target, path: Path, progress: Any = None) -> dict[str, Any]:
    """Writes the answers that the file lacks. See respond."""
    if not settings.prompts:
        raise ConfigError("prompts='': expected the path of a JSONL file of prompts to answer.")
    if target.tokenizer is None:
        raise ConfigError(f"target={target.name!r}: has no tokenizer, which prompts need; add its tokenizer files.")
    _check_same_answers(path.with_name(CONFIG), settings, target)
    prompts = load_prompts(settings.prompts, settings.num_prompts)
    known = len(responses.read(path)) if path.is_file() else 0
    total, num_tokens, began = sum(len(prompt.turns) for prompt in prompts), 0, time.perf_counter()
    decoder = SpeculativeDecoder(target, None, max_batch_size=settings.max_batch_size)
    limits = settings.max_tokens, settings.max_prompt_tokens
    for number, response in enumerate(
        responses.generate(decoder, prompts, path, *limits, settings.temperatures), known + 1
    ):
        num_tokens += len(response.response)
        if progress:
            progress(number, total, f"responses, {num_tokens / (time.perf_counter() - began):.0f} tokens/s")
    found = responses.read(path) if path.is_file() else []
    return {
        "prompts": len(prompts),
        "responses": len(found),
        "tokens": sum(len(response.response) for response in found),
        "tokens_per_second": num_tokens / (time.perf_counter() - began),
    }


def _check_same_answers(path: Path, settings: RespondConfig, target: Target) -> None:
    """Answers of one file come from one target with one set of settings; more prompts may be added.

    Raises:
        SpecJAXError: the file beside this one holds answers of others.
    """
    content: dict[str, Any] = {"target": target.name, "dtype": str(target.params["embedding"].dtype)}
    content |= {name: getattr(settings, name) for name in ("max_tokens", "max_prompt_tokens")}
    content["temperatures"] = list(settings.temperatures)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in content:
            if before.get(name) != content[name]:
                raise SpecJAXError(
                    f"{path.parent}: holds answers with {name}={before.get(name)!r}, but this config has "
                    f"{content[name]!r}; choose another folder or remove them."
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
