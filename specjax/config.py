"""Settings of speculation and of sampling: frozen, validated, hashable.

Both classes refuse unknown keys and read text ("3" is 3). Whatever a user gets wrong is reported as a `ConfigError`
that names the field, the value, what was expected and what to do. A field is accepted only if this version acts on
it; `NOT_YET` lists the others.
"""

import difflib
import hashlib
import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self

import pydantic
import yaml
from pydantic import BeforeValidator, ConfigDict, Field

from specjax.errors import ConfigError

Method = Literal["ngram", "draft_model"]
RejectionSamplingStrategy = Literal["greedy", "residual"]
DraftSampleMethod = Literal["greedy", "probabilistic"]

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this one decode greedily: dividing float32 logits by less overflows."""

DEFAULT_SECTION = "speculative_config"
"""The section read from a YAML file that has it, when `section_name` is not given."""

DEFAULT_PROMPT_LOOKUP = 5
"""Tokens in an n-gram when neither `prompt_lookup_min` nor `prompt_lookup_max` is given."""

KEY_ALIASES = {"speculative_method": "method", "rejection_sample_method": "rejection_sampling_strategy"}
"""Names that MAX (the first) and vLLM (the second) give to a field, and its name here."""

VALUE_ALIASES = {
    "method": {"standalone": "draft_model", "ngram_gpu": "ngram"},
    "rejection_sampling_strategy": {"probabilistic": "residual", "standard": "residual"},
}
"""Other names of values: "standalone" is MAX's, the rest vLLM's. Here n-grams are always looked up on the device."""

_ACCEPTANCE_RULES = "acceptance rules other than greedy and residual"
_EAGLE = "EAGLE draft heads"
_PARALLEL = "parallel drafting (P-EAGLE, PARD, DFlash)"
_SUFFIX = "suffix decoding"
_SYNTHETIC = "synthetic acceptance"

NOT_YET = {
    "method=eagle": _EAGLE,
    "method=eagle3": _EAGLE,
    "method=mtp": "multi-token-prediction heads",
    "method=medusa": "Medusa heads",
    "method=mlp_speculator": "MLP speculators",
    "method=suffix": _SUFFIX,
    "method=dflash": _PARALLEL,
    "method=extract_hidden_states": "extraction of hidden states",
    "rejection_sampling_strategy=strict": _ACCEPTANCE_RULES,
    "rejection_sampling_strategy=block": _ACCEPTANCE_RULES,
    "rejection_sampling_strategy=typical-acceptance": _ACCEPTANCE_RULES,
    "rejection_sampling_strategy=logit-comparison": _ACCEPTANCE_RULES,
    "rejection_sampling_strategy=medusa-typical": _ACCEPTANCE_RULES,
    "rejection_sampling_strategy=relaxed": _ACCEPTANCE_RULES,
    "rejection_sampling_strategy=synthetic": _SYNTHETIC,
    "synthetic_acceptance_rate": _SYNTHETIC,
    "synthetic_acceptance_rates": _SYNTHETIC,
    "synthetic_acceptance_length": _SYNTHETIC,
    "draft_tensor_parallel_size": "tensor parallelism of the draft model",
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


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a bool is not a number")
    return value


def _read_integer(value: Any) -> Any:
    _refuse_bool(value)
    return operator.index(value) if hasattr(value, "__index__") else value  # numpy integers


def _read_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _none_as(default: Any) -> BeforeValidator:
    return BeforeValidator(lambda value: default if value is None else value)


Integer = Annotated[int, BeforeValidator(_read_integer)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]
NonEmptyText = Annotated[str, BeforeValidator(_read_path), Field(min_length=1)]


def _setting(default: Any, description: str, *, expected: str, remedy: str, **constraints: Any) -> Any:
    """A pydantic field that knows how to say what it expects (`expected`) and what to do about it (`remedy`)."""
    advice: dict[str, Any] = {"expected": expected, "remedy": remedy}
    return Field(default=default, description=description, json_schema_extra=advice, **constraints)


def _nearest(name: str, names: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {matches[0]!r}? " if matches else ""


class _Settings(pydantic.BaseModel):
    """Frozen settings whose every validation failure is a `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
            names = cls._known_names()
            raise ConfigError(
                f"{cls.__name__}.{unknown}={values[unknown]!r}{where}: expected the name of a field; "
                f"{_nearest(unknown, names)}The fields are: {', '.join(cls.model_fields)}."
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
    `prompt_lookup_min` and `prompt_lookup_max` hold what was resolved, never None. `speculative_method` (MAX) is
    another name of `method`, and `rejection_sample_method` (vLLM) of `rejection_sampling_strategy`; `KEY_ALIASES` and
    `VALUE_ALIASES` list them.

    Raises:
      ConfigError: a field is unknown, wrong, meaningless for the method, or not in this version yet.

    Example:
      >>> SpeculativeConfig(method="ngram", num_speculative_tokens="5").num_speculative_tokens
      5

    Reference: rejection sampling, Leviathan et al. 2023 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318).
    """

    # What drafts
    method: Method = _setting(
        None,
        "The drafter: 'ngram' copies what followed an earlier occurrence of the last tokens, 'draft_model' runs a "
        "smaller language model. Default: 'ngram' if model is 'ngram', else 'draft_model' if a model is given.",
        expected="'ngram' or 'draft_model' (or their other names 'ngram_gpu' and 'standalone')",
        remedy="name one of them, or give a model; to decode without drafts pass config=None to SpeculativeDecoder",
    )
    model: NonEmptyText | None = _setting(
        None,
        "The draft model: a directory, hub id or named asset whose vocabulary equals the target's. 'ngram' selects "
        "the n-gram method and is then stored as None. Default: None.",
        expected="the directory, hub id or asset name of a draft model",
        remedy="method='draft_model' needs one of the target's vocabulary, method='ngram' needs none",
    )
    revision: NonEmptyText | None = _setting(
        None,
        "The branch, tag or commit of the draft model on the hub. Default: the hub's default branch.",
        expected="the name of a branch, tag or commit",
        remedy="give one for a draft model from the hub, else leave the field out",
    )
    max_model_len: Integer | None = _setting(
        None,
        "The longest context in tokens that the draft model reads; a row beyond it decodes without drafts. Default: "
        "what the draft and the target model allow.",
        expected="an integer >= 1, in tokens",
        remedy="give the draft model's longest context, else leave the field out",
        ge=1,
    )

    # How it drafts
    num_speculative_tokens: Integer = _setting(
        2,
        "Drafts proposed for each row in a round, in tokens. Default: 2.",
        expected="an integer >= 1",
        remedy="give the number of drafts a round; to decode without drafts pass config=None to SpeculativeDecoder",
        ge=1,
    )
    draft_sample_method: DraftSampleMethod = _setting(
        None,
        "How the draft model picks its tokens: 'greedy' takes the most probable, 'probabilistic' samples with the "
        "row's sampling parameters. Default: 'probabilistic' for a draft model, 'greedy' for n-grams, which have no "
        "probabilities.",
        expected="'greedy' or 'probabilistic' ('ngram' has only 'greedy')",
        remedy="name one of them or leave the field out",
    )
    prompt_lookup_min: Integer | None = _setting(
        None,
        "The shortest n-gram that is looked up, in tokens. Default: prompt_lookup_max, or 5 where neither is given. "
        "n-grams only.",
        expected="an integer >= 1 and <= prompt_lookup_max",
        remedy="give both in order, or leave one out to make them equal",
        ge=1,
    )
    prompt_lookup_max: Integer | None = _setting(
        None,
        "The longest n-gram that is looked up, in tokens; longer ones are tried first. Default: prompt_lookup_min, "
        "or 5 where neither is given. n-grams only.",
        expected="an integer >= 1 and >= prompt_lookup_min",
        remedy="give both in order, or leave one out to make them equal",
        ge=1,
    )

    # What is accepted
    rejection_sampling_strategy: RejectionSamplingStrategy = _setting(
        None,
        "The acceptance rule: 'residual' (other names 'probabilistic', 'standard') keeps the target's distribution "
        "exactly, 'greedy' accepts the target's most probable token. Default: 'residual'.",
        expected="'greedy' or 'residual'",
        remedy="name one of them or leave the field out",
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
        "draft_model": ("model", "revision", "max_model_len"),
    }
    """Fields that mean something for one method alone."""

    @classmethod
    def _resolve(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = cls._rename(values)
        cls._refuse_unknown(given)
        section = cls._read_section(given)
        values = {**section, **given}
        cls._resolve_method(values)
        values.setdefault("rejection_sampling_strategy", "residual")
        for name in ("method", "rejection_sampling_strategy"):
            cls._refuse_absent_value(name, values[name])
        method = values["method"]
        for owner, names in cls.METHOD_FIELDS.items():
            for name in names:
                if owner != method and name in values:
                    cls._refuse(name, values[name], f"it means nothing for method={method!r}: leave it out")
        if method == "ngram":
            cls._resolve_ngram(values)
        else:
            values.setdefault("draft_sample_method", "probabilistic")
        return values

    @classmethod
    def _resolve_method(cls, values: dict[str, Any]) -> None:
        names_ngram = values.get("model") == "ngram"
        if "method" not in values:
            if "model" not in values:
                cls._refuse("method", None)
            values["method"] = "ngram" if names_ngram else "draft_model"
        method = values["method"]
        if not isinstance(method, str) or method not in cls.METHOD_FIELDS:
            cls._refuse_absent_value("method", method)
            text = str(method)
            remedy = _nearest(text, ("ngram", "draft_model", "ngram_gpu", "standalone")) + "name one of them"
            cls._refuse("method", method, remedy)
        if method == "draft_model" and "model" not in values:
            cls._refuse("model", None)
        if names_ngram:
            if method == "draft_model":
                cls._refuse("model", "ngram", "it selects method='ngram': write './ngram' for a directory of that name")
            del values["model"]

    @classmethod
    def _resolve_ngram(cls, values: dict[str, Any]) -> None:
        if values.setdefault("draft_sample_method", "greedy") == "probabilistic":
            cls._refuse("draft_sample_method", "probabilistic", "n-grams have no probabilities to sample: leave it out")
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

    @classmethod
    def _rename(cls, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Drops what is None, gives fields and values their name here, and refuses what this version does not have."""
        renamed: dict[str, Any] = {}
        if values.get("tensor_parallel_size") is not None:
            raise ConfigError(
                f"{cls.__name__}.tensor_parallel_size={values['tensor_parallel_size']!r}{where}: expected "
                "draft_tensor_parallel_size, the field for the draft model; the target's parallelism is set where "
                f"the target is loaded. {NOT_YET['draft_tensor_parallel_size'].capitalize()} is not in this version "
                "of SpecJAX yet: leave it out."
            )
        for key, value in values.items():
            name = KEY_ALIASES.get(key, key)
            if name in NOT_YET and value is not None:
                raise ConfigError(
                    f"{cls.__name__}.{name}={value!r}{where}: expected no value, the feature ({NOT_YET[name]}) is not "
                    "in this version of SpecJAX yet; leave the field out. The fields in this version are: "
                    f"{', '.join(cls.model_fields)}."
                )
            if value is None and (name in cls.model_fields or name in NOT_YET or name == "tensor_parallel_size"):
                continue
            if isinstance(value, str):
                value = VALUE_ALIASES.get(name, {}).get(value, value)
            if name in renamed and renamed[name] != value:
                raise ConfigError(
                    f"{cls.__name__}.{key}={values[key]!r}{where}: expected the same as {name}={renamed[name]!r}, "
                    "which is the same field; give one of the two."
                )
            renamed[name] = value
        return renamed

    @classmethod
    def _refuse_absent_value(cls, name: str, value: Any) -> None:
        old_mtp = name == "method" and str(value).endswith("_mtp")  # deepseek_mtp and others, of earlier vLLM
        feature = NOT_YET.get(f"{name}={'mtp' if old_mtp else value}")
        if feature is not None:
            alias = next(key for key, field in KEY_ALIASES.items() if field == name)
            remedy = f"{value!r} needs a feature ({feature}) that is not in this version of SpecJAX yet"
            cls._refuse(name, value, f"{remedy}: choose one that is ({alias} is another name of this field)")

    @classmethod
    def _read_section(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields in the section of `config_file`, named as here; none where no file is given."""
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
        fields = cls._rename({str(key): value for key, value in section.items()}, where)
        cls._refuse_unknown(fields, where)
        for nested in ("config_file", "section_name"):
            if nested in fields:
                cls._refuse(nested, fields[nested], f"a file cannot name another one{where}: leave it out")
        return fields

    @classmethod
    def _known_names(cls) -> list[str]:
        return [*cls.model_fields, *KEY_ALIASES, *(key for key in NOT_YET if "=" not in key)]

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
        """Whether a draft is accepted by comparing its logit in the target with that of the most probable token."""
        return self._has("rejection_sampling_strategy", "logit-comparison")

    def uses_typical_acceptance(self) -> bool:
        """Whether a draft is accepted when it is typical of the target's distribution."""
        return self._has("rejection_sampling_strategy", "typical-acceptance")

    def _has(self, name: str, *values: str) -> bool:
        return getattr(self, name) in values

    def compute_hash(self) -> str:
        """A key of 16 hex digits of what changes the compiled graph (`enforce_eager` does not, it compiles nothing)."""
        graph = self.model_dump(exclude={"enforce_eager", "config_file", "section_name"})
        return hashlib.sha256(json.dumps(graph, sort_keys=True).encode()).hexdigest()[:16]


class SamplingParams(_Settings):
    """How tokens are drawn from the target, for one row; the same with and without speculation.

    Operations happen in this order: temperature, top_k, top_p, min_p, draw.

    Raises:
      ConfigError: a field is unknown or wrong.

    Example:
      >>> SamplingParams(temperature=0.8, stop="END").stop
      ('END',)
    """

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
    stop_token_ids: Annotated[tuple[Annotated[int, BeforeValidator(_read_integer), Field(ge=0)], ...], _none_as(())] = (
        _setting(
            (),
            "Token ids that end the generation besides the model's own end tokens. Default: none.",
            expected="a list of integers >= 0",
            remedy="give token ids of the target's vocabulary",
        )
    )
    ignore_eos: bool = _setting(
        False,
        "Goes on behind the model's own end tokens; stop_token_ids still end it. Default: False.",
        expected="True or False",
        remedy="leave the field out to stop at the model's own end tokens",
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

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature < GREEDY_TEMPERATURE
