"""Settings: every field, every refusal, every other name, and where values come from."""

import doctest
import inspect
import json
import math
import re
from typing import get_args

import numpy as np
import pytest

from specjax import config as config_module
from specjax.config import (
    DEFAULT_STRATEGY,
    ELSEWHERE,
    FLAG_ALIASES,
    KEY_ALIASES,
    NOT_YET,
    MeshConfig,
    RejectionSamplingStrategy,
    SamplingParams,
    SpeculativeConfig,
)
from specjax.errors import ConfigError


def draft(**values):
    return SpeculativeConfig(method="draft_model", model="draft/directory", **values)


def ngram(**values):
    return SpeculativeConfig(method="ngram", **values)


def synthetic(**values):
    return draft(rejection_sampling_strategy="synthetic", **values)


def relaxed(**values):
    return draft(rejection_sampling_strategy="relaxed", **values)


def medusa_typical(**values):
    return ngram(rejection_sampling_strategy="medusa-typical", **values)


def refusal(make, *args, **values) -> str:
    """The message of the ConfigError that `make` raises."""
    with pytest.raises(ConfigError) as caught:
        make(*args, **values)
    message = str(caught.value)
    assert not re.search("pydantic|validation error|type=", message), message
    return message


@pytest.fixture
def write_yaml(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Methods


@pytest.mark.parametrize("name", ["ngram", "ngram_gpu"])
def test_every_name_of_the_ngram_method_selects_it(name):
    assert SpeculativeConfig(method=name).method == "ngram"


@pytest.mark.parametrize("name", ["draft_model", "standalone"])
def test_every_name_of_the_draft_model_method_selects_it(name):
    assert SpeculativeConfig(method=name, model="small").method == "draft_model"


def test_the_key_of_max_names_the_method():
    assert SpeculativeConfig(speculative_method="ngram") == SpeculativeConfig(method="ngram")


def test_two_names_of_a_field_may_agree_but_not_differ():
    assert SpeculativeConfig(method="draft_model", speculative_method="standalone", model="small").is_standalone()
    message = refusal(SpeculativeConfig, method="draft_model", speculative_method="ngram", model="small")
    assert "speculative_method='ngram'" in message and "method='draft_model'" in message


def test_the_model_ngram_selects_ngram_and_is_not_kept():
    assert SpeculativeConfig(model="ngram") == SpeculativeConfig(method="ngram", model="ngram") == ngram()
    assert SpeculativeConfig(model="ngram").model is None


def test_another_model_selects_a_draft_model():
    config = SpeculativeConfig(model="small/model")
    assert (config.method, config.model) == ("draft_model", "small/model")


def test_a_path_is_read_as_text(tmp_path):
    assert SpeculativeConfig(model=tmp_path).model == str(tmp_path)


def test_no_method_and_no_model_is_refused_with_how_to_decode_plainly():
    assert "config=None" in refusal(SpeculativeConfig)


def test_a_draft_model_without_a_model_is_refused():
    assert "SpeculativeConfig.model=None: expected the directory" in refusal(SpeculativeConfig, method="draft_model")


def test_ngram_with_another_model_is_refused():
    assert "SpeculativeConfig.model='small'" in refusal(ngram, model="small")


def test_a_draft_model_called_ngram_is_refused_with_how_to_name_a_directory():
    assert "./ngram" in refusal(SpeculativeConfig, method="draft_model", model="ngram")


@pytest.mark.parametrize("method", ["ngrm", "", 3, ["ngram"]])
def test_an_unknown_method_is_refused_with_those_that_exist(method):
    message = refusal(SpeculativeConfig, method=method, model="small")
    assert f"SpeculativeConfig.method={method!r}" in message and "'draft_model'" in message


def test_a_misspelt_method_is_refused_with_the_nearest():
    assert "did you mean 'draft_model'?" in refusal(SpeculativeConfig, method="draftmodel", model="small")


# The other fields of SpeculativeConfig


def test_an_ngram_config_has_these_defaults():
    assert ngram().model_dump() == {
        "method": "ngram",
        "model": None,
        "revision": None,
        "assistant_early_exit": None,
        "draft_tensor_parallel_size": None,
        "max_model_len": None,
        "speculative_token_map": None,
        "num_speculative_tokens": 2,
        "draft_confidence_threshold": None,
        "draft_sample_method": "greedy",
        "prompt_lookup_min": 5,
        "prompt_lookup_max": 5,
        "rejection_sampling_strategy": "residual",
        **{field: None for fields in SpeculativeConfig.STRATEGY_FIELDS.values() for field in fields},
        "enforce_eager": False,
    }


def test_a_draft_model_config_has_these_defaults():
    assert draft().model_dump() == {
        "method": "draft_model",
        "model": "draft/directory",
        "revision": None,
        "assistant_early_exit": None,
        "draft_tensor_parallel_size": None,
        "max_model_len": None,
        "speculative_token_map": None,
        "num_speculative_tokens": 2,
        "draft_confidence_threshold": None,
        "draft_sample_method": "probabilistic",
        "prompt_lookup_min": None,
        "prompt_lookup_max": None,
        "rejection_sampling_strategy": "residual",
        **{field: None for fields in SpeculativeConfig.STRATEGY_FIELDS.values() for field in fields},
        "enforce_eager": False,
    }


def test_given_values_are_kept():
    values = {
        "revision": "main",
        "max_model_len": 2048,
        "num_speculative_tokens": 4,
        "draft_sample_method": "greedy",
        "rejection_sampling_strategy": "greedy",
        "enforce_eager": True,
    }
    assert values.items() <= draft(**values).model_dump().items()


@pytest.mark.parametrize(
    "other",
    [
        {"num_speculative_tokens": "auto"},
        {"rejection_sampling_strategy": "synthetic", "synthetic_acceptance_rate": 0.5},
    ],
)
def test_only_one_thing_decides_how_many_drafts_a_round_has(other):
    message = refusal(draft, draft_confidence_threshold=0.4, **other)
    assert "SpeculativeConfig.draft_confidence_threshold=0.4: expected a number in [0, 1]" in message
    assert draft(draft_confidence_threshold=0, **other).draft_confidence_threshold == 0
    assert draft(draft_confidence_threshold="0.4").draft_confidence_threshold == 0.4


@pytest.mark.parametrize(
    "given, resolved",
    [({}, (5, 5)), ({"prompt_lookup_min": 2}, (2, 2)), ({"prompt_lookup_max": "3"}, (3, 3))]
    + [
        ({"prompt_lookup_min": 2, "prompt_lookup_max": 4}, (2, 4)),
        ({"prompt_lookup_min": 3, "prompt_lookup_max": 3}, (3, 3)),
    ],
)
def test_one_ngram_size_sets_both(given, resolved):
    config = ngram(**given)
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == resolved


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("num_speculative_tokens", 0, "an integer >= 1"),
        ("num_speculative_tokens", -1, "an integer >= 1"),
        ("num_speculative_tokens", "many", "an integer >= 1"),
        ("num_speculative_tokens", 2.5, "an integer >= 1"),
        ("num_speculative_tokens", math.nan, "an integer >= 1"),
        ("num_speculative_tokens", math.inf, "an integer >= 1"),
        ("num_speculative_tokens", True, "an integer >= 1"),
        ("prompt_lookup_min", 0, "an integer >= 1 and <= prompt_lookup_max"),
        ("prompt_lookup_max", 0, "an integer >= 1 and >= prompt_lookup_min"),
        ("draft_sample_method", "random", "'greedy' or 'probabilistic'"),
        ("rejection_sampling_strategy", "lossy", "'greedy', 'residual', 'typical-acceptance'"),
        ("rejection_sampling_strategy", "", "'greedy', 'residual', 'typical-acceptance'"),
        ("rejection_sampling_strategy", 3, "'greedy', 'residual', 'typical-acceptance'"),
        ("rejection_sampling_strategy", ["greedy"], "'greedy', 'residual', 'typical-acceptance'"),
        ("enforce_eager", "perhaps", "True or False"),
        ("config_file", "", "the path of a YAML file"),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_what_was_expected(field, value, expected):
    assert f"SpeculativeConfig.{field}={value!r}: expected {expected}" in refusal(ngram, **{field: value})


def test_an_early_exit_needs_no_model():
    config = SpeculativeConfig(assistant_early_exit="20")
    assert (config.method, config.model, config.assistant_early_exit) == ("draft_model", None, 20)
    assert SpeculativeConfig(model="some/draft", assistant_early_exit=2).model == "some/draft"


@pytest.mark.parametrize("rule", ["strict", "typical-acceptance"])
def test_rules_that_match_tokens_draft_greedily_by_default(rule):
    assert SpeculativeConfig(model="some/draft", rejection_sampling_strategy=rule).draft_sample_method == "greedy"


def test_an_early_exit_without_model_has_no_revision():
    with pytest.raises(ConfigError, match=r"SpeculativeConfig.revision='main': .* no model is given"):
        SpeculativeConfig(assistant_early_exit=2, revision="main")


@pytest.mark.parametrize("field, value", [("max_model_len", 0), ("revision", ""), ("revision", 3), ("model", "")])
def test_a_wrong_value_for_a_draft_model_is_refused_by_name(field, value):
    values = {"model": "small", field: value}
    message = refusal(SpeculativeConfig, method="draft_model", **values)
    assert f"SpeculativeConfig.{field}={value!r}: expected " in message


def test_the_message_of_a_wrong_count_says_what_to_do():
    assert refusal(ngram, num_speculative_tokens=0) == (
        "SpeculativeConfig.num_speculative_tokens=0: expected an integer >= 1, or 'auto'; give the number of drafts "
        "a round; to decode without drafts pass config=None to SpeculativeDecoder."
    )


def test_a_number_of_drafts_or_as_many_as_pay():
    assert ngram(num_speculative_tokens="auto").num_speculative_tokens == "auto"
    assert ngram(num_speculative_tokens="auto").max_drafts == 6
    assert ngram(num_speculative_tokens="3").max_drafts == 3
    for wrong in ("many", "", 0, True, 2.5, [1]):
        assert f"num_speculative_tokens={wrong!r}: expected an integer >= 1, or 'auto'" in refusal(
            ngram, num_speculative_tokens=wrong
        )
    synthetic = {"rejection_sampling_strategy": "synthetic", "synthetic_acceptance_length": 2.0}
    assert "'synthetic' is told what is accepted" in refusal(ngram, num_speculative_tokens="auto", **synthetic)


def test_every_wrong_value_is_reported_at_once():
    message = refusal(ngram, num_speculative_tokens=0, enforce_eager="perhaps")
    assert "num_speculative_tokens=0" in message and "enforce_eager='perhaps'" in message


def test_ngram_sizes_out_of_order_are_refused():
    message = refusal(ngram, prompt_lookup_min=4, prompt_lookup_max=2)
    assert "SpeculativeConfig.prompt_lookup_max=2: expected an integer >= 1 and >= prompt_lookup_min" in message


@pytest.mark.parametrize("field", ["prompt_lookup_min", "prompt_lookup_max"])
def test_ngram_fields_are_refused_for_a_draft_model(field):
    assert f"SpeculativeConfig.{field}=3" in (message := refusal(draft, **{field: 3}))
    assert "expected no value for method='draft_model'" in message


@pytest.mark.parametrize("field, value", [("revision", "main"), ("max_model_len", 64)])
def test_draft_model_fields_are_refused_for_ngram(field, value):
    assert "expected no value for method='ngram'" in refusal(ngram, **{field: value})


def test_sampled_ngram_drafts_are_refused():
    assert "SpeculativeConfig.draft_sample_method='probabilistic'" in refusal(
        ngram, draft_sample_method="probabilistic"
    )


# Acceptance rules


@pytest.mark.parametrize("config", [ngram(), draft()])
def test_every_method_has_a_default_rule(config):
    assert config.rejection_sampling_strategy == DEFAULT_STRATEGY[config.method] == "residual"
    assert set(DEFAULT_STRATEGY) == set(SpeculativeConfig.METHOD_FIELDS)


@pytest.mark.parametrize("rule", get_args(RejectionSamplingStrategy))
def test_every_rule_is_selected_by_name(rule):
    needed = {"synthetic_acceptance_rate": 0.5} if rule == "synthetic" else {}
    assert draft(rejection_sampling_strategy=rule, **needed).rejection_sampling_strategy == rule


@pytest.mark.parametrize("field", ["rejection_sampling_strategy", "rejection_sample_method"])
@pytest.mark.parametrize("value", ["residual", "probabilistic", "standard"])
def test_every_name_of_the_residual_rule_selects_it(field, value):
    assert ngram(**{field: value}).rejection_sampling_strategy == "residual"


@pytest.mark.parametrize("value", ["strict", "block", "synthetic"])
def test_rules_of_vllm_are_selected_by_its_name_of_the_field(value):
    needed = {"synthetic_acceptance_length": 2} if value == "synthetic" else {}
    assert ngram(rejection_sample_method=value, **needed).rejection_sampling_strategy == value


def test_a_misspelt_rule_is_refused_with_the_nearest():
    message = refusal(ngram, rejection_sampling_strategy="typical_acceptance")
    assert "SpeculativeConfig.rejection_sampling_strategy='typical_acceptance'" in message
    assert "did you mean 'typical-acceptance'?" in message and "'synthetic'" in message


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("synthetic_acceptance_rate", "0.5", 0.5),
        ("synthetic_acceptance_rates", ["0.5", 0], (0.5, 0.0)),
        ("synthetic_acceptance_rates", (1, 1), (1.0, 1.0)),
        ("synthetic_acceptance_rates", np.array([1.0, 0.25]), (1.0, 0.25)),
        ("synthetic_acceptance_length", "2.5", 2.5),
        ("synthetic_acceptance_length", 1, 1.0),
        ("synthetic_acceptance_length", 3, 3.0),
    ],
)
def test_each_synthetic_field_says_how_much_is_accepted(field, text, value):
    config = synthetic(**{field: text})
    assert {name: getattr(config, name) for name in config.STRATEGY_FIELDS["synthetic"]} == {
        **dict.fromkeys(config.STRATEGY_FIELDS["synthetic"]),
        field: value,
    }


def test_a_mean_rate_alone_selects_synthetic_acceptance():
    assert draft(synthetic_acceptance_rate=0) == synthetic(synthetic_acceptance_rate=0.0)
    assert ngram(synthetic_acceptance_rate=0.7).rejection_sampling_strategy == "synthetic"


@pytest.mark.parametrize(
    "field, value", [("synthetic_acceptance_rates", [0.5, 0.5]), ("synthetic_acceptance_length", 2)]
)
def test_rates_or_a_length_alone_are_refused_with_the_rule_to_set(field, value):
    message = refusal(ngram, **{field: value})
    assert f"SpeculativeConfig.{field}={value!r}: expected" in message
    assert "belongs to 'synthetic'" in message


def test_synthetic_acceptance_without_a_rate_is_refused_with_the_three_ways_to_give_one():
    message = refusal(synthetic)
    assert "SpeculativeConfig.rejection_sampling_strategy='synthetic'" in message
    assert all(field in message for field in SpeculativeConfig.STRATEGY_FIELDS["synthetic"])


@pytest.mark.parametrize(
    "make, first, second",
    [
        (draft, {"synthetic_acceptance_rate": 0.5}, {"synthetic_acceptance_rates": [0.5, 0.5]}),
        (synthetic, {"synthetic_acceptance_rate": 0.5}, {"synthetic_acceptance_rates": [0.5, 0.5]}),
        (synthetic, {"synthetic_acceptance_rate": 0.5}, {"synthetic_acceptance_length": 2}),
        (synthetic, {"synthetic_acceptance_rates": [0.5, 0.5]}, {"synthetic_acceptance_length": 2}),
    ],
)
def test_two_synthetic_fields_are_refused_together(make, first, second):
    message = refusal(make, **first, **second)
    ((one, value),), ((other, wrong),) = first.items(), second.items()
    assert f"SpeculativeConfig.{other}={wrong!r}" in message and f"{one}={value!r} is given too" in message


@pytest.mark.parametrize("value", [[0.5], [0.9, 0.8, 0.7], [], [0.4, 0.5], 0.5, "0.5", [0.5, "half"]])
def test_rates_that_are_not_one_for_each_draft_and_falling_are_refused(value):
    message = refusal(synthetic, synthetic_acceptance_rates=value)
    assert re.search(r"SpeculativeConfig\.synthetic_acceptance_rates(\[1\]='half'|=)", message)
    assert "expected a list of num_speculative_tokens numbers in [0, 1], none larger" in message


@pytest.mark.parametrize("value", [1.1, -0.1, math.nan, math.inf, True, None])
def test_a_rate_that_is_no_rate_is_refused_with_its_place(value):
    message = refusal(synthetic, synthetic_acceptance_rates=[1, value])
    assert f"SpeculativeConfig.synthetic_acceptance_rates[1]={value!r}: expected a list of" in message


def test_rates_are_counted_against_the_drafts_of_a_copy():
    config = synthetic(synthetic_acceptance_rates=[0.5, 0.5])
    assert "synthetic_acceptance_rates=(0.5, 0.5)" in refusal(config.model_copy, update={"num_speculative_tokens": 3})
    longer = {"num_speculative_tokens": 3, "synthetic_acceptance_rates": [0.5, 0.5, 0]}
    assert config.model_copy(update=longer) == synthetic(**longer)


def test_a_wrong_count_of_drafts_is_not_blamed_on_the_rates():
    message = refusal(synthetic, num_speculative_tokens=0, synthetic_acceptance_rates=[0.5])
    assert "num_speculative_tokens=0" in message and "synthetic_acceptance_rates" not in message


@pytest.mark.parametrize("num_drafts, longest", [(1, 2), (4, 5)])
def test_a_synthetic_length_is_at_most_a_full_round(num_drafts, longest):
    values = {"num_speculative_tokens": num_drafts, "synthetic_acceptance_length": longest}
    assert synthetic(**values).synthetic_acceptance_length == longest
    message = refusal(synthetic, **{**values, "synthetic_acceptance_length": longest + 0.1})
    assert f"SpeculativeConfig.synthetic_acceptance_length={longest + 0.1}: expected a number in [1, num_" in message


def test_relaxed_acceptance_has_the_defaults_of_max():
    config = relaxed()
    assert (config.relaxed_topk, config.relaxed_probability_delta, config.relaxed_log_delta) == (10, 0.6, None)


@pytest.mark.parametrize("field", ["relaxed_delta", "relaxed_probability_delta"])
def test_the_delta_of_max_is_a_difference_of_probabilities(field):
    config = relaxed(relaxed_topk="3", **{field: "0.25"})
    assert (config.relaxed_topk, config.relaxed_probability_delta, config.relaxed_log_delta) == (3, 0.25, None)


def test_a_difference_of_log_probabilities_replaces_that_of_probabilities():
    config = relaxed(relaxed_log_delta="1.5")
    assert (config.relaxed_probability_delta, config.relaxed_log_delta) == (None, 1.5)


def test_two_deltas_are_refused_together():
    message = refusal(relaxed, relaxed_delta=0.5, relaxed_log_delta=1)
    assert "SpeculativeConfig.relaxed_log_delta=1: expected" in message
    assert "relaxed_probability_delta=0.5" in message and "one of the two" in message


def test_one_delta_is_exchanged_for_the_other_in_a_copy():
    update = {"relaxed_probability_delta": None, "relaxed_log_delta": 1}
    assert relaxed().model_copy(update=update) == relaxed(relaxed_log_delta=1)


@pytest.mark.parametrize("flag", [True, "true", 1])
def test_the_flag_of_max_selects_relaxed_acceptance(flag):
    assert draft(use_relaxed_acceptance_for_thinking=flag) == relaxed()
    assert relaxed(use_relaxed_acceptance_for_thinking=flag) == relaxed()


@pytest.mark.parametrize("flag", [False, None, "false"])
def test_a_false_flag_of_max_means_nothing(flag):
    assert draft(use_relaxed_acceptance_for_thinking=flag) == draft()
    assert relaxed(use_relaxed_acceptance_for_thinking=flag) == relaxed()


@pytest.mark.parametrize("field", ["rejection_sampling_strategy", "rejection_sample_method"])
@pytest.mark.parametrize("flag_first", [True, False])
def test_the_flag_of_max_with_another_rule_is_refused_with_both(field, flag_first):
    values = {"use_relaxed_acceptance_for_thinking": True, field: "strict"}
    message = refusal(draft, **(values if flag_first else dict(reversed(values.items()))))
    assert "use_relaxed_acceptance_for_thinking=True" in message and f"{field}='strict'" in message


def test_a_flag_that_is_no_flag_is_refused():
    message = refusal(draft, use_relaxed_acceptance_for_thinking="perhaps")
    assert "SpeculativeConfig.use_relaxed_acceptance_for_thinking='perhaps': expected True or False" in message
    with pytest.raises(ConfigError) as caught:
        draft(use_relaxed_acceptance_for_thinking="perhaps")
    assert caught.value.__context__ is None


def test_a_misspelt_flag_is_refused_with_the_nearest():
    assert "did you mean 'use_relaxed_acceptance_for_thinking'?" in refusal(draft, use_relaxed_acceptance=True)


def test_medusa_typical_acceptance_has_the_defaults_of_medusa():
    assert (medusa_typical().posterior_threshold, medusa_typical().posterior_alpha) == (0.09, 0.3)
    config = medusa_typical(posterior_threshold="0.2", posterior_alpha=2)
    assert (config.posterior_threshold, config.posterior_alpha) == (0.2, 2.0)


@pytest.mark.parametrize(
    "make, field, values, expected",
    [
        (synthetic, "synthetic_acceptance_rate", [-0.1, 1.1, math.nan, "half", True], "a number in [0, 1]"),
        (
            synthetic,
            "synthetic_acceptance_length",
            [0.9, 3.1, math.inf, math.nan, "long", True],
            "a number in [1, num_speculative_tokens + 1], in tokens",
        ),
        (relaxed, "relaxed_topk", [0, -1, 1.5, math.nan, "all", True], "an integer >= 1, in tokens"),
        (relaxed, "relaxed_probability_delta", [-0.1, 1.1, math.nan, "all", True], "a number in [0, 1]"),
        (relaxed, "relaxed_log_delta", [-0.1, math.nan, math.inf, "all", True], "a finite number >= 0"),
        (medusa_typical, "posterior_threshold", [0, -1, 1.1, math.nan, "all", True], "a number in (0, 1]"),
        (medusa_typical, "posterior_alpha", [0, -1, math.nan, math.inf, "all", True], "a finite number > 0"),
    ],
)
def test_a_wrong_value_for_a_rule_is_refused_by_name_with_what_was_expected(make, field, values, expected):
    for value in values:
        assert f"SpeculativeConfig.{field}={value!r}: expected {expected}" in refusal(make, **{field: value})


@pytest.mark.parametrize(
    "owner, field, rule",
    [
        (owner, field, rule)
        for owner, fields in SpeculativeConfig.STRATEGY_FIELDS.items()
        for field in fields
        for rule in ["residual", "greedy", "relaxed", "medusa-typical", "synthetic"]
        if rule != owner
    ],
)
def test_fields_of_one_rule_are_refused_for_another(owner, field, rule):
    values = {"synthetic_acceptance_length": 2} if rule == "synthetic" else {}
    message = refusal(draft, rejection_sampling_strategy=rule, **values, **{field: 1})
    assert f"SpeculativeConfig.{field}=1: expected" in message
    assert f"expected no value for rejection_sampling_strategy={rule!r}" in message
    assert f"belongs to {owner!r}" in message


def test_fields_of_a_rule_are_refused_where_no_rule_is_given():
    assert "belongs to 'relaxed'" in refusal(draft, relaxed_topk=3)
    assert "belongs to 'medusa-typical'" in refusal(ngram, posterior_alpha=0.3)


def test_logits_of_ngram_drafts_are_not_compared():
    message = refusal(ngram, rejection_sampling_strategy="logit-comparison")
    assert "SpeculativeConfig.rejection_sampling_strategy='logit-comparison'" in message
    assert "use method='draft_model' or another rule" in message


def test_relaxed_drafts_are_the_most_probable_tokens():
    assert relaxed().draft_sample_method == relaxed(draft_sample_method="greedy").draft_sample_method == "greedy"
    message = refusal(relaxed, draft_sample_method="probabilistic")
    assert "SpeculativeConfig.draft_sample_method='probabilistic'" in message
    assert "rejection_sampling_strategy='relaxed'" in message and "give 'greedy'" in message


RULED = [
    synthetic(synthetic_acceptance_rate=0.7),
    synthetic(synthetic_acceptance_rates=[0.7, 0.2]),
    synthetic(synthetic_acceptance_length=2.5),
    relaxed(),
    relaxed(relaxed_topk=3),
    relaxed(relaxed_delta=0.1),
    relaxed(relaxed_log_delta=0.1),
    draft(rejection_sampling_strategy="medusa-typical"),
    draft(rejection_sampling_strategy="medusa-typical", posterior_threshold=0.2),
    draft(rejection_sampling_strategy="medusa-typical", posterior_alpha=0.2),
    draft(rejection_sampling_strategy="strict"),
    draft(rejection_sampling_strategy="typical-acceptance"),
    draft(rejection_sampling_strategy="logit-comparison"),
    draft(rejection_sampling_strategy="block"),
    draft(rejection_sampling_strategy="greedy"),
    draft(),
]


@pytest.mark.parametrize("config", RULED)
def test_a_rule_survives_a_copy_and_a_dump(config):
    assert config.model_copy(update={"max_model_len": None}) == config == config.model_copy()
    assert SpeculativeConfig(**config.model_dump()) == config
    assert SpeculativeConfig(**config.model_dump(mode="json")) == config
    assert config.model_copy(update={"num_speculative_tokens": 2}).compute_hash() == config.compute_hash()


def test_every_rule_and_every_field_of_one_gives_another_hash():
    assert len({config.compute_hash() for config in RULED}) == len(set(RULED)) == len(RULED)


# What is not in this version


@pytest.mark.parametrize("entry", NOT_YET)
def test_what_is_not_in_this_version_is_refused_with_its_feature(entry):
    field, _, value = entry.partition("=")
    values = {"method": "ngram", field: value or 1}
    message = refusal(SpeculativeConfig, **values)
    assert f"SpeculativeConfig.{field}={values[field]!r}" in message
    assert "not in this version of SpecJAX yet" in message and NOT_YET[entry] in message


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("settings", [SpeculativeConfig, SamplingParams])
def test_what_other_systems_say_in_another_way_gets_advice(settings, name):
    assert name not in {*settings.model_fields, *KEY_ALIASES, *NOT_YET}
    message = refusal(settings, **{name: 1})
    assert f"{settings.__name__}.{name}=1: expected the name of a field; {ELSEWHERE[name]}. The fields are" in message


def test_no_field_that_is_refused_is_suggested():
    assert "did you mean" not in refusal(SpeculativeConfig, method="ngram", moe_backends="x")


@pytest.mark.parametrize("settings", [SpeculativeConfig, SamplingParams, MeshConfig])
def test_help_explains_every_field(settings):
    said = " ".join(inspect.getdoc(settings).split())
    for name, field in settings.model_fields.items():
        assert f"{name}: {' '.join(field.description.split())}" in said


@pytest.mark.parametrize("method", ["deepseek_mtp", "qwen3_next_mtp"])
def test_old_names_of_mtp_mean_mtp(method):
    with pytest.warns(UserWarning, match="old name of 'mtp'"):
        assert SpeculativeConfig(method=method).method == "mtp"


def test_absent_methods_are_refused_with_those_that_exist():
    message = refusal(SpeculativeConfig, method="medusa", model="head")
    assert "'ngram', 'draft_model', 'eagle'" in message


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"speculators_model_type": "eagle3"}, "eagle3"),
        ({"speculators_model_type": "mtp"}, "mtp"),
        ({"speculators_model_type": "eagle"}, "eagle"),
        ({"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 32000}, "eagle3"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "eagle3"),
        ({"architectures": ["EagleLlamaForCausalLM"]}, "eagle"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "draft_model"),
    ],
)
def test_the_method_is_that_of_the_checkpoint(config, method, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SpeculativeConfig(model=str(tmp_path)).method == method


@pytest.mark.parametrize(
    ("name", "method"), [("org/EAGLE3-LLaMA3.1", "eagle3"), ("org/Eagle-vicuna", "eagle"), ("org/small", "draft_model")]
)
def test_the_method_of_a_checkpoint_that_is_not_here_is_told_by_its_name(name, method):
    assert SpeculativeConfig(model=name).method == method


def test_heads_are_judged_by_what_the_target_draws():
    for method in ("eagle", "eagle3", "mtp"):
        config = SpeculativeConfig(method=method)
        assert config.rejection_sampling_strategy == "typical-acceptance" and config.draft_sample_method == "greedy"
    hybrid = SpeculativeConfig(method="hybrid", prompt_lookup_min=3)
    assert hybrid.rejection_sampling_strategy == "residual" and hybrid.prompt_lookup_max == 3


def test_tensor_parallel_size_is_refused_with_the_right_field():
    assert "draft_tensor_parallel_size" in refusal(ngram, tensor_parallel_size=2)


def test_none_means_not_given_even_for_what_is_not_in_this_version():
    assert ngram(quantization=None, prompt_lookup_min=None, num_speculative_tokens=None) == ngram()


@pytest.mark.parametrize("value", [3, None])
def test_an_unknown_field_is_refused_with_the_nearest_name(value):
    message = refusal(ngram, num_speculative_token=value)
    assert f"SpeculativeConfig.num_speculative_token={value}" in message
    assert "did you mean 'num_speculative_tokens'?" in message and "prompt_lookup_min" in message


def test_every_field_of_the_two_surfaces_is_known():
    # ../shared/surfaces.md, sections 1 and 4: MAX 26 and vLLM 0.3x.
    surface = """
        speculative_method num_speculative_tokens rejection_sampling_strategy synthetic_acceptance_rate config_file
        section_name method model draft_tensor_parallel_size quantization moe_backend enforce_eager max_model_len
        revision code_revision draft_load_config disable_padded_drafter_batch use_local_argmax_reduction
        prompt_lookup_max prompt_lookup_min speculative_token_tree parallel_drafting suffix_decoding_max_tree_depth
        suffix_decoding_max_cached_requests suffix_decoding_max_spec_factor suffix_decoding_min_token_prob
        rejection_sample_method synthetic_acceptance_rates synthetic_acceptance_length
        use_relaxed_acceptance_for_thinking relaxed_topk relaxed_delta
    """
    assert set(surface.split()) <= {*SpeculativeConfig.model_fields, *KEY_ALIASES, *FLAG_ALIASES, *NOT_YET}


# Where values come from


def test_a_file_gives_what_the_arguments_do_not(write_yaml):
    path = write_yaml("method: ngram\nnum_speculative_tokens: 7\nprompt_lookup_max: '4'\n")
    config = SpeculativeConfig(config_file=path, num_speculative_tokens=3)
    assert config.num_speculative_tokens == 3  # the argument
    assert config.prompt_lookup_max == 4  # the file
    assert config.rejection_sampling_strategy == "residual"  # the default


def test_an_argument_of_none_leaves_the_value_of_the_file(write_yaml):
    path = write_yaml("method: ngram\nnum_speculative_tokens: 7\n")
    assert SpeculativeConfig(config_file=path, num_speculative_tokens=None).num_speculative_tokens == 7


def test_an_argument_wins_over_a_file_that_uses_another_name(write_yaml):
    path = write_yaml("speculative_method: ngram\nrejection_sample_method: standard\n")
    config = SpeculativeConfig(
        config_file=path, method="standalone", model="small", rejection_sampling_strategy="greedy"
    )
    assert config.is_standalone() and config.uses_greedy_rejection()


def test_a_list_of_rates_is_read_from_a_file(write_yaml):
    path = write_yaml(
        "method: ngram\nnum_speculative_tokens: 3\nrejection_sample_method: synthetic\n"
        "synthetic_acceptance_rates:\n  - 0.9\n  - '0.5'\n  - 0\n"
    )
    assert SpeculativeConfig(config_file=path).synthetic_acceptance_rates == (0.9, 0.5, 0.0)


def test_a_mean_rate_in_a_file_selects_synthetic_acceptance(write_yaml):
    path = write_yaml("method: ngram\nsynthetic_acceptance_rate: 0.5\n")
    assert SpeculativeConfig(config_file=path).rejection_sampling_strategy == "synthetic"


def test_a_flag_of_max_is_read_from_a_file_and_arguments_win_over_it(write_yaml):
    path = write_yaml("method: ngram\nuse_relaxed_acceptance_for_thinking: true\n")
    assert SpeculativeConfig(config_file=path).rejection_sampling_strategy == "relaxed"
    assert SpeculativeConfig(config_file=path, rejection_sample_method="strict").rejection_sampling_strategy == "strict"
    off = SpeculativeConfig(config_file=path, use_relaxed_acceptance_for_thinking=False)
    assert off.rejection_sampling_strategy == "residual"


def test_a_flag_of_max_among_the_arguments_wins_over_the_rule_of_a_file(write_yaml):
    path = write_yaml("method: ngram\nrejection_sampling_strategy: strict\n")
    config = SpeculativeConfig(config_file=path, use_relaxed_acceptance_for_thinking=True)
    assert config.rejection_sampling_strategy == "relaxed"


def test_a_flag_of_max_and_another_rule_in_a_file_are_refused_with_the_file(write_yaml):
    path = write_yaml("use_relaxed_acceptance_for_thinking: yes\nrejection_sampling_strategy: strict\nmethod: ngram\n")
    message = refusal(SpeculativeConfig, config_file=path)
    assert f"rejection_sampling_strategy='strict' (in {path})" in message
    assert "use_relaxed_acceptance_for_thinking=True" in message


def test_one_section_of_a_file_is_read(write_yaml):
    path = write_yaml("fast: {method: ngram, num_speculative_tokens: 9}\nother: 3\n")
    assert SpeculativeConfig(config_file=path, section_name="fast").num_speculative_tokens == 9


def test_the_conventional_section_is_read_where_a_file_has_it(write_yaml):
    path = write_yaml("speculative_config: {method: ngram, num_speculative_tokens: 9}\nmodel_path: x\n")
    assert SpeculativeConfig(config_file=str(path)).num_speculative_tokens == 9


def test_a_missing_section_is_refused_with_those_that_exist(write_yaml):
    path = write_yaml("fast: {method: ngram}\nslow: {method: ngram}\n")
    message = refusal(SpeculativeConfig, config_file=path, section_name="fats")
    assert "SpeculativeConfig.section_name='fats'" in message and "fast, slow" in message


def test_a_section_without_a_file_is_refused():
    assert "give config_file" in refusal(ngram, section_name="fast")


@pytest.mark.parametrize("text", ["", "- ngram\n", "ngram\n"])
def test_a_file_whose_root_is_no_mapping_is_refused(write_yaml, text):
    assert "its root is" in refusal(SpeculativeConfig, config_file=write_yaml(text))


def test_a_section_that_is_no_mapping_is_refused(write_yaml):
    message = refusal(SpeculativeConfig, config_file=write_yaml("fast: 3\n"), section_name="fast")
    assert "SpeculativeConfig.section_name='fast'" in message and "it holds 3" in message


def test_a_file_that_is_no_yaml_is_refused(write_yaml):
    assert "reading it failed" in refusal(SpeculativeConfig, config_file=write_yaml("a: [1\n"))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "reading it failed" in refusal(SpeculativeConfig, config_file=tmp_path / "config.yaml")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    message = refusal(SpeculativeConfig, config_file=tmp_path / "none.yaml")
    assert "SpeculativeConfig.config_file=" in message and "No such file" in message


@pytest.mark.parametrize("line", ["num_speculative_token: 3", "3: 4", "quantization: fp8", "tensor_parallel_size: 2"])
def test_a_wrong_field_in_a_file_is_refused_with_the_file(write_yaml, line):
    path = write_yaml(f"method: ngram\n{line}\n")
    assert f"(in {path})" in refusal(SpeculativeConfig, config_file=path)


@pytest.mark.parametrize("line", ["config_file: other.yaml", "section_name: fast"])
def test_a_file_that_names_another_is_refused(write_yaml, line):
    assert "cannot name another" in refusal(SpeculativeConfig, config_file=write_yaml(f"method: ngram\n{line}\n"))


def test_a_dump_holds_what_was_read_and_makes_an_equal_config(write_yaml):
    path = write_yaml("fast: {method: ngram, num_speculative_tokens: 9}\n")
    config = SpeculativeConfig(config_file=path, section_name="fast")
    dump = config.model_dump()
    assert "section_name" not in dump and "config_file" not in dump
    assert SpeculativeConfig(**dump).model_dump() == dump
    assert draft(num_speculative_tokens=3) == SpeculativeConfig(**draft(num_speculative_tokens=3).model_dump())


# Predicates and the hash

PREDICATES = [
    "is_standalone",
    "uses_draft_model",
    "use_ngram_gpu",
    "uses_greedy_rejection",
    "is_eagle",
    "is_mtp",
    "use_eagle",
    "use_dflash",
    "uses_extract_hidden_states",
    "uses_logit_comparison",
    "uses_typical_acceptance",
]


@pytest.mark.parametrize(
    "config, true",
    [
        (draft(), {"is_standalone", "uses_draft_model"}),
        (ngram(), {"use_ngram_gpu"}),
        (ngram(rejection_sampling_strategy="greedy"), {"use_ngram_gpu", "uses_greedy_rejection"}),
        (
            draft(rejection_sampling_strategy="logit-comparison"),
            {"is_standalone", "uses_draft_model", "uses_logit_comparison"},
        ),
        (ngram(rejection_sampling_strategy="typical-acceptance"), {"use_ngram_gpu", "uses_typical_acceptance"}),
        (ngram(rejection_sampling_strategy="medusa-typical"), {"use_ngram_gpu"}),
    ],
)
def test_predicates_tell_what_was_configured(config, true):
    assert {name for name in PREDICATES if getattr(config, name)()} == true


@pytest.mark.parametrize(
    "change",
    [
        {"num_speculative_tokens": 3},
        {"rejection_sampling_strategy": "greedy"},
        {"synthetic_acceptance_rate": 0.5},
        {"draft_sample_method": "greedy"},
        {"max_model_len": 64},
        {"speculative_token_map": "map.json"},
        {"revision": "v2"},
        {"model": "another"},
    ],
)
def test_the_hash_changes_with_the_compiled_graph(change):
    assert draft().compute_hash() != SpeculativeConfig(**{"model": "draft/directory", **change}).compute_hash()


def test_the_hash_is_the_same_for_the_same_graph():
    assert re.fullmatch("[0-9a-f]{16}", ngram().compute_hash())
    assert (
        ngram().compute_hash()
        == SpeculativeConfig(model="ngram", enforce_eager=True, prompt_lookup_min=5).compute_hash()
    )
    assert ngram().compute_hash() == "62ae3a4cd5509111"  # stable between processes and machines


# Both classes


@pytest.mark.parametrize("settings", [ngram(), SamplingParams()])
def test_settings_are_read_only(settings):
    field = next(iter(type(settings).model_fields))
    with pytest.raises(ConfigError, match="read-only"):
        setattr(settings, field, getattr(settings, field))


def test_equal_settings_have_equal_hashes():
    assert len({ngram(), ngram(num_speculative_tokens="2"), SamplingParams(), SamplingParams(stop=None)}) == 2


def test_a_copy_changes_what_it_is_told_and_is_validated():
    assert ngram().model_copy(update={"num_speculative_tokens": "4"}) == ngram(num_speculative_tokens=4)
    assert ngram().model_copy() == ngram()
    assert "max_tokens=0" in refusal(SamplingParams().model_copy, update={"max_tokens": 0})


@pytest.mark.parametrize(
    "settings", [ngram(), draft(), relaxed(), SamplingParams(), SamplingParams(logit_bias={7: 1}, presence_penalty=1)]
)
def test_a_mapping_is_validated_like_arguments(settings):
    kind = type(settings)
    assert kind.model_validate(settings.model_dump()) == settings
    assert kind.model_validate(settings) is settings
    assert "nothing_like_it=1" in refusal(kind.model_validate, {"nothing_like_it": 1})
    assert "expected a mapping" in refusal(kind.model_validate, "text")


def test_a_refusal_shows_no_other_exception():
    with pytest.raises(ConfigError) as caught:
        SamplingParams(max_tokens=0)
    assert caught.value.__context__ is None and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kind", [SpeculativeConfig, SamplingParams])
def test_every_field_says_what_it_does_and_its_default(kind):
    for name, field in kind.model_fields.items():
        assert "Default" in field.description, name
        assert set(field.json_schema_extra) == {"expected", "remedy"}, name


@pytest.mark.parametrize("name", ["SpeculativeConfig", "SamplingParams"])
def test_the_example_in_the_docstring_holds(name):
    tests = doctest.DocTestFinder().find(
        getattr(config_module, name), name, globs=vars(config_module), module=config_module
    )
    examples = next(test for test in tests if test.name == name)
    assert doctest.DocTestRunner().run(examples) == (0, 1)


# SamplingParams


def test_sampling_parameters_have_these_defaults():
    assert SamplingParams().model_dump() == {
        "logit_bias": (),
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "max_tokens": 128,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": False,
        "seed": 0,
    }


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("temperature", "0.7", 0.7),
        ("top_k", "40", 40),
        ("top_p", "0.9", 0.9),
        ("min_p", "0.05", 0.05),
        ("max_tokens", "16", 16),
        ("stop_token_ids", ["2", 3], (2, 3)),
        ("ignore_eos", "true", True),
        ("logit_bias", {"50256": "-100"}, ((50256, -100.0),)),
        ("repetition_penalty", "1.2", 1.2),
        ("frequency_penalty", "-2", -2.0),
        ("presence_penalty", "0.5", 0.5),
        ("logprobs", "true", True),
        ("seed", "7", 7),
    ],
)
def test_text_is_read_as_the_value_it_spells(field, text, value):
    assert getattr(SamplingParams(**{field: text}), field) == value


def test_numbers_of_numpy_are_read():
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int32(3), stop_token_ids=np.array([1, 2]), seed=np.int64(4)
    )
    assert (params.temperature, params.top_k, params.stop_token_ids, params.seed) == (0.5, 3, (1, 2), 4)
    assert type(params.top_k) is int


@pytest.mark.parametrize("temperature, greedy", [(0, True), (9.9e-6, True), (1e-5, False), (1.0, False)])
def test_a_temperature_below_one_hundred_thousandth_is_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy


@pytest.mark.parametrize("top_k", [0, -1])
def test_both_ways_to_turn_top_k_off_are_the_same(top_k):
    assert SamplingParams(top_k=top_k).top_k == 0


@pytest.mark.parametrize(
    "stop, stored", [(None, ()), ("END", ("END",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ())]
)
def test_stop_is_stored_as_a_tuple(stop, stored):
    assert SamplingParams(stop=stop).stop == stored


@pytest.mark.parametrize(
    "biases",
    [{9: 1, "2": -1.5}, {"9": "1", 2: -1.5}, [(9, 1), (2, -1.5)], [["2", -1.5], ["9", 1]], ((2, -1.5), (9, 1.0))]
    + [{np.int64(9): np.float32(1), 2: -1.5}],
)
def test_biases_are_stored_as_pairs_in_the_order_of_the_tokens(biases):
    assert SamplingParams(logit_bias=biases).logit_bias == ((2, -1.5), (9, 1.0))


@pytest.mark.parametrize("biases", [None, {}, [], ()])
def test_no_biases_are_stored_as_none(biases):
    assert SamplingParams(logit_bias=biases) == SamplingParams()


def test_parameters_with_biases_are_hashable_and_survive_a_copy_and_a_dump():
    params = SamplingParams(logit_bias={9: 1, 2: -1.5}, repetition_penalty=1.1, logprobs=True)
    assert hash(params) == hash(SamplingParams(logit_bias=[(2, -1.5), (9, 1)], repetition_penalty=1.1, logprobs=True))
    assert params.model_copy(update={"seed": 0}) == params == SamplingParams(**params.model_dump(mode="json"))
    assert params.model_copy(update={"logit_bias": None, "repetition_penalty": 1, "logprobs": False}) == (
        SamplingParams()
    )


@pytest.mark.parametrize(
    "values, adjusted",
    [
        ({}, False),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "logprobs": True}, False),
        ({"repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {3: 0}}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"logit_bias": {3: 0, 4: -1}}, True),
    ],
)
def test_any_active_bias_or_penalty_adjusts_the_logits(values, adjusted):
    assert SamplingParams(**values).adjusts_logits is adjusted


def test_no_seed_is_seed_zero_and_the_largest_is_accepted():
    assert SamplingParams(seed=None).seed == 0
    assert SamplingParams(seed=2**63 - 1).seed == 2**63 - 1


@pytest.mark.parametrize(
    "field, value, expected",
    [
        ("temperature", -0.1, "a finite number >= 0"),
        ("temperature", math.nan, "a finite number >= 0"),
        ("temperature", "nan", "a finite number >= 0"),
        ("temperature", math.inf, "a finite number >= 0"),
        ("temperature", True, "a finite number >= 0"),
        ("temperature", None, "a finite number >= 0"),
        ("top_k", -2, "an integer >= 1, or 0 or -1 for off"),
        ("top_k", 1.5, "an integer >= 1, or 0 or -1 for off"),
        ("top_k", math.nan, "an integer >= 1, or 0 or -1 for off"),
        ("top_p", 0, "a number in (0, 1]"),
        ("top_p", 1.01, "a number in (0, 1]"),
        ("top_p", math.nan, "a number in (0, 1]"),
        ("min_p", -0.01, "a number in [0, 1]"),
        ("min_p", 1.01, "a number in [0, 1]"),
        ("min_p", math.nan, "a number in [0, 1]"),
        ("max_tokens", 0, "an integer >= 1, in tokens"),
        ("max_tokens", math.nan, "an integer >= 1, in tokens"),
        ("max_tokens", None, "an integer >= 1, in tokens"),
        ("stop", 3, "a non-empty text or a list of them"),
        ("stop_token_ids", 3, "a list of integers >= 0"),
        ("ignore_eos", 3, "True or False"),
        ("logprobs", 5, "True or False"),
        ("logprobs", 0, "True or False"),
        ("logprobs", None, "True or False"),
        ("repetition_penalty", 0, "a number in [0.01, 100]"),
        ("repetition_penalty", -1, "a number in [0.01, 100]"),
        ("repetition_penalty", math.inf, "a number in [0.01, 100]"),
        ("repetition_penalty", math.nan, "a number in [0.01, 100]"),
        ("repetition_penalty", True, "a number in [0.01, 100]"),
        ("frequency_penalty", 2.1, "a number in [-2, 2]"),
        ("frequency_penalty", math.nan, "a number in [-2, 2]"),
        ("frequency_penalty", "much", "a number in [-2, 2]"),
        ("presence_penalty", -2.1, "a number in [-2, 2]"),
        ("presence_penalty", math.nan, "a number in [-2, 2]"),
        ("presence_penalty", True, "a number in [-2, 2]"),
        ("logit_bias", 3, "a mapping of token ids >= 0 to numbers in [-100, 100], no id twice"),
        ("logit_bias", "3", "a mapping of token ids >= 0 to numbers in [-100, 100], no id twice"),
        ("logit_bias", {"3": 1, 3: 2}, "a mapping of token ids >= 0 to numbers in [-100, 100], no id twice"),
        ("logit_bias", [(3, 1), (3, 1)], "a mapping of token ids >= 0 to numbers in [-100, 100], no id twice"),
        ("seed", -1, "an integer in [0, 2**63)"),
        ("seed", 2**63, "an integer in [0, 2**63)"),
        ("seed", 0.5, "an integer in [0, 2**63)"),
        ("seed", math.nan, "an integer in [0, 2**63)"),
    ],
)
def test_a_wrong_sampling_parameter_is_refused_by_name_with_what_was_expected(field, value, expected):
    assert f"SamplingParams.{field}={value!r}: expected {expected}; " in refusal(SamplingParams, **{field: value})


@pytest.mark.parametrize("value, place", [("", "stop[0]=''"), (["a", ""], "stop[1]=''"), ([None], "stop[0]=None")])
def test_an_empty_stop_text_is_refused(value, place):
    assert f"SamplingParams.{place}: expected a non-empty text" in refusal(SamplingParams, stop=value)


@pytest.mark.parametrize("value", [[-1], [1.5], [True], ["x"], [math.nan]])
def test_a_stop_token_id_that_is_no_id_is_refused(value):
    assert f"SamplingParams.stop_token_ids[0]={value[0]!r}: expected a list of" in refusal(
        SamplingParams, stop_token_ids=value
    )


@pytest.mark.parametrize(
    "biases, place",
    [
        ({-1: 1}, "[0][0]=-1"),
        ({"the": 1}, "[0][0]='the'"),
        ({1.5: 1}, "[0][0]=1.5"),
        ({True: 1}, "[0][0]=True"),
        ({3: 1, 4: 100.1}, "[1][1]=100.1"),
        ({3: -101}, "[0][1]=-101"),
        ({3: math.nan}, "[0][1]=nan"),
        ({3: True}, "[0][1]=True"),
        ({3: None}, "[0][1]=None"),
        ({3: "much"}, "[0][1]='much'"),
        ([3], "[0]=3"),
    ],
)
def test_a_token_or_a_bias_that_is_wrong_is_refused_with_its_place(biases, place):
    message = refusal(SamplingParams, logit_bias=biases)
    assert f"SamplingParams.logit_bias{place}: expected a mapping of token ids >= 0 to numbers" in message


def test_an_unknown_sampling_parameter_is_refused_with_the_nearest_name():
    assert "did you mean 'temperature'?" in refusal(SamplingParams, temprature=1)
