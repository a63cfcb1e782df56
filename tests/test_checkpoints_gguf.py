"""GGUF conversion on tiny files written here, and the tokenizers that come out of it."""

import json
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from specjax.checkpoints.gguf import LLAMA3_ROPE_SCALINGS, convert_gguf, unpermute_rotary_rows
from specjax.errors import CheckpointError, SpecJAXError
from specjax.tokenizer import encode_prompt, load_tokenizer, stop_token_ids

HIDDEN, INTERMEDIATE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 64, 2, 4, 2, 8
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, "he", "11", *SPECIAL, "<think>"]
MERGES = ["h e", "1 1"]
BOS, EOS, END_OF_TEXT, THINK = (TOKENS.index(token) for token in [*SPECIAL, "<think>"])
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tensors(architecture: str, tied: bool = True) -> dict[str, np.ndarray]:
    """Random tensors under their GGUF names, in Hugging Face's row order."""
    q_width, kv_width = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(NUM_LAYERS):
        block = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (q_width, HIDDEN),
            "attn_k.weight": (kv_width, HIDDEN),
            "attn_v.weight": (kv_width, HIDDEN),
            "attn_output.weight": (HIDDEN, q_width),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            "ffn_up.weight": (INTERMEDIATE, HIDDEN),
            "ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
        if architecture == "qwen2":
            block |= {"attn_q.bias": (q_width,), "attn_k.bias": (kv_width,), "attn_v.bias": (kv_width,)}
        if architecture == "qwen3":
            block |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def permute_by_definition(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order, row by row: stored row 2i + j of a head is its row i + j * head_dim / 2."""
    head_dim = rows.shape[0] // num_heads
    stored = np.empty_like(rows)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            for j in range(2):
                stored[head * head_dim + 2 * i + j] = rows[head * head_dim + i + j * head_dim // 2]
    return stored


def write_gguf(
    path: Path,
    architecture: str,
    tensors: dict[str, np.ndarray],
    metadata: dict[str, object] | None = None,
    quantised: frozenset[str] = frozenset(),
) -> Path:
    """Writes a tiny model; `metadata` overrides or adds keys, a value of None leaves the key out."""
    values: dict[str, object] = {
        f"{architecture}.block_count": NUM_LAYERS,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INTERMEDIATE,
        f"{architecture}.attention.head_count": NUM_HEADS,
        f"{architecture}.attention.head_count_kv": NUM_KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 4) + [3, 3, 3, 4],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.padding_token_id": END_OF_TEXT,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    } | (metadata or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if name in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_rows(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as a llama file stores them, q and k permuted."""
    heads = {"attn_q.weight": NUM_HEADS, "attn_q.bias": NUM_HEADS, "attn_k.weight": NUM_KV_HEADS}
    heads["attn_k.bias"] = NUM_KV_HEADS
    return {
        name: permute_by_definition(tensor, heads[name.split(".", 2)[-1]])
        if name.split(".", 2)[-1] in heads
        else tensor
        for name, tensor in tensors.items()
    }


def write_llama(path: Path, metadata: dict[str, object] | None = None, **changes: np.ndarray) -> Path:
    return write_gguf(path, "llama", stored_rows(tiny_tensors("llama")) | changes, metadata)


def converted_config(gguf_path: Path) -> dict[str, object]:
    return json.loads((convert_gguf(gguf_path, gguf_path.with_suffix("")) / "config.json").read_text())


def test_unpermute_rotary_rows_inverts_the_definition_of_the_permutation():
    rows = np.arange(NUM_HEADS * HEAD_DIM * 3).reshape(NUM_HEADS * HEAD_DIM, 3)
    np.testing.assert_array_equal(unpermute_rotary_rows(permute_by_definition(rows, NUM_HEADS), NUM_HEADS), rows)


def test_llama_tensors_come_out_in_hugging_face_order(tmp_path):
    tensors = tiny_tensors("llama")
    out = load_file(convert_gguf(write_llama(tmp_path / "m.gguf"), tmp_path / "out") / "model.safetensors")
    np.testing.assert_array_equal(out["model.embed_tokens.weight"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(out["model.norm.weight"], tensors["output_norm.weight"])
    hf_names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(NUM_LAYERS):
        for name, hf_name in hf_names.items():
            expected = tensors[f"blk.{layer}.{name}.weight"]
            np.testing.assert_array_equal(out[f"model.layers.{layer}.{hf_name}.weight"], expected, err_msg=name)
    assert len(out) == 2 + NUM_LAYERS * len(hf_names)


def test_llama_config_holds_the_metadata(tmp_path):
    config = converted_config(write_llama(tmp_path / "m.gguf"))
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": len(TOKENS),
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "float32",
    }
    assert config == expected


def test_an_output_tensor_becomes_an_untied_head(tmp_path):
    tensors = tiny_tensors("qwen2", tied=False)
    out = convert_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", tensors), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(out / "model.safetensors")["lm_head.weight"], tensors["output.weight"])


def test_qwen2_rows_and_biases_are_taken_as_they_are(tmp_path):
    tensors = tiny_tensors("qwen2")
    out = load_file(
        convert_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", tensors), tmp_path / "out") / "model.safetensors"
    )
    for part in ("weight", "bias"):
        for projection in "qkv":
            np.testing.assert_array_equal(
                out[f"model.layers.1.self_attn.{projection}_proj.{part}"], tensors[f"blk.1.attn_{projection}.{part}"]
            )


def test_qwen3_head_norms_are_kept(tmp_path):
    tensors = tiny_tensors("qwen3")
    out = load_file(
        convert_gguf(write_gguf(tmp_path / "m.gguf", "qwen3", tensors), tmp_path / "out") / "model.safetensors"
    )
    for projection in "qk":
        np.testing.assert_array_equal(
            out[f"model.layers.0.self_attn.{projection}_norm.weight"], tensors[f"blk.0.attn_{projection}_norm.weight"]
        )


def test_llama_biases_are_unpermuted_like_their_weights(tmp_path):
    tensors = tiny_tensors("llama")
    widths = {"q": NUM_HEADS * HEAD_DIM, "k": NUM_KV_HEADS * HEAD_DIM, "v": NUM_KV_HEADS * HEAD_DIM, "output": HIDDEN}
    for layer in range(NUM_LAYERS):
        tensors |= {f"blk.{layer}.attn_{name}.bias": np.arange(w, dtype=np.float32) for name, w in widths.items()}
    path = write_gguf(tmp_path / "m.gguf", "llama", stored_rows(tensors))
    out = convert_gguf(path, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["attention_bias"] is True
    for name, hf_name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")):
        bias = load_file(out / "model.safetensors")[f"model.layers.1.self_attn.{hf_name}.bias"]
        np.testing.assert_array_equal(bias, np.arange(widths[name]))


def test_q8_0_tensors_are_dequantised_within_half_a_quantisation_step(tmp_path):
    tensors = tiny_tensors("qwen2")
    name = "blk.0.ffn_up.weight"
    path = write_gguf(tmp_path / "m.gguf", "qwen2", tensors, quantised=frozenset({name}))
    out = load_file(convert_gguf(path, tmp_path / "out") / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    # One block of 32 is one row here: scale max/127, stored as float16 (relative error up to 2**-11).
    peak = np.abs(tensors[name]).max(axis=1, keepdims=True)
    assert out.dtype == np.float32
    assert np.all(np.abs(out - tensors[name]) <= peak * (0.5 / 127 + 2**-11))
    assert not np.array_equal(out, tensors[name])


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling_is_mapped(tmp_path, metadata, expected):
    path = write_llama(tmp_path / "m.gguf", {f"llama.rope.scaling.{key}": value for key, value in metadata.items()})
    assert converted_config(path)["rope_scaling"] == expected


def test_the_old_linear_scale_key_is_mapped(tmp_path):
    path = write_llama(tmp_path / "m.gguf", {"llama.rope.scale_linear": 2.0})
    assert converted_config(path)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def llama3_factors_by_definition(factor: float) -> np.ndarray:
    """Llama 3's rule, frequency by frequency: short waves as they are, long ones divided, a ramp between."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 10000.0 ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("scaling", LLAMA3_ROPE_SCALINGS, ids=lambda scaling: str(scaling["factor"]))
def test_published_llama3_rope_factors_are_recognised(tmp_path, scaling):
    path = write_llama(tmp_path / "m.gguf", **{"rope_freqs.weight": llama3_factors_by_definition(scaling["factor"])})
    assert converted_config(path)["rope_scaling"] == scaling


def test_rope_factors_of_unknown_origin_are_refused(tmp_path):
    path = write_llama(tmp_path / "m.gguf", **{"rope_freqs.weight": llama3_factors_by_definition(5.0)})
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight holds factors"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.pre": "deepseek-llm"}, r"tokenizer\.ggml\.pre='deepseek-llm'.*llama-bpe.*qwen2.*smollm"),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre=None"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.model='llama'.*'gpt2'"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix=True"),
        ({"tokenizer.ggml.eos_token_id": 9999}, r"eos_token_id=9999 is outside the vocabulary"),
        ({"tokenizer.ggml.eos_token_id": None}, r"'tokenizer\.ggml\.eos_token_id' is missing"),
        ({"tokenizer.ggml.merges": ["x yz"]}, "merges does not fit"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 entries"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type='longrope'"),
        ({"llama.rope.scaling.attn_factor": 1.5}, r"llama\.rope\.scaling\.attn_factor=1\.5"),
        ({"llama.attention.sliding_window": 64}, r"llama\.attention\.sliding_window=64"),
        ({"llama.expert_count": 8}, r"llama\.expert_count=8"),
        ({"llama.rope.dimension_count": 4}, r"llama\.rope\.dimension_count=4 must equal the head width 8"),
        ({"llama.attention.head_count": [4, 4]}, r"llama\.attention\.head_count=\[4, 4\]"),
        ({"llama.context_length": None}, r"'llama\.context_length' is missing"),
        ({"llama.block_count": 3}, r"9 tensors are missing: blk\.2\.attn_k\.weight"),
        ({"llama.block_count": 1}, r"9 tensors have no place in the model: blk\.1\.attn_k\.weight"),
        ({"llama.feed_forward_length": 32}, r"tensor blk\.0\.ffn_gate\.weight has shape \(64, 32\)"),
        ({"split.count": 2}, r"split\.count=2"),
    ],
)
def test_unsupported_metadata_are_refused_by_name(tmp_path, metadata, message):
    path = write_llama(tmp_path / "m.gguf", metadata)
    with pytest.raises(CheckpointError, match=message) as error:
        convert_gguf(path, tmp_path / "out")
    assert str(path) in str(error.value)


def test_an_unknown_architecture_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "gemma", tiny_tensors("llama"))
    with pytest.raises(CheckpointError, match=r"general\.architecture='gemma'.*llama.*qwen2.*qwen3"):
        convert_gguf(path, tmp_path / "out")


def test_a_leftover_tensor_is_named(tmp_path):
    path = write_llama(tmp_path / "m.gguf", **{"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=r"1 tensors have no place in the model: blk\.0\.ffn_gate_exps\.weight"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kept):
    content = write_llama(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(CheckpointError, match=r"cut\.gguf: not a whole GGUF file"):
        convert_gguf(path, tmp_path / "out")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.gguf.*cannot be read"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")


def test_a_failed_conversion_leaves_nothing_behind(tmp_path):
    path = write_llama(tmp_path / "m.gguf", {"llama.block_count": 3})
    with pytest.raises(CheckpointError):
        convert_gguf(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_output_directory_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        convert_gguf(write_llama(tmp_path / "m.gguf"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, EOS),
        ({"tokenizer.ggml.eos_token_id": END_OF_TEXT}, [END_OF_TEXT, EOS]),
        ({"tokenizer.ggml.eos_token_id": END_OF_TEXT, "tokenizer.chat_template": None}, END_OF_TEXT),
        ({"tokenizer.ggml.eot_token_id": END_OF_TEXT}, [EOS, END_OF_TEXT]),
    ],
)
def test_generation_ends_at_eos_and_at_the_templates_end_of_turn(tmp_path, metadata, expected):
    out = convert_gguf(write_llama(tmp_path / "m.gguf", metadata), tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == expected


def pieces(tmp_path: Path, pre: str, text: str) -> list[str]:
    out = convert_gguf(write_llama(tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre}), tmp_path / "out")
    return Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).tokens


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["1", "1"]), ("qwen2", ["1", "1"]), ("llama-bpe", ["11"])])
def test_digits_are_split_as_the_pre_tokenizer_says(tmp_path, pre, expected):
    assert pieces(tmp_path, pre, "11") == expected


def test_qwen2_text_is_put_into_nfc(tmp_path):
    decomposed = unicodedata.normalize("NFD", "é")
    assert len(pieces(tmp_path, "qwen2", decomposed)) == len("é".encode())


def test_special_tokens_are_matched_whole_in_text(tmp_path):
    assert pieces(tmp_path, "smollm", "he<|im_end|><think>") == ["he", "<|im_end|>", "<think>"]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def tiny_directory(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    tensors = tiny_tensors(request.param)
    pre = "smollm" if request.param == "llama" else "qwen2"
    path = write_gguf(root / "m.gguf", request.param, tensors, {"tokenizer.ggml.pre": pre})
    return convert_gguf(path, root / "out")


def test_transformers_loads_the_tokenizer_as_it_was_built(tiny_directory):
    text = " The 1123 he\u0301's <think>\r\n\n  end<|im_end|>"
    built = Tokenizer.from_file(str(tiny_directory / "tokenizer.json"))
    assert encode_prompt(load_tokenizer(tiny_directory), text, chat=False) == built.encode(text).ids


def test_decoding_leaves_out_control_tokens_only(tiny_directory):
    tokenizer = load_tokenizer(tiny_directory)
    assert tokenizer.decode([BOS, THINK, TOKENS.index("he"), EOS], skip_special_tokens=True) == "<think>he"


def test_chat_puts_text_into_one_user_turn(tiny_directory):
    tokenizer = load_tokenizer(tiny_directory)
    ids = encode_prompt(tokenizer, "he", chat=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n"
    assert encode_prompt(tokenizer, [{"role": "user", "content": "he"}], chat=True) == ids


@pytest.mark.parametrize("ids", [[3, 5], (3, 5), np.array([3, 5])])
def test_token_ids_are_taken_as_they_are(tiny_directory, ids):
    encoded = encode_prompt(load_tokenizer(tiny_directory), ids, chat=True)
    assert encoded == [3, 5]
    assert all(type(token) is int for token in encoded)


@pytest.mark.parametrize(
    ("prompt", "chat", "message"),
    [
        ("", False, "prompt='' is empty"),
        ([], False, r"prompt=\[\] is empty"),
        ([3, len(TOKENS)], False, rf"prompt\[1\]={len(TOKENS)} is outside the vocabulary.*id < {len(TOKENS)}"),
        ([-1], False, r"prompt\[0\]=-1 is outside"),
        ([True], False, r"prompt\[0\]=True has type bool"),
        (["a"], False, r"prompt\[0\]='a' has type str"),
        (np.ones(2), False, r"prompt\[0\]=.*has type float64"),
        (np.ones((1, 2), int), False, r"shape \(1, 2\)"),
        (7, False, "prompt=7 has type int"),
        (b"he", False, "has type bytes"),
        ([{"role": "user", "content": "he"}], False, "pass chat=True"),
        ([{"role": "user"}], True, r"prompt\[0\]=.*expected a message"),
    ],
)
def test_a_wrong_prompt_is_named(tiny_directory, prompt, chat, message):
    with pytest.raises(SpecJAXError, match=message):
        encode_prompt(load_tokenizer(tiny_directory), prompt, chat)


def test_chat_without_a_template_says_to_turn_chat_off(tmp_path):
    out = convert_gguf(write_llama(tmp_path / "m.gguf", {"tokenizer.chat_template": None}), tmp_path / "out")
    with pytest.raises(SpecJAXError, match="pass chat=False"):
        encode_prompt(load_tokenizer(out), "he", chat=True)


def test_bos_is_put_in_front_where_the_file_asks_for_it(tmp_path):
    out = convert_gguf(write_llama(tmp_path / "m.gguf", {"tokenizer.ggml.add_bos_token": True}), tmp_path / "out")
    assert encode_prompt(load_tokenizer(out), "he", chat=False) == [BOS, TOKENS.index("he")]


def test_stop_tokens_are_gathered_from_both_configs_and_the_tokenizer(tiny_directory, tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert stop_token_ids(tmp_path, load_tokenizer(tiny_directory)) == (7, 9, EOS)


def test_a_stop_token_that_is_no_integer_is_named(tiny_directory, tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="eos_token_id='</s>'"):
        stop_token_ids(tmp_path, load_tokenizer(tiny_directory))


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
