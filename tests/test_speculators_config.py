"""config.json of the speculators format: read, written, refused by name; types registered later."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import AutoConfig, PretrainedConfig

from specjax.checkpoints import speculators
from specjax.checkpoints.speculators import (
    DynamicTreeTokenProposalConfig,
    Eagle3SpeculatorConfig,
    GreedyTokenProposalConfig,
    SampleTokenProposalConfig,
    SpeculatorModelConfig,
    SpeculatorsConfig,
    StaticTreeTokenProposalConfig,
    TokenProposalConfig,
    VerifierConfig,
    reload_schemas,
)
from specjax.errors import AssetError, CheckpointError, ConfigError

LAYER = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 97}
GREEDY = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
DETAILS = {
    "algorithm": "eagle3",
    "proposal_methods": [GREEDY],
    "default_proposal_method": "greedy",
    "verifier": {"name_or_path": "org/target", "architectures": ["LlamaForCausalLM"]},
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "eagle3": {
        "draft_vocab_size": 32000,
        "norm_before_residual": False,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": None,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "embed_requires_grad": False,
    },
    "peagle": {"mask_token_id": None, "embed_requires_grad": True, "draft_vocab_size": 32000},
    "dflash": {
        "draft_vocab_size": 32000,
        "block_size": 8,
        "target_hidden_size": None,
        "aux_hidden_state_layer_ids": None,
        "mask_token_id": None,
        "sliding_window_non_causal": False,
        "sample_from_anchor": False,
    },
    "mtp": {"num_nextn_predict_layers": 1},
    "eagle": {"transformer_layer_architecture": "auto", "layernorms": False, "fusion_bias": False},
    "mlp": {"inputs_hidden_states_normalized": False, "vocab_size": 128256, "num_layers": 5, "tie_weights": True},
    "independent": {"speculators_config": None},
}


def described(kind: str = "eagle3", **fields: Any) -> dict[str, Any]:
    return {"speculators_model_type": kind, "speculators_config": DETAILS, **fields}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_type_has_the_formats_fields_and_defaults(kind):
    config = SpeculatorModelConfig.from_dict({"speculators_model_type": kind})
    assert isinstance(config, PretrainedConfig) and type(config) is SpeculatorModelConfig.registry[kind]
    assert config.speculators_version == "0.9.0"
    assert {name: getattr(config, name) for name in DEFAULTS[kind]} == DEFAULTS[kind]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_is_saved_loads_the_same(tmp_path, kind):
    layer = {"transformer_layer_config": LAYER} if kind in ("eagle3", "peagle", "dflash", "mtp", "eagle") else {}
    config = SpeculatorModelConfig.from_dict(described(kind, **layer, dtype="bfloat16", note=[1, 2]))
    path = config.save(tmp_path / "new")
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]
    again = SpeculatorModelConfig.from_pretrained(tmp_path / "new")
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict() and again.to_diff_dict() == config.to_diff_dict()
    assert again.note == [1, 2]
    assert again.speculators_config.proposal_methods == [GreedyTokenProposalConfig(speculative_tokens=3)]
    if layer:
        assert again.transformer_layer_config.model_type == "llama"
        assert again.transformer_layer_config.hidden_size == 32


def test_no_model_type_is_written(tmp_path):
    written = json.loads(SpeculatorModelConfig.from_dict(described(model_type="llama")).save(tmp_path).read_text())
    assert "model_type" not in written
    assert written["transformer_layer_config"]["model_type"] == "qwen3"
    assert written["norm_before_residual"] is False


def test_transformers_own_way_of_saving_writes_the_same_fields(tmp_path):
    config = Eagle3SpeculatorConfig(transformer_layer_config=LAYER, speculators_config=SpeculatorsConfig(**DETAILS))
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_diff_dict()


def test_a_diff_has_only_what_is_not_every_configs_default():
    config = Eagle3SpeculatorConfig(transformer_layer_config=LAYER)
    assert set(config.to_diff_dict()) < set(config.to_dict())
    assert "return_dict" in config.to_dict() and "return_dict" not in config.to_diff_dict()


def test_saving_over_a_config_replaces_it(tmp_path):
    Eagle3SpeculatorConfig(norm_output=True).save(tmp_path)
    Eagle3SpeculatorConfig(fc_norm=True).save(tmp_path)
    config = Eagle3SpeculatorConfig.from_pretrained(tmp_path)
    assert config.fc_norm and not config.norm_output


def test_a_layer_config_of_no_type_has_the_types_own(tmp_path):
    bare = {name: value for name, value in LAYER.items() if name != "model_type"}
    kinds = {"eagle3": "qwen3", "mtp": "qwen2", "eagle": "llama", "dflash": "qwen3"}
    for kind, expected in kinds.items():
        config = SpeculatorModelConfig.from_dict(described(kind, transformer_layer_config=bare))
        assert config.transformer_layer_config.model_type == expected, kind


def test_a_config_that_is_not_of_the_format_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LAYER))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*speculators_model_type is missing"):
        SpeculatorModelConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        (tmp_path / "empty").mkdir()
        SpeculatorModelConfig.from_pretrained(tmp_path / "empty")
    with pytest.raises(AssetError):
        SpeculatorModelConfig.from_pretrained(tmp_path / "absent")


BAD = [
    ({"norm_before_residual": "yes"}, r"norm_before_residual='yes': expected a valid boolean"),
    ({"draft_vocab_size": 0}, r"draft_vocab_size=0: expected greater than or equal to 1"),
    ({"draft_vocab_size": "many"}, r"draft_vocab_size='many': expected a valid integer"),
    ({"architectures": "X"}, r"architectures='X': expected a valid list"),
    ({"eagle_aux_hidden_state_layer_ids": [1, 2.5]}, r"eagle_aux_hidden_state_layer_ids\.1=2\.5: expected a valid int"),
    ({"norm_before_fc": True, "fc_norm": True}, r"norm_before_fc=True, fc_norm=True: expected one of them"),
    ({"transformer_layer_config": {"model_type": "no_such"}}, r"transformer_layer_config: model_type='no_such'"),
    ({"transformer_layer_config": 3}, r"transformer_layer_config=3: expected an instance of"),
    ({"speculators_config": {**DETAILS, "default_proposal_method": "sample"}}, r"default_proposal_method='sample'"),
    ({"speculators_config": {**DETAILS, "verifier": {"name_or_path": None}}}, r"architectures: is missing"),
    (
        {"speculators_config": {**DETAILS, "proposal_methods": [{"proposal_type": "guess"}]}},
        r"proposal_type='guess': expected one of",
    ),
    ({"speculators_config": {**DETAILS, "proposal_methods": [{}]}}, r"proposal_type: is missing"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[" ".join(fields) for fields, _ in BAD])
def test_wrong_fields_are_refused_by_name(fields, message):
    with pytest.raises(CheckpointError, match=message):
        SpeculatorModelConfig.from_dict(described(**fields))
    with pytest.raises(ConfigError, match=message):
        Eagle3SpeculatorConfig(**{"speculators_config": DETAILS, **fields})


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(CheckpointError, match=r"speculators_model_type='other': expected one of \('eagle3'"):
        SpeculatorModelConfig.from_dict(described("other"))
    with pytest.raises(CheckpointError, match=r"'mtp': is read by MTPSpeculatorConfig"):
        Eagle3SpeculatorConfig.from_dict(described("mtp"))


@pytest.mark.parametrize(
    ("kind", "fields", "defaults"),
    [
        (GreedyTokenProposalConfig, "greedy", {"speculative_tokens": 5, "verifier_accept_k": 1}),
        (SampleTokenProposalConfig, "sample", {"accept_lenience": 1.0}),
        (SampleTokenProposalConfig, "sampling", {"accept_lenience": 1.0}),
        (StaticTreeTokenProposalConfig, "static_tree", {"branching_factor": 2, "depth": 5}),
        (DynamicTreeTokenProposalConfig, "dynamic_tree", {"expansion_factor": 10, "depth": 6}),
    ],
)
def test_proposals_are_chosen_by_their_type(kind, fields, defaults):
    proposal = TokenProposalConfig.model_validate({"proposal_type": fields})
    assert type(proposal) is kind
    assert {name: getattr(proposal, name) for name in defaults} == defaults
    whole = SpeculatorsConfig(**{**DETAILS, "proposal_methods": [proposal], "default_proposal_method": fields})
    assert SpeculatorsConfig.model_validate(whole.model_dump()) == whole


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GreedyTokenProposalConfig, {"speculative_tokens": 0}, r"speculative_tokens=0: expected greater"),
        (GreedyTokenProposalConfig, {"accept_tolerance": -1.0}, r"accept_tolerance=-1\.0: expected greater"),
        (SampleTokenProposalConfig, {"accept_lenience": 1.5}, r"accept_lenience=1\.5: expected less"),
        (GreedyTokenProposalConfig, {"speculative_tokens": True}, r"speculative_tokens=True: expected a valid int"),
        (TokenProposalConfig, {"proposal_type": "greedy"}, r"expected one of its subclasses"),
    ],
)
def test_wrong_proposals_are_refused_by_name(kind, fields, message):
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


def test_a_verifier_comes_from_a_transformers_config():
    config = AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], name_or_path="org/own")
    assert VerifierConfig.from_config(config).name_or_path == "org/own"
    verifier = VerifierConfig.from_config(config, name_or_path="org/other")
    assert verifier.name_or_path == "org/other" and verifier.architectures == ["LlamaForCausalLM"]
    assert VerifierConfig.from_config(config, name_or_path=None).name_or_path is None


def test_types_registered_later_become_loadable(monkeypatch):
    monkeypatch.setattr(SpeculatorModelConfig, "registry", dict(SpeculatorModelConfig.registry))
    monkeypatch.setattr(TokenProposalConfig, "registry", dict(TokenProposalConfig.registry))

    @TokenProposalConfig.register("beam")
    class BeamTokenProposalConfig(TokenProposalConfig):
        proposal_type: Literal["beam"] = "beam"
        width: int = 4

    @SpeculatorModelConfig.register("later")
    class LaterSpeculatorConfig(SpeculatorModelConfig):
        speculators_model_type: Literal["later"] = "later"
        size: speculators.Count = 7

    reload_schemas()
    details = {**DETAILS, "proposal_methods": [{"proposal_type": "beam"}], "default_proposal_method": "beam"}
    config = SpeculatorModelConfig.from_dict(described("later", speculators_config=details))
    assert type(config) is LaterSpeculatorConfig and config.size == 7
    assert type(config.speculators_config.proposal_methods[0]) is BeamTokenProposalConfig
    assert SpeculatorModelConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(CheckpointError, match=r"size='big': expected a valid integer"):
        SpeculatorModelConfig.from_dict(described("later", size="big"))


def test_names_are_registered_once_and_for_subclasses_only():
    with pytest.raises(ConfigError, match=r"register\('eagle3'\): is the name of Eagle3SpeculatorConfig already"):
        SpeculatorModelConfig.register("eagle3")(speculators.MTPSpeculatorConfig)
    with pytest.raises(ConfigError, match=r"Path is no subclass of TokenProposalConfig"):
        TokenProposalConfig.register("path")(Path)
