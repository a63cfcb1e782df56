"""load_target: a name or path -> a model that is ready to decode."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from specjax.checkpoints import hf, pretrained
from specjax.config import MeshConfig
from specjax.errors import CheckpointError, ConfigError
from specjax.sharding import has_places, make_mesh, param_places, placed
from specjax.target import decoder
from specjax.target.families import ModelConfig, from_hf
from specjax.tokenizer import load_tokenizer, stop_token_ids

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A loaded model.

    Attributes:
        name: what it was loaded by.
        config: its architecture.
        params: its weights, as decoder.init describes them.
        dtype: of weights and cache.
        tokenizer: a transformers tokenizer, or None (then prompts are token ids).
        stop_token_ids: tokens that end a generation.
        mesh: that its weights lie on; None for one device.
    """

    name: str
    config: ModelConfig
    params: decoder.Params
    dtype: Any
    tokenizer: Any = None
    stop_token_ids: tuple[int, ...] = ()
    mesh: Mesh | None = None

    def on(self, mesh: MeshConfig) -> "Target":
        """The same model spread over devices.

        Raises:
            ConfigError: there are too few devices, or it cannot be split so.
        """
        return self.beside(make_mesh(mesh, self.config))

    def beside(self, mesh: Mesh | None, whole: bool = False) -> "Target":
        """The same model on a mesh that was made for another; None leaves it where it is.

        Args:
            whole: every device gets all weights.
        """
        if mesh is None:
            return self
        shapes, axes = decoder.param_shapes(self.config), decoder.param_axes(self.config)
        params = placed(decoder.as_arrays(self.params, shapes), shapes, axes, mesh, whole)
        return dataclasses.replace(self, params=params, mesh=mesh)

    @property
    def num_params(self) -> int:
        """Weights, a tied head not counted twice."""
        total = sum(x.size for x in jax.tree.leaves(self.params))
        return total - (self.config.width * self.config.vocab_size if self.config.tied_head else 0)


def load_target(
    name_or_path: str | Path, dtype: Any = None, mesh: MeshConfig | None = None, revision: str | None = None
) -> Target:
    """Loads a model.

    Args:
        name_or_path: a Hugging Face directory or hub id, a GGUF file, or a named asset ("smollm2-135m-instruct").
        dtype: of weights and cache; None is float32 on CPU (where bfloat16 is slower) and bfloat16 on accelerators.
        mesh: how many devices to spread over, each weight as it is read; None for one.
        revision: of a hub id.

    Raises:
        AssetError: nothing is found under that name.
        CheckpointError: it is not a checkpoint that can be read; names the tensor or field.
        ConfigError: unknown dtype, or a mesh that the model cannot be split over.
    """
    dtype = _dtype(dtype)
    directory = pretrained.resolve(name_or_path, revision)
    config = from_hf(hf.read_config(directory))
    made = None if mesh is None else make_mesh(mesh, config)
    places = None
    if has_places(made):
        places = param_places(decoder.param_shapes(config), decoder.param_axes(config), made)
    params = hf.read_params(directory, config, dtype, places)
    if reads_rows_first(made, dtype):
        params = decoder.rows_first(params, config.tied_head)
    tokenizer = load_tokenizer(directory) if any(directory.glob("tokenizer*")) else None
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"{directory}: its tokenizer has {len(tokenizer)} tokens but config.json says vocab_size="
            f"{config.vocab_size}; expected no more tokens than logits."
        )
    stops = stop_token_ids(directory, tokenizer)
    return Target(str(name_or_path), config, params, dtype, tokenizer, stops, made)


def reads_rows_first(mesh: Mesh | None, dtype: Any) -> bool:
    """Whether kernels are to lie as layers.RowsFirst."""
    return not has_places(mesh) and dtype == jnp.float32 and jax.default_backend() == "cpu"


def _dtype(dtype: Any) -> Any:
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected one of {DTYPES}, or None for the platform's best.")
    return jnp.dtype(name)
