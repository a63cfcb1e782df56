"""A trained head, or one of another dialect, as a directory of the speculators format."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from specjax.checkpoints import hf, pretrained
from specjax.checkpoints.heads import TOKEN_MAP, read_head, read_token_map, write_draft_model, write_head
from specjax.checkpoints.load import load_target
from specjax.errors import ConfigError
from specjax.heads import network
from specjax.heads.config import HeadConfig
from specjax.target.families import ModelConfig, RopeScaling
from specjax.train.begin import read_vocabulary, restore_params, trained_head
from specjax.train.students import DraftModelStudent, HeadStudent, Student

DRAFTS = 4
"""Drafts a round that a checkpoint asks for where nobody says how many."""


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target: str = "",
    num_speculative_tokens: int = 0,
    dtype: str = "bfloat16",
) -> Path:
    """Writes a head in the speculators format, a draft model as a Hugging Face directory.

    Args:
        source: the workdir of a training or its head/ folder, or a checkpoint that SpecJAX reads.
        out: the directory to be made.
        target: name of the target; needed for checkpoints, and known of trainings.
        num_speculative_tokens: to draft with where a user names no number; 0 for what the source says, or 4.
        dtype: of the weights in the file.

    Raises:
        ConfigError: no head, no target, or a head that the format cannot express.
        CheckpointError: the checkpoint cannot be read.
    """
    trained, token_map = trained_head(Path(source)), None
    drafts = num_speculative_tokens or DRAFTS
    if trained is not None:
        summary = trained.parent / "summary.json"
        if not target and summary.is_file():
            target = json.loads(summary.read_text(encoding="utf-8"))["target"]
        _require_target(target)
        config, params, vocabulary = read_trained(trained)
        if isinstance(config, ModelConfig):
            return write_draft_model(
                Path(out), config, params, _public_name(target), drafts, vocabulary, jnp.dtype(dtype)
            )
        if not config.reduced:
            vocabulary, token_map = None, vocabulary
    else:
        _require_target(target)
        directory, model = pretrained.resolve(source, pickles=True), load_target(target).config
        loaded = read_head(directory, model, np.dtype("float32"))
        config, params, vocabulary = loaded.config, loaded.params, loaded.vocabulary
        if (directory / TOKEN_MAP).is_file() and not config.own_head:
            token_map = read_token_map(directory / TOKEN_MAP, model.vocab_size, "--source")
        drafts = num_speculative_tokens or loaded.num_speculative_tokens or DRAFTS
    architectures = hf.read_config(pretrained.resolve(target)).get("architectures") or ["LlamaForCausalLM"]
    name = _public_name(target)
    return write_head(Path(out), config, params, name, architectures, drafts, vocabulary, jnp.dtype(dtype), token_map)


def _public_name(target: str) -> str:
    """What other systems know a target by."""
    asset = pretrained.ASSETS.get(target)
    return asset.hub if asset else target


def _require_target(target: str) -> None:
    if not target:
        raise ConfigError("--target: is missing; expected the name of the model that the head drafts for.")


def read_trained(folder: Path) -> tuple[HeadConfig | ModelConfig, network.Params, np.ndarray | None]:
    """What trainer.write_head wrote: the head or draft model, its weights and the tokens that it learnt, None for all.

    Raises:
        ConfigError: head.json or the weights are not there or do not fit each other.
    """
    try:
        fields: dict[str, Any] = json.loads((folder / "head.json").read_text(encoding="utf-8"))
        layer = fields.pop("layer")
        scaling = layer.pop("rope_scaling")
        layer["sliding_windows"] = tuple(layer["sliding_windows"])
        layer["rope_scaling"] = RopeScaling(**scaling) if scaling else None
        model = ModelConfig(**layer)
        student: Student = DraftModelStudent(model)
        if fields["method"] != "draft_model":
            student = HeadStudent(HeadConfig(layer=model, **fields | {"taps": tuple(fields["taps"])}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'head.json'}: {error}; expected what `specjax train` writes.") from error
    params = restore_params(folder, student.param_shapes(), SingleDeviceSharding(jax.devices()[0]))
    if isinstance(student, DraftModelStudent):
        params = params | {"head": params["embedding"].T}
    return student.config, params, read_vocabulary(folder)
