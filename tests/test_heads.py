"""The head network against the formulas of every wiring, in float64 numpy."""

import dataclasses
import functools

import head_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_target

from specjax.errors import ConfigError
from specjax.heads import config as heads
from specjax.heads import network
from specjax.target.decoder import AttendWithin

LENGTH, VOCAB, WIDTH = 7, 19, 32
LAYER = dataclasses.replace(random_target(0, VOCAB).config, num_layers=1, sliding_windows=(None,))
TWO = dataclasses.replace(LAYER, num_layers=2, sliding_windows=(None, None))
TAPS = (0, 1, 2)

eagle3 = functools.partial(heads.eagle3, taps=TAPS, draft_vocab_size=11)
CASES = {
    "eagle": heads.eagle(LAYER, WIDTH),
    "eagle with bias": heads.eagle(LAYER, WIDTH, joining_bias=True),
    "eagle with layernorms": heads.eagle(TWO, WIDTH, layernorms=True),
    "eagle3": eagle3(LAYER, WIDTH),
    "eagle3 norm_before_residual": eagle3(LAYER, WIDTH, norm_before_residual=True),
    "eagle3 norm_before_fc": eagle3(LAYER, WIDTH, norm_before_fc=True),
    "eagle3 fc_norm": eagle3(LAYER, WIDTH, fc_norm=True),
    "eagle3 norm_output": eagle3(LAYER, WIDTH, norm_output=True),
    "eagle3 of 3.1, two layers": eagle3(TWO, WIDTH, fc_norm=True, norm_output=True, norm_before_residual=True),
    "eagle3 of a wider target": eagle3(LAYER, 40, own_embedding=True, norm_before_fc=True),
    "mtp deepseek": heads.mtp(LAYER, WIDTH, own_head=True, own_embedding=True),
    "mtp glm4_moe": heads.mtp(LAYER, WIDTH, "glm4_moe"),
    "mtp mimo": heads.mtp(dataclasses.replace(LAYER, qkv_bias=True), WIDTH, "mimo"),
    "mtp ernie": heads.mtp(LAYER, WIDTH, "ernie"),
    "mtp qwen3_next": heads.mtp(dataclasses.replace(LAYER, qk_norm=True), WIDTH, "qwen3_next"),
    "mtp of two blocks": heads.mtp(LAYER, WIDTH, num_blocks=2),
}


def random_weights(config, seed):
    """Kernels far from 0, scales around 1, biases that matter."""
    rng = np.random.RandomState(seed)

    def draw(path, shape):
        name = path[-1].key
        if "norm" in name:
            return (1 + 0.3 * rng.randn(*shape.shape)).astype(np.float32)
        return (rng.randn(*shape.shape) * (0.5 if "bias" in name else 0.2)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, network.param_shapes(config))


@pytest.mark.exact
@pytest.mark.parametrize("name", CASES)
def test_every_wiring_computes_its_formula(name):
    config = CASES[name]
    rng = np.random.RandomState(1)
    params, shared = random_weights(config, 0), network.Shared(rng.randn(VOCAB, WIDTH), rng.randn(WIDTH, VOCAB) * 0.2)
    shared = jax.tree.map(lambda x: x.astype(np.float32), shared)
    tokens = rng.randint(0, VOCAB, (2, LENGTH))
    features = rng.randn(2, LENGTH, config.num_features, config.target_width).astype(np.float32) * 2
    positions = jnp.arange(LENGTH) + jnp.array([[0], [5]])
    mask = jnp.tril(jnp.ones((2, LENGTH, LENGTH), bool))

    @jax.jit
    def everything(params, shared, tokens, features):
        feature, found = network.fuse(config, params, features), []
        for block in range(config.num_blocks):
            attends = [AttendWithin(mask)] * config.layer.num_layers
            out = network.run(config, params, shared, tokens, feature, positions, attends, block)
            feature = out.recycled
            found.append((network.logits(config, params, shared, out.hidden), feature))
        return found

    wanted = np.array([[LENGTH - 1, 0, 2], [1, 1, 4]])

    @jax.jit
    def some(params, shared, tokens, feature):
        attends = [AttendWithin(mask)] * config.layer.num_layers
        return network.run(config, params, shared, tokens, feature, positions, attends, 0, wanted)

    found = everything(params, shared, tokens, features)
    asked = some(params, shared, tokens, network.fuse(config, params, features)).recycled
    np.testing.assert_allclose(asked, found[0][1][np.arange(2)[:, None], wanted], atol=2e-5, rtol=2e-5)
    weights = reference.Weights(params)
    for row in range(2):
        feature = reference.fuse(config, weights, features[row].astype(np.float64))
        for block, (logits, recycled) in enumerate(found):
            expected, feature = reference.run(
                config, weights, shared, tokens[row], feature, np.asarray(positions[row]), block
            )
            np.testing.assert_allclose(logits[row], expected, atol=2e-5, rtol=2e-5)
            np.testing.assert_allclose(recycled[row], feature, atol=2e-5, rtol=2e-5)
    assert logits.shape[-1] == config.draft_vocab_size
    assert weights.unread() == set()


def test_weights_that_init_gives_are_those_that_param_shapes_promises():
    config = CASES["eagle3 of 3.1, two layers"]
    made = jax.jit(functools.partial(network.init, config))(jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda x: x.shape, network.param_shapes(config))
    assert jax.tree.structure(made) == jax.tree.structure(
        network.param_axes(config), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: eagle3(LAYER, WIDTH, norm_before_fc=True, fc_norm=True), "norm_before_fc=True, fc_norm=True"),
        (lambda: heads.eagle3(LAYER, WIDTH, (), 11), r"taps=\(\)"),
        (lambda: heads.mtp(LAYER, WIDTH, "medusa"), "wiring='medusa'"),
        (lambda: heads.for_target(LAYER, "medusa"), "method='medusa'"),
        (lambda: heads.for_target(LAYER, "eagle", fc_norm=True), "fc_norm"),
    ],
)
def test_configs_that_make_no_sense_are_refused_by_name(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
