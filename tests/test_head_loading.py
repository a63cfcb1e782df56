"""From a config to a head that drafts: where it is found, what is refused, what is warned about, and export."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from models import LetterTokenizer, random_target
from safetensors.numpy import save_file

import specjax
from specjax.checkpoints import heads as head_files
from specjax.checkpoints import pretrained
from specjax.checkpoints.load import load_target
from specjax.cli import main
from specjax.drafters import build_drafter
from specjax.drafters.fit import check_fit
from specjax.drafters.head import HeadWeights
from specjax.heads import config as hc
from specjax.heads import network
from specjax.target import decoder
from specjax.train import losses, trainer
from specjax.train.data import Batch
from specjax.train.export import export
from specjax.train.students import student_for

TARGET = random_target(0, tokenizer=LetterTokenizer())
BARE = dataclasses.replace(TARGET, tokenizer=None)
TAP = 1


@pytest.fixture(scope="module")
def fitted() -> tuple[hc.HeadConfig, network.Params]:
    """A head that has learnt to guess the random target from the state entering its second layer."""
    config = hc.for_target(TARGET.config, "eagle3", taps=(TAP,))
    frozen = losses.freeze(TARGET.params, jnp.arange(TARGET.config.vocab_size), jnp.float32)
    length = 64
    positions = jnp.broadcast_to(jnp.arange(length), (8, length))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (8, length, length))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        tokens = jax.random.randint(key, (8, length), 0, TARGET.config.vocab_size)
        taps, final = decoder.forward(TARGET.config, TARGET.params, tokens, positions, causal, (TAP,))
        best = (final @ TARGET.params["head"]).argmax(axis=-1)
        ones = jnp.ones((8, length), jnp.int32)
        batch = Batch(tokens, positions, ones, ones > 0, best, final, jnp.stack(taps, axis=2))

        def loss(params):
            return losses.loss_fn(config, losses.LossSettings(), params, frozen, batch, 1)[0]

        gradients = jax.grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    params = jax.jit(lambda: network.init(config, jax.random.key(1)))()
    state = optimizer.init(params)
    for index in range(300):
        params, state = step(params, state, jax.random.key(index))
    return config, params


def weights_of(params) -> HeadWeights:
    return HeadWeights(params, network.Shared(TARGET.params["embedding"], TARGET.params["head"]))


def test_a_head_that_fits_is_not_warned_about(fitted):
    config, params = fitted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fit(config, weights_of(params), TARGET, "head")


def test_taps_that_are_off_by_one_are_named(fitted):
    config, params = fitted
    off = dataclasses.replace(config, taps=(TAP + 1,))
    with pytest.warns(specjax.DraftWarning, match=r"taps one layer earlier, \(1,\)"):
        check_fit(off, weights_of(params), TARGET, "head")


def test_a_swapped_head_is_warned_about(fitted):
    config, params = fitted
    swapped = params | {"head": params["head"][:, ::-1]}
    with pytest.warns(specjax.DraftWarning, match="trained for random-0"):
        check_fit(config, weights_of(swapped), TARGET, "head")


def written(directory, method="eagle3", target="random-0", **fields):
    if method == "eagle3":
        fields = {"taps": (0, 1, 2)} | fields
    config = hc.for_target(TARGET.config, method, **fields)
    params = network.init(config, jax.random.key(3))
    vocabulary = np.arange(config.draft_vocab_size, dtype=np.int32) * 2 if config.reduced else None
    head_files.write_head(directory, config, params, target, ["LlamaForCausalLM"], 3, vocabulary, jnp.float32)
    return directory


@pytest.mark.parametrize(
    ("method", "fields"),
    [("eagle3", {"draft_vocab_size": 40}), ("eagle", {}), ("mtp", {"wiring": "qwen3_next", "qk_norm": True})],
)
def test_a_head_decodes_what_plain_decoding_does(method, fields, tmp_path):
    path = str(written(tmp_path / "head", method, **fields))
    prompts = [[5, 9, 2, 5, 9], [7]]
    params = specjax.SamplingParams(max_tokens=12)
    plain = specjax.SpeculativeDecoder(BARE).generate(prompts, params)
    for config in (
        specjax.SpeculativeConfig(model=path, num_speculative_tokens=3),
        specjax.SpeculativeConfig(method="hybrid", model=path, num_speculative_tokens=3, prompt_lookup_min=2),
    ):
        assert config.method in (method, "hybrid")
        found = specjax.SpeculativeDecoder(BARE, config).generate(prompts, params)
        assert found.token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "mtp"}, "is a head for method='eagle3'"),
        ({"method": "draft_model"}, "is for method='eagle3'"),
        ({"method": "eagle3", "max_model_len": 9999}, "max_model_len=9999"),
    ],
)
def test_configs_that_do_not_fit_the_head_are_refused(fields, message, tmp_path):
    config = specjax.SpeculativeConfig(model=str(written(tmp_path / "head")), **fields)
    with pytest.raises(specjax.ConfigError, match=message):
        build_drafter(config, BARE)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vocab_size": 96}, "vocab"),
        ({"width": 16}, "embed_tokens|width|hidden_size|shape"),
        ({"num_layers": 1, "sliding_windows": (None,)}, "entering layer 2|layers"),
    ],
)
def test_heads_of_another_target_are_refused(other, message, tmp_path):
    config = specjax.SpeculativeConfig(method="eagle3", model=str(written(tmp_path / "head")))
    target = dataclasses.replace(BARE, config=dataclasses.replace(BARE.config, **other))
    with pytest.raises(specjax.SpecJAXError, match=message):
        build_drafter(config, target)


def test_a_head_made_for_another_name_is_pointed_out(tmp_path):
    path = str(written(tmp_path / "head", target="some/other-model"))
    with pytest.warns(specjax.DraftWarning, match="some/other-model"):
        build_drafter(specjax.SpeculativeConfig(method="eagle3", model=path), BARE)


def test_a_target_without_a_head_is_told_what_there_is():
    with pytest.raises(specjax.ConfigError, match="no mtp head for random-0"):
        build_drafter(specjax.SpeculativeConfig(method="mtp"), BARE)


def test_a_head_is_found_by_its_target(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "shipped", lambda: {"random-eagle3": written(tmp_path / "random-eagle3")})
    assert pretrained.shipped_for("random-0", "eagle3") == "random-eagle3"
    drafter, _ = build_drafter(specjax.SpeculativeConfig(method="eagle3"), BARE)
    assert drafter.name == "eagle3" and drafter.taps == (0, 1, 2)


def test_drafts_that_are_never_accepted_are_explained(tmp_path):
    config = specjax.SpeculativeConfig(method="eagle3", model=str(written(tmp_path / "head")), num_speculative_tokens=8)
    found = specjax.SpeculativeDecoder(BARE, config)
    with pytest.warns(specjax.DraftWarning, match="acceptance_length=1.0.*norm_before_residual"):
        found.generate([[1, 2, 3], [4, 5, 6]], specjax.SamplingParams(max_tokens=60, temperature=1.0, seed=1))


def test_a_stream_of_drafts_that_are_never_accepted_is_explained_too(tmp_path):
    config = specjax.SpeculativeConfig(method="eagle3", model=str(written(tmp_path / "head")), num_speculative_tokens=8)
    found = specjax.SpeculativeDecoder(BARE, config)
    with pytest.warns(specjax.DraftWarning, match="acceptance_length=1.0"):
        list(found.stream([[1, 2, 3]], specjax.SamplingParams(max_tokens=60, temperature=1.0, seed=1)))


def test_a_draft_model_with_mtp_layers_says_how_to_draft_with_those(tmp_path):
    path = tiny.write_directory(tmp_path / "draft", tiny.hf_config("llama-untied"))
    draft = load_target(path, dtype="float32")
    block = hc.for_target(draft.config, "mtp", wiring="qwen3_next")
    own = head_files.tensors_of(
        block,
        network.init(block, jax.random.key(0)),
        head_files.NAMES["qwen3_next"],
        jnp.float32,
        draft.config.num_layers,
    )
    save_file(tiny.tensors(tiny.hf_config("llama-untied")) | own, path / "model.safetensors")
    described = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(described))
    config = specjax.SpeculativeConfig(model=str(path))
    assert config.method == "draft_model"
    with pytest.warns(specjax.DraftWarning, match="set method='mtp'"):
        build_drafter(config, draft)


def test_export_of_a_checkpoint_keeps_what_it_drafts(tmp_path):
    target = load_target(tiny.write_directory(tmp_path / "target", tiny.hf_config("llama-untied")), dtype="float32")
    block = hc.for_target(target.config, "eagle")
    params, ids = network.init(block, jax.random.key(0)), np.array([3, 5, 8], np.int32)
    first = head_files.write_head(
        tmp_path / "first", block, params, str(tmp_path / "target"), [], 3, None, jnp.float32, ids
    )
    second = export(first, tmp_path / "second", target=str(tmp_path / "target"), dtype="float32")
    for name in ("token_map.json", "model.safetensors"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert head_files.num_drafts_of(second) == 3


def test_export_writes_what_training_left(fitted, tmp_path, monkeypatch):
    config, params = fitted
    workdir = tmp_path / "work"
    trainer.write_head(workdir / "head", dataclasses.asdict(config), params, None)
    (workdir / "summary.json").write_text(json.dumps({"target": "tiny"}))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    monkeypatch.chdir(tmp_path)
    arguments = ["export", f"--source={workdir}", f"--out={tmp_path / 'out'}", "--dtype=float32"]
    assert main([*arguments, "--num_speculative_tokens=3"]) == 0
    loaded = head_files.read_head(tmp_path / "out", TARGET.config, jnp.float32)
    assert loaded.config == config and loaded.num_speculative_tokens == 3
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), loaded.params, params))
    assert loaded.speculator.speculators_config.verifier.name_or_path == "tiny"


def test_an_exported_draft_model_loads_and_drafts(tmp_path, monkeypatch):
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 24}
    student = student_for(TARGET.config, "draft_model", **sizes)
    params = student.init(jax.random.key(0), TARGET.params, jnp.arange(TARGET.config.vocab_size))
    trainer.write_head(tmp_path / "work" / "head", student.fields(), params, None)
    (tmp_path / "random-0").mkdir()
    (tmp_path / "random-0" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--source=work", "--out=draft", "--target=random-0", "--dtype=float32"]) == 0
    draft = specjax.load_target(tmp_path / "draft")
    assert draft.config == student.config
    assert bool((draft.params["embedding"] == params["embedding"]).all())
    config = specjax.SpeculativeConfig(method="draft_model", model=str(tmp_path / "draft"))
    prompt, limit = [[5, 9, 2]], specjax.SamplingParams(max_tokens=8)
    plain = specjax.SpeculativeDecoder(BARE).generate(prompt, limit)
    assert specjax.SpeculativeDecoder(BARE, config).generate(prompt, limit).token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x"], "--source"),
        (["--source=nowhere", "--out=x"], "--target"),
        (["--source=x", "--out=y", "--dtype=int4"], "int4"),
        (["--source=x", "--out=y", "--num_speculative_tokens=-1"], "num_speculative_tokens"),
    ],
)
def test_wrong_exports_are_explained(arguments, message, capsys):
    assert main(["export", *arguments]) == 2
    assert message in capsys.readouterr().err
