"""What can be trained: a draft head, or a small language model for the draft_model method."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from specjax.errors import ConfigError
from specjax.heads import network
from specjax.heads.config import HeadConfig, for_target
from specjax.target import decoder
from specjax.target.families import ModelConfig
from specjax.target.layers import as_array, some_outputs
from specjax.train import losses

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class HeadStudent:
    """A head of any method."""

    config: HeadConfig

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose entering states it reads."""
        return self.config.taps

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that it can propose."""
        return self.config.draft_vocab_size

    def fields(self) -> dict[str, Any]:
        """What head.json says of it."""
        return dataclasses.asdict(self.config)

    def init(self, key: jax.Array, target_params: Any, kept: jax.Array) -> Any:
        """float32 weights to begin with: random, but for the target's final norm and its head for kept int32[V'].

        Where the states are read raw, these are weights for states in units of their root mean squares.
        """
        params = network.init(self.config, key, jnp.float32)
        if self.config.own_head:
            params["head"] = as_array(some_outputs(target_params["head"], kept)).astype(jnp.float32)
        for index in range(self.config.num_blocks if self.config.norm_output else 0):
            params[f"block_{index}"]["output_norm"] = target_params["final_norm"].astype(jnp.float32)
        return params

    def param_shapes(self) -> Any:
        """The same as jax.ShapeDtypeStruct."""
        return network.param_shapes(self.config)

    @property
    def reads_raw(self) -> bool:
        """Whether its first product reads the target's states without a norm, as EAGLE and the first EAGLE-3 do."""
        c = self.config
        return not (c.norm_each_tap or c.norm_before_fusing if c.taps else c.hidden_norm)

    def scaled(self, params: Any, factors: jax.Array) -> Any:
        """The weights of the same function of the states times 1 / factors float32[n, D_t], where it reads them raw."""
        part, name = ("fusion", "kernel") if self.config.taps else ("block_0", "join")
        rows = factors.reshape(-1, 1)
        if name == "join":
            embedding = jnp.ones((self.config.layer.width, 1), rows.dtype)
            rows = jnp.concatenate([embedding, rows] if self.config.embedding_first else [rows, embedding])
        return params | {part: params[part] | {name: params[part][name] * rows}}

    def loss(
        self,
        settings: losses.LossSettings,
        params: Any,
        frozen: losses.Frozen,
        batch: Any,
        num_unrolled: int,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """See losses.loss_fn."""
        return losses.loss_fn(self.config, settings, params, frozen, batch, num_unrolled, key)


@dataclasses.dataclass(frozen=True)
class DraftModelStudent:
    """A language model of the target's vocabulary with a tied head; what HeadStudent has, but it reads no states."""

    config: ModelConfig
    taps: tuple[int, ...] = ()
    reads_raw: bool = False

    @property
    def draft_vocab_size(self) -> int:
        return self.config.vocab_size

    def fields(self) -> dict[str, Any]:
        return {"method": "draft_model", "layer": dataclasses.asdict(self.config)}

    def init(self, key: jax.Array, target_params: Any, kept: jax.Array) -> Any:
        """Random layers; the embedding is the target's in the directions in which that varies most."""
        params = decoder.init(self.config, key, jnp.float32)
        del params["head"]
        wide = target_params["embedding"].astype(jnp.float32)
        _, directions = jnp.linalg.eigh(wide.T @ wide)
        return params | {"embedding": wide @ directions[:, -self.config.width :]}

    def param_shapes(self) -> Any:
        return {name: shape for name, shape in decoder.param_shapes(self.config).items() if name != "head"}

    def loss(
        self,
        settings: losses.LossSettings,
        params: Any,
        frozen: losses.Frozen,
        batch: Any,
        num_unrolled: int,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """See losses.draft_model_loss."""
        return losses.draft_model_loss(self.config, settings, params, frozen, batch)


Student = HeadStudent | DraftModelStudent
"""What the trainer trains: static and hashable."""


def student_for(target: ModelConfig, method: str = "", **fields: Any) -> Student:
    """What config.head describes. A draft model's fields are those of its ModelConfig: width, num_layers, num_heads,
    num_kv_heads, mlp_width.

    Raises:
        ConfigError: a wrong field.
    """
    if method != "draft_model":
        config = for_target(target, method, **fields)  # type: ignore[arg-type]
        if config.method != "eagle3" and config.layer.num_layers > 1:
            num = config.layer.num_layers
            raise ConfigError(f"head.num_layers={num}: expected 1 for {method}; the formats have no names for more.")
        return HeadStudent(config)
    sizes = ("width", "num_layers", "num_heads", "num_kv_heads", "mlp_width")
    for name in sizes:
        if not isinstance(fields.get(name), int) or fields[name] < 1:
            raise ConfigError(f"head.{name}={fields.get(name)!r}: expected an integer >= 1, of the draft model.")
    unknown = sorted(fields.keys() - set(sizes))
    if unknown:
        raise ConfigError(f"head.{unknown[0]}={fields[unknown[0]]!r}: is no field of a draft model; expected {sizes}.")
    if fields["width"] % fields["num_heads"] or fields["num_heads"] % fields["num_kv_heads"]:
        raise ConfigError(
            f"head: width={fields['width']}, num_heads={fields['num_heads']}, num_kv_heads={fields['num_kv_heads']}; "
            "expected each a multiple of the next."
        )
    if fields["width"] > target.width:
        raise ConfigError(f"head.width={fields['width']}: expected at most {target.width}, the target's.")
    return DraftModelStudent(
        ModelConfig(
            family="llama",
            vocab_size=target.vocab_size,
            head_dim=fields["width"] // fields["num_heads"],
            norm_eps=target.norm_eps,
            rope_theta=target.rope_theta,
            rope_scaling=target.rope_scaling,
            max_position=target.max_position,
            sliding_windows=(None,) * fields["num_layers"],
            tied_head=True,
            **fields,
        )
    )
