"""Responses of the target to training prompts, generated once and kept as token ids."""

import json
import lzma
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from specjax.config import SamplingParams
from specjax.errors import ConfigError
from specjax.evaluate.prompts import Prompt
from specjax.generate import SpeculativeDecoder
from specjax.slots import completions
from specjax.tokenizer import decode_text

BUILT_IN = {"built_in_smollm2": "smollm2-135m-instruct.jsonl.xz"}
"""Answers that come with SpecJAX, see answers/README.md."""

BLOCK = 1024
"""Prompts that are decoded in one call: within it the shortest come first."""


class Response(NamedTuple):
    """One turn of a training prompt with the target's answer.

    Attributes:
        id: of the prompt, and the turn.
        category: of the prompt.
        prompt: token ids, chat template included.
        response: token ids, the stop token included where the target gave one.
        finish_reason: "stop" or "length".
    """

    id: str
    category: str
    prompt: list[int]
    response: list[int]
    finish_reason: str


def read(path: str | os.PathLike) -> list[Response]:
    """All responses of a file, or of one of BUILT_IN; a last line that a kill cut off is left out.

    Raises:
        ConfigError: no such file, or a line that is no response; names it.
    """
    built_in = BUILT_IN.get(os.fspath(path))
    if built_in is not None:
        text = lzma.decompress(resources.files("specjax.train").joinpath("answers", built_in).read_bytes()).decode()
    elif Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"responses={os.fspath(path)!r}: no such file; expected what `specjax respond` writes, or one of "
            f"{', '.join(BUILT_IN)}."
        )
    lines = text.split("\n")
    responses = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is not complete
        try:
            responses.append(Response(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{os.fspath(path)}:{number}: is no response ({error}); remove the line.") from error
    return responses


def generate(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    path: str | os.PathLike,
    max_tokens: int,
    max_prompt_tokens: int,
    temperatures: Sequence[float],
) -> Iterator[Response]:
    """Answers prompts that the file has no answer to yet, appends and yields the answers as they finish.

    Args:
        max_tokens: of a response.
        max_prompt_tokens: longer prompts, chat template and earlier turns included, are left out.
        temperatures: prompt i is answered at the i-th of them, round and round; its seed is i.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {response.id: response for response in read(path)} if path.is_file() else {}
    _drop_partial_line(path)
    for first in range(0, len(prompts), BLOCK):
        block = list(enumerate(prompts))[first : first + BLOCK]
        for turn in range(max((len(prompt.turns) for _, prompt in block), default=0)):
            yield from _one_turn(decoder, block, turn, done, path, max_tokens, max_prompt_tokens, temperatures)


def _one_turn(
    decoder: SpeculativeDecoder,
    block: Sequence[tuple[int, Prompt]],
    turn: int,
    done: dict[str, Response],
    path: Path,
    max_tokens: int,
    max_prompt_tokens: int,
    temperatures: Sequence[float],
) -> Iterator[Response]:
    tokenizer: Any = decoder.target.tokenizer
    asked, params = [], []
    for index, prompt in block:
        earlier = [done.get(f"{prompt.id}#{before}") for before in range(turn)]
        if turn >= len(prompt.turns) or f"{prompt.id}#{turn}" in done or None in earlier:
            continue
        messages: list[dict[str, str]] = []
        for question, answer in zip(prompt.turns, [*earlier, None], strict=False):
            messages.append({"role": "user", "content": question})
            if answer is not None:
                text = decode_text(tokenizer, answer.response)
                messages.append({"role": "assistant", "content": text})
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(tokens) > max_prompt_tokens:
            continue
        asked.append((f"{prompt.id}#{turn}", prompt.category, list(tokens)))
        temperature = temperatures[index % len(temperatures)]
        params.append(SamplingParams(temperature=temperature, seed=index, max_tokens=max_tokens))
    if not asked:
        return
    with path.open("a", encoding="utf-8") as file:
        for completion in completions(decoder, [tokens for _, _, tokens in asked], params):
            name, category, tokens = asked[completion.index]
            if completion.finish_reason == "error":
                continue  # logits that were not finite: nothing to learn from
            response = Response(name, category, tokens, completion.token_ids, completion.finish_reason)
            file.write(json.dumps(response._asdict(), separators=(",", ":")) + "\n")
            file.flush()
            done[name] = response
            yield response


def _drop_partial_line(path: Path) -> None:
    """Cuts off what a kill left of a line, so that the next line begins its own."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
