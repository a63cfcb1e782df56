"""Draft heads in every dialect: what is written reads back bit for bit, and damaged files are refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from specjax.checkpoints import heads as files
from specjax.checkpoints import hf
from specjax.checkpoints.load import load_target
from specjax.errors import CheckpointError, ConfigError
from specjax.heads import config as heads
from specjax.heads import network
from specjax.target.families import ModelConfig, RopeScaling, from_hf

V, D, NUM_DRAFTABLE = tiny.VOCAB, tiny.WIDTH, 20
TARGET = from_hf(tiny.hf_config("llama-untied"))
VOCABULARY = np.arange(5, 5 + 3 * NUM_DRAFTABLE, 3, dtype=np.int32)
OFFSETS = (VOCABULARY - np.arange(NUM_DRAFTABLE)).astype(np.int64)
HEADS = {
    "eagle": heads.for_target(TARGET, "eagle"),
    "eagle-bias-norms": heads.for_target(TARGET, "eagle", joining_bias=True, layernorms=True),
    "eagle3": heads.for_target(TARGET, "eagle3", taps=(0, 1, 3), draft_vocab_size=NUM_DRAFTABLE),
    "eagle3-one-norm": heads.for_target(
        TARGET, "eagle3", taps=(0, 1, 2), norm_before_fc=True, norm_before_residual=True
    ),
    "eagle3-norms-layers": heads.for_target(
        TARGET, "eagle3", taps=(1, 2), fc_norm=True, norm_output=True, num_layers=2
    ),
    "eagle3-own-embedding": heads.for_target(TARGET, "eagle3", taps=(0, 1, 2), own_embedding=True),
    **{f"mtp-{wiring}": heads.for_target(TARGET, "mtp", wiring=wiring) for wiring in heads.WIRINGS},
    "mtp-two-blocks": heads.for_target(TARGET, "mtp", wiring="mimo", num_blocks=2),
    "mtp-own": heads.for_target(TARGET, "mtp", own_head=True, own_embedding=True),
}


def random_params(head: heads.HeadConfig, seed: int = 0) -> network.Params:
    """Values that bfloat16 holds."""
    random = np.random.default_rng(seed)

    def draw(x: Any) -> jax.Array:
        values = random.normal(1.0 if x.ndim == 1 else 0.0, 0.2, x.shape)
        return jnp.asarray(values.astype(ml_dtypes.bfloat16), jnp.float32)

    return jax.tree.map(draw, network.param_shapes(head))


def write(path: Path, name: str = "eagle3", **options: Any) -> Path:
    head = HEADS[name]
    kept = VOCABULARY if head.reduced else None
    return files.write_head(path, head, random_params(head), "org/target", ["LlamaForCausalLM"], 4, kept, **options)


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def rewrite(directory: Path, **changed: np.ndarray | None) -> None:
    """Replaces tensors, or removes those given as None; `__` in a keyword stands for a dot."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def layer_fields() -> dict[str, Any]:
    return files.to_hf(HEADS["eagle"].layer)


def write_dialect(path: Path, dialect: str, name: str, config: dict[str, Any], **extra: np.ndarray) -> network.Params:
    """A head under another dialect's names, beside a config.json."""
    head = HEADS[name]
    params = random_params(head)
    tensors = files.tensors_of(head, params, files.NAMES[dialect], jnp.bfloat16, TARGET.num_layers)
    path.mkdir()
    save_file(tensors | {key.replace("__", "."): value for key, value in extra.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return params


@pytest.mark.parametrize("name", HEADS)
def test_what_is_written_reads_back_bit_for_bit(tmp_path, name):
    head = HEADS[name]
    path = write(tmp_path / "head", name)
    found = files.read_head(path, TARGET, "float32")
    assert found.config == head
    assert_same(found.params, random_params(head))
    assert found.num_speculative_tokens == 4
    assert (found.vocabulary is None) == (not head.reduced)
    if head.reduced:
        np.testing.assert_array_equal(found.vocabulary, VOCABULARY)
    assert files.detect_method(path) == head.method
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["config.json", "head", "model.safetensors"]


def test_the_file_is_what_the_package_and_vllm_read(tmp_path):
    path = write(tmp_path / "head")
    config = json.loads((path / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3" and "model_type" not in config
    assert config["norm_before_residual"] is False and config["draft_vocab_size"] == NUM_DRAFTABLE
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 3]
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "org/target",
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["transformer_layer_config"]["num_hidden_layers"] == 1
    tensors = load_file(path / "model.safetensors")
    assert {name: x.dtype for name, x in tensors.items() if name in ("d2t", "t2d")} == {"d2t": np.int64, "t2d": bool}
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (D, 2 * D)
    assert tensors["fc.weight"].shape == (D, 3 * D) and tensors["fc.weight"].dtype == ml_dtypes.bfloat16
    assert tensors["lm_head.weight"].shape == (NUM_DRAFTABLE, D)
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), VOCABULARY)


def test_writing_again_replaces_the_head_and_nothing_else(tmp_path):
    path = write(tmp_path / "head")
    write(path, "eagle", dtype=jnp.float32)
    assert files.read_head(path, TARGET, "float32").config == HEADS["eagle"]
    (path / "notes.txt").write_text("kept")
    with pytest.raises(ConfigError, match="holds other files"):
        write(path)
    assert (path / "notes.txt").exists() and files.detect_method(path) == "eagle"


@pytest.mark.parametrize("name", ["eagle", "eagle-bias-norms"])
def test_eagle_in_its_own_dialect(tmp_path, name):
    params = write_dialect(tmp_path / "head", "eagle", name, layer_fields())
    found = files.read_head(tmp_path / "head", TARGET, "float32")
    assert found.config == HEADS[name] and found.speculator is None
    assert_same(found.params, params)
    assert files.detect_method(tmp_path / "head") == "eagle"


def test_an_embedding_that_repeats_the_targets_is_shared(tmp_path):
    target = load_target(tiny.write_directory(tmp_path / "target", tiny.hf_config("llama-untied")), dtype="float32")
    repeated = np.asarray(target.params["embedding"])
    write_dialect(tmp_path / "head", "eagle", "eagle", layer_fields(), embed_tokens__weight=repeated)
    shared = files.read_head(tmp_path / "head", TARGET, "float32", target.params)
    assert shared.config == HEADS["eagle"] and "embedding" not in shared.params
    kept = files.read_head(tmp_path / "head", TARGET, "float32")
    assert kept.config.own_embedding
    np.testing.assert_array_equal(kept.params["embedding"], repeated)
    rewrite(tmp_path / "head", embed_tokens__weight=repeated + 1)
    assert files.read_head(tmp_path / "head", TARGET, "float32", target.params).config.own_embedding


@pytest.mark.parametrize("nested", [True, False])
def test_eagle3_in_its_own_dialect(tmp_path, nested):
    taps = {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}
    config = layer_fields() | {"draft_vocab_size": NUM_DRAFTABLE} | ({"eagle_config": taps} if nested else taps)
    params = write_dialect(tmp_path / "head", "eagle3", "eagle3", config, d2t=OFFSETS)
    found = files.read_head(tmp_path / "head", TARGET, "float32")
    assert found.config == HEADS["eagle3"]
    assert_same(found.params, params)
    np.testing.assert_array_equal(found.vocabulary, VOCABULARY)
    assert files.detect_method(tmp_path / "head") == "eagle3"


def test_eagle3_without_layer_ids_reads_the_usual_ones_where_the_target_has_so_many():
    assert heads.default_taps(32) == (2, 16, 29)
    with pytest.raises(ConfigError, match=r"head\.taps: the target has 3 layers"):
        heads.for_target(TARGET, "eagle3")


@pytest.mark.parametrize("wiring", heads.WIRINGS)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_heads_inside_their_targets_checkpoint(tmp_path, wiring, num_blocks):
    """For ernie the norm behind the block is the target's, for qwen3_next all blocks share what joins."""
    head = heads.for_target(TARGET, "mtp", wiring=wiring, num_blocks=num_blocks)
    params = random_params(head)
    if num_blocks == 2:
        copied = {"ernie": ("output_norm",), "qwen3_next": ("join", "embedding_norm", "hidden_norm", "output_norm")}
        for part in copied.get(wiring, ()):
            params["block_1"][part] = params["block_0"][part]
    path = tmp_path / "target"
    config = tiny.hf_config("llama-untied")
    model_type = {"mimo": "mimo", "glm4_moe": "glm4_moe"}.get(wiring, "llama")
    own = files.tensors_of(head, params, files.NAMES[wiring], jnp.bfloat16, TARGET.num_layers)
    path.mkdir()
    save_file(tiny.tensors(config) | own, path / "model.safetensors")
    described = config | {"model_type": model_type, "num_nextn_predict_layers": num_blocks}
    (path / "config.json").write_text(json.dumps(described))
    assert files.detect_method(path) == "mtp"
    found = files.read_head(path, TARGET, "float32")
    assert found.config == head
    assert_same(found.params, params)
    if wiring in ("mimo", "ernie", "qwen3_next"):  # whose targets skip what they carry for drafting
        assert_same(
            hf.read_params(path, TARGET, jnp.float32)["layer_0"]["mlp_norm"],
            tiny.tensors(config)["model.layers.0.post_attention_layernorm.weight"],
        )


def test_shifted_norms_are_stored_as_what_is_added_to_one(tmp_path):
    head = HEADS["mtp-qwen3_next"]
    params = random_params(head)
    tensors = files.tensors_of(head, params, files.NAMES["qwen3_next"], jnp.float32)
    stored = tensors["mtp.layers.0.input_layernorm.weight"]
    np.testing.assert_array_equal(stored, np.asarray(params["block_0"]["layer_0"]["attention_norm"]) - 1)
    np.testing.assert_array_equal(tensors["mtp.fc.weight"], np.asarray(params["block_0"]["join"]).T)


def test_an_order_that_differs_is_turned_into_the_formats():
    """MiMo joins [hidden; embedding], speculators [embedding; hidden]."""
    head = HEADS["mtp-mimo"]
    params = random_params(head)
    own = files.tensors_of(head, params, files.NAMES["mimo"], jnp.float32)["model.mtp_layers.0.input_proj.weight"]
    written = files.tensors_of(head, params, files.NAMES["speculators-mtp"], jnp.float32)
    np.testing.assert_array_equal(
        written["mtp_layers.0.input_proj.weight"], np.concatenate([own[:, D:], own[:, :D]], 1)
    )


def test_a_mimo_target_is_a_qwen2_with_heads():
    fields = tiny.hf_config("qwen2-window-unused")
    mimo, qwen2 = from_hf({**fields, "model_type": "mimo"}), from_hf(fields)
    assert dataclasses.replace(mimo, family="qwen2") == qwen2


LAYERS = {
    "biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "windows": {"num_layers": 2, "sliding_windows": (7, None), "qk_norm": True},
    "mistral": {"sliding_windows": (7,)},
    "linear": {"rope_scaling": RopeScaling("linear", 2.0)},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 8.0, 64, truncate=False, attention_factor=1.3)},
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind_can_be_written_as_a_config(name):
    layer = dataclasses.replace(HEADS["eagle"].layer, **LAYERS[name])
    again = from_hf(files.to_hf(layer))
    assert dataclasses.replace(again, family=layer.family) == layer


def test_layers_that_no_config_describes_are_refused():
    layer = dataclasses.replace(HEADS["eagle"].layer, qk_norm=True, qkv_bias=True)
    with pytest.raises(ConfigError, match="out_bias=False cannot be expressed"):
        files.to_hf(layer)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_pickle_of_plain_tensors_is_read(tmp_path, stored):
    torch = pytest.importorskip("torch")
    write_dialect(tmp_path / "head", "eagle", "eagle", layer_fields())
    safetensors = tmp_path / "head" / "model.safetensors"
    tensors = {name: torch.tensor(x.astype(np.float32)) for name, x in load_file(safetensors).items()}
    kind = {np.float32: torch.float32, np.float16: torch.float16}.get(stored, torch.bfloat16)
    torch.save({name: x.to(kind) for name, x in tensors.items()}, tmp_path / "head" / "pytorch_model.bin")
    safetensors.unlink()
    found = files.read_head(tmp_path / "head", TARGET, "float32")
    expected = jax.tree.map(lambda x: np.asarray(x).astype(stored).astype(np.float32), random_params(HEADS["eagle"]))
    assert_same(found.params, expected)


def test_a_pickle_of_anything_else_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps(layer_fields()))
    for value in ({"code": Path("x")}, [1, 2]):
        torch.save(value, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="onvert the checkpoint to safetensors"):
            files.read_head(tmp_path, TARGET, "float32")


def test_a_pickle_is_refused_where_torch_is_absent(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(layer_fields()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="Install torch, or convert"):
        files.read_head(tmp_path, TARGET, "float32")


WEIGHT = np.zeros((D, 3 * D), np.float32)
BAD_TENSORS = [
    ({"fc__weight": None}, r"tensor 'fc\.weight' is missing \(expected shape \(48, 144\)\)"),
    ({"lm_head__weight": None}, r"tensor 'lm_head\.weight' is missing"),
    ({"fc__weight": WEIGHT[:, 1:]}, r"tensor 'fc\.weight' has shape \(48, 143\)"),
    ({"fc__weight": WEIGHT.astype(np.int8)}, r"tensor 'fc\.weight' is stored as I8"),
    ({"fc__bias": WEIGHT[:, 0]}, r"does not use: fc\.bias"),
    ({"layers__0__self_attn__q_norm__weight": WEIGHT[:8, 0]}, r"does not use: layers\.0\.self_attn\.q_norm\.weight"),
    ({"d2t": 2 * VOCABULARY.astype(np.int64)}, r"i \+ d2t\[i\] has to increase strictly within 0 to 96.*store id - i"),
    ({"d2t": OFFSETS[::-1].copy() * 3}, r"has to increase strictly"),
    ({"d2t": OFFSETS.astype(np.float32)}, r"tensor 'd2t' is stored as F32"),
    ({"d2t": OFFSETS[:-1]}, r"tensor 'd2t' has shape \(19,\)"),
    ({"d2t": OFFSETS + 1}, r"'t2d' disagree"),
    ({"t2d": np.zeros(V, bool)}, r"t2d marks 0 tokens; expected the 20"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_TENSORS, ids=[message[:30] for _, message in BAD_TENSORS])
def test_damaged_tensors_are_refused_by_name(tmp_path, changed, message):
    path = write(tmp_path / "head")
    rewrite(path, **changed)
    with pytest.raises(CheckpointError, match=message):
        files.read_head(path, TARGET, "float32")


BAD_FIELDS = [
    ({"eagle_aux_hidden_state_layer_ids": [0, 1]}, r"tensor 'fc\.weight' has shape \(48, 144\)"),
    ({"eagle_aux_hidden_state_layer_ids": [0, 1, 9]}, r"eagle_aux_hidden_state_layer_ids=\[0, 1, 9\]; expected int"),
    ({"eagle_aux_hidden_state_layer_ids": []}, r"taps=\(\): expected the target layers"),
    ({"target_hidden_size": 64}, r"target_hidden_size=64; expected 48"),
    ({"draft_vocab_size": 30}, r"tensor 'lm_head\.weight' has shape \(20, 48\)"),
    ({"draft_vocab_size": 98}, r"draft_vocab_size=98; expected 1 to 97"),
    ({"fc_norm": True}, r"tensor 'fc_norm\.0\.weight' is missing"),
    ({"norm_output": "yes"}, r"norm_output='yes': expected a valid boolean"),
    ({"speculators_model_type": "mlp"}, r"is for method='mlp_speculator'; expected a draft head"),
    ({"speculators_model_type": 3}, r"speculators_model_type=3; expected text"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=[message[:30] for _, message in BAD_FIELDS])
def test_wrong_fields_are_refused_by_name(tmp_path, fields, message):
    path = write(tmp_path / "head")
    edit(path, **fields)
    with pytest.raises(CheckpointError, match=message) as refusal:
        files.read_head(path, TARGET, "float32")
    assert str(path) in str(refusal.value)


def test_a_head_of_another_target_is_refused(tmp_path):
    path = write(tmp_path / "head", "eagle")
    with pytest.raises(CheckpointError, match=r"vocab_size=97; expected 96, the target's"):
        files.read_head(path, dataclasses.replace(TARGET, vocab_size=96), "float32")


def test_layer_ids_of_an_unsure_meaning_are_refused(tmp_path):
    config = layer_fields() | {"draft_vocab_size": NUM_DRAFTABLE, "target_layer_ids": [0, 1, 3]}
    write_dialect(tmp_path / "head", "eagle3", "eagle3", config, d2t=OFFSETS)
    with pytest.raises(CheckpointError, match=r"target_layer_ids=\[0, 1, 3\].*expected eagle_aux"):
        files.read_head(tmp_path / "head", TARGET, "float32")


BAD_WRITES = [
    ({"vocabulary": None}, r"vocabulary=None: expected the target's ids of the 20 tokens"),
    ({"vocabulary": VOCABULARY[::-1]}, r"vocabulary: expected 20 different token ids within 0 to 96, sorted"),
    ({"vocabulary": VOCABULARY[:-1]}, r"vocabulary: expected 20"),
    ({"params": {}}, r"params: have shapes \{\}; expected"),
    ({"num_speculative_tokens": 0}, r"speculative_tokens=0: expected greater"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_WRITES, ids=[message[:20] for _, message in BAD_WRITES])
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, changed, message):
    head = HEADS["eagle3"]
    fields = {"params": random_params(head), "num_speculative_tokens": 3, "vocabulary": VOCABULARY} | changed
    with pytest.raises(ConfigError, match=message):
        files.write_head(tmp_path / "head", head, target_name=None, architectures=[], **fields)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"model_type": "llama"}, "draft_model"),
        ({"model_type": "medusa"}, "medusa"),
        ({"model_type": "mlp_speculator"}, "mlp_speculator"),
        ({"model_type": "qwen3", "dflash_config": {}}, "dflash"),
        ({"speculators_model_type": "dflash"}, "dflash"),
        ({"speculators_model_type": "independent"}, "draft_model"),
        ({"speculators_model_type": "peagle"}, "peagle"),
    ],
)
def test_other_methods_are_detected_by_their_config(tmp_path, config, method):
    save_file({"weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert files.detect_method(tmp_path) == method


def test_every_name_of_a_wiring_is_in_the_table():
    assert set(heads.WIRINGS) <= set(files.NAMES)
    assert all(isinstance(TARGET, ModelConfig) and names.layer for names in files.NAMES.values())
