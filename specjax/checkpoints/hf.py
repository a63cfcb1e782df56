"""Hugging Face directories (config.json, safetensors) -> params."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from specjax.errors import CheckpointError
from specjax.target import decoder
from specjax.target.families import ModelConfig

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from config.json."""

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


def read_params(directory: Path, config: ModelConfig, dtype: jnp.dtype) -> decoder.Params:
    """The weights of a directory in the decoder's own layout.

    Every tensor's name and shape is checked before it is used.

    Raises:
        CheckpointError: names tensors that are missing, left over or of the wrong shape or type, and files that
            are absent or truncated.
    """
    with _Tensors(directory) as tensors:
        params: decoder.Params = {}
        for path, names, shape, convert in _entries(config):
            array = convert(*(tensors.take(name, expected) for name, expected in zip(names, shape, strict=True)))
            _put(params, path, jnp.asarray(array, dtype))
        if config.tied_head and "lm_head.weight" in tensors.where:
            _check_tied_head(tensors, config)
        tensors.check_all_taken()
    _check_layout(params, decoder.param_shapes(config, dtype))
    return params


Entry = tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[int, ...], ...], Callable[..., np.ndarray]]
"""Path in params, HF names that it is made of, their shapes, and how."""


def _entries(config: ModelConfig) -> Iterator[Entry]:
    """The one table that relates HF names to the decoder's layout. HF kernels are [out, in], ours [in, ..., out]."""
    D, F, V = config.width, config.mlp_width, config.vocab_size
    K, Q, H = config.num_kv_heads, config.queries_per_kv, config.head_dim
    q, kv = K * Q * H, K * H

    def grouped(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        """[K, Q + 2, H, ...]: each KV head's queries, key and value."""
        rest = query.shape[1:]
        parts = query.reshape(K, Q, H, *rest), key.reshape(K, 1, H, *rest), value.reshape(K, 1, H, *rest)
        return np.concatenate(parts, axis=1)

    def same(x: np.ndarray) -> np.ndarray:
        return x

    def turned(x: np.ndarray) -> np.ndarray:
        return x.T

    yield ("embedding",), ("model.embed_tokens.weight",), ((V, D),), same
    yield ("final_norm",), ("model.norm.weight",), ((D,),), same
    head = "model.embed_tokens.weight" if config.tied_head else "lm_head.weight"
    yield ("head",), (head,), ((V, D),), turned
    for index in range(config.num_layers):
        ours, theirs = f"layer_{index}", f"model.layers.{index}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        projections = tuple(f"{attention}.{x}_proj" for x in "qkv")
        yield (ours, "attention_norm"), (f"{theirs}.input_layernorm.weight",), ((D,),), same
        yield (ours, "mlp_norm"), (f"{theirs}.post_attention_layernorm.weight",), ((D,),), same
        yield (
            (ours, "qkv"),
            tuple(f"{x}.weight" for x in projections),
            ((q, D), (kv, D), (kv, D)),
            lambda *parts: np.moveaxis(grouped(*parts), -1, 0),
        )
        if config.qkv_bias:
            yield (ours, "qkv_bias"), tuple(f"{x}.bias" for x in projections), ((q,), (kv,), (kv,)), grouped
        if config.qk_norm:
            yield (ours, "q_norm"), (f"{attention}.q_norm.weight",), ((H,),), same
            yield (ours, "k_norm"), (f"{attention}.k_norm.weight",), ((H,),), same
        yield (ours, "out"), (f"{attention}.o_proj.weight",), ((D, q),), lambda x: x.T.reshape(K, Q, H, D)
        if config.out_bias:
            yield (ours, "out_bias"), (f"{attention}.o_proj.bias",), ((D,),), same
        gate_up = f"{mlp}.gate_proj", f"{mlp}.up_proj"
        yield (
            (ours, "gate_up"),
            tuple(f"{x}.weight" for x in gate_up),
            ((F, D), (F, D)),
            lambda gate, up: np.stack([gate.T, up.T], axis=1),
        )
        yield (ours, "down"), (f"{mlp}.down_proj.weight",), ((D, F),), turned
        if config.mlp_bias:
            names = tuple(f"{x}.bias" for x in gate_up)
            yield (ours, "gate_up_bias"), names, ((F,), (F,)), lambda gate, up: np.stack([gate, up])
            yield (ours, "down_bias"), (f"{mlp}.down_proj.bias",), ((D,),), same


class _Tensors:
    """The tensors of all safetensors files of a directory, by name, read one at a time."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: list = []
        self.where: dict[str, int] = {}
        self.taken: set[str] = set()

    def __enter__(self) -> "_Tensors":
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

    def take(self, name: str, expected: tuple[int, ...]) -> np.ndarray:
        """One tensor, checked."""
        if name not in self.where:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is missing (expected shape {expected}); the checkpoint has "
                f"{len(self.where)} tensors. Check that config.json belongs to it."
            )
        header = self.files[self.where[name]].get_slice(name)
        shape = tuple(header.get_shape())
        if header.get_dtype() not in STORED_DTYPES:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is stored as {header.get_dtype()}; expected one of "
                f"{STORED_DTYPES}. Quantised checkpoints are not read."
            )
        if shape != expected:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} has shape {shape}; config.json implies {expected}."
            )
        self.taken.add(name)
        return self.files[self.where[name]].get_tensor(name)

    def check_all_taken(self) -> None:
        """No tensor may be left unread: it would mean that the model is not the one that config.json describes."""
        left = sorted(name for name in self.where if name not in self.taken and not name.endswith(IGNORED_SUFFIXES))
        if left:
            shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            raise CheckpointError(
                f"{self.directory}: tensors that this architecture does not use: {shown}. "
                "Check config.json (attention_bias, mlp_bias, tie_word_embeddings, num_hidden_layers)."
            )


def _check_tied_head(tensors: _Tensors, config: ModelConfig) -> None:
    """A tied checkpoint may store the head as well, but only the same one: else either could be the right one."""
    shape = config.vocab_size, config.width
    if not np.array_equal(tensors.take("lm_head.weight", shape), tensors.take("model.embed_tokens.weight", shape)):
        raise CheckpointError(
            f"{tensors.directory}: config.json has tie_word_embeddings=true, but lm_head.weight differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false if the head is meant."
        )


def _put(params: decoder.Params, path: tuple[str, ...], array: jax.Array) -> None:
    for part in path[:-1]:
        params = params.setdefault(part, {})
    params[path[-1]] = array


def _check_layout(params: decoder.Params, shapes: Mapping) -> None:
    """Our own table against the decoder's description of its weights: a difference is a defect here."""
    found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), dict(shapes))
    if found != described:
        raise AssertionError(f"checkpoint table and decoder disagree: {found} against {described}")
