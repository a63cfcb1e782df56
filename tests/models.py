"""Tiny random models for tests, with and without a tokenizer."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from specjax import generate
from specjax.checkpoints.load import Target
from specjax.target import decoder
from specjax.target.families import ModelConfig

VOCAB = 97

QUICK = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
"""Environment of a process that takes a quarter of the usual time to compile, and optimises little."""

USUAL = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
}
"""The compiler options that undo QUICK for one program: those of users."""


def decode_as_usual(patch) -> None:
    """Has decode programs compiled as users' are, for a look into them."""
    decoding = generate.Programs.decoding

    class AsUsual:
        def __init__(self, function):
            self.function = function

        def lower(self, *args):
            lowered = self.function.lower(*args)
            return types.SimpleNamespace(compile=lambda: lowered.compile(USUAL))

    patch.setattr(generate.Programs, "decoding", lambda *args: AsUsual(decoding(*args)))


def compile_as_usual(patch) -> None:
    """Has all programs that are lowered and compiled in two steps, as those of decoders are, compiled as users' are."""
    quick = jax.stages.Lowered.compile
    patch.setattr(jax.stages.Lowered, "compile", lambda lowered: quick(lowered, USUAL))


def random_target(seed: int, vocab_size: int = VOCAB, max_position: int = 512, **fields) -> Target:
    """A two-layer model without tokenizer. Kernels are scaled up so that its choices are far apart."""
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_position=max_position,
        sliding_windows=(None, None),
    )
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, _init(config)(jax.random.key(seed)))
    return Target(f"random-{seed}", config, params, jnp.dtype("float32"), **fields)


@functools.cache
def _init(config):
    return jax.jit(functools.partial(decoder.init, config))


@functools.cache
def _forward(config, capacity):
    def run(params, tokens):
        cache = decoder.init_cache(config, 1, capacity, jnp.float32)
        return decoder.apply(config, params, tokens, jnp.zeros(1, jnp.int32), cache).logits

    return jax.jit(run)


def next_logits(target: Target, text, capacity: int = 256) -> np.ndarray:
    """float32[V]: the logits behind a text, in one pass over all of it; the independent way to decode in tests."""
    tokens = np.zeros((1, capacity), np.int32)
    tokens[0, : len(text)] = text
    return np.asarray(_forward(target.config, capacity)(target.params, tokens)[0, len(text) - 1])


class LetterTokenizer:
    """A stand-in tokenizer whose token i is the letter first + i; enough for stop strings and streaming."""

    eos_token_id = None
    chat_template = None

    def __init__(self, first: int = 32):
        self.first = first

    def get_vocab(self) -> dict[str, int]:
        return {chr(token + self.first): token for token in range(VOCAB)}

    def __len__(self) -> int:
        return VOCAB

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - self.first for letter in text]}

    def decode(self, tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False) -> str:
        return "".join(chr(token + self.first) for token in tokens)
