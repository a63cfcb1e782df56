"""The real SmolLM2-135M-Instruct asset: fetched, converted, and compared with llama.cpp and transformers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import compile_as_usual
from safetensors import safe_open

import specjax
from specjax.checkpoints.pretrained import ASSETS, fetch_gguf, resolve, shipped
from specjax.config import method_of
from specjax.evaluate.oracle import compare_greedy
from specjax.evaluate.prompts import load_prompts
from specjax.tokenizer import encode_prompt, load_tokenizer, stop_token_ids

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("usual_compiler", "users_programs")]

TOKEN_IDS = Path(__file__).parent / "data" / "smollm2_token_ids.jsonl"


@pytest.fixture(scope="module")
def users_programs():
    """Decodes with the programs of users: those that are quick to compile with tiny models are not with a real one."""
    with pytest.MonkeyPatch.context() as patch:
        compile_as_usual(patch)
        yield


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    return resolve("smollm2-135m-instruct")


def test_all_texts_tokenise_as_in_llama_cpp(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    rows = [json.loads(line) for line in TOKEN_IDS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 160
    assert [row["text"] for row in rows if encode_prompt(tokenizer, row["text"], chat=False) != row["ids"]] == []


def test_config_holds_the_published_sizes(smollm2_dir):
    config = json.loads((smollm2_dir / "config.json").read_text())
    names = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads intermediate_size vocab_size".split()
    assert [config[name] for name in names] == [30, 576, 9, 3, 1536, 49152]


def test_generation_stops_at_the_end_of_turn(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    assert stop_token_ids(smollm2_dir, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory) -> Path:
    """The original GGUF file, obtained anew: the cache holds the conversion only."""
    return fetch_gguf(ASSETS["smollm2-135m-instruct"], tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def transformers_tensors(gguf_path, smollm2_dir):
    """Hugging Face's names -> arrays, as transformers itself converts the GGUF file."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # from_pretrained(gguf_file=...) does the same but asks for the accelerate package.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2_dir))
    loaded = load_gguf_checkpoint(gguf_path, return_tensors=True, model_to_load=model)
    return {name: tensor.numpy() for name, tensor in loaded["tensors"].items()}


def test_every_tensor_equals_transformers_own_conversion(smollm2_dir, transformers_tensors):
    with safe_open(smollm2_dir / "model.safetensors", framework="numpy") as ours:
        assert set(ours.keys()) == set(transformers_tensors)
        for name in ours.keys():
            np.testing.assert_allclose(
                ours.get_tensor(name), transformers_tensors[name], rtol=1e-6, atol=0, err_msg=name
            )


def test_q_rows_are_not_left_in_the_order_of_the_gguf_file(smollm2_dir, gguf_path):
    gguf = pytest.importorskip("gguf")
    stored = next(tensor for tensor in gguf.GGUFReader(gguf_path).tensors if tensor.name == "blk.0.attn_q.weight")
    rows = gguf.quants.dequantize(stored.data, stored.tensor_type)
    with safe_open(smollm2_dir / "model.safetensors", framework="numpy") as ours:
        converted = ours.get_tensor("model.layers.0.self_attn.q_proj.weight")
    assert not np.array_equal(converted, rows)
    # Within a head of 64, the rows of the first rotary half stand at the even places of the file.
    np.testing.assert_array_equal(converted[:32], rows[0:64:2])
    np.testing.assert_array_equal(converted[32:64], rows[1:64:2])


@pytest.fixture(scope="module")
def target(smollm2_dir):
    return specjax.load_target("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="module")
def plain(target):
    """A decoder without drafts, that all comparisons share."""
    return specjax.SpeculativeDecoder(target, max_batch_size=1)


def compared(target, plain, config, category, max_tokens):
    """What a method decodes of the first prompt of a category, after comparing it with plain decoding."""
    prompt = next(prompt for prompt in load_prompts("built_in") if prompt.category == category).text
    params = specjax.SamplingParams(max_tokens=max_tokens)
    found = specjax.SpeculativeDecoder(target, config, max_batch_size=1).generate([prompt], params)
    [theirs], [ours] = plain.generate([prompt], params).token_ids, found.token_ids
    tokens = encode_prompt(target.tokenizer, prompt, chat=True)
    assert compare_greedy(target, tokens, theirs, ours).kind in ("identical", "near_tie")
    return found.metrics


def test_copying_gives_the_text_of_plain_decoding(target, plain):
    config = specjax.SpeculativeConfig(
        method="ngram", num_speculative_tokens=6, prompt_lookup_min=3, prompt_lookup_max=5
    )
    assert compared(target, plain, config, "translation", max_tokens=48).accepted > 0


def test_it_knows_the_capital_of_france(plain):
    result = plain.generate("What is the capital of France?")
    assert "Paris" in result.texts[0] and result.finish_reasons == ["stop"]


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_drafter_is_found_by_itself_and_keeps_the_text(target, plain, name):
    """Greedy text is plain decoding's, near-ties aside, and rounds commit clearly more than one token."""
    method = method_of(name)
    config = specjax.SpeculativeConfig(method=method, model=name if method == "draft_model" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", specjax.DraftWarning)
        metrics = compared(target, plain, config, "roleplay", max_tokens=96)
    assert metrics.acceptance_length > 1.4
