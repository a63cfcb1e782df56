"""The config.json of the `speculators` format, 0.9: readable by that package and by vLLM, and the other way round."""

import inspect
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, get_origin

import pydantic
from huggingface_hub.errors import StrictDataclassError
from pydantic import BeforeValidator, ConfigDict, Field, InstanceOf, PlainSerializer, SerializeAsAny
from transformers import AutoConfig, PretrainedConfig

from specjax.checkpoints import hf, pretrained
from specjax.errors import CheckpointError, ConfigError

FORMAT_VERSION = "0.9.0"
"""The version of `speculators` whose fields are written."""

CLASS_NAMES = ("model_type", "sub_configs", "attribute_map", "is_composition", "base_config_key")
"""What transformers keeps on the class and some checkpoints repeat in their config.json."""

Integer = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Class = TypeVar("Class", bound=type)


class Schema(pydantic.BaseModel):
    """A pydantic model whose errors are a ConfigError; keys it does not know are kept."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, /, **fields: Any):
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            message = explain(error, type(self).__name__)
        else:
            return
        raise ConfigError(message)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Validates as the constructor does."""
        try:
            return super().model_validate(obj, **options)
        except pydantic.ValidationError as error:
            message = explain(error, cls.__name__)
        raise ConfigError(message)


def explain(error: pydantic.ValidationError, owner: str) -> str:
    """One line for each error: where, what was found, what was expected, what to do."""
    lines = []
    for details in error.errors():
        where = ".".join([owner, *(str(part) for part in details["loc"])])
        if details["type"] == "missing":
            lines.append(f"{where}: is missing; expected a value. Add it.")
            continue
        expected = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ").rstrip(".")
        if details["type"] == "value_error":
            lines.append(f"{where}: {expected}.")
        else:
            lines.append(f"{where}={details['input']!r}: expected {expected}. Correct the config.")
    return "\n".join(lines)


def _choose(registry: Mapping[str, type], kind: Any, owner: str, field: str) -> Any:
    """The registered class of a kind."""
    if kind is None:
        raise ConfigError(f"{owner}.{field}: is missing; expected one of {tuple(registry)}. Add it.")
    if not isinstance(kind, str) or kind not in registry:
        raise ConfigError(
            f"{owner}.{field}={kind!r}: expected one of {tuple(registry)}; register the class of another kind with "
            f"@{owner}.register, then call reload_schemas()."
        )
    return registry[kind]


def _register(registry: dict[str, type], base: type, name: str) -> Callable[[Class], Class]:
    def keep(kind: Class) -> Class:
        known = registry.get(name)
        if not issubclass(kind, base):
            raise ConfigError(f"register({name!r}): {kind.__name__} is no subclass of {base.__name__}; make it one.")
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ConfigError(f"register({name!r}): is the name of {known.__qualname__} already; choose another.")
        registry[name] = kind
        return kind

    return keep


class TokenProposalConfig(Schema):
    """How drafts are proposed and accepted; the subclass is chosen by `proposal_type`."""

    registry: ClassVar[dict[str, type]] = {}

    proposal_type: str

    def __init__(self, /, **fields: Any):
        if type(self) is TokenProposalConfig:
            raise ConfigError(
                "TokenProposalConfig: expected one of its subclasses, such as GreedyTokenProposalConfig; "
                "use that, or TokenProposalConfig.model_validate."
            )
        super().__init__(**fields)

    @classmethod
    def register(cls, name: str) -> Callable[[Class], Class]:
        """Decorator: makes a subclass the reader of a `proposal_type`."""
        return _register(cls.registry, TokenProposalConfig, name)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """A subclass where this class is asked."""
        if cls is TokenProposalConfig and isinstance(obj, Mapping):
            kind = _choose(cls.registry, obj.get("proposal_type"), "TokenProposalConfig", "proposal_type")
            chosen: Self = kind.model_validate(obj, **options)
            return chosen
        return super().model_validate(obj, **options)


@TokenProposalConfig.register("greedy")
class GreedyTokenProposalConfig(TokenProposalConfig):
    """A chain of the drafter's most probable tokens.

    Attributes:
        speculative_tokens: G, drafts a round.
        verifier_accept_k: a draft is accepted if it is among so many of the target's most probable tokens.
        accept_tolerance: with verifier_accept_k > 1, how far below the best one its log-probability may be.
    """

    proposal_type: Literal["greedy"] = "greedy"
    speculative_tokens: Count = 5
    verifier_accept_k: Count = 1
    accept_tolerance: Annotated[Number, Field(ge=0)] = 0.0


@TokenProposalConfig.register("sampling")
@TokenProposalConfig.register("sample")
class SampleTokenProposalConfig(TokenProposalConfig):
    """A chain of tokens drawn from the drafter, accepted by rejection sampling.

    Attributes:
        speculative_tokens: G, drafts a round.
        accept_lenience: 1 is lossless; smaller values accept more.
    """

    proposal_type: Literal["sample", "sampling"] = "sample"
    speculative_tokens: Count = 3
    accept_lenience: Annotated[Number, Field(ge=0, le=1)] = 1.0


@TokenProposalConfig.register("static_tree")
class StaticTreeTokenProposalConfig(TokenProposalConfig):
    """A tree of fixed shape: `initial_branching_factor` roots, `branching_factor` children each, `depth` levels."""

    proposal_type: Literal["static_tree"] = "static_tree"
    initial_branching_factor: Count = 4
    branching_factor: Count = 2
    depth: Count = 5


@TokenProposalConfig.register("dynamic_tree")
class DynamicTreeTokenProposalConfig(TokenProposalConfig):
    """A tree of `depth` levels, each of the `expansion_factor` likeliest nodes, cut to `speculative_tokens` nodes."""

    proposal_type: Literal["dynamic_tree"] = "dynamic_tree"
    speculative_tokens: Count = 48
    expansion_factor: Count = 10
    depth: Count = 6


class VerifierConfig(Schema):
    """The target that a speculator belongs to.

    Attributes:
        name_or_path: of the target.
        architectures: as in its config.json.
    """

    name_or_path: str | None = Field(...)
    architectures: list[str] = Field(...)

    @classmethod
    def from_config(cls, config: PretrainedConfig, name_or_path: str | None = "UNSET") -> Self:
        """Takes both from a transformers config; `name_or_path` replaces the config's own name."""
        if name_or_path == "UNSET":
            name_or_path = config.name_or_path or None
        return cls(name_or_path=name_or_path, architectures=list(config.architectures or []))


def _read_proposal(value: Any) -> Any:
    return TokenProposalConfig.model_validate(value) if isinstance(value, Mapping) else value


AnyProposal = Annotated[SerializeAsAny[TokenProposalConfig], BeforeValidator(_read_proposal)]


class SpeculatorsConfig(Schema):
    """What a speculator does, and for which target.

    Attributes:
        algorithm: its kind, as a rule the same as speculators_model_type.
        proposal_methods: how it may propose.
        default_proposal_method: the `proposal_type` of one of them.
        verifier: its target.
    """

    algorithm: str
    proposal_methods: list[AnyProposal]
    default_proposal_method: str
    verifier: VerifierConfig

    @pydantic.model_validator(mode="after")
    def _default_is_one_of_them(self) -> Self:
        known = [method.proposal_type for method in self.proposal_methods]
        if self.default_proposal_method not in known:
            raise ValueError(
                f"default_proposal_method={self.default_proposal_method!r}: expected the proposal_type of one of "
                f"proposal_methods, {known}; name one of these or add the method"
            )
        return self


def _layer_reader(default: str) -> BeforeValidator:
    """dict -> transformers config; `default` is the model_type of dicts that have none."""

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        fields = dict(value)
        model_type = fields.pop("model_type", default)
        try:
            return AutoConfig.for_model(model_type, **fields)
        except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"model_type={model_type!r} could not be read ({reason}); correct the fields") from error

    return BeforeValidator(read)


_AsDict = PlainSerializer(lambda config: config.to_diff_dict(), return_type=dict)
LlamaLayer = Annotated[InstanceOf[PretrainedConfig], _layer_reader("llama"), _AsDict]
Qwen2Layer = Annotated[InstanceOf[PretrainedConfig], _layer_reader("qwen2"), _AsDict]
Qwen3Layer = Annotated[InstanceOf[PretrainedConfig], _layer_reader("qwen3"), _AsDict]


def _layer(model_type: str) -> Any:
    return Field(default_factory=lambda: AutoConfig.for_model(model_type))


class CommonFields(Schema):
    """What every config.json of the format has."""

    speculators_model_type: str = ""
    speculators_version: str = FORMAT_VERSION
    speculators_config: SpeculatorsConfig | None = None
    architectures: list[str] = []


class SpeculatorModelConfig(PretrainedConfig):
    """The config.json of a speculator, as a transformers config; the subclass is chosen by `speculators_model_type`.

    Subclasses declare fields with annotations and defaults as pydantic models do. Unknown fields become attributes.

    Attributes:
        speculators_model_type: which subclass.
        speculators_version: of the format.
        speculators_config: algorithm, proposals and target; None where a config is only being put together.
        architectures: classes that can hold the weights.
    """

    model_type = "speculator_model"
    registry: ClassVar[dict[str, type]] = {}
    schema: ClassVar[type[Schema]] = CommonFields

    if TYPE_CHECKING:  # fields of every subclass, declared in CommonFields
        speculators_model_type: str
        speculators_version: str
        speculators_config: SpeculatorsConfig | None
        architectures: list[str]

    def __init_subclass__(cls, *arguments: Any, **options: Any):
        cls.schema = _take_fields(cls, cls.schema)
        if "__init__" not in cls.__dict__:
            cls.__init__ = SpeculatorModelConfig.__init__  # type: ignore[method-assign]
        super().__init_subclass__(*arguments, **options)

    def __init__(self, **fields: Any):
        known = self.schema.model_fields
        checked = self.schema(**{name: x for name, x in fields.items() if name not in CLASS_NAMES or name in known})
        extra = checked.model_extra or {}
        try:
            super().__init__(**{name: value for name, value in extra.items() if name != "transformers_version"})
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{type(self).__name__}: {error}; correct the field.") from error
        for name in type(checked).model_fields:
            setattr(self, name, getattr(checked, name))
        self.check()

    def check(self) -> None:
        """Checks across fields; subclasses extend it."""

    @classmethod
    def register(cls, name: str) -> Callable[[Class], Class]:
        """Decorator: makes a subclass the reader of a `speculators_model_type`."""
        return _register(cls.registry, SpeculatorModelConfig, name)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **fields: Any) -> Any:
        """The config that a dict describes, of the subclass that it names.

        Args:
            config_dict: as in config.json.
            fields: replace or add to it.

        Raises:
            CheckpointError: no or an unknown speculators_model_type, another one than this class's, or a wrong field.
        """
        for option in ("return_unused_kwargs", "_from_auto"):
            fields.pop(option, None)
        values = {**config_dict, **fields}
        if values.get("speculators_model_type") is None:
            raise CheckpointError(
                "config.json: speculators_model_type is missing, so it is not of the speculators format; expected "
                f"one of {tuple(cls.registry)}. Heads in other formats are read by specjax.checkpoints.heads."
            )
        try:
            kind = _choose(
                cls.registry, values["speculators_model_type"], "SpeculatorModelConfig", "speculators_model_type"
            )
            if not issubclass(kind, cls):
                raise ConfigError(
                    f"speculators_model_type={values['speculators_model_type']!r}: is read by {kind.__name__}; "
                    f"expected a kind of {cls.__name__}. Use {kind.__name__} or SpeculatorModelConfig."
                )
            return kind(**values)
        except ConfigError as error:
            message = str(error)
        raise CheckpointError(f"config.json: {message}")

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, revision: str | None = None, **fields: Any) -> Any:  # type: ignore[override]
        """The config of a directory, a named asset or a hub repository.

        Raises:
            AssetError: nothing is found under that name.
            CheckpointError: see from_dict.
        """
        directory = pretrained.resolve(name_or_path, revision)
        try:
            return cls.from_dict(hf.read_config(directory), **fields)
        except CheckpointError as error:
            message = str(error)
        raise CheckpointError(f"{directory}: {message}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, as json knows them; no model_type, which would make transformers take it for a model."""
        fields = {name: getattr(self, name) for name in self.schema.model_fields}
        plain = type(self).schema.model_construct(**fields).model_dump(mode="json", include=set(fields))
        own = {name: self.__dict__.pop(name) for name in list(fields) if name in self.__dict__}
        try:  # transformers would copy the fields, layer configs and all, and write them its own way
            values = super().to_dict()
        finally:
            self.__dict__.update(own)
        values = {name: value for name, value in values.items() if name not in CLASS_NAMES}
        return {**values, **plain}

    def to_diff_dict(self) -> dict[str, Any]:
        """As to_dict, but of what every transformers config has only the values that are not the default."""
        ordinary = PretrainedConfig().to_dict()
        kept = set(self.schema.model_fields) | {"transformers_version"}
        return {
            name: value
            for name, value in self.to_dict().items()
            if name in kept or name not in ordinary or value != ordinary[name]
        }

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes config.json into a directory, whole or not at all, and returns its path."""
        path = Path(directory) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".config-{secrets.token_hex(8)}.json")
        try:
            partial.write_text(json.dumps(self.to_diff_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path


def _take_fields(cls: type, inherited: type[Schema]) -> type[Schema]:
    """Turns a class's annotated fields into a pydantic schema, and takes them off the class.

    Otherwise transformers makes dataclass fields of them, checked with errors of its own.
    """
    found = {
        name: annotation
        for name, annotation in inspect.get_annotations(cls, eval_str=True).items()
        if "ClassVar" not in str(get_origin(annotation))
    }
    fields: dict[str, Any] = {}
    for name, annotation in found.items():
        fields[name] = (annotation, cls.__dict__.get(name, ...))
        if name in cls.__dict__:
            delattr(cls, name)
    cls.__annotations__ = {name: value for name, value in cls.__annotations__.items() if name not in found}
    schema: type[Schema] = pydantic.create_model(cls.__name__, __base__=inherited, __module__=cls.__module__, **fields)
    return schema


@SpeculatorModelConfig.register("eagle3")
class Eagle3SpeculatorConfig(SpeculatorModelConfig):
    """EAGLE-3 and 3.1 heads.

    Attributes:
        transformer_layer_config: of the head's layers; vocab_size is the target's.
        draft_vocab_size: tokens that it can propose.
        norm_before_residual: whether the first layer's residual starts behind hidden_norm.
        target_hidden_size: where it is not the head's own.
        eagle_aux_hidden_state_layer_ids: target layers whose entering states it reads; None is the usual three.
        norm_before_fc, fc_norm: one RMSNorm over all states, or one for each, before they are fused.
        norm_output: whether the next step gets the normed output.
        embed_requires_grad: whether the embedding was trained.
    """

    speculators_model_type: Literal["eagle3"] = "eagle3"
    architectures: list[str] = ["Eagle3Speculator"]
    transformer_layer_config: Qwen3Layer = _layer("qwen3")
    draft_vocab_size: Count = 32000
    norm_before_residual: Flag = False
    target_hidden_size: Count | None = None
    eagle_aux_hidden_state_layer_ids: list[Integer] | None = None
    norm_before_fc: Flag = False
    fc_norm: Flag = False
    norm_output: Flag = False
    embed_requires_grad: Flag = False

    def check(self) -> None:
        if self.norm_before_fc and self.fc_norm:
            raise ConfigError("norm_before_fc=True, fc_norm=True: expected one of them at most; set one to False.")

    @property
    def target_vocab_size(self) -> int:
        """V."""
        return int(self.transformer_layer_config.vocab_size)


@SpeculatorModelConfig.register("peagle")
class PEagleSpeculatorConfig(Eagle3SpeculatorConfig):
    """EAGLE-3 heads that draft in parallel from a mask token."""

    speculators_model_type: Literal["peagle"] = "peagle"  # type: ignore[assignment]
    architectures: list[str] = ["PEagleSpeculator"]
    mask_token_id: Integer | None = None
    embed_requires_grad: Flag = True


@SpeculatorModelConfig.register("dflash")
class DFlashSpeculatorConfig(SpeculatorModelConfig):
    """Block-diffusion heads.

    Attributes:
        block_size: tokens of a block.
        aux_hidden_state_layer_ids: target layers whose states it reads.
        mask_token_id: what fills the block.
        sliding_window_non_causal: whether sliding-window layers see their whole block.
        sample_from_anchor: whether the first token of the block predicts too.
    """

    speculators_model_type: Literal["dflash"] = "dflash"
    architectures: list[str] = ["DFlashSpeculator"]
    transformer_layer_config: Qwen3Layer = _layer("qwen3")
    draft_vocab_size: Count = 32000
    block_size: Count = 8
    target_hidden_size: Count | None = None
    aux_hidden_state_layer_ids: list[Integer] | None = None
    mask_token_id: Integer | None = None
    sliding_window_non_causal: Flag = False
    sample_from_anchor: Flag = False


@SpeculatorModelConfig.register("mtp")
class MTPSpeculatorConfig(SpeculatorModelConfig):
    """Multi-token-prediction heads.

    Attributes:
        transformer_layer_config: of the head's layer.
        num_nextn_predict_layers: distinct blocks.
    """

    speculators_model_type: Literal["mtp"] = "mtp"
    architectures: list[str] = ["MTPDraftModel"]
    transformer_layer_config: Qwen2Layer = _layer("qwen2")
    num_nextn_predict_layers: Count = 1


@SpeculatorModelConfig.register("eagle")
class EagleSpeculatorConfig(SpeculatorModelConfig):
    """EAGLE-1 and 2 heads, of speculators before 0.2.

    Attributes:
        transformer_layer_architecture: class of the layer.
        transformer_layer_config: of it.
        layernorms: whether embedding, layer input and output are normed.
        fusion_bias: whether the joining product has a bias.
    """

    speculators_model_type: Literal["eagle"] = "eagle"
    architectures: list[str] = ["EagleSpeculator"]
    transformer_layer_architecture: str = "auto"
    transformer_layer_config: LlamaLayer = _layer("llama")
    layernorms: Flag = False
    fusion_bias: Flag = False


@SpeculatorModelConfig.register("mlp")
class MLPSpeculatorConfig(SpeculatorModelConfig):
    """MLP speculators (2404.19124), of speculators before 0.2."""

    speculators_model_type: Literal["mlp"] = "mlp"
    architectures: list[str] = ["MLPSpeculator"]
    inputs: list[str] = ["input_embeddings", "hidden_states[-1]"]
    inputs_hidden_states_normalized: Flag = False
    hidden_size: Count = 4096
    intermediate_size: Annotated[int, Field(strict=True, ge=0)] = 4096
    vocab_size: Count = 128256
    num_layers: Count = 5
    tie_weights: Flag = True


@SpeculatorModelConfig.register("independent")
class IndependentSpeculatorConfig(SpeculatorModelConfig):
    """A whole draft model: the fields of its own config.json, kept as they are, model_type too."""

    speculators_model_type: Literal["independent"] = "independent"
    model_type: str | None = None  # type: ignore[assignment,misc]


def reload_schemas() -> None:
    """Rebuilds the schemas, so that types that were registered or defined later are known to them."""
    for kind in (*TokenProposalConfig.registry.values(), VerifierConfig, SpeculatorsConfig):
        kind.model_rebuild(force=True)  # type: ignore[attr-defined]
    for kind in SpeculatorModelConfig.registry.values():
        kind.schema.model_rebuild(force=True)  # type: ignore[attr-defined]
