"""Settings of speculation and of sampling: frozen, validated, hashable.

Both classes refuse unknown keys and read text ("3" is 3). Whatever a user gets wrong is reported as a `ConfigError`
that names the field, the value, what was expected and what to do. A field is accepted only if this version acts on
it; `NOT_YET` lists the others.
"""

import difflib
import hashlib
import itertools
import json
import operator
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, get_args

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator

from specjax.errors import ConfigError

Method = Literal["ngram", "draft_model", "eagle", "eagle3", "mtp", "hybrid"]

HEAD_METHODS: tuple[Method, ...] = ("eagle3", "eagle", "mtp")
"""Methods whose drafter reads the target's hidden states."""
RejectionSamplingStrategy = Literal[
    "greedy",
    "residual",
    "typical-acceptance",
    "strict",
    "block",
    "logit-comparison",
    "medusa-typical",
    "relaxed",
    "synthetic",
]
DraftSampleMethod = Literal["greedy", "probabilistic"]

AUTO: Literal["auto"] = "auto"
"""As many drafts a round as pay."""

MOST_AUTO_DRAFTS = 6
"""Drafts a round that "auto" goes up to, where a head's checkpoint names no number."""

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this one decode greedily: dividing float32 logits by less overflows."""

DEFAULT_SECTION = "speculative_config"
"""The section read from a YAML file that has it, when `section_name` is not given."""

DEFAULT_PROMPT_LOOKUP = 5
"""Tokens in an n-gram when neither `prompt_lookup_min` nor `prompt_lookup_max` is given."""

DEFAULT_STRATEGY: dict[str, RejectionSamplingStrategy] = {
    "ngram": "residual",
    "draft_model": "residual",
    "eagle": "typical-acceptance",
    "eagle3": "typical-acceptance",
    "mtp": "typical-acceptance",
    "hybrid": "residual",
}
"""The acceptance rule of a method where none is given; as in MAX for those that it has."""

TOKEN_MATCHING = ("typical-acceptance", "strict")
"""Rules that accept a draft if the target draws it: the drafter's most probable token is the best guess."""

DEFAULT_RELAXED_TOPK = 10
DEFAULT_RELAXED_PROBABILITY_DELTA = 0.6
"""MAX's defaults for the rule 'relaxed'."""

DEFAULT_POSTERIOR_THRESHOLD = 0.09
DEFAULT_POSTERIOR_ALPHA = 0.3
"""Medusa's defaults for the rule 'medusa-typical'; the second is the root of the first."""

_OF_A_MODEL = (
    "model",
    "revision",
    "draft_tensor_parallel_size",
    "max_model_len",
    "speculative_token_map",
    "draft_confidence_threshold",
)

KEY_ALIASES = {
    "speculative_method": "method",
    "relaxed_delta": "relaxed_probability_delta",
    "rejection_sample_method": "rejection_sampling_strategy",
}
"""Names that MAX (the first two) and vLLM (the third) give to a field, and its name here."""

VALUE_ALIASES = {
    "method": {"standalone": "draft_model", "ngram_gpu": "ngram"},
    "rejection_sampling_strategy": {"probabilistic": "residual", "standard": "residual"},
}
"""Other names of values: "standalone" is MAX's, the rest vLLM's. Here n-grams are always looked up on the device."""

FLAG_ALIASES = {"use_relaxed_acceptance_for_thinking": ("rejection_sampling_strategy", "relaxed")}
"""Flags of MAX, and the field and value that they stand for when true. A false one stands for nothing."""

_PARALLEL = "parallel drafting (P-EAGLE, PARD, DFlash)"
_SUFFIX = "suffix decoding"

NOT_YET = {
    "method=medusa": "Medusa heads",
    "method=mlp_speculator": "MLP speculators",
    "method=suffix": _SUFFIX,
    "method=dflash": _PARALLEL,
    "method=extract_hidden_states": "extraction of hidden states",
    "quantization": "quantised draft weights",
    "moe_backend": "mixture-of-experts drafts",
    "code_revision": "remote model code",
    "draft_load_config": "draft loading options",
    "disable_padded_drafter_batch": "compacted draft batches",
    "use_local_argmax_reduction": "vocabulary-parallel argmax",
    "speculative_token_tree": "token trees",
    "parallel_drafting": _PARALLEL,
    "suffix_decoding_max_tree_depth": _SUFFIX,
    "suffix_decoding_max_cached_requests": _SUFFIX,
    "suffix_decoding_max_spec_factor": _SUFFIX,
    "suffix_decoding_min_token_prob": _SUFFIX,
}
"""What MAX and vLLM configure and this version lacks: `field` or `field=value` -> the feature that will bring it."""

_ABSENT = "SpecJAX has nothing of the kind yet; leave it out"

ELSEWHERE = {
    "acceptance_method": "write rejection_sampling_strategy",
    "allowed_token_ids": _ABSENT,
    "attention_backend": "leave it out, the kernel follows from the device",
    "bad_words": "give their tokens a logit_bias of -100",
    "best_of": "give the prompt that many times, each with a seed of its own",
    "detokenize": "leave it out, results hold tokens and texts",
    "disable_by_batch_size": "num_speculative_tokens='auto' drafts nothing where that is faster, at any batch size",
    "gpu_memory_utilization": "leave it out, caches are as large as prompts and max_tokens need",
    "include_stop_str_in_output": _ABSENT,
    "max_num_batched_tokens": "SpeculativeDecoder takes max_batch_size, in rows",
    "max_num_seqs": "SpeculativeDecoder takes max_batch_size",
    "min_tokens": _ABSENT,
    "n": "give the prompt that many times, each with a seed of its own",
    "prompt_logprobs": _ABSENT,
    "skip_special_tokens": _ABSENT,
    "speculative_model": "write model",
    "target_model_config": "load_target takes the target",
    "target_parallel_config": "load_target takes mesh=MeshConfig(...)",
    "typical_acceptance_sampler_posterior_alpha": "write posterior_alpha, of the rule 'medusa-typical'",
    "typical_acceptance_sampler_posterior_threshold": "write posterior_threshold, of the rule 'medusa-typical'",
    "use_beam_search": _ABSENT,
}
"""Names that other systems give to what is said in another way here, or not at all: name -> what to do."""


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a bool is not a number")
    return value


def _refuse_integer(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError("a number is not a bool")
    return value


def _read_integer(value: Any) -> Any:
    _refuse_bool(value)
    return operator.index(value) if hasattr(value, "__index__") else value  # numpy integers


def _read_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _read_pairs(value: Any) -> Any:
    return tuple(value.items()) if isinstance(value, Mapping) else value


def _none_as(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


Integer = Annotated[int, BeforeValidator(_read_integer)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
NonEmptyText = Annotated[str, BeforeValidator(_read_path), Field(min_length=1)]
TokenId = Annotated[int, BeforeValidator(_read_integer), Field(ge=0)]
Rate = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=1, allow_inf_nan=False)]
Bias = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=-100, le=100, allow_inf_nan=False)]

_FLAG: pydantic.TypeAdapter[bool] = pydantic.TypeAdapter(bool)
_POSITIVE: pydantic.TypeAdapter[int] = pydantic.TypeAdapter(Annotated[Integer, Field(ge=1)])


def _read_num_drafts(value: Any) -> int | Literal["auto"]:
    return AUTO if isinstance(value, str) and value == AUTO else _POSITIVE.validate_python(value)


NumDrafts = Annotated[int | Literal["auto"], PlainValidator(_read_num_drafts)]


def _setting(default: Any, description: str, *, expected: str, remedy: str, **constraints: Any) -> Any:
    """A pydantic field that knows how to say what it expects (`expected`) and what to do about it (`remedy`)."""
    advice: dict[str, Any] = {"expected": expected, "remedy": remedy}
    return Field(default=default, description=description, json_schema_extra=advice, **constraints)


def _nearest(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {matches[0]!r}? " if matches else ""


def method_of(model: str) -> Method:
    """The method of a draft checkpoint: what its config.json says, or where none can be read, its name."""
    for folder in (Path(model), Path(__file__).parent / "pretrained" / model):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(config, dict):
            break
        kind = config.get("speculators_model_type")
        if kind in HEAD_METHODS:
            return kind
        if kind is None and "draft_vocab_size" in config:
            return "eagle3"
        architectures = str(config.get("architectures")).lower()
        return next((method for method in ("eagle3", "eagle") if method in architectures), "draft_model")
    return next((method for method in HEAD_METHODS if method in Path(model).name.lower()), "draft_model")


class _Settings(pydantic.BaseModel):
    """Frozen settings whose every validation failure is a `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Adds the fields to the docstring, where help() shows them."""
        wrap = textwrap.TextWrapper(110, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
        fields = [wrap.fill(f"{name}: {field.description}") for name, field in cls.model_fields.items()]
        cls.__doc__ = "\n".join([textwrap.dedent(f"    {cls.__doc__}").strip(), "", "Fields:", *fields])

    def __init__(self, **values: Any) -> None:
        values = self._resolve(values)
        self._refuse_unknown(values)
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            message = "\n".join(self._explain(details) for details in error.errors())
        else:
            return
        raise ConfigError(message)  # outside the handler, so that no pydantic traceback is chained to it

    @classmethod
    def model_validate(cls, obj: Any, **_: Any) -> Self:
        """Validates a mapping of settings like the constructor does; settings of this class are returned unchanged."""
        if isinstance(obj, cls):
            return obj
        if not isinstance(obj, Mapping):
            raise ConfigError(f"{cls.__name__}: got {obj!r}, expected a mapping of field names to values; pass a dict.")
        return cls(**{str(key): value for key, value in obj.items()})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with the fields in `update` changed, validated as new settings are (pydantic would not)."""
        return type(self)(**{**self.model_dump(), **update}) if update else super().model_copy(deep=deep)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(
            f"{type(self).__name__}.{name}={value!r}: expected no assignment, settings are read-only; "
            f"make a changed copy with .model_copy(update={{{name!r}: {value!r}}})."
        )

    @classmethod
    def _resolve(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fills in what depends on other fields; subclasses say how."""
        return values

    @classmethod
    def _known_names(cls) -> list[str]:
        return list(cls.model_fields)

    @classmethod
    def _refuse_unknown(cls, values: Mapping[str, Any], where: str = "") -> None:
        unknown = next((name for name in values if name not in cls.model_fields), None)
        if unknown is not None:
            advice = f"{ELSEWHERE[unknown]}. " if unknown in ELSEWHERE else _nearest(unknown, cls._known_names())
            raise ConfigError(
                f"{cls.__name__}.{unknown}={values[unknown]!r}{where}: expected the name of a field; "
                f"{advice}The fields are: {', '.join(cls.model_fields)}."
            )

    @classmethod
    def _refuse(cls, name: str, value: Any, remedy: str | None = None) -> NoReturn:
        """Refuses `value` for the field `name` with the field's own explanation, or with `remedy`."""
        advice = cls.model_fields[name].json_schema_extra
        assert isinstance(advice, dict)
        raise ConfigError(
            f"{cls.__name__}.{name}={value!r}: expected {advice['expected']}; {remedy or advice['remedy']}."
        )

    @classmethod
    def _explain(cls, details: Any) -> str:
        name, *indices = details["loc"]
        advice = cls.model_fields[name].json_schema_extra
        assert isinstance(advice, dict)
        place = name + "".join(f"[{index}]" for index in indices)
        return f"{cls.__name__}.{place}={details['input']!r}: expected {advice['expected']}; {advice['remedy']}."


class SpeculativeConfig(_Settings):
    """How drafts are made and accepted; the same fields as in MAX's and vLLM's class of this name.

    A value of None means "not given". A field is looked for in the arguments, then in `config_file`, then it takes its
    default. After construction `method`, `rejection_sampling_strategy`, `draft_sample_method` and, for n-grams,
    `prompt_lookup_min` and `prompt_lookup_max` hold what was resolved, never None; so do `relaxed_topk` and one of the
    two deltas for the rule 'relaxed', and `posterior_threshold` and `posterior_alpha` for 'medusa-typical'.
    `speculative_method` (MAX) is another name of `method`, and `rejection_sample_method` (vLLM) of
    `rejection_sampling_strategy`; `KEY_ALIASES`, `VALUE_ALIASES` and `FLAG_ALIASES` list them.

    Raises:
      ConfigError: a field is unknown, wrong, meaningless for the method or the rule, or not in this version yet.

    Example:
      >>> SpeculativeConfig(method="ngram", num_speculative_tokens="5").num_speculative_tokens
      5

    Reference: rejection sampling, Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318);
    block verification, Sun et al. 2024 (arXiv 2403.10444); typical acceptance of Medusa, Cai et al. 2024 (arXiv
    2401.10774, section 2.3.1).
    """

    # What drafts
    method: Method = _setting(
        None,
        "The drafter: 'ngram' copies what followed an earlier occurrence of the last tokens, 'draft_model' runs a "
        "smaller language model, 'eagle', 'eagle3' and 'mtp' a head that reads the target's hidden states, 'hybrid' "
        "copies where the text repeats itself and runs a head elsewhere. Default: 'ngram' if model is 'ngram', else "
        "what the checkpoint in model says it is.",
        expected="one of 'ngram', 'draft_model', 'eagle', 'eagle3', 'mtp', 'hybrid' ('ngram_gpu' and 'standalone' are "
        "other names of the first two)",
        remedy="name one of them, or give a model; to decode without drafts pass config=None to SpeculativeDecoder",
    )
    model: NonEmptyText | None = _setting(
        None,
        "The draft model or head: a directory, hub id or named asset that fits the target. 'ngram' selects the n-gram "
        "method and is then stored as None. Default: None; heads are then looked for in the target's checkpoint and "
        "among those that come with SpecJAX, where there are any.",
        expected="the directory, hub id or asset name of a draft model or head",
        remedy="method='draft_model' needs one of the target's vocabulary, method='ngram' needs none",
    )
    revision: NonEmptyText | None = _setting(
        None,
        "The branch, tag or commit of the draft model on the hub. Default: the hub's default branch.",
        expected="the name of a branch, tag or commit",
        remedy="give one for a draft model from the hub, else leave the field out",
    )
    assistant_early_exit: Integer | None = _setting(
        None,
        "Drafts with only so many first layers of the draft model, then its final norm and head, in layers (the name "
        "that transformers gives it; LayerSkip, arXiv 2404.16710). Where no model is given the target itself drafts "
        "this way, with the weights that it already has. Default: None, all layers.",
        expected="an integer >= 1, in layers, and less than the draft model has",
        remedy="models that were not trained to exit early draft well with nearly all of their layers only",
        ge=1,
    )
    draft_tensor_parallel_size: Integer | None = _setting(
        None,
        "Parts that the draft model's or head's weights are split into over the target's mesh; 1 gives every device "
        "all of them. Default: None, as many as the target's.",
        expected="1, or the target's MeshConfig.model",
        remedy="leave the field out to split the drafter as the target is",
        ge=1,
    )
    max_model_len: Integer | None = _setting(
        None,
        "The longest context in tokens that the draft model reads; a row beyond it decodes without drafts. Default: "
        "what the draft and the target model allow.",
        expected="an integer >= 1, in tokens",
        remedy="give the draft model's longest context, else leave the field out",
        ge=1,
    )
    speculative_token_map: NonEmptyText | None = _setting(
        None,
        "A JSON file with the list of the only token ids to be drafted, frequent ones, for drafters whose output head "
        "spans the target's vocabulary: only these columns of it are read, which makes a draft cheaper and a token "
        "beyond them a rejection (SGLang's name; FR-Spec, arXiv 2502.14856). Default: token_map.json beside the "
        "drafter's weights, where there is one.",
        expected="the path of a JSON file",
        remedy="`specjax export` writes one beside heads whose loss looked at frequent tokens; or leave the field out",
    )

    # How it drafts
    num_speculative_tokens: NumDrafts = _setting(
        2,
        "Drafts proposed for each row in a round, in tokens, or 'auto': as many as pay, by what rounds cost at the "
        "batch size and by how many drafts were accepted so far, none where plain decoding is faster. Default: what "
        "the checkpoint of a head names, else 2.",
        expected="an integer >= 1, or 'auto'",
        remedy="give the number of drafts a round; to decode without drafts pass config=None to SpeculativeDecoder",
    )
    draft_sample_method: DraftSampleMethod = _setting(
        None,
        "How the draft model picks its tokens: 'greedy' takes the most probable, 'probabilistic' samples with the "
        "row's sampling parameters. Default: 'probabilistic' for a draft model and 'hybrid', 'greedy' for n-grams, "
        "which have no probabilities, and for the rules 'relaxed', 'strict' and 'typical-acceptance' (the default rule "
        "of heads).",
        expected="'greedy' or 'probabilistic' ('ngram' and 'relaxed' have only 'greedy')",
        remedy="name one of them or leave the field out",
    )
    draft_confidence_threshold: Rate | None = _setting(
        None,
        "A row's drafts of a round end with the first whose probability of being reached and accepted is below this, "
        "as the drafter sees it: the product of the largest probabilities (at temperature 1) of its laws up to there. "
        "A draft that is made is scored too, unless this probability is below a quarter of the threshold. Rounds then "
        "draft, and the target scores, little more than is promising; num_speculative_tokens is the most. "
        "(transformers' assistant_confidence_threshold looks at each token by itself.) Default: None, all are made.",
        expected="a number in [0, 1], a probability",
        remedy="0.3 to 0.5 suits heads where a wider window costs time, as on CPU; sampled drafts want less",
    )
    prompt_lookup_min: Integer | None = _setting(
        None,
        "The shortest n-gram that is looked up, in tokens. Default: prompt_lookup_max, or 5 where neither is given. "
        "n-grams and hybrid only.",
        expected="an integer >= 1 and <= prompt_lookup_max",
        remedy="give both in order, or leave one out to make them equal",
        ge=1,
    )
    prompt_lookup_max: Integer | None = _setting(
        None,
        "The longest n-gram that is looked up, in tokens; longer ones are tried first. Default: prompt_lookup_min, "
        "or 5 where neither is given. n-grams and hybrid only.",
        expected="an integer >= 1 and >= prompt_lookup_min",
        remedy="give both in order, or leave one out to make them equal",
        ge=1,
    )

    # What is accepted
    rejection_sampling_strategy: RejectionSamplingStrategy = _setting(
        None,
        "The acceptance rule. Lossless ones keep the target's distribution: 'residual' (other names 'probabilistic', "
        "'standard') weighs the target's probability of a draft against the drafter's; 'block' weighs a round's drafts "
        "together and on average accepts at least as many; 'typical-acceptance' (MAX's meaning, not Medusa's) samples "
        "the target at every position and accepts a draft that equals the sample; 'strict' is the same law under "
        "vLLM's name; 'greedy' accepts the target's most probable token and is lossless at temperature 0. Lossy: "
        "'logit-comparison' accepts a draft whose own logit in the draft model is at most its logit in the target; "
        "'medusa-typical' one that is probable enough for the target's entropy; 'relaxed' one close to the target's "
        "most probable token; 'synthetic' tosses a coin, for benchmarks. Default: 'synthetic' if "
        "synthetic_acceptance_rate is given, else 'typical-acceptance' for 'eagle', 'eagle3' and "
        "'mtp', and 'residual' for other methods.",
        expected="'greedy', 'residual', 'typical-acceptance', 'strict', 'block', 'logit-comparison', 'medusa-typical', "
        "'relaxed' or 'synthetic'",
        remedy="name one of them or leave the field out",
    )
    synthetic_acceptance_rate: Rate | None = _setting(
        None,
        "The mean over a round's positions of the probability that all drafts up to there are accepted (MAX's "
        "meaning): the accepted part of the drafts. Selects the rule 'synthetic' where none is given. Default: None. "
        "'synthetic' only, which needs one of the three synthetic fields.",
        expected="a number in [0, 1]",
        remedy="0 accepts no drafts, 1 all of them",
    )
    synthetic_acceptance_rates: tuple[Rate, ...] | None = _setting(
        None,
        "The unconditional probability for each i in 1..num_speculative_tokens that at least i drafts are accepted "
        "(vLLM's meaning). Default: None. 'synthetic' only.",
        expected="a list of num_speculative_tokens numbers in [0, 1], none larger than the one before",
        remedy="give one for each draft of a round, and num_speculative_tokens to match",
    )
    synthetic_acceptance_length: Number | None = _setting(
        None,
        "The mean tokens of a round, the one that follows the accepted drafts included (vLLM's meaning). Default: "
        "None. 'synthetic' only.",
        expected="a number in [1, num_speculative_tokens + 1], in tokens",
        remedy="1 accepts no drafts, num_speculative_tokens + 1 all of them; raise num_speculative_tokens for more",
        ge=1,
        allow_inf_nan=False,
    )
    relaxed_topk: Integer | None = _setting(
        None,
        "How many of the target's most probable tokens are accepted at most, in tokens. Default: 10. 'relaxed' only.",
        expected="an integer >= 1, in tokens",
        remedy="1 accepts the most probable token alone",
        ge=1,
    )
    relaxed_probability_delta: Rate | None = _setting(
        None,
        "Accepted tokens have at least the probability of the most probable one minus this (relaxed_delta in MAX). "
        "Default: 0.6 where relaxed_log_delta is not given. 'relaxed' only.",
        expected="a number in [0, 1], a difference of probabilities",
        remedy="0 accepts the most probable token alone, 1 all of the relaxed_topk",
    )
    relaxed_log_delta: Number | None = _setting(
        None,
        "Accepted tokens have at least the log-probability of the most probable one minus this, in nats (relaxed_delta "
        "in TensorRT-LLM). Default: None, relaxed_probability_delta decides. 'relaxed' only.",
        expected="a finite number >= 0, a difference of natural logarithms of probabilities",
        remedy="0 accepts the most probable token alone; give relaxed_probability_delta or this one",
        ge=0,
        allow_inf_nan=False,
    )
    posterior_threshold: Number | None = _setting(
        None,
        "A draft is accepted if the target's probability of it exceeds the smaller of this and posterior_alpha * "
        "exp(-entropy of the target). Default: 0.09. 'medusa-typical' only.",
        expected="a number in (0, 1]",
        remedy="smaller ones accept more; leave the field out for Medusa's 0.09",
        gt=0,
        le=1,
        allow_inf_nan=False,
    )
    posterior_alpha: Number | None = _setting(
        None,
        "The factor of exp(-entropy of the target) that posterior_threshold describes. Default: 0.3. "
        "'medusa-typical' only.",
        expected="a finite number > 0",
        remedy="smaller ones accept more; leave the field out for Medusa's 0.3",
        gt=0,
        allow_inf_nan=False,
    )

    # How it runs
    enforce_eager: bool = _setting(
        False,
        "Runs under jax.disable_jit, operation by operation: slow, for debugging. Default: False.",
        expected="True or False",
        remedy="leave the field out to run compiled",
    )

    # Where it is read from
    config_file: NonEmptyText | None = _setting(
        None,
        "A YAML file to read fields from; arguments win over it. Left out of dumps, which hold what was read. "
        "Default: None.",
        expected="the path of a YAML file that holds a mapping",
        remedy="check the path and the file's content",
        exclude=True,
    )
    section_name: NonEmptyText | None = _setting(
        None,
        "The section of config_file to read. Left out of dumps. Default: 'speculative_config' where the file has it, "
        "else the whole file.",
        expected="the name of a section of config_file",
        remedy="give config_file as well, or leave section_name out",
        exclude=True,
    )

    METHOD_FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "ngram": ("prompt_lookup_min", "prompt_lookup_max"),
        "draft_model": (*_OF_A_MODEL, "assistant_early_exit"),
        "eagle": _OF_A_MODEL,
        "eagle3": _OF_A_MODEL,
        "mtp": _OF_A_MODEL,
        "hybrid": (*_OF_A_MODEL, "prompt_lookup_min", "prompt_lookup_max"),
    }
    """The fields of each method; those that no method lists belong to all."""

    STRATEGY_FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "medusa-typical": ("posterior_threshold", "posterior_alpha"),
        "relaxed": ("relaxed_topk", "relaxed_probability_delta", "relaxed_log_delta"),
        "synthetic": ("synthetic_acceptance_rate", "synthetic_acceptance_rates", "synthetic_acceptance_length"),
    }
    """The fields of each acceptance rule; those that no rule lists belong to all."""

    @classmethod
    def _resolve(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = cls._rename(values)
        cls._refuse_unknown(given)
        # A flag among the arguments, even a false one, wins over the file.
        section = cls._read_section(given, flags=[key for key in FLAG_ALIASES if values.get(key) is not None])
        values = {**section, **given}
        cls._resolve_method(values)
        cls._resolve_strategy(values)
        cls._refuse_foreign(values, "method", cls.METHOD_FIELDS)
        cls._refuse_foreign(values, "rejection_sampling_strategy", cls.STRATEGY_FIELDS)
        cls._resolve_draft_sampling(values)
        if values["method"] in ("ngram", "hybrid"):
            cls._resolve_ngram(values)
        strategy = values["rejection_sampling_strategy"]
        cls._refuse_unsteady(values)
        if strategy == "medusa-typical":
            values.setdefault("posterior_threshold", DEFAULT_POSTERIOR_THRESHOLD)
            values.setdefault("posterior_alpha", DEFAULT_POSTERIOR_ALPHA)
        elif strategy == "relaxed":
            cls._resolve_relaxed(values)
        elif strategy == "synthetic":
            cls._refuse_all_but_one_synthetic(values)
        return values

    @classmethod
    def _refuse_foreign(cls, values: Mapping[str, Any], key: str, table: Mapping[str, tuple[str, ...]]) -> None:
        """Refuses the fields that `table` gives only to other values of the field `key` than the chosen one."""
        for name in dict.fromkeys(itertools.chain.from_iterable(table.values())):
            owners = [owner for owner, names in table.items() if name in names]
            if name in values and values[key] not in owners:
                raise ConfigError(
                    f"{cls.__name__}.{name}={values[name]!r}: expected no value for {key}={values[key]!r}, it belongs "
                    f"to {', '.join(map(repr, owners))}; leave it out, or choose another {key}."
                )

    @classmethod
    def _resolve_method(cls, values: dict[str, Any]) -> None:
        names_ngram = values.get("model") == "ngram"
        if "method" not in values:
            if "model" not in values and "assistant_early_exit" not in values:
                cls._refuse("method", None)
            values["method"] = "ngram" if names_ngram else method_of(str(values.get("model", "")))
        method = values["method"]
        if not isinstance(method, str) or method not in cls.METHOD_FIELDS:
            cls._refuse_absent_method(method)
            text = str(method)
            remedy = _nearest(text, (*cls.METHOD_FIELDS, *VALUE_ALIASES["method"])) + "name one of them"
            cls._refuse("method", method, remedy)
        if method == "draft_model" and "model" not in values and "assistant_early_exit" not in values:
            cls._refuse("model", None)
        if "revision" in values and "model" not in values and method != "ngram":
            cls._refuse("revision", values["revision"], "no model is given that it could be of: leave it out")
        if names_ngram:
            if method != "ngram":
                cls._refuse("model", "ngram", "it selects method='ngram': write './ngram' for a directory of that name")
            del values["model"]

    @classmethod
    def _resolve_strategy(cls, values: dict[str, Any]) -> None:
        name, method = "rejection_sampling_strategy", values["method"]
        default = "synthetic" if "synthetic_acceptance_rate" in values else DEFAULT_STRATEGY[method]
        strategy = values.setdefault(name, default)
        strategies = get_args(RejectionSamplingStrategy)
        if strategy not in strategies:
            nearest = _nearest(str(strategy), (*strategies, *VALUE_ALIASES[name]))
            cls._refuse(name, strategy, nearest + "name one of them or leave the field out")
        if strategy == "logit-comparison" and method in ("ngram", "hybrid"):
            cls._refuse(name, strategy, "n-grams have no logits to compare: use method='draft_model' or another rule")

    @classmethod
    def _resolve_draft_sampling(cls, values: dict[str, Any]) -> None:
        reason = None
        if values["method"] == "ngram":
            reason = "n-grams have no probabilities to sample"
        elif values["rejection_sampling_strategy"] == "relaxed":
            reason = "rejection_sampling_strategy='relaxed' takes the draft model's most probable tokens"
        greedily = reason or values["rejection_sampling_strategy"] in TOKEN_MATCHING
        chosen = values.setdefault("draft_sample_method", "greedy" if greedily else "probabilistic")
        if reason and chosen == "probabilistic":
            cls._refuse("draft_sample_method", chosen, f"{reason}: leave it out or give 'greedy'")

    @classmethod
    def _refuse_unsteady(cls, values: Mapping[str, Any]) -> None:
        """Refuses draft_confidence_threshold where something else decides how many drafts a round has."""
        name = "draft_confidence_threshold"
        if not values.get(name):
            return
        if values.get("num_speculative_tokens") == AUTO:
            cls._refuse(name, values[name], "num_speculative_tokens='auto' decides that itself: give one of the two")
        if values["rejection_sampling_strategy"] == "synthetic":
            cls._refuse(name, values[name], "'synthetic' is told what is accepted of a number of drafts: leave it out")

    @classmethod
    def _resolve_relaxed(cls, values: dict[str, Any]) -> None:
        values.setdefault("relaxed_topk", DEFAULT_RELAXED_TOPK)
        if "relaxed_log_delta" not in values:
            values.setdefault("relaxed_probability_delta", DEFAULT_RELAXED_PROBABILITY_DELTA)
        elif "relaxed_probability_delta" in values:
            other = f"relaxed_probability_delta={values['relaxed_probability_delta']!r}"
            remedy = f"{other} says the same in another unit: give one of the two, and None for the other"
            cls._refuse("relaxed_log_delta", values["relaxed_log_delta"], remedy)

    @classmethod
    def _refuse_all_but_one_synthetic(cls, values: Mapping[str, Any]) -> None:
        if values.get("num_speculative_tokens") == AUTO:
            cls._refuse(
                "num_speculative_tokens", AUTO, "'synthetic' is told what is accepted of a number of drafts: give it"
            )
        names = cls.STRATEGY_FIELDS["synthetic"]
        given = [name for name in names if name in values]
        if not given:
            remedy = f"'synthetic' needs to be told how much it accepts: give one of {', '.join(names)}"
            cls._refuse("rejection_sampling_strategy", "synthetic", remedy)
        if len(given) > 1:
            first, second = given[:2]
            remedy = f"{first}={values[first]!r} is given too: give one of the two, and None for the other"
            cls._refuse(second, values[second], remedy)

    @classmethod
    def _resolve_ngram(cls, values: dict[str, Any]) -> None:
        shortest, longest = values.get("prompt_lookup_min"), values.get("prompt_lookup_max")
        values["prompt_lookup_min"] = next(n for n in (shortest, longest, DEFAULT_PROMPT_LOOKUP) if n is not None)
        values["prompt_lookup_max"] = next(n for n in (longest, shortest, DEFAULT_PROMPT_LOOKUP) if n is not None)

    @pydantic.field_validator("prompt_lookup_max")
    @classmethod
    def _in_order(cls, longest: int | None, info: pydantic.ValidationInfo) -> int | None:
        shortest = info.data.get("prompt_lookup_min")
        if longest is not None and shortest is not None and longest < shortest:
            raise ValueError("prompt_lookup_max is less than prompt_lookup_min")
        return longest

    @pydantic.field_validator("synthetic_acceptance_rates")
    @classmethod
    def _one_for_each_draft(cls, rates: tuple[float, ...] | None, info: pydantic.ValidationInfo) -> Any:
        if rates is not None:
            if len(rates) != info.data.get("num_speculative_tokens", len(rates)):
                raise ValueError("there are not num_speculative_tokens rates")
            if any(later > earlier for earlier, later in itertools.pairwise(rates)):
                raise ValueError("a rate is larger than the one before")
        return rates

    @pydantic.field_validator("synthetic_acceptance_length")
    @classmethod
    def _within_a_round(cls, length: float | None, info: pydantic.ValidationInfo) -> float | None:
        if length is not None and length > info.data.get("num_speculative_tokens", length) + 1:
            raise ValueError("a round has no more than num_speculative_tokens + 1 tokens")
        return length

    @classmethod
    def _rename(cls, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Drops what is None, gives fields and values their name here, and refuses what this version does not have."""
        renamed: dict[str, Any] = {}
        keys: dict[str, str] = {}  # name here -> name that it was given by
        if values.get("tensor_parallel_size") is not None:
            raise ConfigError(
                f"{cls.__name__}.tensor_parallel_size={values['tensor_parallel_size']!r}{where}: expected "
                "draft_tensor_parallel_size, the field for the draft model; the target's parallelism is MeshConfig's, "
                "which load_target and SpeculativeDecoder take."
            )
        for key, value in values.items():
            name = KEY_ALIASES.get(key, key)
            if key in FLAG_ALIASES:
                name, chosen = FLAG_ALIASES[key]
                value = chosen if cls._read_flag(key, value, where) else None
            if name in NOT_YET and value is not None:
                raise ConfigError(
                    f"{cls.__name__}.{name}={value!r}{where}: expected no value, the feature ({NOT_YET[name]}) is not "
                    "in this version of SpecJAX yet; leave the field out. The fields in this version are: "
                    f"{', '.join(cls.model_fields)}."
                )
            if value is None and (name in cls.model_fields or name in NOT_YET or name == "tensor_parallel_size"):
                continue
            if isinstance(value, str):
                if name == "method" and value.endswith("_mtp"):
                    message = f"{cls.__name__}.{key}={value!r}: is an old name of 'mtp' in vLLM; write method='mtp'."
                    warnings.warn(message, stacklevel=4)
                    value = "mtp"
                value = VALUE_ALIASES.get(name, {}).get(value, value)
            if name in renamed and renamed[name] != value:
                raise ConfigError(
                    f"{cls.__name__}.{key}={values[key]!r}{where}: expected the same as "
                    f"{keys[name]}={values[keys[name]]!r}, which sets the same field; give one of the two."
                )
            renamed[name] = value
            keys.setdefault(name, key)
        return renamed

    @classmethod
    def _read_flag(cls, key: str, value: Any, where: str) -> bool:
        try:
            return value is not None and _FLAG.validate_python(value)
        except pydantic.ValidationError:
            pass  # so that no pydantic traceback is chained to what follows
        name, chosen = FLAG_ALIASES[key]
        raise ConfigError(
            f"{cls.__name__}.{key}={value!r}{where}: expected True or False; "
            f"leave it out, or set {name}={chosen!r}, which is what True stands for."
        )

    @classmethod
    def _refuse_absent_method(cls, method: Any) -> None:
        feature = NOT_YET.get(f"method={method}")
        if feature is not None:
            remedy = f"{method!r} needs a feature ({feature}) that is not in this version of SpecJAX yet"
            cls._refuse("method", method, f"{remedy}: choose one that is (speculative_method names this field too)")

    @classmethod
    def _read_section(cls, given: Mapping[str, Any], flags: Sequence[str] = ()) -> dict[str, Any]:
        """The fields in the section of `config_file` but for `flags`, named as here; none where no file is given."""
        path, name = given.get("config_file"), given.get("section_name")
        if path is None:
            if name is not None:
                cls._refuse("section_name", name)
            return {}
        try:
            root = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            cls._refuse("config_file", path, f"reading it failed with: {error}")
        if not isinstance(root, dict):
            cls._refuse("config_file", path, f"its root is {root!r}: write one 'field: value' a line")
        if name is None:
            name = DEFAULT_SECTION if DEFAULT_SECTION in root else None
        elif name not in root:
            cls._refuse("section_name", name, f"the sections of {path} are: {', '.join(map(str, root)) or 'none'}")
        section = root if name is None else root[name]
        where = f" (in {path}" + (")" if name is None else f", section {name!r})")
        if not isinstance(section, dict):
            cls._refuse("section_name", name, f"it holds {section!r}: write one 'field: value' a line below its name")
        fields = cls._rename({str(key): value for key, value in section.items() if key not in flags}, where)
        cls._refuse_unknown(fields, where)
        for nested in ("config_file", "section_name"):
            if nested in fields:
                cls._refuse(nested, fields[nested], f"a file cannot name another one{where}: leave it out")
        return fields

    @classmethod
    def _known_names(cls) -> list[str]:
        return [*cls.model_fields, *KEY_ALIASES, *FLAG_ALIASES]

    @property
    def max_drafts(self) -> int:
        """num_speculative_tokens, or the most that "auto" takes where no checkpoint says it."""
        drafts = self.num_speculative_tokens
        return MOST_AUTO_DRAFTS if drafts == AUTO else drafts

    def is_standalone(self) -> bool:
        """Whether a draft model of its own drafts (MAX's name)."""
        return self.method == "draft_model"

    def uses_draft_model(self) -> bool:
        """Whether a draft model of its own drafts (vLLM's name)."""
        return self.method == "draft_model"

    def is_eagle(self) -> bool:
        """Whether an EAGLE head drafts (MAX's name)."""
        return self._has("method", "eagle", "eagle3")

    def use_eagle(self) -> bool:
        """Whether the drafter reads the target's features: EAGLE heads, MTP and DFlash (vLLM's name)."""
        return self._has("method", "eagle", "eagle3", "mtp", "dflash")

    def is_mtp(self) -> bool:
        """Whether the target's own multi-token-prediction heads draft."""
        return self._has("method", "mtp")

    def use_dflash(self) -> bool:
        """Whether a DFlash head drafts."""
        return self._has("method", "dflash")

    def uses_extract_hidden_states(self) -> bool:
        """Whether hidden states are stored instead of tokens drafted."""
        return self._has("method", "extract_hidden_states")

    def use_ngram_gpu(self) -> bool:
        """Whether n-grams are looked up on the device, as they always are here."""
        return self.method == "ngram"

    def uses_greedy_rejection(self) -> bool:
        """Whether a draft is accepted when it is the target's most probable token."""
        return self.rejection_sampling_strategy == "greedy"

    def uses_logit_comparison(self) -> bool:
        """Whether a draft is accepted when its own logit in the draft model is at most its logit in the target."""
        return self._has("rejection_sampling_strategy", "logit-comparison")

    def uses_synthetic_acceptance(self) -> bool:
        """Whether a coin accepts drafts."""
        return self._has("rejection_sampling_strategy", "synthetic")

    def uses_typical_acceptance(self) -> bool:
        """Whether the target samples every position and a draft is accepted when it equals the sample (MAX's name)."""
        return self._has("rejection_sampling_strategy", "typical-acceptance")

    def _has(self, name: str, *values: str) -> bool:
        return getattr(self, name) in values

    def compute_hash(self) -> str:
        """A key of 16 hex digits of what changes the compiled graph (`enforce_eager` does not, it compiles nothing)."""
        graph = self.model_dump(exclude={"enforce_eager", "config_file", "section_name"})
        return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:16]


class SamplingParams(_Settings):
    """How tokens are drawn from the target, for one row; the same with and without speculation.

    Operations happen in this order: logit_bias, repetition_penalty, frequency_penalty, presence_penalty, temperature,
    top_k, top_p, min_p, draw. The penalties see the tokens that stand before the one that is drawn.

    Raises:
      ConfigError: a field is unknown or wrong.

    Example:
      >>> SamplingParams(temperature=0.8, stop="END").stop
      ('END',)
    """

    # The logits
    logit_bias: Annotated[tuple[tuple[TokenId, Bias], ...], BeforeValidator(_read_pairs), _none_as(())] = _setting(
        (),
        "Added to the logits of these token ids: a mapping of ids to numbers, pairs of both, or None. Stored as pairs "
        "in the order of the ids. Default: none.",
        expected="a mapping of token ids >= 0 to numbers in [-100, 100], no id twice",
        remedy="-100 all but bans a token, 100 all but forces it",
    )
    repetition_penalty: Number = _setting(
        1.0,
        "Divides the positive logits and multiplies the negative ones of tokens in the prompt or the output. No unit. "
        "Default: 1.0, off.",
        expected="a number in [0.01, 100]",
        remedy="1 is off, larger ones repeat less",
        ge=0.01,
        le=100,
        allow_inf_nan=False,
    )
    frequency_penalty: Number = _setting(
        0.0,
        "Subtracted from a token's logit once for each time that it occurs in the output. Default: 0.0, off.",
        expected="a number in [-2, 2]",
        remedy="0 is off, larger ones repeat less",
        ge=-2,
        le=2,
        allow_inf_nan=False,
    )
    presence_penalty: Number = _setting(
        0.0,
        "Subtracted from a token's logit once if it occurs in the output. Default: 0.0, off.",
        expected="a number in [-2, 2]",
        remedy="0 is off, larger ones repeat less",
        ge=-2,
        le=2,
        allow_inf_nan=False,
    )

    # The distribution
    temperature: Number = _setting(
        0.0,
        "Divides the logits; below 1e-5 the most probable token is taken. No unit. Default: 0.0, greedy.",
        expected="a finite number >= 0",
        remedy="0 is greedy, 1 is the model's own distribution",
        ge=0,
        allow_inf_nan=False,
    )
    top_k: Integer = _setting(
        0,
        "Keeps this many most probable tokens; 0 and -1 keep all and are stored as 0. Default: 0.",
        expected="an integer >= 1, or 0 or -1 for off",
        remedy="give the number of tokens to keep",
        ge=-1,
    )
    top_p: Number = _setting(
        1.0,
        "Keeps the fewest most probable tokens whose probabilities sum to at least this. Default: 1.0, all.",
        expected="a number in (0, 1]",
        remedy="1 keeps all tokens",
        gt=0,
        le=1,
        allow_inf_nan=False,
    )
    min_p: Number = _setting(
        0.0,
        "Keeps tokens at least this times as probable as the most probable one. Default: 0.0, all.",
        expected="a number in [0, 1]",
        remedy="0 keeps all tokens",
        ge=0,
        le=1,
        allow_inf_nan=False,
    )

    # The end
    max_tokens: Integer = _setting(
        128,
        "The most new tokens. Default: 128.",
        expected="an integer >= 1, in tokens",
        remedy="give the most tokens to generate",
        ge=1,
    )
    stop: Annotated[
        tuple[NonEmptyText, ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        _none_as(()),
    ] = _setting(
        (),
        "Texts that end the generation and are cut from it, with all that follows: one text, a list, or None. "
        "Default: none.",
        expected="a non-empty text or a list of them",
        remedy="leave the field out to stop at the model's own end tokens alone",
    )
    stop_token_ids: Annotated[tuple[TokenId, ...], _none_as(())] = _setting(
        (),
        "Token ids that end the generation besides the model's own end tokens. Default: none.",
        expected="a list of integers >= 0",
        remedy="give token ids of the target's vocabulary",
    )
    ignore_eos: bool = _setting(
        False,
        "Goes on behind the model's own end tokens; stop_token_ids still end it. Default: False.",
        expected="True or False",
        remedy="leave the field out to stop at the model's own end tokens",
    )

    # What is returned
    logprobs: Annotated[bool, BeforeValidator(_refuse_integer)] = _setting(
        False,
        "Returns the target's log-probability of every output token (logprobs=0 in vLLM). Default: False.",
        expected="True or False",
        remedy="True returns the log-probability of each output token, those of other tokens are not returned; leave "
        "the field out to return tokens alone",
    )

    # The randomness
    seed: Annotated[Integer, _none_as(0)] = _setting(
        0,
        "Seeds the row's random numbers. Equal seeds give equal texts for equal prompts: give each row its own for "
        "different samples. Default (also for None): 0.",
        expected="an integer in [0, 2**63)",
        remedy="leave it out for 0",
        ge=0,
        lt=2**63,
    )

    @pydantic.field_validator("top_k")
    @classmethod
    def _off_is_zero(cls, top_k: int) -> int:
        return max(top_k, 0)

    @pydantic.field_validator("logit_bias")
    @classmethod
    def _sorted_by_token(cls, pairs: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a token id has two biases")
        return tuple(sorted(pairs))

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def adjusts_logits(self) -> bool:
        """Whether a bias or a penalty changes the logits before the temperature does."""
        penalties = self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
        return penalties or any(bias != 0.0 for _, bias in self.logit_bias)


class MeshConfig(_Settings):
    """Over how many devices a decoder's arrays are spread: data times model of them.

    Rows of a batch are split over data; weights, KV heads and vocabulary over model.

    Raises:
      ConfigError: a field is unknown or wrong.

    Example:
      >>> MeshConfig(data=2, model=4).num_devices
      8
    """

    data: Integer = _setting(
        1,
        "Parts that the rows of a batch are split into. Default: 1.",
        expected="an integer >= 1",
        remedy="give a divisor of the batch size: a smaller batch is whole on every device",
        ge=1,
    )
    model: Integer = _setting(
        1,
        "Parts that weights, caches and logits are split into. Default: 1.",
        expected="an integer >= 1",
        remedy="give a divisor of the target's heads, MLP width and vocabulary",
        ge=1,
    )

    @property
    def num_devices(self) -> int:
        """Devices that it takes."""
        return self.data * self.model
