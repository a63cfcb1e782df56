"""Hugging Face directories (config.json, safetensors) -> params."""

import functools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.errors import CheckpointError
from specjax.sharding import put
from specjax.target import decoder
from specjax.target.families import ModelConfig

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from config.json."""

HEAD_PREFIXES = ("model.mtp_", "mtp.")
"""Tensors of the draft heads that some targets carry; specjax.checkpoints.heads reads them."""

STORED_DTYPES = ("F64", "F32", "F16", "BF16")


def read_config(directory: Path) -> dict:
    """config.json as a dict.

    Raises:
        CheckpointError: absent or not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no config.json; expected a Hugging Face model directory.")
    return _read_json_object(path)


def _read_json_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON or bad UTF-8
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}; expected an object. Download it again.")
    return value


def read_params(directory: Path, config: ModelConfig, dtype: jnp.dtype, places: Any = None) -> decoder.Params:
    """The weights of a directory in the decoder's own layout.

    Every tensor's name and shape is checked before it is used. The host holds one weight at a time.

    Args:
        places: where each weight goes; None for the first device.

    Raises:
        CheckpointError: names tensors that are missing, left over or of the wrong shape or type, and files that
            are absent or truncated.
    """
    with Tensors(directory) as tensors:
        params = read_entries(tensors, model_entries(config), dtype, places)
        if config.tied_head and "lm_head.weight" in tensors.where:
            _check_tied_head(tensors, config)
        tensors.check_all_taken(HEAD_PREFIXES)
    check_layout(params, decoder.param_shapes(config, dtype))
    return params


class Entry(NamedTuple):
    """How one weight of ours relates to tensors of a file. HF kernels are [out, in], ours [in, ..., out].

    Attributes:
        path: where it is in params.
        names: the tensors that it is made of.
        shapes: theirs.
        read: tensors -> weight.
        write: weight -> tensors, the inverse.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    read: Callable[..., np.ndarray]
    write: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def vector(path: tuple[str, ...], name: str, *shape: int) -> Entry:
    """A tensor that is stored as we have it."""
    return Entry(path, (name,), (shape,), lambda x: x, lambda x: (x,))


def kernel(path: tuple[str, ...], name: str, num_in: int, num_out: int) -> Entry:
    """The weight of a linear layer."""
    return Entry(path, (name,), ((num_out, num_in),), lambda x: x.T, lambda x: (x.T,))


def model_entries(config: ModelConfig) -> Iterator[Entry]:
    """The one table that relates HF names to the decoder's layout."""
    D, V = config.width, config.vocab_size
    yield vector(("embedding",), "model.embed_tokens.weight", V, D)
    yield vector(("final_norm",), "model.norm.weight", D)
    yield kernel(("head",), "model.embed_tokens.weight" if config.tied_head else "lm_head.weight", D, V)
    for index in range(config.num_layers):
        yield from layer_entries(config, (f"layer_{index}",), f"model.layers.{index}")


def layer_entries(
    config: ModelConfig, ours: tuple[str, ...], theirs: str, input_width: int | None = None, norm_input: bool = True
) -> Iterator[Entry]:
    """The weights of one decoder layer.

    Args:
        ours: path of the layer in params.
        theirs: what its tensors' names begin with.
        input_width: of what the attention's projections read; None where that is the layer's own input.
        norm_input: whether it norms its input.
    """
    D, F = config.width, config.mlp_width
    K, Q, H = config.num_kv_heads, config.queries_per_kv, config.head_dim
    q, kv, read_width = K * Q * H, K * H, input_width or D

    def grouped(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """[K, Q + 2, H, ...]: each KV head's queries, key and value."""
        rest = query.shape[1:]
        parts = query.reshape(K, Q, H, *rest), key.reshape(K, 1, H, *rest), value.reshape(K, 1, H, *rest)
        return np.concatenate(parts, axis=1)

    def ungrouped(x: np.ndarray) -> tuple[np.ndarray, ...]:
        rest = x.shape[3:]
        return x[:, :Q].reshape(q, *rest), x[:, Q].reshape(kv, *rest), x[:, Q + 1].reshape(kv, *rest)

    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    projections = tuple(f"{attention}.{x}_proj" for x in "qkv")
    if norm_input:
        yield vector((*ours, "attention_norm"), f"{theirs}.input_layernorm.weight", D)
    yield vector((*ours, "mlp_norm"), f"{theirs}.post_attention_layernorm.weight", D)
    yield Entry(
        (*ours, "qkv"),
        tuple(f"{x}.weight" for x in projections),
        ((q, read_width), (kv, read_width), (kv, read_width)),
        lambda *parts: np.moveaxis(grouped(*parts), -1, 0),
        lambda x: ungrouped(np.moveaxis(x, 0, -1)),
    )
    if config.qkv_bias:
        names = tuple(f"{x}.bias" for x in projections)
        yield Entry((*ours, "qkv_bias"), names, ((q,), (kv,), (kv,)), grouped, ungrouped)
    if config.qk_norm:
        yield vector((*ours, "q_norm"), f"{attention}.q_norm.weight", H)
        yield vector((*ours, "k_norm"), f"{attention}.k_norm.weight", H)
    yield Entry(
        (*ours, "out"),
        (f"{attention}.o_proj.weight",),
        ((D, q),),
        lambda x: x.T.reshape(K, Q, H, D),
        lambda x: (x.reshape(q, D).T,),
    )
    if config.out_bias:
        yield vector((*ours, "out_bias"), f"{attention}.o_proj.bias", D)
    gate_up = f"{mlp}.gate_proj", f"{mlp}.up_proj"
    yield Entry(
        (*ours, "gate_up"),
        tuple(f"{x}.weight" for x in gate_up),
        ((F, D), (F, D)),
        lambda gate, up: np.stack([gate.T, up.T], axis=1),
        lambda x: (x[:, 0].T, x[:, 1].T),
    )
    yield kernel((*ours, "down"), f"{mlp}.down_proj.weight", F, D)
    if config.mlp_bias:
        names = tuple(f"{x}.bias" for x in gate_up)
        yield Entry(
            (*ours, "gate_up_bias"), names, ((F,), (F,)), lambda gate, up: np.stack([gate, up]), lambda x: (x[0], x[1])
        )
        yield vector((*ours, "down_bias"), f"{mlp}.down_proj.bias", D)


class Tensors:
    """The tensors of all safetensors files of a directory, by name, read one at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: list = []
        self.where: dict[str, int] = {}
        self.taken: set[str] = set()

    def __enter__(self) -> "Tensors":
        from safetensors import SafetensorError, safe_open

        for path in self._paths():
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: is truncated or not a safetensors file ({error}); download it again."
                ) from error
            self.where |= {name: len(self.files) for name in file.keys()}  # noqa: SIM118 (not a dict)
            self.files.append(file)
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.clear()

    def _paths(self) -> list[Path]:
        """One file, or those that the index of a sharded checkpoint names."""
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _read_json_object(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index}: has no weight_map; expected tensor names and the files they are in.")
            paths = [self.directory / name for name in sorted(set(weight_map.values()))]
            absent = [path.name for path in paths if not path.is_file()]
            if absent:
                raise CheckpointError(f"{index}: names files that are not there: {', '.join(absent)}; download them.")
            return paths
        single = self.directory / "model.safetensors"
        if single.is_file():  # beside which others may lie: adapters, or the same weights under other names
            return [single]
        paths = sorted(self.directory.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(
                f"{self.directory}: has no *.safetensors; pickle checkpoints are not read, convert them to safetensors."
            )
        return paths

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that is there."""
        return tuple(self.files[self.where[name]].get_slice(name).get_shape())

    def take(self, name: str, expected: tuple[int, ...], stored: tuple[str, ...] = STORED_DTYPES) -> np.ndarray:
        """One tensor, checked.

        Args:
            stored: dtypes that it may have in the file.
        """
        if name not in self.where:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is missing (expected shape {expected}); the checkpoint has "
                f"{len(self.where)} tensors. Check that config.json belongs to it."
            )
        dtype, shape = self._dtype(name), self.shape(name)
        if dtype not in stored:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is stored as {dtype}; expected one of "
                f"{stored}. Quantised checkpoints are not read."
            )
        if shape != expected:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} has shape {shape}; config.json implies {expected}."
            )
        self.taken.add(name)
        return self._load(name)

    def _dtype(self, name: str) -> str:
        dtype: str = self.files[self.where[name]].get_slice(name).get_dtype()
        return dtype

    def _load(self, name: str) -> np.ndarray:
        return self.files[self.where[name]].get_tensor(name)

    def check_all_taken(self, ignored_prefixes: tuple[str, ...] = ()) -> None:
        """No tensor may be left unread: it would mean that the model is not the one that config.json describes."""
        left = sorted(
            name
            for name in self.where
            if name not in self.taken and not name.endswith(IGNORED_SUFFIXES) and not name.startswith(ignored_prefixes)
        )
        if left:
            shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            raise CheckpointError(
                f"{self.directory}: tensors that this architecture does not use: {shown}. "
                "Check config.json (attention_bias, mlp_bias, tie_word_embeddings, num_hidden_layers)."
            )


def _check_tied_head(tensors: Tensors, config: ModelConfig) -> None:
    """A tied checkpoint may store the head as well, but only the same one: else either could be the right one."""
    shape = config.vocab_size, config.width
    if not np.array_equal(tensors.take("lm_head.weight", shape), tensors.take("model.embed_tokens.weight", shape)):
        raise CheckpointError(
            f"{tensors.directory}: config.json has tie_word_embeddings=true, but lm_head.weight differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false if the head is meant."
        )


def read_entries(tensors: Tensors, entries: Iterable[Entry], dtype: jnp.dtype, places: Any = None) -> decoder.Params:
    """The weights that entries describe, as a nested dict; each goes to its place as it is read."""
    params: decoder.Params = {}
    for entry in entries:
        parts = (tensors.take(name, shape) for name, shape in zip(entry.names, entry.shapes, strict=True))
        array = entry.read(*parts)
        if places is None:
            _put(params, entry.path, jnp.asarray(array, dtype))
        else:  # each device is sent its part of the converted array, and no device the whole
            where = functools.reduce(operator.getitem, entry.path, places)
            _put(params, entry.path, put(array.astype(dtype), where))
    return params


def _put(params: decoder.Params, path: tuple[str, ...], array: jax.Array) -> None:
    for part in path[:-1]:
        params = params.setdefault(part, {})
    params[path[-1]] = array


def check_layout(params: decoder.Params, shapes: Mapping) -> None:
    """Our own table against a network's description of its weights: a difference is a defect here."""
    found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), dict(shapes))
    if found != described:
        raise AssertionError(f"checkpoint table and network disagree: {found} against {described}")
