"""Products of few rows on CPUs, and the form of kernels that they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import USUAL, random_target

from specjax.checkpoints.load import load_target
from specjax.config import MeshConfig, SamplingParams
from specjax.generate import SpeculativeDecoder
from specjax.target import decoder, few_rows, layers

WIDTH, NUM = 96, 200


def arrays(num_rows, num_outputs=NUM):
    random = np.random.default_rng(num_rows)
    shapes = (num_rows, WIDTH), (num_outputs, WIDTH)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("num_outputs", [NUM, 3 * few_rows.BLOCK, 97])
@pytest.mark.parametrize("num_rows", [*range(1, few_rows.TOGETHER + 4), few_rows.MOST, few_rows.MOST + 1])
def test_few_rows_give_the_matrix_product(num_rows, num_outputs):
    x, matrix = arrays(num_rows, num_outputs)
    found = jax.jit(few_rows.times)(x, matrix)
    assert found.shape == (num_rows, num_outputs) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, x.astype(np.float64) @ matrix.T.astype(np.float64), atol=2e-5)


@pytest.mark.parametrize("num_rows", [1, 3, few_rows.MOST + 1])
def test_numbers_that_bfloat16_holds_are_kept_in_it_and_give_the_same(num_rows):
    x, matrix = arrays(num_rows)
    kernel = jnp.asarray(matrix).T
    assert layers.RowsFirst.of(kernel).rows.dtype == jnp.float32
    kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    narrow = layers.RowsFirst.of(kernel)
    assert narrow.rows.dtype == jnp.bfloat16
    found = jax.jit(layers.project)(x, narrow)
    wide = jax.jit(few_rows.times)(x, kernel.T)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wide, atol=0 if few_rows.suits(num_rows, NUM) else 2e-5)
    np.testing.assert_array_equal(layers.as_array(narrow), kernel)
    assert layers.as_array(narrow).dtype == jnp.float32


@pytest.mark.parametrize("num_rows", [5, few_rows.TOGETHER + 3])
def test_a_row_is_the_same_whatever_stands_beside_it(num_rows):
    x, matrix = arrays(num_rows)
    alone = np.asarray(jax.jit(few_rows.times)(x, matrix))
    for broken in (np.nan, np.inf, -np.inf, 1e38):
        beside = x.copy()
        beside[2] = broken
        found = np.asarray(jax.jit(few_rows.times)(beside, matrix))
        np.testing.assert_array_equal(np.delete(found, 2, axis=0), np.delete(alone, 2, axis=0))
        assert not np.isfinite(found[2]).all()


@pytest.mark.parametrize("num_rows", [2, 5, few_rows.MOST])
def test_the_products_are_never_in_memory(num_rows):
    """What makes it fast: else its time would be that of writing and reading num_rows matrices."""

    def swiglu_down(gate, up, matrix):
        return few_rows.times(jax.nn.silu(gate) * up, matrix)

    (gate, matrix), (up, _) = arrays(num_rows), arrays(num_rows + 1)
    compiled = jax.jit(swiglu_down).lower(gate, up[:num_rows], matrix).compile(USUAL)
    assert "reduce-window" not in compiled.as_text()
    # The activations twice and the sums twice, an even number of rows of them.
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * (num_rows + 1) * (WIDTH + NUM) * 4


def test_rows_beyond_the_first_few_need_outputs_that_make_blocks():
    assert few_rows.suits(few_rows.TOGETHER, 50257) and not few_rows.suits(few_rows.TOGETHER + 1, 50257)
    assert few_rows.suits(few_rows.MOST, 49152) and not few_rows.suits(few_rows.MOST + 1, 49152)


def test_both_forms_of_a_kernel_give_the_same():
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(24, 2, 10)), jnp.float32)
    turned = layers.RowsFirst.of(kernel)
    np.testing.assert_array_equal(layers.as_array(turned), kernel)
    x = jnp.asarray(random.normal(size=(3, 2, 24)), jnp.float32)
    np.testing.assert_allclose(layers.project(x, turned), layers.project(x, kernel), atol=1e-5)
    flat = layers.RowsFirst.of(kernel[:, 0])
    chosen = np.array([7, 2, 3])
    np.testing.assert_array_equal(layers.as_array(layers.some_outputs(flat, chosen)), kernel[:, 0][:, chosen])
    several = layers.RowsFirst.of(kernel, num_inputs=2)
    np.testing.assert_array_equal(layers.as_array(several), layers.with_one_input(kernel, 10))


def test_turned_weights_turn_back():
    target = random_target(0)
    shapes = decoder.param_shapes(target.config)
    turned = decoder.rows_first(jax.tree.map(jnp.copy, target.params))
    assert isinstance(turned["layer_0"]["out"], layers.RowsFirst) and isinstance(turned["head"], layers.RowsFirst)
    jax.tree.map(np.testing.assert_array_equal, decoder.as_arrays(turned, shapes), target.params)


def test_a_checkpoint_decodes_the_same_in_either_form(model, own_cache):
    loaded = load_target(model)
    assert isinstance(loaded.params["layer_0"]["qkv"], layers.RowsFirst)
    spread = loaded.on(MeshConfig(data=1, model=1))
    assert isinstance(spread.params["layer_0"]["qkv"], jax.Array)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[5, 6, 7, 5, 6], [9, 8]]
    found = [SpeculativeDecoder(target).generate(prompts, params).token_ids for target in (loaded, spread)]
    assert found[0] == found[1]
    assert loaded.num_params == spread.num_params
