"""The decoder against transformers: logits, hidden states, windows through the cache; and what from_hf refuses."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
import tiny

from specjax.checkpoints.load import Target, load_target
from specjax.errors import CheckpointError
from specjax.target import decoder, layers
from specjax.target.families import ModelConfig, from_hf

SEAM = make_goldens.LENGTH // 2
"""Where the second of two equally long windows starts; it crosses from the first cache block into the second."""
TAPS = (0, 1, tiny.NUM_LAYERS)
TOLERANCE = 1e-4
"""Two float32 implementations; measured are up to 3e-5 on logits of standard deviation 1.2."""

WITH_WINDOWS = ["llama-untied", "mistral-window-head-dim", "qwen2-layer-types"]


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return tiny.prompt(make_goldens.BATCH, make_goldens.LENGTH)


@pytest.fixture(scope="module")
def goldens() -> Iterator[np.lib.npyio.NpzFile]:
    with np.load(make_goldens.GOLDENS) as arrays:
        yield arrays


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds one Hugging Face directory for each case."""
    root = tmp_path_factory.mktemp("targets")
    for case in tiny.CASES:
        tiny.write_directory(root / case, tiny.hf_config(case))
    return root


@functools.partial(jax.jit, static_argnums=0)
def forward(config: ModelConfig, params, tokens, start, cache) -> decoder.TargetOutput:
    return decoder.apply(config, params, tokens, start, cache, taps=TAPS)


def in_two_windows(target: Target, tokens: np.ndarray, capacity: int = 512) -> decoder.TargetOutput:
    """Runs the prompt in two windows through one cache and joins their outputs along the positions."""
    batch, length = tokens.shape
    cache = decoder.init_cache(target.config, batch, capacity, target.dtype)
    first = forward(target.config, target.params, tokens[:, :SEAM], jnp.zeros(batch, jnp.int32), cache)
    second = forward(target.config, target.params, tokens[:, SEAM:], jnp.full(batch, SEAM, jnp.int32), first.cache)
    return decoder.TargetOutput(
        logits=jnp.concatenate([first.logits, second.logits], axis=1),
        taps=tuple(jnp.concatenate(pair, axis=1) for pair in zip(first.taps, second.taps, strict=True)),
        final=jnp.concatenate([first.final, second.final], axis=1),
        cache=second.cache,
    )


def test_every_case_has_a_golden_and_every_golden_a_case(goldens):
    assert set(goldens.files) == set(tiny.CASES)


@pytest.mark.parametrize("case", tiny.CASES)
def test_logits_of_two_windows_equal_the_stored_ones_of_transformers(case, directories, tokens, goldens):
    output = in_two_windows(load_target(directories / case, dtype="float32"), tokens)
    found = np.asarray(output.logits)[:, list(make_goldens.POSITIONS)]
    np.testing.assert_allclose(found, goldens[case], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", WITH_WINDOWS)
def test_rows_whose_windows_start_at_their_own_offsets_give_the_stored_logits(case, directories, tokens, goldens):
    """Row 0 goes on from position 37 and overwrites what its first window left beyond, row 1 from 200."""
    target = load_target(directories / case, dtype="float32")
    cache = decoder.init_cache(target.config, 2, 512, target.dtype)
    first = forward(target.config, target.params, tokens[:, :SEAM], jnp.zeros(2, jnp.int32), cache)
    start = np.array([37, SEAM], np.int32)
    window = np.stack([row[offset : offset + SEAM] for row, offset in zip(tokens, start, strict=True)])
    second = forward(target.config, target.params, window, jnp.asarray(start), first.cache)
    for row, offset in enumerate(start):
        kept = [i for i, position in enumerate(make_goldens.POSITIONS) if offset <= position < offset + SEAM]
        found = np.asarray(second.logits)[row, [make_goldens.POSITIONS[i] - offset for i in kept]]
        np.testing.assert_allclose(found, goldens[case][row, kept], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", tiny.CASES)
def test_logits_and_hidden_states_equal_those_of_transformers(case, directories, tokens):
    torch = pytest.importorskip("torch")
    model = make_goldens.transformers_model(directories / case)
    leaving = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: leaving.append(inputs[0].numpy()))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True)
    ours = in_two_windows(load_target(directories / case, dtype="float32"), tokens)
    expected_taps = [theirs.hidden_states[0].numpy(), theirs.hidden_states[1].numpy(), leaving[0]]
    expected_states = [*expected_taps, theirs.hidden_states[-1].numpy()]
    for found, expected in zip([*ours.taps, ours.final], expected_states, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * max(1.0, expected.std()))
    np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", WITH_WINDOWS)
def test_logits_are_bitwise_the_same_in_a_larger_cache(case, directories, tokens):
    target = load_target(directories / case, dtype="float32")
    small, large = (in_two_windows(target, tokens, capacity).logits for capacity in (512, 2048))
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize("case", WITH_WINDOWS)
def test_logits_are_bitwise_the_same_whatever_finite_values_stale_slots_hold(case, directories, tokens):
    """Finite is enough, and as much as can be had: hidden slots get weight 0, and 0 * NaN would be NaN.

    A slot only ever holds what the model computed for it, so NaN there means that the row had it before.
    """
    target = load_target(directories / case, dtype="float32")
    start, window = jnp.array([40, 90], jnp.int32), tokens[:, SEAM:]
    clean = forward(
        target.config,
        target.params,
        tokens[:, :SEAM],
        jnp.zeros(2, jnp.int32),
        decoder.init_cache(target.config, 2, 512, target.dtype),
    ).cache
    stale = jnp.arange(512)[None, None, :, None] >= start[:, None, None, None]
    dirty = jax.tree.map(lambda slots: jnp.where(stale, np.finfo(np.float32).max, slots), clean)
    expected, found = (forward(target.config, target.params, window, start, cache).logits for cache in (clean, dirty))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", ["llama-biases-head-dim", "qwen3-tied"])
def test_bfloat16_logits_stay_near_those_of_float32(case, directories, tokens, goldens):
    """Within 5 % in the root of mean squares: bfloat16 keeps 8 bits, and each of 3 layers rounds some ten times."""
    output = in_two_windows(load_target(directories / case, dtype="bfloat16"), tokens)
    assert {x.dtype for x in (*output.taps, output.final, *output.cache.keys)} == {jnp.dtype("bfloat16")}
    found, expected = np.asarray(output.logits)[:, list(make_goldens.POSITIONS)], goldens[case]
    assert np.sqrt(np.mean((found - expected) ** 2)) < 0.05 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_float32_whatever_the_dtype_of_the_weights(dtype):
    config = from_hf(tiny.hf_config("llama-biases-head-dim"))
    params = decoder.param_shapes(config, dtype)
    cache = jax.eval_shape(lambda: decoder.init_cache(config, 2, 512, dtype))
    window, start = jax.ShapeDtypeStruct((2, 4), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    output = jax.eval_shape(functools.partial(decoder.apply, config), params, window, start, cache)
    assert output.logits.dtype == jnp.float32


def test_a_window_without_logits_writes_the_same_cache(directories, tokens):
    target = load_target(directories / "llama-tied", dtype="float32")
    cache = decoder.init_cache(target.config, 2, 512, target.dtype)
    window, start = tokens[:, :SEAM], jnp.zeros(2, jnp.int32)
    expected = forward(target.config, target.params, window, start, cache)
    prefill = functools.partial(decoder.apply, target.config, with_logits=False)
    found = jax.jit(prefill)(target.params, window, start, cache)
    assert found.logits is None
    jax.tree.map(np.testing.assert_array_equal, found.cache, expected.cache)


@pytest.mark.parametrize("sliding_window", [None, 1, 7, 300])
def test_attention_in_blocks_equals_attention_written_out_densely(sliding_window):
    """Of a window of 5 at ragged starts, up to 400 positions into the cache, with a garbage slot beyond."""
    random = np.random.RandomState(0)
    B, T, K, Q, H, S = 3, 5, 2, 3, 8, 512
    queries = random.standard_normal((B, T, K, Q, H)).astype(np.float32)
    keys, values = random.standard_normal((2, B, K, S, H)).astype(np.float32)
    start = np.array([0, 254, 395], np.int32)
    found = jax.jit(layers.attend, static_argnums=4)(queries, keys, values, start, sliding_window)
    expected = np.zeros((B, T, K, Q, H))
    for b, t, k, q in np.ndindex(B, T, K, Q):
        position = start[b] + t
        oldest = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
        logits = keys[b, k, oldest : position + 1].astype(np.float64) @ queries[b, t, k, q]
        weights = np.exp(logits - logits.max())
        expected[b, t, k, q] = weights @ values[b, k, oldest : position + 1] / weights.sum()
    np.testing.assert_allclose(found, expected.reshape(B, T, K * Q * H), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", tiny.CASES)
def test_every_weight_has_one_logical_axis_for_each_dimension(case):
    config = from_hf(tiny.hf_config(case))
    shapes, axes = decoder.param_shapes(config), decoder.param_axes(config)
    num_axes = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    assert num_axes == jax.tree.map(lambda x: x.ndim, shapes)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": ("llama-tied", {"model_type": "gemma"}, "model_type='gemma'"),
    "no family": ("llama-tied", {"model_type": None}, "model_type=None"),
    "another activation": ("llama-tied", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "quantised": ("llama-tied", {"quantization_config": {"bits": 4}}, "quantization_config="),
    "rope of another kind": ("llama-tied", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "rope factor below 1": ("llama-tied", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
    "no rope factor": ("llama-tied", {"rope_parameters": {"rope_type": "yarn"}}, "factor=None"),
    "no llama3 band": ("llama-tied", {"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor=None"),
    "part of a head rotated": ("llama-tied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "two layer types": ("qwen2-layer-types", {"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries"),
    "unknown layer type": ("qwen2-layer-types", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
    "window of nothing": ("mistral-window-head-dim", {"sliding_window": 0}, "sliding_window=0"),
    "heads that do not group": ("llama-tied", {"num_key_value_heads": 4}, "num_attention_heads=6 .*heads=4"),
    "no vocabulary": ("llama-tied", {"vocab_size": None}, "vocab_size=None"),
    "width as text": ("llama-tied", {"hidden_size": "48"}, "hidden_size='48'"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_from_hf_names_the_field_that_it_refuses(refused):
    case, overrides, message = REFUSED[refused]
    with pytest.raises(CheckpointError, match=message):
        from_hf(tiny.hf_config(case, **overrides))


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_from_hf_names_a_field_that_is_absent(field):
    config = tiny.hf_config("llama-tied")
    del config[field]
    with pytest.raises(CheckpointError, match=f"{field}=None"):
        from_hf(config)


@pytest.mark.parametrize(
    ("case", "absent", "field", "expected"),
    [
        ("mistral-window-head-dim", "sliding_window", "sliding_windows", (4096,) * 3),
        ("qwen2-window", "max_window_layers", "sliding_windows", (None,) * 3),  # 28 layers attend fully
        ("qwen3-tied", "head_dim", "head_dim", 128),
        ("llama-biases-head-dim", "head_dim", "head_dim", 8),
        ("llama-tied", "rope_theta", "rope_theta", 10000.0),
        ("llama-biases-head-dim", "attention_bias", "out_bias", False),
    ],
)
def test_an_absent_field_has_the_value_that_transformers_gives_it(case, absent, field, expected):
    config = tiny.hf_config(case)
    del config[absent]
    assert getattr(from_hf(config), field) == expected
