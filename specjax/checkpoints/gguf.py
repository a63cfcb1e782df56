"""GGUF files turned into Hugging Face directories, so that the rest of SpecJAX reads one layout only."""

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specjax.errors import CheckpointError

# Raised when the converter writes something else for the same file; cached conversions are kept apart by it.
CONVERTER_VERSION = 1

CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4  # values of tokenizer.ggml.token_type

# Tokens with which the chat templates of the supported tokenizers end a turn.
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>")


class Architecture(NamedTuple):
    """What differs between the supported GGUF architectures.

    Attributes:
        hf_class: the class named in config.json.
        permuted: whether q and k rows are stored in the order of interleaved rotary embedding.
        qkv_bias: True or False if fixed by the architecture, None if the file decides (then o has one too).
        qk_norm: whether q and k are normalised per head.
    """

    hf_class: str
    permuted: bool
    qkv_bias: bool | None
    qk_norm: bool


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", permuted=True, qkv_bias=None, qk_norm=False),
    "qwen2": Architecture("Qwen2ForCausalLM", permuted=False, qkv_bias=True, qk_norm=False),
    "qwen3": Architecture("Qwen3ForCausalLM", permuted=False, qkv_bias=False, qk_norm=True),
}


class TokenizerRecipe(NamedTuple):
    """How a value of tokenizer.ggml.pre splits text before byte-level BPE.

    Attributes:
        split_regex: published split pattern; None means GPT-2's pattern behind a split into single digits.
        nfc: whether text is put into Unicode NFC first.
        ignore_merges: whether a piece that is a token as a whole is taken as it is.
        add_bos: whether BOS is put in front where the file does not say.
    """

    split_regex: str | None
    nfc: bool
    ignore_merges: bool
    add_bos: bool


_SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_RECIPES = {
    "smollm": TokenizerRecipe(None, nfc=False, ignore_merges=False, add_bos=False),
    "qwen2": TokenizerRecipe(_SPLIT_REGEX.replace("DIGITS", ""), nfc=True, ignore_merges=False, add_bos=False),
    "llama-bpe": TokenizerRecipe(_SPLIT_REGEX.replace("DIGITS", "{1,3}"), nfc=False, ignore_merges=True, add_bos=True),
}

# rope_freqs.weight holds the factors of Llama 3's rope scaling but not the settings they came from; these are the
# published ones (Llama 3.1 and 3.2), recognised by computing their factors.
LLAMA3_ROPE_SCALINGS = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)

# Every `<architecture>.` key that is read or has no effect; any other may change the model's output and is refused.
_MODEL_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "tensor_data_layout",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)


class TensorSpec(NamedTuple):
    """One tensor of the model in both layouts.

    Attributes:
        gguf_name: name in the GGUF file.
        hf_name: name in the Hugging Face checkpoint.
        shape: shape in the Hugging Face checkpoint, [out, in] for matrices.
        num_permuted_heads: number of heads whose rows are to be put back in order; 0 if the order is right already.
    """

    gguf_name: str
    hf_name: str
    shape: tuple[int, ...]
    num_permuted_heads: int = 0


def convert_gguf(gguf_path: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> Path:
    """Turns a GGUF file of the llama, qwen2 or qwen3 architecture into a Hugging Face directory.

    Weights are written as float32 (quantised ones dequantised), in the row order and under the names that
    transformers uses; config, generation config and tokenizer are built from the file's metadata.

    Args:
        gguf_path: the GGUF file.
        out_dir: directory to make; it appears only once it is complete.

    Returns:
        `out_dir` as a Path.

    Raises:
        CheckpointError: the file is damaged, is of an unsupported kind, holds or lacks a tensor, or `out_dir` exists.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    if out_dir.exists():
        raise CheckpointError(f"out_dir={str(out_dir)!r} already exists; delete it or give another directory")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial_dir = out_dir.parent / f".{out_dir.name}.{uuid.uuid4().hex}.partial"
    partial_dir.mkdir()
    try:
        _convert_into(gguf_path, partial_dir)
        partial_dir.rename(out_dir)
    except CheckpointError as error:
        raise CheckpointError(f"{gguf_path}: {error}") from error
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    return out_dir


def unpermute_rotary_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q or k.

    GGUF stores the pair (i, i + head_dim/2) of each head side by side, as rows 2i and 2i + 1.

    Args:
        rows: [num_heads * head_dim, ...] weight or bias as stored in GGUF.
        num_heads: number of heads of this tensor (KV heads for k).

    Returns:
        An array of the same shape in Hugging Face's order.
    """
    head_dim = rows.shape[0] // num_heads
    pairs = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _convert_into(gguf_path: Path, directory: Path) -> None:
    metadata, tensors = _read_gguf(gguf_path)
    config = _hf_config(metadata, tensors)
    specs = _tensor_specs(config)
    _check_tensors(specs, tensors)
    _write_tokenizer(metadata, config["max_position_embeddings"], directory)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", _generation_config(metadata))
    _write_safetensors(directory / "model.safetensors", specs, tensors)


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata values by key, and the reader's tensors by name."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise CheckpointError(f"the file cannot be read ({error}); check the path") from error
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"not a whole GGUF file ({error}); it may be truncated, fetch it again") from error
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"split.count={metadata['split.count']}: one part of a split model; join it with llama-gguf-split --merge"
        )
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise CheckpointError(f"metadata key {key!r} is missing; the file is not a complete model")
    return metadata[key]


def _decimal(value: float) -> float:
    """The shortest decimal with the same float32: GGUF stores 1e-5 as the float32 9.99999974e-06."""
    return float(str(np.float32(value)))


def _hf_config(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    name = _required(metadata, "general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"general.architecture={name!r} is not supported; supported are {sorted(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    _check_model_keys(metadata, name)
    hidden_size = _required(metadata, f"{name}.embedding_length")
    num_heads = _required(metadata, f"{name}.attention.head_count")
    num_kv_heads = metadata.get(f"{name}.attention.head_count_kv", num_heads)
    for key, count in (("head_count", num_heads), ("head_count_kv", num_kv_heads)):
        if not isinstance(count, int) or count < 1:
            raise CheckpointError(f"{name}.attention.{key}={count!r} must be one positive integer for all layers")
    head_dim = metadata.get(f"{name}.attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(f"{name}.{key}", head_dim) != head_dim:
            raise CheckpointError(f"{name}.{key}={metadata[f'{name}.{key}']} must equal the head width {head_dim}")
    # 10000 is what llama.cpp takes where the key is absent, as in files of Llama 2's time.
    rope_theta = _decimal(metadata.get(f"{name}.rope.freq_base", 10000.0))
    config = {
        "architectures": [architecture.hf_class],
        "model_type": name,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": _required(metadata, f"{name}.feed_forward_length"),
        "num_hidden_layers": _required(metadata, f"{name}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": len(_required(metadata, "tokenizer.ggml.tokens")),
        "max_position_embeddings": _required(metadata, f"{name}.context_length"),
        "rms_norm_eps": _decimal(_required(metadata, f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(metadata, tensors, name, rope_theta, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _required(metadata, "tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }
    if architecture.qkv_bias is None:
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = False
    elif name == "qwen3":
        config["attention_bias"] = False
    return config


def _check_model_keys(metadata: Mapping[str, Any], architecture: str) -> None:
    prefix = f"{architecture}."
    for key, value in metadata.items():
        if key.startswith(prefix) and key.removeprefix(prefix) not in _MODEL_KEYS:
            # expert_count = 0 is how some converters write a dense model.
            if key.removeprefix(prefix) in ("expert_count", "expert_used_count") and value == 0:
                continue
            raise CheckpointError(
                f"{key}={value!r} is not supported; it may change the model's output, so the file is refused"
            )


def _rope_scaling(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any], architecture: str, rope_theta: float, head_dim: int
) -> dict[str, Any] | None:
    prefix = f"{architecture}.rope.scaling."
    # rope.scale_linear is the older spelling of linear scaling.
    linear_factor = metadata.get(f"{architecture}.rope.scale_linear", 1.0)
    kind = metadata.get(f"{prefix}type", "none" if linear_factor == 1.0 else "linear")
    if "rope_freqs.weight" in tensors:
        if kind != "none":
            raise CheckpointError(f"rope_freqs.weight and {prefix}type={kind!r} together are not supported")
        return _llama3_rope_scaling(_float32(tensors["rope_freqs.weight"]), rope_theta, head_dim)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{prefix}type={kind!r} is not supported; supported are 'none', 'linear' and 'yarn'")
    factor = _decimal(metadata.get(f"{prefix}factor", linear_factor))
    if factor <= 0.0:
        raise CheckpointError(f"{prefix}factor={factor} must be positive")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _required(metadata, f"{prefix}original_context_length"),
    }
    for hf_key in ("beta_fast", "beta_slow"):
        if f"{prefix}yarn_{hf_key}" in metadata:
            scaling[hf_key] = _decimal(metadata[f"{prefix}yarn_{hf_key}"])
    return scaling


def _llama3_rope_scaling(stored: np.ndarray, rope_theta: float, head_dim: int) -> dict[str, Any]:
    for scaling in LLAMA3_ROPE_SCALINGS:
        expected = _llama3_rope_factors(scaling, rope_theta, head_dim)
        if stored.shape == expected.shape and np.allclose(stored, expected, rtol=1e-5, atol=0.0):
            return dict(scaling)
    raise CheckpointError(
        f"rope_freqs.weight holds factors {stored.min():.4g} to {stored.max():.4g} that no published Llama 3 rope "
        f"scaling gives (factor 8 or 32, low 1, high 4, original length 8192); convert from the original instead"
    )


def _llama3_rope_factors(scaling: Mapping[str, Any], rope_theta: float, head_dim: int) -> np.ndarray:
    """[head_dim / 2] divisors of the rotary frequencies, as llama.cpp's converter writes them."""
    wavelength = 2.0 * math.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _tensor_specs(config: Mapping[str, Any]) -> list[TensorSpec]:
    """Every tensor that a model of this config has, in the order in which it is written."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    specs = [TensorSpec("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(config["num_hidden_layers"]):
        specs += [
            spec._replace(gguf_name=f"blk.{layer}.{spec.gguf_name}", hf_name=f"model.layers.{layer}.{spec.hf_name}")
            for spec in _layer_specs(config)
        ]
    specs.append(TensorSpec("output_norm.weight", "model.norm.weight", (hidden,)))
    if not config["tie_word_embeddings"]:
        specs.append(TensorSpec("output.weight", "lm_head.weight", (vocab, hidden)))
    return specs


def _layer_specs(config: Mapping[str, Any]) -> list[TensorSpec]:
    architecture = ARCHITECTURES[config["model_type"]]
    hidden, intermediate, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q_permuted, k_permuted = (num_heads, num_kv_heads) if architecture.permuted else (0, 0)
    q_width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    specs = [
        TensorSpec("attn_norm.weight", "input_layernorm.weight", (hidden,)),
        TensorSpec("attn_q.weight", "self_attn.q_proj.weight", (q_width, hidden), q_permuted),
        TensorSpec("attn_k.weight", "self_attn.k_proj.weight", (kv_width, hidden), k_permuted),
        TensorSpec("attn_v.weight", "self_attn.v_proj.weight", (kv_width, hidden)),
        TensorSpec("attn_output.weight", "self_attn.o_proj.weight", (hidden, q_width)),
        TensorSpec("ffn_norm.weight", "post_attention_layernorm.weight", (hidden,)),
        TensorSpec("ffn_gate.weight", "mlp.gate_proj.weight", (intermediate, hidden)),
        TensorSpec("ffn_up.weight", "mlp.up_proj.weight", (intermediate, hidden)),
        TensorSpec("ffn_down.weight", "mlp.down_proj.weight", (hidden, intermediate)),
    ]
    if architecture.qkv_bias or config.get("attention_bias"):
        specs += [
            TensorSpec("attn_q.bias", "self_attn.q_proj.bias", (q_width,), q_permuted),
            TensorSpec("attn_k.bias", "self_attn.k_proj.bias", (kv_width,), k_permuted),
            TensorSpec("attn_v.bias", "self_attn.v_proj.bias", (kv_width,)),
        ]
    if config.get("attention_bias"):
        specs.append(TensorSpec("attn_output.bias", "self_attn.o_proj.bias", (hidden,)))
    if architecture.qk_norm:
        specs += [
            TensorSpec("attn_q_norm.weight", "self_attn.q_norm.weight", (head_dim,)),
            TensorSpec("attn_k_norm.weight", "self_attn.k_norm.weight", (head_dim,)),
        ]
    return specs


def _check_tensors(specs: list[TensorSpec], tensors: Mapping[str, Any]) -> None:
    expected = {spec.gguf_name for spec in specs}
    missing = sorted(expected - tensors.keys())
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing: {_first_few(missing)}")
    # rope_freqs.weight has become rope_scaling in the config.
    leftover = sorted(tensors.keys() - expected - {"rope_freqs.weight"})
    if leftover:
        raise CheckpointError(f"{len(leftover)} tensors have no place in the model: {_first_few(leftover)}")
    for spec in specs:
        shape = _shape(tensors[spec.gguf_name])
        if shape != spec.shape:
            raise CheckpointError(f"tensor {spec.gguf_name} has shape {shape}; the metadata ask for {spec.shape}")


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _shape(tensor: Any) -> tuple[int, ...]:
    """Shape of a GGUF tensor in numpy's order; GGUF lists the fastest dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _float32(tensor: Any) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise CheckpointError(f"tensor {tensor.name} has type {tensor.tensor_type.name}, not supported") from error
    return np.asarray(values, np.float32).reshape(_shape(tensor))


def _write_safetensors(path: Path, specs: list[TensorSpec], tensors: Mapping[str, Any]) -> None:
    """Writes tensor by tensor: safetensors' own writer would need the float32 model in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + 4 * math.prod(spec.shape)
        header[spec.hf_name] = {"dtype": "F32", "shape": spec.shape, "data_offsets": (offset, end)}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for spec in specs:
            values = _float32(tensors[spec.gguf_name])
            if spec.num_permuted_heads:
                values = unpermute_rotary_rows(values, spec.num_permuted_heads)
            file.write(np.ascontiguousarray(values, "<f4").data)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    eos = metadata["tokenizer.ggml.eos_token_id"]
    stops = [eos, *(token for token in _end_of_turn_ids(metadata) if token != eos)]
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stops if len(stops) > 1 else eos,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _end_of_turn_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The token the file names as end of turn, or else those of its chat template."""
    tokens, template = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.chat_template", "")
    named = _token(metadata, "tokenizer.ggml.eot_token_id")
    if named is not None:
        return [tokens.index(named)]
    return [tokens.index(token) for token in END_OF_TURN_TOKENS if token in template and token in tokens]


def _write_tokenizer(metadata: Mapping[str, Any], context_length: int, directory: Path) -> None:
    _build_tokenizer(metadata).save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    for hf_key, gguf_key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        config[f"{hf_key}_token"] = _token(metadata, f"tokenizer.ggml.{gguf_key}_token_id")
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    _write_json(directory / "tokenizer_config.json", config)


def _token(metadata: Mapping[str, Any], key: str) -> str | None:
    """Text of the token whose id is stored under `key`; None if the key is absent."""
    if key not in metadata:
        return None
    tokens, token_id = metadata["tokenizer.ggml.tokens"], metadata[key]
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{key}={token_id} is outside the vocabulary of {len(tokens)} tokens")
    return tokens[token_id]


def _build_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` (byte-level BPE) from the tokenizer metadata."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    recipe = _tokenizer_recipe(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.tokens holds {len(tokens) - len(vocab)} tokens twice")
    merges = [tuple(merge.split(" ")) for merge in _required(metadata, "tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=recipe.ignore_merges))
    except Exception as error:  # tokenizers raises plain Exception for merges that do not fit the vocabulary
        raise CheckpointError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error
    if recipe.split_regex is None:
        split: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        split = pre_tokenizers.Split(Regex(recipe.split_regex), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=recipe.split_regex is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if recipe.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata, recipe)
    _add_special_tokens(tokenizer, metadata)
    return tokenizer


def _tokenizer_recipe(metadata: Mapping[str, Any]) -> TokenizerRecipe:
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model={model!r} is not supported; supported is 'gpt2' (byte-level BPE)")
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in TOKENIZER_RECIPES:
        raise CheckpointError(f"tokenizer.ggml.pre={pre!r} is not supported; supported are {sorted(TOKENIZER_RECIPES)}")
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise CheckpointError("tokenizer.ggml.add_space_prefix=True is not supported; byte-level BPE expects False")
    return TOKENIZER_RECIPES[pre]


def _post_processor(metadata: Mapping[str, Any], recipe: TokenizerRecipe) -> Any:
    """Puts BOS in front and EOS behind where the file asks for it."""
    from tokenizers import processors

    bos = _token(metadata, "tokenizer.ggml.bos_token_id")
    eos = _token(metadata, "tokenizer.ggml.eos_token_id")
    first = [bos] if metadata.get("tokenizer.ggml.add_bos_token", recipe.add_bos) else []
    last = [eos] if metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if None in first:
        raise CheckpointError("tokenizer.ggml.bos_token_id is missing although the tokenizer puts BOS in front")
    if not first and not last:
        return processors.ByteLevel(trim_offsets=False)
    ids = {token: metadata["tokenizer.ggml.tokens"].index(token) for token in first + last}
    return processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=list(ids.items()))


def _add_special_tokens(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken

    tokens, kinds = metadata["tokenizer.ggml.tokens"], _required(metadata, "tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    # Both kinds are matched whole in text; only control tokens are left out of decoded text (skip_special_tokens).
    added = [
        AddedToken(token, special=kind == CONTROL_TOKEN, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL_TOKEN, USER_DEFINED_TOKEN)
    ]
    tokenizer.add_tokens(added)
