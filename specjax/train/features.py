"""The target's taps, final states and best tokens of training text, computed once and kept on disk."""

import functools
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from specjax import cache as kv
from specjax.checkpoints.load import Target
from specjax.errors import ConfigError
from specjax.evaluate.files import write_json
from specjax.target import decoder
from specjax.target.families import ModelConfig
from specjax.target.layers import Kernel, project
from specjax.train.responses import Response

LONGEST = 4096
"""Longer sequences lose what lies behind."""

FORWARD_ROWS = 8
"""Sequences that go through the target together."""

WINDOWS = (128, 64, 32)
"""Positions that go through it at once: the attention of 128 stays in a CPU's caches. The last are as few as do."""

SHARD_TOKENS = 32768
"""Tokens after which a shard is closed: about what a kill loses."""

HEAD_CHUNK = 512
"""Tokens whose logits over the whole vocabulary are held at once."""

PER_TOKEN = {"tokens": np.int32, "loss_mask": np.bool_, "positions": np.int32, "best": np.int32}


def target_features(
    config: ModelConfig,
    params: decoder.Params,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    taps: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The target's view of packed sequences: a token sees the earlier tokens of its own segment.

    Args:
        tokens, positions: int32[B, T].
        segments: int32[B, T], 0 for padding.
        taps: as in decoder.apply.

    Returns:
        taps float32[B, T, n, D]; the states after the final norm float32[B, T, D]; the most probable next tokens
        int32[B, T].
    """
    T = tokens.shape[1]
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))
    tapped, final = decoder.forward(config, params, tokens, positions, mask, taps, jnp.float32)
    return _stacked(tapped, final), final, _best_tokens(params["head"], final)


def _stacked(tapped: Sequence[jax.Array], like: jax.Array) -> jax.Array:
    """Taps as one array [B, T, n, D]; none leave n = 0."""
    return jnp.stack(tapped, axis=2) if tapped else jnp.zeros((*like.shape[:2], 0, like.shape[-1]), like.dtype)


def _best_tokens(head: Kernel, final: jax.Array) -> jax.Array:
    """The argmax of final @ head, int32[B, T], some tokens at a time because all logits together fill gigabytes."""
    flat = final.reshape(-1, final.shape[-1])
    chunk = min(HEAD_CHUNK, len(flat))
    padded = jnp.pad(flat, ((0, -len(flat) % chunk), (0, 0))).reshape(-1, chunk, flat.shape[-1])

    def best(states: jax.Array) -> jax.Array:
        return jnp.argmax(project(states, head), axis=-1).astype(jnp.int32)

    return jax.lax.map(best, padded).reshape(-1)[: len(flat)].reshape(final.shape[:-1])


class FeatureCache:
    """Shards of features on disk, read as sequences. See write for the files; taps may be some of the stored ones.

    Attributes:
        lengths: tokens of each sequence.
        names: ids of the sequences' responses.
    """

    def __init__(
        self, directory: str | os.PathLike, responses: Sequence[Response], target: Target, taps: Sequence[int]
    ):
        """Opens the features of given responses, in their order.

        Raises:
            ConfigError: the cache is of another target or of other taps, or some responses are not in it.
        """
        self.directory = Path(directory)
        stored = check_identity(self.directory, target, taps)
        self._columns = [stored.index(tap) for tap in taps]
        self._all_taps = self._columns == list(range(len(stored)))
        self._shards: list[dict[str, np.ndarray]] = []
        where: dict[str, tuple[int, int, int]] = {}
        for path in _shard_paths(self.directory):
            shard, meta = _open_shard(path)
            for name, first, last in zip(meta["sequences"], shard["offsets"][:-1], shard["offsets"][1:], strict=True):
                where[name] = len(self._shards), int(first), int(last)
            self._shards.append(shard)
        missing = [response.id for response in responses if sequence_name(response) not in where]
        if missing:
            raise ConfigError(
                f"features_dir={str(directory)!r}: lacks {len(missing)} of {len(responses)} responses, such as "
                f"{missing[0]!r}; run the command that writes features again."
            )
        self._places = [where[sequence_name(response)] for response in responses]
        self.lengths = np.array([last - first for _, first, last in self._places], np.int64)
        self.names = [response.id for response in responses]

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int, length: int) -> dict[str, np.ndarray]:
        """The last `length` tokens of a sequence: arrays of PER_TOKEN, final bfloat16[t, D], taps [t, n, D]."""
        shard, first, last = self._places[index]
        arrays = self._shards[shard]
        chosen = slice(max(first, last - length), last)
        part = {name: arrays[name][chosen] for name in (*PER_TOKEN, "final")}
        if self._columns:
            part["taps"] = arrays["taps"][chosen] if self._all_taps else arrays["taps"][chosen][:, self._columns]
        return part


class TokenStore:
    """The same sequences without features: for training that runs the target itself. See FeatureCache."""

    def __init__(self, responses: Sequence[Response], max_length: int = LONGEST):
        self._responses = responses
        self._max_length = max_length
        self.lengths = np.array([len(_tokens(response, max_length)) for response in responses], np.int64)
        self.names = [response.id for response in responses]

    def __len__(self) -> int:
        return len(self._responses)

    def read(self, index: int, length: int) -> dict[str, np.ndarray]:
        """tokens, loss_mask and positions of the first `length` tokens of a sequence.

        Not of the last, as in FeatureCache: the target would not see what stands before them.
        """
        arrays = token_arrays(self._responses[index], self._max_length)
        return {name: array[:length] for name, array in arrays.items()}


def token_arrays(response: Response, max_length: int = LONGEST) -> dict[str, np.ndarray]:
    """tokens int32[t], loss_mask bool[t] (True in the response) and positions int32[t] of a response."""
    tokens = _tokens(response, max_length)
    index = np.arange(len(tokens), dtype=np.int32)
    return {"tokens": np.array(tokens, np.int32), "loss_mask": index >= len(response.prompt), "positions": index}


def _tokens(response: Response, max_length: int) -> list[int]:
    return (response.prompt + response.response)[:max_length]


def sequence_name(response: Response) -> str:
    """A name that another text with the same id doesn't have."""
    checksum = zlib.crc32(np.array(response.prompt + [-1] + response.response, np.int32).tobytes())
    return f"{response.id}:{checksum:08x}"


def texts_as_responses(tokenizer: Any, texts: Sequence[tuple[str, str]], length: int) -> Iterator[Response]:
    """Plain (id, text) pairs as sequences of at most `length` tokens, with loss on all of them."""
    for name, text in texts:
        tokens = tokenizer(text)["input_ids"]
        for part, first in enumerate(range(0, len(tokens), length)):
            yield Response(f"{name}#text{part}", "text", [], list(tokens[first : first + length]), "length")


def write(
    directory: str | os.PathLike,
    responses: Sequence[Response],
    target: Target,
    taps: Sequence[int],
    progress: Any = None,
) -> None:
    """Computes the features of responses that the cache does not hold yet, and adds them as shards.

    A shard is a folder 00000, 00001, ... that appears complete: tokens.npy int32[N], loss_mask.npy bool[N] (True in
    responses), positions.npy int32[N], best.npy int32[N] (the target's most probable next token), final.npy
    bfloat16[N, D] and taps.npy bfloat16[N, n, D] (both as uint16), offsets.npy int64[sequences + 1], meta.json.

    Args:
        target: its dtype is that of the computation; bfloat16 is several times faster where a CPU has AMX.
        taps: as in decoder.apply.
        progress: called with (done, total, description) after each forward pass; None prints now and then.

    Raises:
        ConfigError: the cache is of another target or of other taps.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob("*.*.partial"):
        if not _running(int(leftover.suffixes[-2][1:])):  # another run that shares the cache may be writing its own
            shutil.rmtree(leftover, ignore_errors=True)
    if (directory / "meta.json").is_file():
        taps = check_identity(directory, target, taps)
    else:
        write_json(directory / "meta.json", _identity(target, taps))
    known = {name for path in _shard_paths(directory) for name in _read_json(path / "meta.json")["sequences"]}
    fresh = {sequence_name(response): response for response in responses}
    pending = sorted((len(_tokens(r, LONGEST)), name) for name, r in fresh.items() if name not in known)
    pending = [item for item in pending if item[0]]
    total, done, began = sum(length for length, _ in pending), 0, time.perf_counter()
    shard: list[tuple[str, dict[str, np.ndarray]]] = []
    for number, first in enumerate(range(0, len(pending), FORWARD_ROWS)):
        names = [name for _, name in pending[first : first + FORWARD_ROWS]]
        arrays = [token_arrays(fresh[name]) for name in names]
        shard += zip(names, _compute(target, tuple(taps), arrays), strict=True)
        done += sum(len(array["tokens"]) for array in arrays)
        speed = done / (time.perf_counter() - began)
        if progress:
            progress(done, total, f"features, {speed:.0f} tokens/s")
        elif number % 10 == 0 or done == total:
            print(f"features: {done} of {total} tokens, {speed:.0f} tokens/s", flush=True)
        if done == total or sum(len(arrays["tokens"]) for _, arrays in shard) >= SHARD_TOKENS:
            _write_shard(directory, shard, target, taps)
            shard = []


def _compute(
    target: Target, taps: tuple[int, ...], sequences: Sequence[dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """Adds best, final and taps to the token arrays of at most FORWARD_ROWS sequences."""
    longest = max(len(arrays["tokens"]) for arrays in sequences)
    starts = range(0, longest, WINDOWS[0])
    widths = [min(width for width in WINDOWS if width >= min(longest - start, WINDOWS[0])) for start in starts]
    tokens = np.zeros((FORWARD_ROWS, sum(widths)), np.int32)
    for row, arrays in enumerate(sequences):
        tokens[row, : len(arrays["tokens"])] = arrays["tokens"]
    capacity = kv.round_capacity(tokens.shape[1])
    cache = decoder.init_cache(target.config, FORWARD_ROWS, capacity, jnp.dtype(jnp.float32))
    windows = []
    for start, width in zip(starts, widths, strict=True):
        part = tokens[:, start : start + width]
        found, cache = _forward(target.config, target.params, part, np.int32(start), cache, taps)
        windows.append(jax.device_get(found))
    tapped, final, best = (np.concatenate(parts, axis=1) for parts in zip(*windows, strict=True))
    for row, arrays in enumerate(sequences):
        used = row, slice(len(arrays["tokens"]))
        yield arrays | {"best": best[used], "final": final[used], "taps": tapped[used]}


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=4)
def _forward(
    config: ModelConfig, params: decoder.Params, tokens: Any, start: Any, cache: kv.KVCache, taps: tuple[int, ...]
) -> Any:
    """What target_features gives, taps and states as bfloat16, of a window whose history the cache holds."""
    starts = jnp.full(tokens.shape[0], start)
    output = decoder.apply(config, params, tokens, starts, cache, taps, with_logits=False)
    narrow = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    best = _best_tokens(params["head"], output.final)
    return (narrow(_stacked(output.taps, output.final)), narrow(output.final), best), output.cache


def _write_shard(
    directory: Path, shard: Sequence[tuple[str, dict[str, np.ndarray]]], target: Target, taps: Sequence[int]
) -> None:
    """Writes one shard under a temporary name and renames it."""
    number = max((int(path.name) for path in _shard_paths(directory)), default=-1) + 1
    temporary = directory / f"{number:05}.{os.getpid()}.partial"
    temporary.mkdir()
    arrays = [arrays for _, arrays in shard]
    for name in PER_TOKEN:
        np.save(temporary / f"{name}.npy", np.concatenate([a[name] for a in arrays]))
    for name in ("final", "taps"):
        np.save(temporary / f"{name}.npy", np.concatenate([a[name] for a in arrays]).view(np.uint16))
    lengths = [len(a["tokens"]) for a in arrays]
    np.save(temporary / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    counts = {"num_sequences": len(shard), "num_tokens": sum(lengths)}
    write_json(temporary / "meta.json", _identity(target, taps) | counts | {"sequences": [name for name, _ in shard]})
    temporary.rename(directory / f"{number:05}")


def _open_shard(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A shard's arrays, mapped and not read, and its meta.json."""
    names = (*PER_TOKEN, "final", "taps", "offsets")
    arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r") for name in names}
    for name in ("final", "taps"):
        arrays[name] = arrays[name].view(ml_dtypes.bfloat16)
    return arrays, _read_json(path / "meta.json")


def _shard_paths(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name.isdigit())


def _identity(target: Target, taps: Sequence[int]) -> dict[str, Any]:
    """What the features of one cache have in common."""
    config = target.config
    return {
        "target": target.name,
        "dtype": str(target.dtype),
        "width": config.width,
        "num_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "taps": list(taps),
        "weights": _fingerprint(target.params),
    }


def _fingerprint(params: Any) -> str:
    """A checksum of some of the weights: other weights by the same name have other features."""
    checksum = 0
    for weight in jax.tree.leaves(params)[:: max(len(jax.tree.leaves(params)) // 8, 1)]:
        checksum = zlib.crc32(np.asarray(weight.reshape(-1)[:256], np.float32).tobytes(), checksum)
    return f"{checksum:08x}"


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def check_identity(directory: Path, target: Target, taps: Sequence[int]) -> list[int]:
    """The taps that a cache stores.

    Raises:
        ConfigError: it is of another target, or lacks some of the taps.
    """
    if not (directory / "meta.json").is_file():
        raise ConfigError(f"features_dir={str(directory)!r}: holds no features; expected a folder that training wrote.")
    found, expected = _read_json(directory / "meta.json"), _identity(target, taps)
    stored: list[int] = found["taps"]
    wrong = [field for field in expected if field != "taps" and found.get(field) != expected[field]]
    if not set(taps) <= set(stored):
        wrong.append("taps")
    for field in wrong:
        raise ConfigError(
            f"features_dir={str(directory)!r}: was computed with {field}={found.get(field)!r}, but this run needs "
            f"{field}={expected[field]!r}; choose another folder, or remove it so that it is computed anew."
        )
    return stored


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
