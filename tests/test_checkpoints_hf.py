"""Reading Hugging Face directories: what loads right, and what is refused by name when a directory is damaged."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from specjax.checkpoints.load import Target, load_target
from specjax.errors import AssetError, CheckpointError, ConfigError, SpecJAXError
from specjax.target import decoder

CASE = "llama-biases-head-dim"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A good directory, for the test to damage."""
    return tiny.write_directory(tmp_path / "model", tiny.hf_config(CASE))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.write_directory(tmp_path / "sharded", tiny.hf_config(CASE), num_shards=2)


def rewrite(directory: Path, **changed: np.ndarray | None) -> None:
    """Replaces tensors of model.safetensors, or removes those given as None; `__` in a keyword stands for a dot."""
    path = directory / "model.safetensors"
    changes = {name.replace("__", "."): tensor for name, tensor in changed.items()}
    weights = load_file(path) | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def assert_same_params(found: Target, expected: Target) -> None:
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def arrays_of(target: Target) -> decoder.Params:
    """Its weights as the decoder describes them, whichever form they lie in."""
    return decoder.as_arrays(target.params, decoder.param_shapes(target.config))


def write_tokenizer(directory: Path, num_tokens: int) -> None:
    vocabulary = {f"t{index}": index for index in range(num_tokens)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def test_every_weight_is_where_the_decoder_reads_it(directory):
    """Element by element from the definition of the layout, for one layer; test_target covers the rest by logits."""
    layer = arrays_of(load_target(directory, dtype="float32"))["layer_1"]
    stored = load_file(directory / "model.safetensors")
    prefix, Q, H, D = "model.layers.1.", 3, 16, tiny.WIDTH
    rows = {x: stored[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"}
    biases = {x: stored[f"{prefix}self_attn.{x}_proj.bias"] for x in "qkv"}
    for k, h in np.ndindex(2, H):
        for q in range(Q):
            head = k * Q + q
            np.testing.assert_array_equal(layer["qkv"][:, k, q, h], rows["q"][head * H + h])
            np.testing.assert_array_equal(layer["qkv_bias"][k, q, h], biases["q"][head * H + h])
            np.testing.assert_array_equal(
                layer["out"][k, q, h], stored[f"{prefix}self_attn.o_proj.weight"][:, head * H + h]
            )
        for group, x in ((Q, "k"), (Q + 1, "v")):
            np.testing.assert_array_equal(layer["qkv"][:, k, group, h], rows[x][k * H + h])
            np.testing.assert_array_equal(layer["qkv_bias"][k, group, h], biases[x][k * H + h])
    assert layer["gate_up"].shape == (D, 2, 80)
    np.testing.assert_array_equal(layer["gate_up"][:, 1], stored[f"{prefix}mlp.up_proj.weight"].T)


def test_a_sharded_checkpoint_loads_as_the_single_file_does(directory, sharded):
    assert_same_params(load_target(sharded, dtype="float32"), load_target(directory, dtype="float32"))


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_weights_stored_in_another_float_type_load_with_their_values(directory, stored):
    weights = {name: tensor.astype(stored) for name, tensor in tiny.tensors(tiny.hf_config(CASE)).items()}
    save_file(weights, directory / "model.safetensors")
    params = arrays_of(load_target(directory, dtype="float32"))
    np.testing.assert_array_equal(params["embedding"], weights["model.embed_tokens.weight"].astype(np.float32))
    np.testing.assert_array_equal(
        params["layer_2"]["down"], weights["model.layers.2.mlp.down_proj.weight"].T.astype(np.float32)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.bfloat16])
def test_weights_are_rounded_to_the_dtype_asked_for(directory, dtype):
    exact, rounded = load_target(directory, dtype="float32"), load_target(directory, dtype=dtype)
    assert rounded.dtype == jnp.dtype(dtype)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(dtype), y), arrays_of(exact), arrays_of(rounded))


def test_no_dtype_is_float32_on_cpu(directory):
    if jax.default_backend() != "cpu":
        pytest.skip("bfloat16 elsewhere")
    assert load_target(directory).dtype == jnp.float32


def test_num_params_counts_every_stored_weight_once(tmp_path):
    for case in ("llama-tied", "llama-untied"):
        config = tiny.hf_config(case)
        target = load_target(tiny.write_directory(tmp_path / case, config), dtype="float32")
        assert target.num_params == sum(tensor.size for tensor in tiny.tensors(config).values()), case


def test_a_tied_checkpoint_that_also_stores_its_head_loads_as_one_that_does_not(tmp_path):
    config = tiny.hf_config("llama-tied")
    directory = tiny.write_directory(tmp_path, config)
    expected = load_target(directory, dtype="float32")
    rewrite(directory, lm_head__weight=tiny.tensors(config)["model.embed_tokens.weight"])
    assert_same_params(load_target(directory, dtype="float32"), expected)


def test_a_tied_checkpoint_whose_stored_head_differs_is_refused(tmp_path):
    config = tiny.hf_config("llama-tied")
    directory = tiny.write_directory(tmp_path, config)
    rewrite(directory, lm_head__weight=tiny.tensors(config)["model.embed_tokens.weight"] + 1)
    with pytest.raises(CheckpointError, match="tie_word_embeddings=true, but lm_head.weight differs"):
        load_target(directory)


def test_rotary_frequencies_stored_by_old_checkpoints_are_left_unread(directory):
    expected = load_target(directory, dtype="float32")
    rewrite(directory, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(8, np.float32))
    assert_same_params(load_target(directory, dtype="float32"), expected)


def test_other_safetensors_beside_the_model_are_left_unread(directory):
    expected = load_target(directory, dtype="float32")
    save_file({"lora_a": np.ones(3, np.float32)}, directory / "adapter_model.safetensors")
    assert_same_params(load_target(directory, dtype="float32"), expected)


def test_a_missing_tensor_is_named(directory):
    rewrite(directory, model__layers__1__self_attn__k_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"'model.layers.1.self_attn.k_proj.weight' is missing .*\(32, 48\)"):
        load_target(directory)


def test_tensors_left_over_are_named(directory):
    rewrite(directory, model__layers__3__mlp__up_proj__weight=np.ones((2, 2), np.float32))
    with pytest.raises(CheckpointError, match="does not use: model.layers.3.mlp.up_proj.weight"):
        load_target(directory)


def test_many_tensors_left_over_are_counted(directory):
    rewrite(directory, **{f"extra_{index}": np.ones(1, np.float32) for index in range(11)})
    with pytest.raises(CheckpointError, match="extra_0, .* and 3 more"):
        load_target(directory)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(directory):
    rewrite(directory, model__norm__weight=np.ones(47, np.float32))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \(47,\); .*\(48,\)"):
        load_target(directory)


def test_a_tensor_of_integers_is_refused(directory):
    rewrite(directory, model__norm__weight=np.ones(48, np.int8))
    with pytest.raises(CheckpointError, match="'model.norm.weight' is stored as I8"):
        load_target(directory)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_named(directory, num_bytes):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match="model.safetensors: is truncated"):
        load_target(directory)


def test_an_absent_shard_is_named(sharded):
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=f"not there: {SHARDS[1]}; download"):
        load_target(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_index_is_named(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json: "):
        load_target(sharded)


def test_an_absent_config_is_named(directory):
    (directory / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        load_target(directory)


@pytest.mark.parametrize("content", [b'{"model_type": ', b"\xff\xfe", b"[1, 2]"])
def test_a_config_that_is_no_json_object_is_named(directory, content):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json: .* again"):
        load_target(directory)


def test_a_directory_of_pickles_is_refused(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no .*safetensors; pickle"):
        load_target(directory)


@pytest.mark.parametrize("dtype", ["int8", "fp16", 7, np.float64])
def test_a_dtype_that_is_not_supported_is_refused(directory, dtype):
    with pytest.raises(ConfigError, match=r"dtype=.*expected one of \('float32', 'bfloat16', 'float16'\)"):
        load_target(directory, dtype=dtype)


def test_what_is_no_mesh_is_refused(directory):
    with pytest.raises(ConfigError, match=r"mesh=4: expected a specjax.MeshConfig"):
        load_target(directory, mesh=4)


def test_a_path_where_nothing_is_is_refused(tmp_path):
    with pytest.raises(AssetError, match="nowhere"):
        load_target(tmp_path / "nowhere")


def test_a_tokenizer_of_as_many_tokens_as_logits_is_accepted(directory):
    write_tokenizer(directory, tiny.VOCAB)
    assert len(load_target(directory).tokenizer) == tiny.VOCAB


def test_a_tokenizer_of_more_tokens_than_logits_is_refused(directory):
    write_tokenizer(directory, tiny.VOCAB + 1)
    with pytest.raises(CheckpointError, match=f"has {tiny.VOCAB + 1} tokens .*vocab_size={tiny.VOCAB}"):
        load_target(directory)


def test_stop_tokens_come_from_the_config_where_there_is_no_tokenizer(tmp_path):
    directory = tiny.write_directory(tmp_path, tiny.hf_config(CASE, eos_token_id=[5, 3]))
    target = load_target(directory)
    assert (target.tokenizer, target.stop_token_ids) == (None, (3, 5))


def test_every_error_of_loading_is_one_that_users_catch():
    assert all(issubclass(error, SpecJAXError) for error in (AssetError, CheckpointError, ConfigError))


def test_a_loaded_directory_may_be_removed(directory):
    """Weights are copies, not views of a mapped file."""
    target = load_target(directory, dtype="float32")
    before = jax.tree.map(np.array, target.params)
    shutil.rmtree(directory)
    jax.tree.map(np.testing.assert_array_equal, target.params, before)
