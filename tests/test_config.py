"""Settings: every field, every refusal, every other name, and where values come from."""

import doctest
import math
import re

import numpy as np
import pytest

from specjax import config as config_module
from specjax.config import KEY_ALIASES, NOT_YET, SamplingParams, SpeculativeConfig
from specjax.errors import ConfigError


def draft(**values):
    return SpeculativeConfig(method="draft_model", model="draft/directory", **values)


def ngram(**values):
    return SpeculativeConfig(method="ngram", **values)


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
        "max_model_len": None,
        "num_speculative_tokens": 2,
        "draft_sample_method": "greedy",
        "prompt_lookup_min": 5,
        "prompt_lookup_max": 5,
        "rejection_sampling_strategy": "residual",
        "enforce_eager": False,
    }


def test_a_draft_model_config_has_these_defaults():
    assert draft().model_dump() == {
        "method": "draft_model",
        "model": "draft/directory",
        "revision": None,
        "max_model_len": None,
        "num_speculative_tokens": 2,
        "draft_sample_method": "probabilistic",
        "prompt_lookup_min": None,
        "prompt_lookup_max": None,
        "rejection_sampling_strategy": "residual",
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
        ("rejection_sampling_strategy", "lossy", "'greedy' or 'residual'"),
        ("enforce_eager", "perhaps", "True or False"),
        ("config_file", "", "the path of a YAML file"),
    ],
)
def test_a_wrong_value_is_refused_by_name_with_what_was_expected(field, value, expected):
    assert f"SpeculativeConfig.{field}={value!r}: expected {expected}" in refusal(ngram, **{field: value})


@pytest.mark.parametrize("field, value", [("max_model_len", 0), ("revision", ""), ("revision", 3), ("model", "")])
def test_a_wrong_value_for_a_draft_model_is_refused_by_name(field, value):
    values = {"model": "small", field: value}
    message = refusal(SpeculativeConfig, method="draft_model", **values)
    assert f"SpeculativeConfig.{field}={value!r}: expected " in message


def test_the_message_of_a_wrong_count_says_what_to_do():
    assert refusal(ngram, num_speculative_tokens=0) == (
        "SpeculativeConfig.num_speculative_tokens=0: expected an integer >= 1; give the number of drafts a round; "
        "to decode without drafts pass config=None to SpeculativeDecoder."
    )


def test_every_wrong_value_is_reported_at_once():
    message = refusal(ngram, num_speculative_tokens=0, enforce_eager="perhaps")
    assert "num_speculative_tokens=0" in message and "enforce_eager='perhaps'" in message


def test_ngram_sizes_out_of_order_are_refused():
    message = refusal(ngram, prompt_lookup_min=4, prompt_lookup_max=2)
    assert "SpeculativeConfig.prompt_lookup_max=2: expected an integer >= 1 and >= prompt_lookup_min" in message


@pytest.mark.parametrize("field", ["prompt_lookup_min", "prompt_lookup_max"])
def test_ngram_fields_are_refused_for_a_draft_model(field):
    assert f"SpeculativeConfig.{field}=3" in (message := refusal(draft, **{field: 3}))
    assert "means nothing for method='draft_model'" in message


@pytest.mark.parametrize("field, value", [("revision", "main"), ("max_model_len", 64)])
def test_draft_model_fields_are_refused_for_ngram(field, value):
    assert "means nothing for method='ngram'" in refusal(ngram, **{field: value})


def test_sampled_ngram_drafts_are_refused():
    assert "SpeculativeConfig.draft_sample_method='probabilistic'" in refusal(
        ngram, draft_sample_method="probabilistic"
    )


@pytest.mark.parametrize("field", ["rejection_sampling_strategy", "rejection_sample_method"])
@pytest.mark.parametrize("value", ["residual", "probabilistic", "standard"])
def test_every_name_of_the_residual_rule_selects_it(field, value):
    assert ngram(**{field: value}).rejection_sampling_strategy == "residual"


def test_the_greedy_rule_is_selected_by_name():
    assert ngram(rejection_sampling_strategy="greedy").uses_greedy_rejection()


# What is not in this version


@pytest.mark.parametrize("entry", NOT_YET)
def test_what_is_not_in_this_version_is_refused_with_its_feature(entry):
    field, _, value = entry.partition("=")
    values = {"method": "ngram", field: value or 1}
    message = refusal(SpeculativeConfig, **values)
    assert f"SpeculativeConfig.{field}={values[field]!r}" in message
    assert "not in this version of SpecJAX yet" in message and NOT_YET[entry] in message


@pytest.mark.parametrize("value", ["strict", "block", "synthetic"])
def test_rules_of_vllm_that_are_not_in_this_version_are_refused(value):
    assert "not in this version of SpecJAX yet" in refusal(ngram, rejection_sample_method=value)


@pytest.mark.parametrize("method", ["deepseek_mtp", "qwen3_next_mtp"])
def test_old_names_of_mtp_are_refused_like_mtp(method):
    assert NOT_YET["method=mtp"] in refusal(SpeculativeConfig, method=method)


def test_absent_methods_are_refused_with_those_that_exist():
    message = refusal(SpeculativeConfig, method="eagle3", model="head")
    assert "'ngram' or 'draft_model'" in message


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
    """
    assert set(surface.split()) <= {*SpeculativeConfig.model_fields, *KEY_ALIASES, *NOT_YET}


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
    ],
)
def test_predicates_tell_what_was_configured(config, true):
    assert {name for name in PREDICATES if getattr(config, name)()} == true


@pytest.mark.parametrize(
    "change",
    [
        {"num_speculative_tokens": 3},
        {"rejection_sampling_strategy": "greedy"},
        {"draft_sample_method": "greedy"},
        {"max_model_len": 64},
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
    assert ngram().compute_hash() == "6defb0b9afa307ae"  # stable between processes and machines


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


@pytest.mark.parametrize("settings", [ngram(), draft(), SamplingParams()])
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
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "max_tokens": 128,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
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


def test_an_unknown_sampling_parameter_is_refused_with_the_nearest_name():
    assert "did you mean 'temperature'?" in refusal(SamplingParams, temprature=1)
