"""Drafting methods: one file each, and the table that names them."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from specjax.checkpoints import pretrained
from specjax.checkpoints.heads import TOKEN_MAP, LoadedHead, detect_method, num_drafts_of, read_head, read_token_map
from specjax.checkpoints.load import Target, load_target, reads_rows_first
from specjax.config import AUTO, SpeculativeConfig
from specjax.drafters.base import Drafter, draft_counts
from specjax.drafters.draft_model import DraftWeights, draft_model
from specjax.drafters.fit import check_fit, check_shapes
from specjax.drafters.head import HeadWeights, head
from specjax.drafters.hybrid import hybrid
from specjax.drafters.ngram import ngram
from specjax.drafters.paced import PacedParams, paced
from specjax.drafters.plain import plain
from specjax.errors import AssetError, ConfigError, DraftWarning
from specjax.heads import network
from specjax.heads.network import Shared
from specjax.sharding import has_places, num_parts, placed
from specjax.target.decoder import rows_first
from specjax.target.layers import Kernel, some_outputs


def build_drafter(config: SpeculativeConfig | None, target: Target) -> tuple[Drafter, Any]:
    """The drafter that a config describes for a target, and its weights, on the target's mesh. None decodes plainly.

    Raises:
        ConfigError: the draft model does not fit the target; names the field.
    """
    if config is None:
        return plain(), ()
    return _with_drafts(METHODS[str(config.method)](config, target), config, target)


class Method(NamedTuple):
    """A drafting method that fits a target.

    Attributes:
        with_drafts: number of drafts a round -> the drafter.
        params: its weights.
        num_speculative_tokens: G that a checkpoint asks for, or None.
    """

    with_drafts: Callable[[int], Drafter]
    params: Any
    num_speculative_tokens: int | None = None


def _with_drafts(method: Method, config: SpeculativeConfig, target: Target) -> tuple[Drafter, Any]:
    """The method with as many drafts as its config or checkpoint says, or with as many as pay."""
    if config.num_speculative_tokens == AUTO:
        most = method.num_speculative_tokens or config.max_drafts
        drafters = [method.with_drafts(num) for num in draft_counts(most) if num]
        # Until a round has been measured, all cost the same.
        params = PacedParams(method.params, jnp.ones(len(drafters) + 1))
        return paced(drafters, target.config.width, target.dtype), params
    given = "num_speculative_tokens" in config.model_fields_set or config.uses_synthetic_acceptance()
    num = config.max_drafts if given else method.num_speculative_tokens or config.max_drafts
    return method.with_drafts(num), method.params


def _ngram(config: SpeculativeConfig, target: Target) -> Method:
    shortest, longest = config.prompt_lookup_min, config.prompt_lookup_max
    assert shortest is not None and longest is not None  # validated
    return Method(lambda num: ngram(num, shortest, longest), ())


def _draft_model(config: SpeculativeConfig, target: Target) -> Method:
    draft, directory = target, None
    if config.model is not None:
        directory = pretrained.resolve(config.model, config.revision)
        method = detect_method(directory)
        if method not in ("draft_model", "mtp"):  # a language model may carry MTP layers
            raise ConfigError(
                f"SpeculativeConfig.method='draft_model': {config.model} is for method={method!r}; set that, or give "
                "a language model."
            )
        if method == "mtp":
            warnings.warn(
                f"SpeculativeConfig.model={config.model!r}: has MTP layers, but method='draft_model' drafts with the "
                "whole model; set method='mtp' to draft with those layers.",
                DraftWarning,
                stacklevel=2,
            )
        draft = load_target(config.model, dtype=target.dtype, revision=config.revision)
    return _draft_model_method(draft, target, config, directory)


def _head(config: SpeculativeConfig, target: Target) -> Method:
    name = config.model or _own_head(str(config.method), target)
    directory = pretrained.resolve(name, config.revision, pickles=True)
    loaded = read_head(directory, target.config, target.dtype, target.params)
    if config.method not in (loaded.config.method, "hybrid"):
        raise ConfigError(
            f"SpeculativeConfig.method={config.method!r}: {name} is a head for method={loaded.config.method!r}; set "
            "that, or leave the field out."
        )
    check_shapes(loaded.config, target, name)
    _warn_of_another_verifier(loaded, target, name)
    ids, columns = loaded.vocabulary, target.params["head"]
    if not loaded.config.own_head:
        ids, columns = _drafted(config, directory, target, columns)
    elif config.speculative_token_map is not None:
        raise ConfigError(
            f"SpeculativeConfig.speculative_token_map={config.speculative_token_map!r}: {name} has an output head of "
            "its own; expected one that reads the target's. Leave the field out."
        )
    token_of = None if ids is None else jnp.asarray(ids)
    shared = Shared(target.params["embedding"], columns)
    params, whole = loaded.params, _whole(config, target)
    if has_places(target.mesh):
        shapes, axes = network.param_shapes(loaded.config), network.param_axes(loaded.config)
        params = placed(params, shapes, axes, target.mesh, whole)
    elif reads_rows_first(target.mesh, target.dtype):
        params = rows_first(params)
    weights = HeadWeights(params, shared, token_of)
    check_fit(loaded.config, weights, target, name)
    limit = _checked_limit(config, target.config.max_position, "the target's context")
    sample, threshold = config.draft_sample_method == "probabilistic", config.draft_confidence_threshold or 0.0
    return Method(
        lambda num: head(loaded.config, num, target.dtype, sample, limit, threshold),
        weights,
        loaded.num_speculative_tokens,
    )


def _drafted(
    config: SpeculativeConfig, directory: Path | None, target: Target, head: Kernel
) -> tuple[np.ndarray | None, Kernel]:
    """The only tokens to be drafted int32[V'] or None for all, and their columns of an output head dtype[D, V].

    Raises:
        ConfigError: the token map cannot be read, or does not list different tokens of the target.
    """
    path = None if directory is None else directory / TOKEN_MAP
    if config.speculative_token_map is not None:
        path = Path(config.speculative_token_map)
    elif path is None or not path.is_file():
        return None, head
    tokens = read_token_map(path, target.config.vocab_size, "SpeculativeConfig.speculative_token_map")
    columns = some_outputs(head, tokens)
    if has_places(target.mesh):
        columns = placed(columns, columns, PartitionSpec("width", "vocab"), target.mesh)
    return tokens, columns


def _whole(config: SpeculativeConfig, target: Target) -> bool:
    """Whether every device gets all of the drafter's weights.

    Raises:
        ConfigError: draft_tensor_parallel_size is neither 1 nor the target's.
    """
    size = config.draft_tensor_parallel_size
    parts = 1 if target.mesh is None else num_parts(target.mesh)
    if size not in (None, 1, parts):
        raise ConfigError(
            f"SpeculativeConfig.draft_tensor_parallel_size={size}: expected 1, or {parts} as the target's mesh has."
        )
    return size == 1 and parts > 1


def _own_head(method: str, target: Target) -> str:
    """The head of a target where the config names none: in its checkpoint, or one that comes with SpecJAX."""
    kinds = ("eagle3", "mtp", "eagle") if method == "hybrid" else (method,)
    found = next((name for kind in kinds if (name := pretrained.shipped_for(target.name, kind))), None)
    if found is not None:
        return found
    if "mtp" in kinds:
        with contextlib.suppress(AssetError):
            if detect_method(pretrained.resolve(target.name)) == "mtp":
                return target.name
    raise ConfigError(
        f"SpeculativeConfig.model=None: no {' or '.join(kinds)} head for {target.name} comes with SpecJAX or with its "
        f"checkpoint; expected the directory or hub id of one. Shipped: {', '.join(pretrained.shipped()) or 'none'}."
    )


def _warn_of_another_verifier(loaded: LoadedHead, target: Target, name: str) -> None:
    """Names may differ for the same model (a path, a hub id), so this only asks to look."""
    if loaded.speculator is None or loaded.speculator.speculators_config is None:
        return
    verifier = loaded.speculator.speculators_config.verifier.name_or_path
    if verifier and Path(verifier).name.lower() != Path(target.name).name.lower():
        warnings.warn(
            f"{name}: was made for {verifier!r}, the target is {target.name!r}; if these are not the same weights, "
            "few drafts will be accepted.",
            DraftWarning,
            stacklevel=2,
        )


def _hybrid(config: SpeculativeConfig, target: Target) -> Method:
    shortest, longest = config.prompt_lookup_min, config.prompt_lookup_max
    assert shortest is not None and longest is not None  # validated
    other = _head(config, target)
    vocab_size = target.config.vocab_size
    return other._replace(with_drafts=lambda num: hybrid(other.with_drafts(num), vocab_size, shortest, longest))


def draft_model_for(draft: Target, target: Target, config: SpeculativeConfig) -> tuple[Drafter, Any]:
    """The draft_model drafter from a model that is already loaded, and its weights."""
    return _with_drafts(_draft_model_method(draft, target, config, None), config, target)


def _draft_model_method(draft: Target, target: Target, config: SpeculativeConfig, directory: Path | None) -> Method:
    whole = _whole(config, target)
    if draft.mesh is not target.mesh or whole:
        draft = draft.beside(target.mesh, whole)
    if draft.config.vocab_size != target.config.vocab_size:
        raise ConfigError(
            f"SpeculativeConfig.model={draft.name!r}: its vocabulary has {draft.config.vocab_size} tokens, the "
            f"target's {target.config.vocab_size}; expected the same vocabulary, so choose a draft model of "
            "the target's family."
        )
    other = _first_differing_token(draft.tokenizer, target.tokenizer)
    if other is not None:
        raise ConfigError(
            f"SpeculativeConfig.model={draft.name!r}: its tokenizer differs from the target's, in {other!r} first; "
            "expected the same vocabulary, so choose a draft model of the target's family."
        )
    if config.assistant_early_exit is not None:
        draft = _first_layers(draft, config.assistant_early_exit)
    longest = min(draft.config.max_position, target.config.max_position)
    limit = _checked_limit(config, longest, "the shorter context of draft and target")
    if limit is None and longest < target.config.max_position:
        limit = longest
    sample, threshold = config.draft_sample_method == "probabilistic", config.draft_confidence_threshold or 0.0
    token_of, columns = _drafted(config, directory, target, draft.params["head"])
    weights = DraftWeights(draft.params)
    if token_of is not None:
        weights = DraftWeights(draft.params, columns, jnp.asarray(token_of))
    asked = None if directory is None else num_drafts_of(directory)
    return Method(lambda num: draft_model(draft.config, num, draft.dtype, sample, limit, threshold), weights, asked)


def _checked_limit(config: SpeculativeConfig, longest: int, what: str) -> int | None:
    """max_model_len, which may be at most `longest` positions; `what` says whose they are."""
    limit = config.max_model_len
    if limit is not None and limit > longest:
        raise ConfigError(f"SpeculativeConfig.max_model_len={limit}: expected at most {longest}, {what}.")
    return limit


def _first_layers(draft: Target, num_layers: int) -> Target:
    """The same model left after its first layers, by its final norm and head."""
    if num_layers >= draft.config.num_layers:
        raise ConfigError(
            f"SpeculativeConfig.assistant_early_exit={num_layers}: {draft.name} has {draft.config.num_layers} layers; "
            "expected fewer."
        )
    windows = draft.config.sliding_windows[:num_layers]
    return dataclasses.replace(
        draft, config=dataclasses.replace(draft.config, num_layers=num_layers, sliding_windows=windows)
    )


def _first_differing_token(draft: Any, target: Any) -> str | None:
    """A token with another id in one of two tokenizers, or None; unknown where one of them is absent."""
    if draft is None or target is None:
        return None
    ours, theirs = draft.get_vocab(), target.get_vocab()
    return next((token for token in sorted(ours.keys() | theirs.keys()) if ours.get(token) != theirs.get(token)), None)


METHODS: dict[str, Callable[[SpeculativeConfig, Target], Method]] = {
    "ngram": _ngram,
    "draft_model": _draft_model,
    "eagle": _head,
    "eagle3": _head,
    "mtp": _head,
    "hybrid": _hybrid,
}
