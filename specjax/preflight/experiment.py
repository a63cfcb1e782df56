"""A preflight: the frozen form of its config, and the topology that it is compiled for."""

import dataclasses
import difflib
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from pallas_kernels.tpu_cost import CHIPS, Chip
from specjax import cache as kv
from specjax.checkpoints import hf
from specjax.checkpoints.load import DTYPES
from specjax.config import SpeculativeConfig
from specjax.errors import ConfigError
from specjax.evaluate.files import plain_dict
from specjax.target.families import ModelConfig, from_hf

FLAT = ("1x1", "1x2", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBE = ("1x1x1", "1x2x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
LAYOUTS = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBE, "tpu7x": CUBE}
"""Usual layouts of chips; libtpu takes others, too."""

MODELS = Path(__file__).parent / "models"
METHODS = ("ngram", "eagle", "eagle3", "mtp")
"""Methods whose drafter is known without a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What is compiled.

    Attributes:
        model: one of shipped_models(), or a folder with a config.json.
        dtype: of weights and caches.
        method: the drafting method; None compiles plain decoding only.
        head: fields of specjax.heads.config.for_target, of methods that draft with a head.
        batch: rows.
        context: live positions of each row, those of the round included.
        capacity: positions of each row's cache; 0 is the bucket that generate would take.
        data: of the mesh, parts of the batch.
        model_parts: of the mesh, parts of weights and caches; 0 is as many as there are devices for.
        drafts: numbers of drafts a round that are compiled, besides plain decoding.
        acceptance_rates: probabilities that a draft is accepted after those before it, to predict speed-ups for.
        acceptance_by_position: measured: the share of rounds in which at least i drafts are accepted, i = 1, 2, ...
        compilers: programs that are compiled at a time.
    """

    model: str = ""
    dtype: str = "bfloat16"
    method: SpeculativeConfig | None = None
    head: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 8
    context: int = 4096
    capacity: int = 0
    data: int = 1
    model_parts: int = 0
    drafts: tuple[int, ...] = ()
    acceptance_rates: tuple[float, ...] = ()
    acceptance_by_position: tuple[float, ...] = ()
    compilers: int = 2

    def __post_init__(self) -> None:
        numbers = {"batch": self.batch, "context": self.context, "mesh.data": self.data, "compilers": self.compilers}
        for name, number in numbers.items():
            if number < 1:
                raise ConfigError(f"config.{name}={number}: expected an integer >= 1.")
        if self.dtype not in DTYPES:
            raise ConfigError(f"config.dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}.")
        if self.model_parts < 0:
            raise ConfigError(f"config.mesh.model={self.model_parts}: expected an integer >= 1, or 0 for all devices.")
        if self.capacity and (self.capacity % kv.BLOCK or self.capacity < self.context):
            raise ConfigError(
                f"config.capacity={self.capacity}: expected a multiple of {kv.BLOCK} that holds "
                f"context={self.context}, such as {kv.round_capacity(self.context)}, or 0 for that."
            )
        if self.batch % self.data:
            fits = max(n for n in range(1, self.data + 1) if self.batch % n == 0)
            raise ConfigError(
                f"config.mesh.data={self.data}: expected a divisor of batch={self.batch}, of which {fits} is the "
                "nearest."
            )
        if any(num < 1 for num in self.drafts) or len(set(self.drafts)) < len(self.drafts):
            raise ConfigError(f"config.drafts={self.drafts}: expected different integers >= 1.")
        if bool(self.drafts) != (self.method is not None):
            raise ConfigError(
                f"config.drafts={self.drafts}: expected some with a method, and () without one; set "
                "config.speculative.method."
            )
        if self.method is not None and self.method.method not in METHODS:
            raise ConfigError(
                f"config.speculative.method={self.method.method!r}: expected one of {', '.join(METHODS)}, or '' for "
                "plain decoding."
            )
        for field in ("acceptance_rates", "acceptance_by_position"):
            if any(not 0 <= rate <= 1 for rate in getattr(self, field)):
                raise ConfigError(f"config.{field}={getattr(self, field)}: expected numbers in [0, 1].")
        rates = self.acceptance_by_position
        if any(later > rate for rate, later in zip(rates, rates[1:], strict=False)):
            raise ConfigError(
                f"config.acceptance_by_position={rates}: expected numbers that don't increase: the share of rounds in "
                "which at least 1, 2, ... drafts are accepted."
            )
        if rates and len(rates) < max(self.drafts, default=0):
            raise ConfigError(
                f"config.acceptance_by_position={rates}: expected {max(self.drafts)} numbers, one for each draft."
            )

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Preflight":
        """Reads a config file's fields; those left out take their defaults.

        Raises:
            ConfigError: an unknown field, or a wrong value.
        """
        fields = plain_dict(config)
        names = {field.name for field in dataclasses.fields(cls)} - {"method", "data", "model_parts"}
        names |= {"speculative", "mesh"}
        for name in fields:
            if name not in names:
                known = ", ".join(sorted(names))
                raise ConfigError(f"config.{name}={fields[name]!r}: is no field; expected some of {known}.")
        for name in ("drafts", "acceptance_rates", "acceptance_by_position"):
            if isinstance(fields.get(name), str):
                raise ConfigError(f"config.{name}={fields[name]!r}: is a text; expected a tuple, such as (1, 2).")
            fields[name] = tuple(fields.get(name, ()))
        mesh = fields.pop("mesh", {})
        if set(mesh) - {"data", "model"}:
            raise ConfigError(f"config.mesh={mesh!r}: expected the fields data and model, such as data=1, model=4.")
        fields |= {"data": mesh.get("data", 1), "model_parts": mesh.get("model", 0)}
        method = fields.pop("speculative", {})
        if "num_speculative_tokens" in method:
            raise ConfigError(
                f"config.speculative.num_speculative_tokens={method['num_speculative_tokens']}: is not read here; "
                "expected the numbers of drafts that are compiled in config.drafts."
            )
        fields["method"] = SpeculativeConfig.model_validate(method) if method.get("method") else None
        return cls(**fields)

    @property
    def positions(self) -> int:
        """Of each row's cache."""
        return self.capacity or kv.round_capacity(self.context)

    def read_model(self) -> ModelConfig:
        """The target's architecture.

        Raises:
            ConfigError: there is no such config.json, or the context is longer than the model's.
            CheckpointError: it is not one of a model that can be read.
        """
        model = from_hf(hf.read_config(_folder(self.model)))
        if self.context > model.max_position:
            raise ConfigError(
                f"config.context={self.context}: expected at most {model.max_position}, the longest of {self.model}."
            )
        return model


def shipped_models() -> list[str]:
    """Names of the models whose config.json comes with SpecJAX."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def _folder(name: str) -> Path:
    """The folder with the config.json of a model."""
    shipped = shipped_models()
    folder = MODELS / name if name in shipped else Path(name.removesuffix("config.json"))
    if not (folder / "config.json").is_file():
        near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"config.model={name!r}: no config.json is found there; expected a folder that has one, or one of "
            f"{', '.join(shipped)}, of which {near} is the nearest."
        )
    return folder


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that need not be there.

    Attributes:
        name: such as "v6e:2x2".
        chip: figures of one device.
        devices: jax's; on tpu7x two a chip.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def read_topology(name: str) -> Topology:
    """The topology of a name like "v6e:2x2", for libtpu to compile for.

    Raises:
        ConfigError: it is unknown, or libtpu is missing; names the nearest that are valid, or what to install.
    """
    kind, _, layout = name.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--topology={name!r}: its chip is unknown; expected one of {', '.join(CHIPS)} and a layout, such as "
            f"{_nearest(near, layout)}."
        )
    try:
        importlib.import_module("libtpu")
    except ImportError as error:
        raise ConfigError(
            f"--topology={name!r}: libtpu, which compiles for TPUs, is not installed; "
            "`pip install libtpu` brings it (Linux only)."
        ) from error
    # No TPU is looked for, and other processes may compile, too. Without one libtpu complains until it is told of one.
    told = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if not any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0")):
        told |= {"TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in told.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--topology={name!r}: libtpu refuses it ({reason}); expected a layout of {kind} such as "
            f"{_nearest(kind, layout)}; usual ones are {', '.join(LAYOUTS[kind])}."
        ) from error
    return Topology(name, CHIPS[kind], tuple(devices))


def _nearest(kind: str, layout: str) -> str:
    """The usual topology whose number of chips is nearest to what a text seems to ask for."""

    def chips(text: str) -> int:
        product = 1
        for number in re.findall(r"\d+", text):
            product *= int(number)
        return product

    return f"{kind}:{min(LAYOUTS[kind], key=lambda other: abs(chips(other) - chips(layout or '2x2')))}"
