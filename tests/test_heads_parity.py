"""Heads pass between SpecJAX and the `speculators` package both ways, and its torch modules give the same logits."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from specjax.checkpoints.heads import read_head, write_head
from specjax.checkpoints.load import Target, load_target
from specjax.checkpoints.speculators import SpeculatorModelConfig
from specjax.heads import config as heads
from specjax.heads import network
from specjax.target.decoder import AttendWithin
from specjax.train import losses

torch = pytest.importorskip("torch")

# speculators 0.9 names an argument of transformers as 5.40 no longer does (setup.cfg caps it for tests).
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

NUM_TOKENS, NUM_STEPS = 11, 3
NUM_DRAFTABLE = 40
TAPS = (0, 1, 3)


@pytest.fixture(scope="module")
def package() -> Any:
    """`speculators`; what its data generation imports is stood in for where it is not installed."""
    absent = []
    for name in ("openai", "openai.types.chat", "openai.types.completion", "datasets"):
        try:
            __import__(name)
        except ImportError:
            absent.append(name)
            sys.modules[name] = mock.MagicMock()
    try:
        return pytest.importorskip("speculators")
    finally:
        for name in absent:
            del sys.modules[name]


def target_at(path: Path, case: str, **overrides: Any) -> Target:
    return load_target(tiny.write_directory(path, tiny.hf_config(case, **overrides)), dtype="float32")


def random_params(head: heads.HeadConfig) -> network.Params:
    """Weights far enough from their initial values that every one of them matters."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(random.normal(1.0 if x.ndim == 1 else 0.0, 0.3, x.shape), jnp.float32),
        network.param_shapes(head),
    )


def loaded_by_the_package(package: Any, directory: Path, target: Target) -> Any:
    config = package.SpeculatorModelConfig.from_pretrained(directory)
    config.transformer_layer_config._attn_implementation = "eager"
    model = package.SpeculatorModel.from_pretrained(directory, config=config)
    # 0.9 tells by a NaN whether to take the target's embedding, and transformers 5 leaves no NaN but stray memory.
    model.embed_tokens.load_state_dict({"weight": torch.tensor(np.asarray(target.params["embedding"]))})
    return model.float().eval()


def captured_logits(model: Any, **inputs: Any) -> list[np.ndarray]:
    """What the module's output head gives in each step."""
    found: list[np.ndarray] = []
    handle = model.lm_head.register_forward_hook(lambda _, __, out: found.append(out.detach().numpy()[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found


def shared(target: Target) -> network.Shared:
    return network.Shared(target.params["embedding"], target.params["head"])


EAGLE3: list[tuple[str, dict[str, Any]]] = [
    ("llama-biases-head-dim", {}),
    ("llama-llama3", {"norm_before_residual": True}),
    ("llama-llama3", {"fc_norm": True, "norm_output": True}),
    ("qwen3-tied", {"norm_before_fc": True}),
    ("qwen3-tied", {"num_layers": 2}),
]


@pytest.mark.parametrize(("case", "options"), EAGLE3, ids=["-".join([case, *options]) for case, options in EAGLE3])
def test_eagle3_logits_equal_those_of_the_package_in_every_step(tmp_path, package, case, options):
    overrides = {"mlp_bias": False} if case == "llama-biases-head-dim" else {}
    target = target_at(tmp_path / "target", case, **overrides)
    head = heads.for_target(target.config, "eagle3", taps=TAPS, draft_vocab_size=NUM_DRAFTABLE, **options)
    params = random_params(head)
    vocabulary = np.sort(np.random.default_rng(1).permutation(tiny.VOCAB)[:NUM_DRAFTABLE]).astype(np.int32)
    path = write_head(tmp_path / "head", head, params, str(tmp_path / "target"), [], 3, vocabulary, jnp.float32)

    random = np.random.default_rng(2)
    tokens = random.integers(0, tiny.VOCAB, NUM_TOKENS)
    features = random.normal(size=(NUM_TOKENS, len(TAPS), tiny.WIDTH)).astype(np.float32)
    model = loaded_by_the_package(package, path, target)
    np.testing.assert_array_equal(model.d2t.numpy() + np.arange(NUM_DRAFTABLE), vocabulary)
    theirs = captured_logits(
        model,
        hidden_states=torch.tensor(features.reshape(1, NUM_TOKENS, -1)),
        input_ids=torch.tensor(tokens[None]),
        document_ids=torch.zeros((1, NUM_TOKENS), dtype=torch.long),
        ttt_steps=NUM_STEPS,
    )

    model.save_pretrained(tmp_path / "saved")
    read = read_head(tmp_path / "saved", target.config, "float32", target.params)
    assert read.config == head
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    mask = jnp.tril(jnp.ones((1, NUM_TOKENS, NUM_TOKENS), bool))
    memories: list[list[Any]] = [[] for _ in range(head.layer.num_layers)]
    feature = network.fuse(read.config, read.params, jnp.asarray(features[None]))
    for step in range(NUM_STEPS):
        output = network.run(
            read.config,
            read.params,
            shared(target),
            jnp.asarray(np.pad(tokens[step:], (0, step))[None]),
            feature,
            jnp.arange(NUM_TOKENS)[None] + step,
            [losses._attend_to_chain(mask, layer, jnp.float32) for layer in memories],
        )
        for layer, memory in zip(memories, output.memories, strict=True):
            layer.append(memory)
        feature = output.recycled
        ours = np.asarray(network.logits(read.config, read.params, shared(target), output.hidden))[0]
        np.testing.assert_allclose(ours, theirs[step], rtol=2e-4, atol=2e-4, err_msg=f"step {step}")


@pytest.mark.parametrize("wiring", ["qwen3_next", "mimo", "deepseek"])
def test_mtp_logits_equal_those_of_the_package_in_every_step(tmp_path, package, wiring):
    """From position 1 on where a family zeroes the first embedding: the package knows no such wiring."""
    target = target_at(tmp_path / "target", "qwen3-tied")
    head = heads.for_target(target.config, "mtp", wiring=wiring)
    params = random_params(head)
    path = write_head(tmp_path / "head", head, params, str(tmp_path / "target"), [], NUM_STEPS, None, jnp.float32)

    random = np.random.default_rng(2)
    tokens = random.integers(0, tiny.VOCAB, NUM_TOKENS)
    features = random.normal(size=(1, NUM_TOKENS, tiny.WIDTH)).astype(np.float32)
    model = loaded_by_the_package(package, path, target)
    theirs = captured_logits(model, input_ids=torch.tensor(tokens[None]), hidden_states=torch.tensor(features))

    model.save_pretrained(tmp_path / "saved")
    read = read_head(tmp_path / "saved", target.config, "float32", target.params)
    assert read.config.wiring == wiring
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    num = NUM_TOKENS - NUM_STEPS - 1
    mask = jnp.tril(jnp.ones((1, num, num), bool))
    feature = jnp.asarray(features[:, :num])
    positions = jnp.arange(num)[None] + (1 if read.config.first_embedding_zeroed else 0)  # rotations are relative
    for step in range(NUM_STEPS):
        drafted = jnp.asarray(tokens[None, step + 1 : step + 1 + num])
        output = network.run(
            read.config, read.params, shared(target), drafted, feature, positions, [AttendWithin(mask)]
        )
        feature = output.recycled
        ours = np.asarray(network.logits(read.config, read.params, shared(target), output.hidden))[0]
        np.testing.assert_allclose(ours, theirs[step], rtol=2e-4, atol=2e-4, err_msg=f"step {step}")


@pytest.mark.parametrize("kind", ["eagle3", "peagle", "dflash", "mtp"])
def test_configs_have_the_packages_fields_and_defaults(tmp_path, package, kind):
    theirs = package.SpeculatorModelConfig.registry[kind]()
    ours = SpeculatorModelConfig.registry[kind]().to_diff_dict()
    assert theirs.to_diff_dict() == ours
    theirs.save_pretrained(tmp_path / "theirs")
    read = SpeculatorModelConfig.from_pretrained(tmp_path / "theirs").to_diff_dict()
    assert read.pop("auto_map")  # 0.9 leaves one in every file
    assert read == ours
