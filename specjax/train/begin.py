"""What training goes on from: the head of an earlier training, or one in a checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from specjax.checkpoints import hf, pretrained
from specjax.checkpoints.heads import TOKEN_MAP, read_head, read_token_map
from specjax.checkpoints.load import Target
from specjax.errors import AssetError, ConfigError
from specjax.sharding import put
from specjax.target.families import from_hf
from specjax.train.students import DraftModelStudent, HeadStudent, Student


def inherit(name: str, student: Student, target: Target, sharding: Sharding) -> tuple[Any, np.ndarray | None]:
    """The weights to begin with, and the tokens that they were trained to draft, None for all.

    Args:
        name: the head/ folder of a training, or the name or directory of a head in a checkpoint.
        student: what the weights are to be of.
        sharding: of the weights.

    Raises:
        ConfigError: no head is there, or it is another one than the student's.
        CheckpointError: the checkpoint cannot be read.
    """
    folder = Path(name)
    if (folder / "head.json").is_file():
        _check_same_head(name, student, json.loads((folder / "head.json").read_text(encoding="utf-8")))
        vocabulary = folder / "vocabulary.npy"
        learnt = np.load(vocabulary) if vocabulary.is_file() else None
        return restore_params(folder, student.param_shapes(), sharding, "init_from"), learnt
    try:
        directory = pretrained.resolve(name)
    except AssetError as error:
        raise ConfigError(f"init_from={name!r}: expected the head/ folder of a training, or a head: {error}") from error
    theirs, params, learnt = _from_checkpoint(directory, student, target)
    _check_same_head(name, student, theirs.fields())
    if learnt is None and (directory / TOKEN_MAP).is_file():
        learnt = read_token_map(directory / TOKEN_MAP, target.config.vocab_size, "init_from")
    return jax.tree.map(lambda x: put(x, sharding), params), learnt


def _from_checkpoint(directory: Path, student: Student, target: Target) -> tuple[Student, Any, np.ndarray | None]:
    if isinstance(student, DraftModelStudent):
        config = from_hf(hf.read_config(directory))
        params = hf.read_params(directory, config, np.dtype("float32"))
        return DraftModelStudent(config), {part: x for part, x in params.items() if part != "head"}, None
    loaded = read_head(directory, target.config, np.dtype("float32"), target.params)
    return HeadStudent(loaded.config), loaded.params, loaded.vocabulary


def _check_same_head(name: str, student: Student, theirs: dict[str, Any]) -> None:
    """Raises:
    ConfigError: a field of the head differs from what the config describes.
    """
    ours = json.loads(json.dumps(student.fields()))
    theirs = json.loads(json.dumps(theirs))
    ours, theirs = ({**fields.pop("layer"), **fields} for fields in (ours, theirs))
    for field in sorted(ours.keys() | theirs.keys()):
        if ours.get(field) != theirs.get(field):
            raise ConfigError(
                f"init_from={name!r}: is a head with {field}={theirs.get(field)!r}, this config's has "
                f"{ours.get(field)!r}; expected equal config.head fields."
            )


def restore_params(path: str | os.PathLike[str], shapes: Any, sharding: Sharding, name: str = "source") -> Any:
    """The weights of a head that write_head wrote. name: of the setting that gave the path, for messages.

    Raises:
        ConfigError: there is none, or it is of another shape.
    """
    folder = Path(path).absolute() / "params"
    if not folder.is_dir():
        raise ConfigError(f"{name}={os.fspath(path)!r}: holds no params/; expected the head/ folder of a training.")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(folder, with_sharding(shapes, sharding))
        except ValueError as error:
            raise ConfigError(
                f"{name}={os.fspath(path)!r}: its weights do not have the shapes of its head ({error}); expected what "
                "`specjax train` wrote."
            ) from error


def with_sharding(shapes: Any, sharding: Sharding) -> Any:
    """The same jax.ShapeDtypeStructs with a sharding each."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
