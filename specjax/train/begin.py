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
from specjax.errors import AssetError, CheckpointError, ConfigError
from specjax.sharding import put_all
from specjax.target.families import from_hf
from specjax.train.students import DraftModelStudent, HeadStudent, Student


def inherit(name: str, student: Student, target: Target, sharding: Sharding) -> tuple[Any, np.ndarray | None]:
    """The weights to begin with, and the tokens that they were trained to draft, None for all.

    Args:
        name: the workdir of a training or its head/ folder, or the name or directory of a head in a checkpoint.
        student: what the weights are to be of.
        sharding: of the weights.

    Raises:
        ConfigError: no head is there, or it is another one than the student's.
    """
    trained = trained_head(Path(name))
    if trained is not None:
        _check_same(name, student, json.loads((trained / "head.json").read_text(encoding="utf-8")))
        params = restore_params(trained, student.param_shapes(), sharding, "init_from")
        return params, read_vocabulary(trained)
    try:
        directory = pretrained.resolve(name, pickles=True)
        params, learnt = _from_checkpoint(name, directory, student, target)
    except (AssetError, CheckpointError) as error:
        raise ConfigError(f"init_from={name!r}: {error}; expected what `specjax train` wrote, or a head.") from error
    if learnt is None and (directory / TOKEN_MAP).is_file():
        learnt = read_token_map(directory / TOKEN_MAP, target.config.vocab_size, "init_from")
    return put_all(params, sharding), learnt


def trained_head(folder: Path) -> Path | None:
    """The head/ folder of a training, given that or the workdir; None where there is none."""
    return next((path for path in (folder, folder / "head") if (path / "head.json").is_file()), None)


def read_vocabulary(head: Path) -> np.ndarray | None:
    """The tokens that a head of a training learnt; None for all."""
    path = head / "vocabulary.npy"
    return np.load(path) if path.is_file() else None


def _from_checkpoint(name: str, directory: Path, student: Student, target: Target) -> tuple[Any, np.ndarray | None]:
    """Weights, and the draft vocabulary of heads that have one."""
    if isinstance(student, DraftModelStudent):
        config = from_hf(hf.read_config(directory))
        _check_same(name, student, DraftModelStudent(config).fields())
        params = hf.read_params(directory, config, np.dtype("float32"))
        return {part: x for part, x in params.items() if part != "head"}, None
    loaded = read_head(directory, target.config, np.dtype("float32"), target.params)
    _check_same(name, student, HeadStudent(loaded.config).fields())
    return loaded.params, loaded.vocabulary


def _check_same(name: str, student: Student, theirs: dict[str, Any]) -> None:
    """Compares what a head is made of, but for what only names its layers' family.

    Raises:
        ConfigError: a field differs from what the config describes.
    """
    ours, theirs = json.loads(json.dumps([student.fields(), theirs]))
    for fields in (ours, theirs):
        fields |= fields.pop("layer", {})
        fields.pop("family", None)
        if isinstance(student, HeadStudent):
            fields.pop("tied_head", None)
    for field in ("method", *sorted(ours.keys() | theirs.keys())):
        if ours.get(field) != theirs.get(field):
            raise ConfigError(
                f"init_from={name!r}: has {field}={theirs.get(field)!r}, but what config.head describes has "
                f"{ours.get(field)!r}; expected the same head."
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
