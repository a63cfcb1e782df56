"""Text to token ids and back: a checkpoint's tokenizer, its stop tokens, and prompts of every accepted form."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specjax.errors import CheckpointError, SpecJAXError


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """Loads the tokenizer of a Hugging Face directory, without network and without printing.

    Returns:
        A transformers tokenizer.

    Raises:
        CheckpointError: the directory has no tokenizer or one that transformers cannot read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{str(directory)!r} is no directory; pass the checkpoint directory")
    with _without_torch_advice():
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(str(directory), use_fast=True, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise plain Exception as well for damaged files
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be loaded ({error}); the directory needs tokenizer.json and "
            f"tokenizer_config.json next to config.json"
        ) from error


def stop_token_ids(directory: str | os.PathLike[str], tokenizer: Any) -> tuple[int, ...]:
    """Every token id that ends generation: from generation_config.json, config.json and the tokenizer.

    Returns:
        Sorted ids, each once; empty if none of the three names one.

    Raises:
        CheckpointError: a file cannot be read, or its eos_token_id is no integer or list of integers.
    """
    found: set[int] = set()
    for file_name in ("generation_config.json", "config.json"):
        found.update(_eos_ids(Path(directory) / file_name))
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    return tuple(sorted(found))


THINK_TOKENS = (
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, SmolLM3, GLM-4.5
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
)
"""Tokens that open and close a reasoning, as model families write them."""


def think_tokens(tokenizer: Any) -> tuple[int, int] | None:
    """The ids of the tokens that open and close a reasoning; None where the tokenizer has no such pair."""
    vocab = {} if tokenizer is None else tokenizer.get_vocab()
    return next(((vocab[start], vocab[end]) for start, end in THINK_TOKENS if start in vocab and end in vocab), None)


def encode_prompt(tokenizer: Any, prompt: Any, chat: bool, vocab_size: int | None = None) -> list[int]:
    """Turns a prompt into token ids.

    Args:
        tokenizer: what `load_tokenizer` returns, or None: then only token ids are accepted.
        prompt: text; or a list of {"role": ..., "content": ...} messages; or a list or 1-D integer array of token ids.
        chat: puts text (as one user turn) and messages into the chat template, up to where the answer begins. Token
            ids are taken as they are.
        vocab_size: token ids must lie below it; None is the tokenizer's own.

    Returns:
        The token ids, at least one.

    Raises:
        SpecJAXError: the prompt is empty or of another type, an id is outside the vocabulary, or the chat template
            is missing, needed but not asked for, or refuses the messages.
    """
    if tokenizer is None and (isinstance(prompt, str) or _is_messages(prompt)):
        raise SpecJAXError("the target has no tokenizer; expected token ids, or add tokenizer.json to its directory")
    if isinstance(prompt, str):
        if not prompt:
            raise SpecJAXError("prompt='' is empty; expected at least one character")
        if chat:
            return _apply_chat_template(tokenizer, [{"role": "user", "content": prompt}])
        return _not_empty([int(token) for token in tokenizer(prompt)["input_ids"]], prompt)
    if hasattr(prompt, "__array__"):  # JAX arrays too
        prompt = np.asarray(prompt)
        if prompt.ndim != 1:
            raise SpecJAXError(f"prompt has shape {prompt.shape}; expected token ids of one prompt, shape [length]")
    elif not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise SpecJAXError(
            f"prompt={_shown(prompt)} has type {type(prompt).__name__}; expected a str, a list of messages, or a list "
            f"or array of token ids"
        )
    if len(prompt) == 0:
        raise SpecJAXError(f"prompt={_shown(prompt)} is empty; expected at least one message or token id")
    if _is_messages(prompt):
        return _encode_messages(tokenizer, prompt, chat)
    return _checked_token_ids(prompt, len(tokenizer) if vocab_size is None else vocab_size)


@contextlib.contextmanager
def _without_torch_advice() -> Iterator[None]:
    """Keeps transformers from announcing, when first imported, that PyTorch is missing: SpecJAX does not use it."""

    def keep(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger = logging.getLogger("transformers")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _eos_ids(path: Path) -> list[int]:
    if not path.is_file():
        return []
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no JSON object ({error}); fetch the checkpoint again") from error
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointError(f"{path}: eos_token_id={eos!r}; expected a token id or a list of them")
    return ids


def _not_empty(tokens: list[int], prompt: Any) -> list[int]:
    if not tokens:
        raise SpecJAXError(f"prompt={_shown(prompt)} has no tokens; expected a text that the tokenizer does not drop")
    return tokens


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _encode_messages(tokenizer: Any, messages: Sequence[Any], chat: bool) -> list[int]:
    if not chat:
        raise SpecJAXError("a prompt of messages needs the chat template; pass chat=True, or the text as one str")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise SpecJAXError(f'prompt[{index}]={_shown(message)}; expected a message {{"role": str, "content": str}}')
    return _apply_chat_template(tokenizer, [dict(message) for message in messages])


def _apply_chat_template(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    if not tokenizer.chat_template:
        raise SpecJAXError("chat=True, but the tokenizer has no chat template; pass chat=False to continue plain text")
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as error:  # the template is a program of the checkpoint's: it may raise anything
        raise SpecJAXError(f"the chat template refuses the messages {_shown(messages)}: {error}") from error
    return _not_empty([int(token) for token in encoded["input_ids"]], messages)


def _checked_token_ids(prompt: Any, vocab_size: int) -> list[int]:
    for index, token in enumerate(prompt):
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
            raise SpecJAXError(
                f"prompt[{index}]={_shown(token)} has type {type(token).__name__}; expected an integer token id"
            )
        if not 0 <= token < vocab_size:
            raise SpecJAXError(f"prompt[{index}]={token} is outside the vocabulary; expected 0 <= id < {vocab_size}")
    return [int(token) for token in prompt]


def _shown(value: Any) -> str:
    """The value as in code, cut to a length that fits an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def decode_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of token ids without special tokens; "" where there is no tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
