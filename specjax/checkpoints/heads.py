"""Draft heads in the dialects they are published in -> HeadConfig and params; and back, in the speculators format."""

import contextlib
import dataclasses
import importlib.util
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from specjax.checkpoints import hf
from specjax.errors import CheckpointError, ConfigError
from specjax.heads import config as heads
from specjax.heads import network
from specjax.heads.config import HeadConfig
from specjax.sharding import fetch
from specjax.target import decoder
from specjax.target.families import ModelConfig, RopeScaling, from_hf
from specjax.target.layers import as_array

# The speculators format is transformers' configs, whose import takes longer than all others; functions that need it
# import it, so that `import specjax` does not.
if TYPE_CHECKING:
    from specjax.checkpoints.speculators import SpeculatorModelConfig, SpeculatorsConfig


class LoadedHead(NamedTuple):
    """A head as it was read.

    Attributes:
        config: what it is made of.
        params: its weights, as specjax.heads.network.init describes them.
        speculator: its config.json, where that is of the speculators format.
        vocabulary: int32[draft_vocab_size], the target's id of each token that it can propose, sorted; None where
            that is every token.
        num_speculative_tokens: G that config.json asks for, or None.
    """

    config: HeadConfig
    params: network.Params
    speculator: "SpeculatorModelConfig | None" = None
    vocabulary: np.ndarray | None = None
    num_speculative_tokens: int | None = None


TOKEN_MAP = "token_map.json"
"""Beside a drafter's weights: the token ids that are worth drafting, where its output head is the target's."""


@dataclasses.dataclass(frozen=True)
class Names:
    """How one dialect names the tensors of a head. In braces: block, layer, tap, and index = target's layers + block.

    Attributes:
        layer: what a decoder layer's tensors begin with.
        join, embedding_norm, hidden_norm, output_norm: of a block, without ".weight".
        embedding, head: where the head has its own; empty where it never does.
        fusion, fusion_norm, tap_norm: of EAGLE-3.
        embedding_first: order of the product's columns; None is the head's own.
        shifted_norms: whether norms are stored as weight - 1.
        own: what all tensors begin with; empty where the file holds nothing but the head.
    """

    layer: str
    join: str = ""
    embedding_norm: str = ""
    hidden_norm: str = ""
    output_norm: str = ""
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    fusion: str = "fc"
    fusion_norm: str = "input_norm"
    tap_norm: str = "fc_norm.{tap}"
    embedding_first: bool | None = None
    shifted_norms: bool = False
    own: tuple[str, ...] = ()


def _eagle3_names(first: str) -> Names:
    return Names(
        layer="layers.{layer}" if first == "layers.0" else first,
        embedding_norm=f"{first}.input_layernorm",
        hidden_norm=f"{first}.hidden_norm",
        output_norm="norm",
    )


def _block_names(block: str, **names: Any) -> Names:
    return Names(
        layer=block,
        join=f"{block}.input_proj",
        embedding_norm=f"{block}.token_layernorm",
        hidden_norm=f"{block}.hidden_layernorm",
        output_norm=f"{block}.final_layernorm",
        **names,
    )


_NEXTN = Names(
    layer="model.layers.{index}",
    join="model.layers.{index}.eh_proj",
    embedding_norm="model.layers.{index}.enorm",
    hidden_norm="model.layers.{index}.hnorm",
    output_norm="model.layers.{index}.shared_head.norm",
    embedding="model.layers.{index}.embed_tokens",
    head="model.layers.{index}.shared_head.head",
    own=("model.layers.{index}.",),
)

NAMES = {
    "eagle": Names(
        layer="layers.{layer}", join="fc", embedding_norm="embed_layernorm", output_norm="lm_head_layernorm"
    ),
    "eagle3": _eagle3_names("midlayer"),
    "speculators-eagle": Names(
        layer="transformer",
        join="fusion_fc",
        embedding_norm="embedding_layernorm",
        output_norm="pre_lm_head_layernorm",
    ),
    "speculators-eagle3": _eagle3_names("layers.0"),
    "speculators-mtp": _block_names("mtp_layers.{block}", embedding_first=True),
    "deepseek": _NEXTN,
    "glm4_moe": _NEXTN,
    "mimo": _block_names("model.mtp_layers.{block}", embedding="", head="", own=("model.mtp_layers.",)),
    "ernie": Names(
        layer="model.mtp_block.{block}",
        join="model.mtp_linear_proj.{block}",
        embedding_norm="model.mtp_emb_norm.{block}",
        hidden_norm="model.mtp_hidden_norm.{block}",
        output_norm="model.norm",  # the target's
        embedding="",
        head="",
        own=("model.mtp_",),
    ),
    "qwen3_next": Names(
        layer="mtp.layers.{block}",
        join="mtp.fc",
        embedding_norm="mtp.pre_fc_norm_embedding",
        hidden_norm="mtp.pre_fc_norm_hidden",
        output_norm="mtp.norm",
        embedding="mtp.embed_tokens",
        head="mtp.lm_head",
        shifted_norms=True,
        own=("mtp.",),
    ),
}
"""Dialects of files that hold a head, and wirings of heads inside their target's checkpoint."""

IGNORED = ("verifier_lm_head.", "verifier_norm.")
"""Copies of the target's weights that training leaves behind."""

SHIFTED_FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
"""Families whose norms multiply by 1 + weight."""

OTHER_METHODS = {
    "medusa": "medusa",
    "mlp_speculator": "mlp_speculator",
    "mlp": "mlp_speculator",
    "dflash": "dflash",
    "peagle": "peagle",
    "independent": "draft_model",
}
"""model_type or speculators_model_type, and the method of the drafter that it belongs to."""

INTEGERS = ("I64", "I32")
FLAGS = ("BOOL", "U8")


def detect_method(directory: Path) -> str:
    """The method that a checkpoint is made for: "eagle", "eagle3", "mtp", "draft_model", or one in OTHER_METHODS.

    Raises:
        CheckpointError: no config.json, no weights, or a speculators_model_type that is not text.
    """
    config = hf.read_config(directory)
    with open_tensors(directory) as tensors:
        return _method(config, tuple(tensors.where))


def _method(config: Mapping[str, Any], names: Sequence[str]) -> str:
    kind = config.get("speculators_model_type")
    if kind is not None:
        if not isinstance(kind, str):
            raise CheckpointError(f"config.json: speculators_model_type={kind!r}; expected text, such as 'eagle3'.")
        return OTHER_METHODS.get(kind, kind)
    if config.get("model_type") in OTHER_METHODS:
        return OTHER_METHODS[config["model_type"]]
    if "dflash_config" in config:
        return "dflash"
    if any(name.endswith(("midlayer.hidden_norm.weight", "layers.0.hidden_norm.weight")) for name in names):
        return "eagle3"
    if "fc.weight" in names and any(name.startswith("layers.0.") for name in names):
        return "eagle"
    return "mtp" if _wiring(config, names) else "draft_model"


def _wiring(config: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The wiring of the head inside a target's checkpoint."""
    if any(name.startswith("model.mtp_layers.") for name in names):
        return "mimo"
    if any(name.startswith("model.mtp_linear_proj.") for name in names):
        return "ernie"
    if "mtp.fc.weight" in names:
        return "qwen3_next"
    if any(name.startswith("model.layers.") and name.endswith(".eh_proj.weight") for name in names):
        return "glm4_moe" if str(config.get("model_type")).startswith("glm4") else "deepseek"
    return None


def read_head(
    directory: Path, target_config: ModelConfig, dtype: Any, target_params: network.Params | None = None
) -> LoadedHead:
    """Reads a draft head: EAGLE, EAGLE-3, speculators, or the MTP layers of a target's checkpoint.

    Args:
        directory: with config.json and the weights.
        target_config: of the target that it drafts for.
        dtype: of the weights.
        target_params: the target's weights; a head that repeats the target's embedding or output head then shares
            them instead. None keeps them.

    Raises:
        CheckpointError: names the tensor or field that is missing, left over, or does not fit the target.
    """
    config = hf.read_config(directory)
    with open_tensors(directory) as tensors:
        names = tuple(tensors.where)
        try:
            head, dialect, speculator = _describe(config, tensors, target_config)
        except ConfigError as error:
            raise CheckpointError(f"{directory}: {error}") from error
        except CheckpointError as error:
            message = str(error)
            raise CheckpointError(message if str(directory) in message else f"{directory}: {message}") from error
        head = _own(head, dialect, tensors, target_config, target_params)
        params = hf.read_entries(tensors, _entries(head, dialect, target_config.num_layers), dtype)
        vocabulary = _read_vocabulary(tensors, head)
        tensors.check_all_taken(IGNORED + _foreign(names, dialect, target_config.num_layers))
    hf.check_layout(params, network.param_shapes(head, dtype))
    return LoadedHead(head, params, speculator, vocabulary, _num_speculative_tokens(speculator))


def read_token_map(path: Path, vocab_size: int, setting: str) -> np.ndarray:
    """The tokens that a TOKEN_MAP lists, int32[V'], increasing.

    Args:
        setting: what gave the path, for messages.

    Raises:
        ConfigError: it cannot be read, or does not list different tokens of the target.
    """
    where = f"{setting}={str(path)!r}"
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {error}; expected a JSON file with a list of token ids.") from error
    whole = isinstance(ids, list) and all(type(token) is int and 0 <= token < vocab_size for token in ids)
    if not whole or not ids or len(set(ids)) < len(ids):
        raise ConfigError(f"{where}: expected a list of different token ids, each from 0 to {vocab_size - 1}.")
    return np.sort(np.array(ids, np.int32))


def _foreign(names: Sequence[str], dialect: Names, num_layers: int) -> tuple[str, ...]:
    """Tensors that belong to the target, where the head lies in its checkpoint."""
    if not dialect.own:
        return ()
    own = tuple(prefix.format(index=index) for prefix in dialect.own for index in range(num_layers, num_layers + 64))
    return tuple(name for name in names if not name.startswith(own))


def _describe(
    config: dict, tensors: hf.Tensors, target: ModelConfig
) -> "tuple[HeadConfig, Names, SpeculatorModelConfig | None]":
    """What a checkpoint's config.json and tensors say that the head is."""
    from specjax.checkpoints.speculators import SpeculatorModelConfig

    method = _method(config, tuple(tensors.where))
    speculator = None
    if "speculators_model_type" in config:
        speculator = SpeculatorModelConfig.from_dict(config)
    if method == "eagle":
        if speculator is None:
            head = heads.eagle(
                _layer(config, target),
                target.width,
                joining_bias="fc.bias" in tensors.where,
                layernorms="embed_layernorm.weight" in tensors.where,
            )
            return head, NAMES["eagle"], None
        layer = _one_layer(_layer(speculator.transformer_layer_config.to_diff_dict(), target))
        head = heads.eagle(layer, target.width, speculator.fusion_bias, speculator.layernorms)
        return head, NAMES["speculators-eagle"], speculator
    if method == "eagle3":
        fields = config if speculator is None else speculator.to_dict()
        layer_fields = config if speculator is None else speculator.transformer_layer_config.to_diff_dict()
        dialect = "eagle3" if any(name.startswith("midlayer.") for name in tensors.where) else "speculators-eagle3"
        return _eagle3(fields, _layer(layer_fields, target), tensors, target), NAMES[dialect], speculator
    if method == "mtp" and speculator is not None:
        layer_fields = speculator.transformer_layer_config.to_diff_dict()
        shifted = layer_fields.get("model_type") in SHIFTED_FAMILIES
        head = heads.mtp(
            _one_layer(_layer(layer_fields, target)),
            target.width,
            wiring=getattr(speculator, "mtp_wiring", "qwen3_next"),
            num_blocks=speculator.num_nextn_predict_layers,
        )
        return head, dataclasses.replace(NAMES["speculators-mtp"], shifted_norms=shifted), speculator
    wiring = _wiring(config, tuple(tensors.where))
    if method == "mtp" and wiring:
        layer = dataclasses.replace(target, num_layers=1, sliding_windows=(None,), tied_head=False)
        head = heads.mtp(layer, target.width, wiring, _num_blocks(config))
        return head, NAMES[wiring], None
    raise CheckpointError(
        f"is for method={method!r}; expected a draft head: eagle, eagle3 or mtp. Choose that method, or another model."
    )


def _num_blocks(config: Mapping[str, Any]) -> int:
    for field in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        value = config.get(field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {field}={value!r}; expected an integer >= 1. Correct it.")
        return value
    return 1


def _layer(fields: Mapping[str, Any], target: ModelConfig) -> ModelConfig:
    """The head's decoder layers from the fields of a config.json."""
    layer = from_hf(fields)
    if layer.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"config.json: vocab_size={layer.vocab_size}; expected {target.vocab_size}, the target's. "
            "The head belongs to another target."
        )
    return dataclasses.replace(layer, tied_head=False)


def _one_layer(layer: ModelConfig) -> ModelConfig:
    return dataclasses.replace(layer, num_layers=1, sliding_windows=layer.sliding_windows[:1])


def _eagle3(config: Mapping[str, Any], layer: ModelConfig, tensors: hf.Tensors, target: ModelConfig) -> HeadConfig:
    nested = config.get("eagle_config") or {}
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"config.json: eagle_config={nested!r}; expected an object. Correct it.")

    def field(name: str, default: Any) -> Any:
        value = config.get(name, nested.get(name))
        return default if value is None else value

    def flag(name: str) -> bool:
        value = field(name, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name}={value!r}; expected true or false. Correct it.")
        return value

    if "target_layer_ids" in config and field("eagle_aux_hidden_state_layer_ids", None) is None:
        raise CheckpointError(
            f"config.json: target_layer_ids={config['target_layer_ids']!r} counts layers in a way that differs between "
            "writers; expected eagle_aux_hidden_state_layer_ids, the layers whose entering states are read. Add it."
        )
    taps = field("eagle_aux_hidden_state_layer_ids", None)
    taps = list(heads.default_taps(target.num_layers)) if taps is None else taps
    if not isinstance(taps, list) or not all(
        isinstance(tap, int) and not isinstance(tap, bool) and 0 <= tap <= target.num_layers for tap in taps
    ):
        raise CheckpointError(
            f"config.json: eagle_aux_hidden_state_layer_ids={taps!r}; expected integers of 0 to {target.num_layers}, "
            "the target's layers. The head belongs to another target."
        )
    width = field("target_hidden_size", target.width)
    if width != target.width:
        raise CheckpointError(
            f"config.json: target_hidden_size={width!r}; expected {target.width}, the target's. "
            "The head belongs to another target."
        )
    draft_vocab_size = field("draft_vocab_size", layer.vocab_size)
    if not isinstance(draft_vocab_size, int) or not 1 <= draft_vocab_size <= layer.vocab_size:
        raise CheckpointError(
            f"config.json: draft_vocab_size={draft_vocab_size!r}; expected 1 to {layer.vocab_size}, vocab_size."
        )
    options = {name: flag(name) for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}
    return heads.eagle3(layer, target.width, tuple(taps), draft_vocab_size, **options)


def _own(
    head: HeadConfig, dialect: Names, tensors: hf.Tensors, target: ModelConfig, target_params: network.Params | None
) -> HeadConfig:
    """Settles whether the head has an embedding and an output head of its own, or repeats its target's."""

    def kept(part: str, size: int, mine: str, turned: bool) -> bool:
        blocks = range(head.num_blocks if part else 0)
        found = [name for block in blocks if (name := _name(part, block, target.num_layers)) in tensors.where]
        if not found:
            return False
        shape = size, head.layer.width
        first = tensors.take(found[0], shape)
        for other in found[1:]:
            if not np.array_equal(first, tensors.take(other, shape)):
                raise CheckpointError(
                    f"{tensors.directory}: tensors {found[0]!r} and {other!r} differ; expected the blocks to share "
                    "them. Blocks with their own are not read."
                )
        if target_params is None:
            return True
        shared = fetch(as_array(target_params[mine]))
        shared = shared.T if turned else shared
        return shared.shape != shape or not np.array_equal(first.astype(shared.dtype), shared)

    own_embedding = kept(dialect.embedding, head.layer.vocab_size, "embedding", turned=False)
    own_head = kept(dialect.head, head.draft_vocab_size, "head", turned=True)
    return dataclasses.replace(head, own_embedding=own_embedding, own_head=own_head or head.reduced)


def _name(pattern: str, block: int, num_layers: int, **indices: int) -> str:
    return pattern.format(block=block, index=num_layers + block, **indices) + ".weight"


def _entries(head: HeadConfig, names: Names, num_layers: int) -> Iterator[hf.Entry]:
    """All weights of a head, related to a dialect's tensors. num_layers: of the target."""
    entries = _plain_entries(head, names, num_layers)
    return map(_shifted, entries) if names.shifted_norms else entries


def _plain_entries(head: HeadConfig, names: Names, num_layers: int) -> Iterator[hf.Entry]:
    c = head.layer
    D, D_t, n = c.width, head.target_width, head.num_features
    if head.taps:
        yield hf.kernel(("fusion", "kernel"), f"{names.fusion}.weight", n * D_t, D)
        if head.norm_before_fusing:
            yield hf.vector(("fusion", "norm"), f"{names.fusion_norm}.weight", n * D_t)
        for tap in range(n if head.norm_each_tap else 0):
            yield hf.vector(("fusion", f"tap_norm_{tap}"), _name(names.tap_norm, 0, 0, tap=tap), D_t)
    for block in range(head.num_blocks):
        ours = f"block_{block}"
        hidden = D if head.taps else D_t
        if head.joined_by == "product":
            yield _join((ours, "join"), _name(names.join, block, num_layers), head, names)
            if head.joining_bias:
                name = _name(names.join, block, num_layers).removesuffix("weight") + "bias"
                yield hf.vector((ours, "join_bias"), name, D)
        for kind, size, there in (
            ("embedding_norm", D, head.embedding_norm),
            ("hidden_norm", hidden, head.hidden_norm),
            ("output_norm", D, head.norm_output),
        ):
            if there:
                yield hf.vector((ours, kind), _name(getattr(names, kind), block, num_layers), size)
        for index in range(c.num_layers):
            first = index == 0
            at_first = first and head.joined_by == "attention"
            yield from hf.layer_entries(
                c,
                (ours, f"layer_{index}"),
                names.layer.format(block=block, index=num_layers + block, layer=index),
                input_width=2 * D if at_first else None,
                norm_input=not at_first and (head.norm_input or not first),
            )
    if head.own_head:
        yield hf.kernel(("head",), _name(names.head, 0, num_layers), D, head.draft_vocab_size)
    if head.own_embedding:
        yield hf.vector(("embedding",), _name(names.embedding, 0, num_layers), c.vocab_size, D)


def _join(path: tuple[str, ...], name: str, head: HeadConfig, names: Names) -> hf.Entry:
    """The joining product; its rows change places where the dialect has another order."""
    D, D_t = head.layer.width, head.target_width
    entry = hf.kernel(path, name, D + D_t, D)
    if names.embedding_first in (None, head.embedding_first):
        return entry
    first = D if names.embedding_first else D_t  # rows that come first in the file

    def read(x: np.ndarray) -> np.ndarray:
        return np.roll(x.T, -first, axis=0)

    def write(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return (np.roll(x, first, axis=0).T,)

    return entry._replace(read=read, write=write)


def _shifted(entry: hf.Entry) -> hf.Entry:
    """A norm that is stored as weight - 1."""
    if not entry.path[-1].endswith("norm"):
        return entry
    return entry._replace(
        read=lambda x: np.asarray(x, np.float32) + 1, write=lambda x: (np.asarray(x, np.float32) - 1,)
    )


def _read_vocabulary(tensors: hf.Tensors, head: HeadConfig) -> np.ndarray | None:
    """The target's id of each draft token, from the offsets d2t; checked against the mask t2d."""
    V, size = head.layer.vocab_size, head.draft_vocab_size
    place = f"{tensors.directory}: tensor 'd2t'"
    ids = np.arange(size, dtype=np.int64)
    if head.method == "eagle3" and "d2t" in tensors.where:
        ids = ids + tensors.take("d2t", (size,), INTEGERS).astype(np.int64)
        if ids[0] < 0 or ids[-1] >= V or np.any(np.diff(ids) <= 0):
            raise CheckpointError(
                f"{place} does not map draft tokens to the target's: i + d2t[i] has to increase strictly within 0 to "
                f"{V - 1}. It may hold ids instead of offsets; store id - i."
            )
    if head.method == "eagle3" and "t2d" in tensors.where:
        mask = tensors.take("t2d", (V,), FLAGS).astype(bool)
        if mask.sum() != size or not mask[ids].all():
            raise CheckpointError(
                f"{place} and 't2d' disagree: t2d marks {int(mask.sum())} tokens; expected the {size} that d2t names. "
                "Download the checkpoint again."
            )
    return ids.astype(np.int32) if head.reduced else None


def num_drafts_of(directory: Path) -> int | None:
    """The drafts a round that a draft model's directory asks for; None where its config.json does not say.

    Raises:
        CheckpointError: no config.json, or fields of the speculators format that are wrong.
    """
    from specjax.checkpoints import speculators

    if hf.read_config(directory).get("speculators_model_type") is None:
        return None
    return _num_speculative_tokens(speculators.SpeculatorModelConfig.from_pretrained(directory))


def _num_speculative_tokens(speculator: "SpeculatorModelConfig | None") -> int | None:
    details = speculator.speculators_config if speculator else None
    methods = details.proposal_methods if details else []
    return next((method.speculative_tokens for method in methods if hasattr(method, "speculative_tokens")), None)


@contextlib.contextmanager
def open_tensors(directory: Path) -> Iterator[hf.Tensors]:
    """The tensors of a directory: safetensors, or else a pickle of plain tensors.

    Raises:
        CheckpointError: there are none, or only a pickle and no torch to read it safely.
    """
    pickled = directory / "pytorch_model.bin"
    kind = _PickledTensors if pickled.is_file() and not any(directory.glob("*.safetensors*")) else hf.Tensors
    with kind(directory) as tensors:
        yield tensors


class _PickledTensors(hf.Tensors):
    """The tensors of pytorch_model.bin, unpickled with weights_only."""

    def __enter__(self) -> "_PickledTensors":
        path = self.directory / "pytorch_model.bin"
        if importlib.util.find_spec("torch") is None:
            raise CheckpointError(
                f"{path}: is a pickle, which only torch reads safely; expected safetensors. "
                "Install torch, or convert the checkpoint to safetensors."
            )
        import pickle

        import torch

        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{path}: cannot be read with weights_only=True ({reason[0] if reason else 'empty'}); expected a dict "
                "of tensors. Convert the checkpoint to safetensors."
            ) from error
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{path}: holds no dict of tensors; convert the checkpoint to safetensors.")
        self.files = [state]
        self.where = dict.fromkeys(state, 0)
        return self

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[0][name].shape)

    def _dtype(self, name: str) -> str:
        kind = str(self.files[0][name].dtype).removeprefix("torch.")
        codes = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        codes |= {"int64": "I64", "int32": "I32", "bool": "BOOL", "uint8": "U8"}
        return codes.get(kind, kind)

    def _load(self, name: str) -> np.ndarray:
        import torch

        tensor = self.files[0][name].contiguous()
        if tensor.dtype == torch.bfloat16:
            bits: np.ndarray = tensor.view(torch.int16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        array: np.ndarray = tensor.numpy()
        return array


def write_head(
    directory: Path,
    head_config: HeadConfig,
    params: network.Params,
    target_name: str | None,
    architectures: Sequence[str],
    num_speculative_tokens: int,
    vocabulary: np.ndarray | None = None,
    dtype: Any = jnp.bfloat16,
    token_map: np.ndarray | None = None,
) -> Path:
    """Writes a head in the speculators format, whole or not at all; a head that is there already is replaced.

    Args:
        directory: to be made.
        target_name: directory or hub id of the target, or None.
        architectures: of the target's config.json.
        num_speculative_tokens: G to draft with.
        vocabulary: int32[draft_vocab_size], see LoadedHead.
        dtype: of the tensors in the file.
        token_map: int32[V'], for TOKEN_MAP: the only tokens to be drafted by a head that has no vocabulary of its own.

    Returns:
        The directory.

    Raises:
        ConfigError: a field that the format cannot express, a vocabulary that does not fit the head, or a directory
            that holds something else.
    """
    directory = Path(directory)
    _check_vocabulary(head_config, vocabulary)
    config = speculator_config(head_config, target_name, architectures, num_speculative_tokens)
    config.dtype = jnp.dtype(dtype).name
    tensors = tensors_of(head_config, params, NAMES[f"speculators-{head_config.method}"], dtype)
    if vocabulary is not None:
        ids = np.asarray(vocabulary, np.int64)
        tensors["d2t"] = ids - np.arange(len(ids))
        tensors["t2d"] = np.isin(np.arange(head_config.layer.vocab_size), ids)
    return _publish(directory, tensors, config, token_map)


def _publish(
    directory: Path, tensors: dict[str, np.ndarray], config: "SpeculatorModelConfig", token_map: np.ndarray | None
) -> Path:
    """Writes tensors, config and token map under another name and renames them."""
    ours = {"config.json", "model.safetensors", TOKEN_MAP}
    if directory.exists() and {path.name for path in directory.iterdir()} - ours:
        raise ConfigError(f"directory={str(directory)!r}: holds other files; expected a new directory or a head's.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    suffix = secrets.token_hex(8)
    partial, old = (directory.with_name(f".{directory.name}-{kind}-{suffix}") for kind in ("new", "old"))
    try:
        partial.mkdir()
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "model.safetensors").chmod(0o644)  # safetensors lets only its writer read
        config.save(partial)
        if token_map is not None:
            (partial / TOKEN_MAP).write_text(json.dumps(np.asarray(token_map).tolist()), encoding="utf-8")
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
    finally:
        if old.exists() and not directory.exists():
            old.rename(directory)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return directory


def write_draft_model(
    directory: Path,
    config: ModelConfig,
    params: decoder.Params,
    target_name: str,
    num_speculative_tokens: int,
    token_map: np.ndarray | None = None,
    dtype: Any = jnp.bfloat16,
) -> Path:
    """Writes a language model with a tied head as a Hugging Face directory that names the target it drafts for.

    Args:
        num_speculative_tokens: G to draft with.
        token_map: int32[V'], for TOKEN_MAP: the only tokens to be drafted.

    Raises:
        ConfigError: a directory that holds something else.
    """
    from specjax.checkpoints import speculators

    layer = to_hf(config) | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    speculator = _greedy_chain("independent", num_speculative_tokens, target_name, [])
    written = speculators.IndependentSpeculatorConfig(**layer, speculators_config=speculator)
    written.dtype = jnp.dtype(dtype).name
    return _publish(Path(directory), dict(_as_tensors(hf.model_entries(config), params, dtype)), written, token_map)


def tensors_of(
    head: HeadConfig, params: network.Params, names: Names, dtype: Any, num_layers: int = 0
) -> dict[str, np.ndarray]:
    """The tensors of a head in a dialect. num_layers: of the target.

    Raises:
        ConfigError: params are not the head's, or blocks differ in what the dialect lets them share.
    """
    found, expected = (
        jax.tree.map(lambda x: tuple(x.shape), dict(tree)) for tree in (params, network.param_shapes(head))
    )
    if found != expected:
        raise ConfigError(f"params: have shapes {found}; expected {expected}, those of the head's config.")
    if head.layer.num_layers > 1 and "{layer}" not in names.layer:
        raise ConfigError(f"num_layers={head.layer.num_layers}: expected 1, this format has no names for more layers.")
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in _as_tensors(_entries(head, names, num_layers), params, dtype):
        if name in tensors and not np.array_equal(tensors[name], tensor):
            raise ConfigError(f"params: blocks differ in {name!r}, which this format lets them share.")
        tensors[name] = tensor
    return tensors


def _as_tensors(entries: Iterable[hf.Entry], params: Any, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a file; a name comes once for each weight that shares it."""
    for entry in entries:
        weight = params
        for part in entry.path:
            weight = weight[part]
        for name, array in zip(entry.names, entry.write(np.asarray(weight)), strict=True):
            yield name, np.ascontiguousarray(array).astype(jnp.dtype(dtype))


def _check_vocabulary(head: HeadConfig, vocabulary: np.ndarray | None) -> None:
    V, size = head.layer.vocab_size, head.draft_vocab_size
    if vocabulary is None:
        if head.reduced:
            raise ConfigError(f"vocabulary=None: expected the target's ids of the {size} tokens of the head.")
        return
    ids = np.asarray(vocabulary)
    if ids.shape != (size,) or ids.dtype.kind not in "iu" or ids[0] < 0 or ids[-1] >= V or np.any(np.diff(ids) <= 0):
        raise ConfigError(f"vocabulary: expected {size} different token ids within 0 to {V - 1}, sorted.")


def speculator_config(
    head: HeadConfig, target_name: str | None, architectures: Sequence[str], num_speculative_tokens: int
) -> "SpeculatorModelConfig":
    """The config.json of a head in the speculators format.

    Raises:
        ConfigError: a field that the format cannot express.
    """
    from transformers import AutoConfig

    from specjax.checkpoints import speculators

    layer = to_hf(head.layer)
    common: dict[str, Any] = {
        "transformer_layer_config": AutoConfig.for_model(layer.pop("model_type"), **layer),
        "tie_word_embeddings": False,
        "speculators_config": _greedy_chain(head.method, num_speculative_tokens, target_name, architectures),
    }
    if head.method == "eagle":
        return speculators.EagleSpeculatorConfig(
            transformer_layer_architecture="LlamaDecoderLayer",
            layernorms=head.embedding_norm,
            fusion_bias=head.joining_bias,
            **common,
        )
    if head.method == "eagle3":
        return speculators.Eagle3SpeculatorConfig(
            draft_vocab_size=head.draft_vocab_size,
            norm_before_residual=head.norm_before_residual,
            target_hidden_size=None if head.target_width == head.layer.width else head.target_width,
            eagle_aux_hidden_state_layer_ids=list(head.taps),
            norm_before_fc=head.norm_before_fusing,
            fc_norm=head.norm_each_tap,
            norm_output=head.recycle_normed,
            **common,
        )
    if head.wiring != "qwen3_next":  # what the format means by mtp
        common["mtp_wiring"] = head.wiring
    return speculators.MTPSpeculatorConfig(num_nextn_predict_layers=head.num_blocks, **common)


def _greedy_chain(
    algorithm: str, num_speculative_tokens: int, target_name: str | None, architectures: Sequence[str]
) -> "SpeculatorsConfig":
    from specjax.checkpoints import speculators

    return speculators.SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[speculators.GreedyTokenProposalConfig(speculative_tokens=num_speculative_tokens)],
        default_proposal_method="greedy",
        verifier=speculators.VerifierConfig(name_or_path=target_name, architectures=list(architectures)),
    )


def to_hf(layer: ModelConfig) -> dict[str, Any]:
    """The config.json fields that from_hf reads as these layers.

    Raises:
        ConfigError: there are none.
    """
    from transformers import AutoConfig

    windowed = sorted({window for window in layer.sliding_windows if window is not None})
    if layer.qk_norm:
        model_type = "qwen3"
    elif layer.qkv_bias and not layer.out_bias:
        model_type = "qwen2"
    else:
        model_type = "mistral" if windowed else "llama"
    fields: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": layer.vocab_size,
        "hidden_size": layer.width,
        "num_hidden_layers": layer.num_layers,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "intermediate_size": layer.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": layer.norm_eps,
        "max_position_embeddings": layer.max_position,
        "attention_bias": layer.qkv_bias,
        "mlp_bias": layer.mlp_bias,
        "rope_parameters": {"rope_theta": layer.rope_theta, **_rope_fields(layer.rope_scaling)},
        "tie_word_embeddings": False,
    }
    if windowed:
        kinds = ["full_attention" if window is None else "sliding_attention" for window in layer.sliding_windows]
        fields |= {"sliding_window": windowed[-1], "use_sliding_window": True, "layer_types": kinds}
    elif model_type != "llama":
        fields |= {"sliding_window": None, "layer_types": ["full_attention"] * layer.num_layers}
    for read in (fields, AutoConfig.for_model(**fields).to_diff_dict()):
        again = dataclasses.replace(from_hf(read), family=layer.family, tied_head=layer.tied_head)
        differing = [x.name for x in dataclasses.fields(layer) if getattr(again, x.name) != getattr(layer, x.name)]
        if differing:
            raise ConfigError(
                f"layer: {', '.join(f'{name}={getattr(layer, name)!r}' for name in differing)} cannot be expressed in "
                f"a config.json of {model_type}; expected layers of a llama, mistral, qwen2 or qwen3."
            )
    return fields


def _rope_fields(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        fields |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_max_position
    return fields
