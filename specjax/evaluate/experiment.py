"""An experiment: the frozen form of an evaluation's config, and what makes two runs of it the same."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from specjax.config import MeshConfig, SamplingParams, SpeculativeConfig
from specjax.errors import ConfigError
from specjax.evaluate import environment
from specjax.evaluate.files import plain_dict
from specjax.evaluate.prompts import Prompt
from specjax.sharding import read_mesh

PLAIN = "plain"

TRANSFORMERS = "torch", "transformers"

COMPARISONS = {
    "transformers": TRANSFORMERS,
    "transformers-lookup": TRANSFORMERS,
    "transformers-assisted": TRANSFORMERS,
    "vllm": ("vllm",),
}
"""Other libraries that can be measured in the same run, and the packages that each needs."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is measured, and on what.

    Attributes:
        target: a named asset, a Hugging Face directory or hub id, or a GGUF file.
        dtype: of weights and cache; empty for the platform's best.
        mesh: how many devices to spread over; None for one.
        prompts: the name of a set, or a JSONL file.
        num_prompts: use only so many; 0 for all.
        categories: use only prompts of these; none for all.
        chat: whether prompts go through the model's chat template.
        repeats: times that everything is measured.
        batch_size: 1 decodes one by one, more that many rows by continuous batching.
        sampling: of all methods.
        methods: name -> drafting method; plain decoding is always measured beside them.
        compare: names of COMPARISONS.
        assistant: a Hugging Face directory or hub id: the draft model of "transformers-assisted".
        costs: measure what scoring and drafting cost, and predict speed-ups from it.
        cost_batches: batch sizes of the cost curve, besides 1 and batch_size.
        step_context: positions in the cache where costs and profile are measured.
        profile: measure the four parts of a round.
    """

    target: str = ""
    dtype: str = ""
    mesh: MeshConfig | None = None
    prompts: str = ""
    num_prompts: int = 0
    categories: tuple[str, ...] = ()
    chat: bool = True
    repeats: int = 1
    batch_size: int = 1
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    methods: Mapping[str, SpeculativeConfig] = dataclasses.field(default_factory=dict)
    compare: tuple[str, ...] = ()
    assistant: str = ""
    costs: bool = False
    cost_batches: tuple[int, ...] = ()
    step_context: int = 200
    profile: bool = False

    def __post_init__(self) -> None:
        for field in ("target", "prompts"):
            if not getattr(self, field):
                raise ConfigError(f"config.{field}='': is empty; see configs/eval_smollm2.py for what it may be.")
        for field in ("repeats", "batch_size", "step_context"):
            if getattr(self, field) < 1:
                raise ConfigError(f"config.{field}={getattr(self, field)}: expected an integer >= 1.")
        if any(batch < 1 for batch in self.cost_batches):
            raise ConfigError(f"config.cost_batches={self.cost_batches}: expected integers >= 1.")
        for name in self.methods:
            if name == PLAIN or name in COMPARISONS:
                raise ConfigError(f"config.methods.{name}: the name is taken; choose another.")
        for name in self.compare:
            if name not in COMPARISONS:
                raise ConfigError(f"config.compare: {name!r} is unknown; expected some of {', '.join(COMPARISONS)}.")
        if self.batch_size > 1 and self.sampling.stop:
            raise ConfigError(
                f"config.sampling.stop={self.sampling.stop}: is for batch_size=1; expected stop_token_ids here."
            )

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Experiment":
        """Reads a config file's fields but for `distributed`; those left out take their defaults.

        Raises:
            ConfigError: an unknown field, or a wrong value.
        """
        fields = plain_dict(config)
        fields.pop("distributed", None)
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(f"config.{name}={fields[name]!r}: is no field; expected some of {', '.join(known)}.")
        for name in ("categories", "compare", "cost_batches"):
            if isinstance(fields.get(name), str):
                raise ConfigError(f"config.{name}={fields[name]!r}: is a text; expected a tuple, such as ('a', 'b').")
            fields[name] = tuple(fields.get(name, ()))
        fields["mesh"] = read_mesh(fields.get("mesh"))
        fields["sampling"] = SamplingParams.model_validate(fields.get("sampling", {}))
        methods = fields.get("methods", {})
        fields["methods"] = {name: SpeculativeConfig.model_validate(value) for name, value in methods.items()}
        return cls(**fields)

    @property
    def compares_texts(self) -> bool:
        """Whether outputs of lossless methods must be plain decoding's."""
        return self.sampling.greedy and not self.sampling.adjusts_logits

    def versions(self) -> dict[str, str]:
        """Package -> version, of all installed packages that something is measured with."""
        return environment.versions(package for name in self.compare for package in COMPARISONS[name])

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON gives them back: of sampling and methods those that were set."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["mesh"] = self.mesh and self.mesh.model_dump(mode="json")
        fields["sampling"] = self.sampling.model_dump(mode="json", exclude_unset=True)
        fields["methods"] = {
            name: method.model_dump(mode="json", exclude_unset=True) for name, method in self.methods.items()
        }
        return json.loads(json.dumps(fields))


def identity(experiment: Experiment, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What must be equal for measurements to belong together, as JSON gives it back."""
    texts = json.dumps([dataclasses.astuple(prompt) for prompt in prompts])
    return experiment.as_json() | {
        "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "device": environment.device_name(),
        "processes": jax.process_count() if jax.process_count() > 1 else None,
        "versions": experiment.versions(),
    }
