"""The kernel of attention over a KV cache: against the reference, for what it reads, compiled for TPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import topologies

from pallas_kernels.attention import attention, suits, write_and_attend
from pallas_kernels.attention.benchmark import estimate
from specjax import MeshConfig, sharding
from specjax.target import decoder
from specjax.target.families import from_hf

JUNK = 1e30
"""What slots behind a window hold: anything finite."""

pytestmark = pytest.mark.usefixtures("usual_compiler")
OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Little optimisation, since compiling is what takes long."""


def example(B, T, K, Q, H, S, start, dtype=jnp.float32, tree=False):
    """(queries, k, v, keys, values, start, mask), with junk in and behind the window."""
    random = np.random.RandomState(0)
    queries = random.standard_normal((B, T, K, Q, H)) * H**-0.5 * 2
    k, v = random.standard_normal((2, B, T, K, H))
    keys, values = random.standard_normal((2, B, K, S, H))
    start = np.asarray(start, np.int32)
    live = (np.arange(S) < start[:, None])[:, None, :, None]
    keys, values = np.where(live, keys, JUNK), np.where(live, values, -JUNK)
    mask = None
    if tree:
        mask = np.zeros((B, T, T), bool)
        for b, t in np.ndindex(B, T):
            mask[b, t] = mask[b, random.randint(t)] if t else False
            mask[b, t, t] = True
    floats = [jnp.asarray(x, dtype) for x in (queries, k, v, keys, values)]
    return *floats, jnp.asarray(start), mask


def run(function, *args, **options):
    """A call compiled with little optimisation; as float32, since numpy lacks bfloat16."""
    call = functools.partial(function, **options)
    found = jax.jit(call).lower(*args).compile(compiler_options=OPTIONS)(*args)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), found)


@pytest.mark.parametrize(
    ("T", "K", "Q", "H", "start", "sliding_window", "tree", "dtype"),
    [
        (5, 2, 4, 128, [0, 300, 507], None, False, "bfloat16"),
        (1, 3, 3, 64, [0, 256, 511], None, False, "float32"),
        (2, 1, 8, 128, [510, 1, 127], 100, False, "float32"),
        (9, 1, 1, 64, [503, 0, 15], None, True, "bfloat16"),
        (5, 2, 3, 128, [500, 129, 256], 130, True, "float32"),
        (17, 1, 4, 64, [0, 495, 120], 3, True, "float32"),
    ],
)
def test_the_kernel_writes_and_attends_as_the_reference_does(T, K, Q, H, start, sliding_window, tree, dtype):
    *arrays, mask = example(len(start), T, K, Q, H, 512, start, dtype, tree)
    options = {"sliding_window": sliding_window, "mask": mask}
    expected = run(write_and_attend, *arrays, **options, implementation="reference")
    # Blocks of half of the slots, so that the queue runs ahead from row to row.
    interpreted = {"implementation": "tpu", "interpret": True, "block": 256, "depth": 2}
    for found in (
        run(write_and_attend, *arrays, **options, **interpreted),
        run(write_and_attend, *arrays, **options, implementation="xla"),
    ):
        tolerance = 2e-2 if dtype == "bfloat16" else 2e-5
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=tolerance)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[2], expected[2])


def test_the_kernel_attends_to_entries_that_are_written_already():
    queries, k, v, keys, values, start, mask = example(2, 3, 2, 2, 64, 512, [200, 509], tree=True)
    mixed, keys, values = run(
        write_and_attend, queries, k, v, keys, values, start, mask=mask, implementation="reference"
    )
    found = run(attention, queries, keys, values, start, mask=mask, implementation="tpu", interpret=True, block=256)
    np.testing.assert_allclose(found, mixed, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("H", "sliding_window"), [(128, None), (64, 20)])
def test_slots_behind_a_row_or_before_its_sliding_window_are_never_read(H, sliding_window):
    """NaN there would reach the result: a hidden weight of 0 makes NaN of it."""
    start = np.array([40, 700, 0])
    *arrays, _ = example(3, 2, 1, 2, H, 1024, start)
    expected = run(write_and_attend, *arrays, sliding_window=sliding_window, implementation="reference")
    # Copies are of 128 slots, but with slots along lanes of twice as many around a window.
    first, last, slots = start[:, None] // 128 * 128, start[:, None] + 1, np.arange(1024)
    live = slots < (first + 256 if H % 128 else last // 128 * 128 + 128)
    if sliding_window is not None:
        live &= slots >= (start[:, None] - sliding_window + 1) // 128 * 128
    assert (live.mean(axis=1) < 0.8).all()
    poison = jnp.where(live[:, None, :, None], 0.0, jnp.nan)
    arrays[3], arrays[4] = arrays[3] + poison, arrays[4] + poison
    kernel = {"implementation": "tpu", "interpret": True, "block": 256, "depth": 2}
    found = run(write_and_attend, *arrays, sliding_window=sliding_window, **kernel)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-5)
    assert np.isnan(found[1]).sum() == np.isnan(arrays[3]).sum()


def test_the_reference_is_attention_written_out_for_a_tree():
    """Two branches of 2 behind a root, in a window of 5, seen from the end of the second; positions by depth."""
    parents = [-1, 0, 1, 0, 3]
    mask = np.eye(5, dtype=bool)
    for t, parent in enumerate(parents):
        if parent >= 0:
            mask[t] |= mask[parent]
    queries, _, _, keys, values, start, _ = example(1, 5, 1, 1, 8, 256, [20])
    random = np.random.RandomState(1)
    keys = keys.at[:, :, 20:25].set(random.standard_normal((1, 1, 5, 8)))
    values = values.at[:, :, 20:25].set(random.standard_normal((1, 1, 5, 8)))
    # A window of 4 ending at position 22 begins at 19, the last slot before the tree.
    slots = [19, 20, 23, 24]
    logits = np.asarray(keys[0, 0, slots], np.float64) @ np.asarray(queries[0, 4, 0, 0], np.float64)
    weights = np.exp(logits - logits.max())
    expected = weights / weights.sum() @ np.asarray(values[0, 0, slots], np.float64)
    for implementation in ("reference", "xla"):
        options = {"sliding_window": 4, "mask": mask[None], "implementation": implementation}
        found = run(attention, queries, keys, values, start, **options)[0, 4, 0, 0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": jnp.zeros((1, 2, 256, 32))}, r"keys: has shape \(1, 2, 256, 32\); expected \(1, 1, 256, 64\)"),
        ({"start": jnp.zeros(2, jnp.int32)}, r"start: has shape \(2,\); expected \(1,\)"),
        ({"start": jnp.zeros(1)}, "start: has dtype float32; expected int32"),
        ({"values": jnp.zeros((1, 1, 256, 64), jnp.bfloat16)}, "values: has dtype bfloat16, keys float32"),
        ({"mask": jnp.zeros((1, 2, 3), bool)}, r"mask: has shape \(1, 2, 3\); expected \(1, 2, 2\)"),
        ({"sliding_window": 0}, "sliding_window=0: expected at least 1"),
        ({"implementation": "cuda"}, "implementation='cuda': expected one of tpu, xla, reference"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    queries, _, _, keys, values, start, _ = example(1, 2, 1, 1, 64, 256, [3])
    arguments = {"queries": queries, "keys": keys, "values": values, "start": start} | changes
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("T", "H", "dtype", "message"),
    [(65, 64, "float32", "65 tokens"), (1, 20, "float32", "width 20"), (1, 64, "float16", "float16")],
)
def test_the_kernel_says_what_it_does_not_take(T, H, dtype, message):
    queries, keys = jnp.zeros((1, T, 1, 1, H), dtype), jnp.zeros((1, 1, 256, H), dtype)
    assert not suits(queries, keys)
    with pytest.raises(NotImplementedError, match=message):
        attention(queries, keys, keys, jnp.zeros(1, jnp.int32), implementation="tpu", interpret=True)


@pytest.fixture
def topology(monkeypatch):
    """chip -> its topology, which need not be there: libtpu compiles for it."""
    pytest.importorskip("libtpu")
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")
    return lambda chip: topologies.get_topology_desc(platform="tpu", topology_name=chip)


def moved(text, size):
    """Operations of a compiled program that move arrays of so many elements, or more, and are no kernel."""
    pattern = r"= \(?\w+\[([\d,]+)\]\S* (copy|copy-start|transpose|reshape|slice-start|async-start|fusion)\("
    found = re.findall(pattern, text)
    return [(shape, what) for shape, what in found if np.prod([int(n) for n in shape.split(",")]) >= size]


@pytest.mark.parametrize(("K", "Q", "H"), [(2, 4, 128), (3, 3, 64)])
@pytest.mark.parametrize(("chip", "dtype"), [("v5e:2x2", "bfloat16"), ("v6e:2x2", "bfloat16"), ("v6e:2x2", "float32")])
def test_the_kernel_compiles_for_a_tpu_and_nothing_of_the_cache_is_copied(topology, chip, K, Q, H, dtype):
    """Shapes of Llama-3.1-8B on 4 chips, and of SmolLM2; asked for by no name."""
    B, T, S = 8, 5, 8192
    place = jax.sharding.SingleDeviceSharding(topology(chip).devices[0])

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    entries, cache = array(B, T, K, H), array(B, K, S, H)
    arguments = array(B, T, K, Q, H), entries, entries, cache, cache, array(B, dtype="int32")
    compiled = jax.jit(write_and_attend, donate_argnums=(3, 4)).lower(*arguments).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "tpu_custom_call" in text and "write_and_attend" in text
    cache_bytes = 2 * B * K * S * H * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 50
    assert not moved(text, B * K * S * H / 50)


def lowered(chip, window, mesh=None, kv_heads=2):
    """A step of a tiny model with the cache donated, lowered for an absent TPU."""
    config = from_hf(
        tiny.hf_config("llama-tied")
        | {"num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": 64, "vocab_size": 96}
    )
    shapes = decoder.param_shapes(config, jnp.bfloat16)
    cache = jax.eval_shape(lambda: decoder.init_cache(config, 4, 1024, jnp.bfloat16))
    tokens, start = jax.ShapeDtypeStruct((4, window), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(chip.devices[0])
        places = jax.tree.map(lambda _: place, (shapes, tokens, start, cache))
    else:
        weights = sharding.param_places(shapes, decoder.param_axes(config), mesh)
        places = weights, *sharding.state_shardings((tokens, start, cache), mesh)
    arguments = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), (shapes, tokens, start, cache), places
    )
    step = jax.jit(functools.partial(decoder.apply, config, with_logits=False), donate_argnums=3)
    return step.lower(*arguments), 2 * config.num_layers * 4 * kv_heads * 1024 * 64 * 2


def test_a_model_decodes_with_the_kernel_where_it_is_compiled_for_a_tpu(topology):
    step, cache_bytes = lowered(topology("v6e:2x2"), 5)
    assert step.as_text().count("tpu_custom_call") >= 1
    compiled = step.compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache_bytes
    assert not moved(compiled.as_text(), 4 * 2 * 1024 * 64)
    prefill, _ = lowered(topology("v6e:2x2"), 512)
    assert "tpu_custom_call" not in prefill.as_text()


def test_under_a_mesh_each_device_runs_the_kernel_on_its_own_heads(topology):
    chip = topology("v6e:2x2")
    config = from_hf(
        tiny.hf_config("llama-tied")
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 96}
    )
    mesh = sharding.make_mesh(MeshConfig(data=2, model=2), config, chip.devices)
    with jax.set_mesh(mesh):
        step, cache_bytes = lowered(chip, 5, mesh)
        compiled = step.compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    assert compiled.memory_analysis().alias_size_in_bytes == cache_bytes / 4
    assert not moved(text, 2 * 1 * 1024 * 64)


def test_elsewhere_a_model_decodes_without_it():
    config = from_hf(tiny.hf_config("llama-tied"))
    shapes = decoder.param_shapes(config)
    cache = jax.eval_shape(lambda: decoder.init_cache(config, 1, 512, jnp.float32))
    tokens, start = jax.ShapeDtypeStruct((1, 5), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.jit(functools.partial(decoder.apply, config)).lower(shapes, tokens, start, cache).as_text()
    assert "custom_call" not in text


@pytest.mark.slow
def test_what_the_kernel_costs_does_not_depend_on_the_capacity():
    """Counted in compiled instructions, of rows that are 4096 slots long."""
    pytest.importorskip("libtpu")
    small, large = (estimate("v6e:2x2", "tpu", capacity=capacity) for capacity in (4096, 16384))
    assert abs(large["cycles"] / small["cycles"] - 1) < 0.01
    # HBM is what it waits for: reading the live cache once.
    assert small["bundles"] < 1.15 * small["least_cycles"]
    assert small["hbm_cycles"] < 1.05 * small["least_cycles"]
