"""The mesh, and how everything large lies on it: the one module that names mesh axes.

What is sharded says so by logical axes (weights where they are made, caches and logits here); RULES maps those to the
mesh. Compiling a program with the mesh set (`jax.set_mesh`) is enough: XLA's partitioner does the rest, and what must
stay local to a device (attention over the cache, acceptance) runs under shard_map by `per_device`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from specjax.cache import KVCache
from specjax.config import MeshConfig
from specjax.errors import ConfigError
from specjax.target.families import ModelConfig

DATA, KV, GROUP = "data", "kv", "group"
MODEL = (KV, GROUP)
"""The model axis in two: KV heads are split over the first, a KV head's queries over the second, on which the cache is
replicated. So a model axis larger than the number of KV heads costs as few copies of the cache as can be."""

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": DATA,
    "vocab": MODEL,
    "kv_heads": KV,
    "queries": GROUP,
    "heads": MODEL,
    "mlp": MODEL,
}
"""Logical axis -> mesh axes. Axes that are not here ("width", "head", positions) are whole on every device."""

CACHE = ("batch", "kv_heads", None, None)
LOGITS = ("batch", None, "vocab")


Place = Sharding | Format
"""Which devices an array lies on, and in which order of axes."""


def read_mesh(fields: Mapping[str, Any] | None) -> MeshConfig | None:
    """The mesh field of a config; None for one device of one process, where there is nothing to spread over.

    Raises:
        ConfigError: an unknown name, or a wrong value.
    """
    mesh = MeshConfig.model_validate(dict(fields or {}))
    return None if mesh.num_devices == 1 and jax.process_count() == 1 else mesh


def make_mesh(config: MeshConfig, target: ModelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a target: axes data, kv and group, over the first devices.

    Args:
        devices: None for all of jax's; a topology's devices to compile for.

    Raises:
        ConfigError: too few devices, or the target cannot be split so; names the nearest sizes that can.
    """
    if not isinstance(config, MeshConfig):
        raise ConfigError(f"mesh={config!r}: expected a specjax.MeshConfig, such as MeshConfig(data=2, model=4).")
    found = list(jax.devices() if devices is None else devices)
    size = config.data * config.model
    if size > len(found):
        raise ConfigError(
            f"MeshConfig: data={config.data} times model={config.model} is {size} devices, there are {len(found)}; "
            f"expected a product of at most {len(found)}."
        )
    heads = target.num_heads
    for name, whole in (("vocab_size", target.vocab_size), ("num_heads", heads), ("mlp_width", target.mlp_width)):
        if whole % config.model:
            able = [n for n in range(1, size + 1) if not (target.vocab_size % n or heads % n or target.mlp_width % n)]
            nearest = min(able, key=lambda n: (abs(n - config.model), n))
            raise ConfigError(
                f"MeshConfig.model={config.model}: the target's {name}={whole} cannot be split so; expected a divisor "
                f"of vocab_size, num_heads and mlp_width, of which {nearest} is the nearest."
            )
    kv = math.gcd(config.model, target.num_kv_heads)
    shape = config.data, kv, config.model // kv
    if target.queries_per_kv % shape[2]:
        raise ConfigError(
            f"MeshConfig.model={config.model}: splits each of the target's {target.num_kv_heads} KV heads "
            f"{shape[2]} times, which its {target.queries_per_kv} queries cannot be; expected at most {heads}."
        )
    if devices is None:
        _check_every_process_has_part(config, found)
    grid = np.array(found[:size]).reshape(shape)
    return Mesh(grid, (DATA, KV, GROUP), axis_types=(AxisType.Auto,) * 3)


def _check_every_process_has_part(config: MeshConfig, devices: Sequence[Any]) -> None:
    """All processes run the same programs, so none may be left out of their mesh.

    Raises:
        ConfigError: one would be.
    """
    size = config.data * config.model
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:size]}
    if idle:
        raise ConfigError(
            f"MeshConfig: data={config.data} times model={config.model} takes {size} of {len(devices)} devices, of "
            f"which process {min(idle)} has none; expected a product of {len(devices)}, all devices of all processes."
        )


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """Where an array of these logical axes lies; an axis that does not divide (one row, say) is whole everywhere."""
    return PartitionSpec(*(_split(axis, size, mesh) for axis, size in zip(axes, shape, strict=True)))


def _split(axis: str | None, size: int, mesh: Any) -> str | tuple[str, ...] | None:
    rule = RULES.get(axis) if axis else None
    if rule is None:
        return None
    parts = math.prod(mesh.shape[name] for name in ((rule,) if isinstance(rule, str) else rule))
    return rule if size % parts == 0 else None


def has_places(mesh: Mesh | None) -> bool:
    """Whether it matters where weights lie: on a mesh, and in tiled memory."""
    return mesh is not None or _is_tiled(jax.devices()[0])


def param_places(shapes: Any, axes: Any, mesh: Mesh | None, whole: bool = False) -> Any:
    """Where each weight lies: a sharding, or in tiled memory a Format with one.

    Args:
        shapes, axes: as param_shapes and param_axes of a network give them.
        mesh: None for one device.
        whole: every device gets all of each weight.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]

    def of(shape: Any, names: PartitionSpec) -> Place:
        logical = tuple(names) + (None,) * (len(shape.shape) - len(names))
        parts = PartitionSpec() if whole or mesh is None else spec(logical, shape.shape, mesh)
        sharding = SingleDeviceSharding(device) if mesh is None else NamedSharding(mesh, parts)
        return Format(Layout(_tiled_order(logical)), sharding) if _is_tiled(device) else sharding

    return jax.tree.map(of, shapes, axes)


def _is_tiled(device: jax.Device) -> bool:
    """Whether a device's memory is tiled, so that the order of axes matters."""
    return device.platform == "tpu"


def _tiled_order(axes: Sequence[str | None]) -> tuple[int, ...]:
    """Axes from the slowest to the fastest in a TPU's memory, which is tiled over the last two of them.

    A kernel [in, ..., out] lies as [..., in, out]: those between are short (gate and up, the heads of a group). In the
    order that they are named in they would be padded, and the compiler would copy all such kernels in every call.
    """
    order = tuple(range(len(axes)))
    return order[1:-1] + (0, order[-1]) if len(axes) > 2 and axes[0] == "width" else order


def placed(params: Any, shapes: Any, axes: Any, mesh: Mesh | None, whole: bool = False) -> Any:
    """Weights where they lie. See param_places."""
    return jax.tree.map(put, params, param_places(shapes, axes, mesh, whole))


def put(array: Any, where: Place) -> jax.Array:
    """An array at a place that may be other processes' too, each of which has the whole and sends its devices parts."""
    sharding = where.sharding if isinstance(where, Format) else where
    assert isinstance(sharding, Sharding)  # Format allows for None
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, where)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, where, lambda part: whole[part])


def put_all(tree: Any, where: Place) -> Any:
    """put for every array of a tree."""
    return jax.tree.map(lambda array: put(array, where), tree)


def on_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """What lies nowhere in particular yet, as arrays of the host do, whole on every device of a mesh; None changes
    nothing."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(array: Any) -> Any:
        there = isinstance(array, jax.ShapeDtypeStruct) or (isinstance(array, jax.Array) and array.committed)
        return array if there else put(array, everywhere)

    return jax.tree.map(placed, tree)


def fetch(tree: Any) -> Any:
    """Arrays as numpy's, whole on every process; all processes ask for the same ones in the same order."""
    leaves, structure = jax.tree.flatten(tree)
    spread = [index for index, leaf in enumerate(leaves) if not _is_here(leaf)]
    if spread:
        everywhere = NamedSharding(leaves[spread[0]].sharding.mesh, PartitionSpec())
        for index, leaf in zip(spread, _gather(everywhere)([leaves[index] for index in spread]), strict=True):
            leaves[index] = leaf
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _is_here(array: Any) -> bool:
    return not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated


@functools.cache
def _gather(where: NamedSharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
    return jax.jit(lambda arrays: arrays, out_shardings=where)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each array of a DecodeState, or its shapes: caches by head, all else by row."""

    def of(array: Any) -> NamedSharding:
        logical = ("batch",) + (None,) * (len(array.shape) - 1) if array.shape else ()
        return NamedSharding(mesh, spec(logical, array.shape, mesh))

    def part(node: Any) -> Any:
        if isinstance(node, KVCache):
            return jax.tree.map(lambda x: NamedSharding(mesh, spec(CACHE, x.shape, mesh)), node)
        return of(node)

    return jax.tree.map(part, state, is_leaf=lambda node: isinstance(node, KVCache))


def placed_state(state: Any, mesh: Mesh | None) -> Any:
    """A DecodeState, or its caches, where programs of a mesh have them; None changes nothing."""
    return state if mesh is None else jax.tree.map(put, state, state_shardings(state, mesh))


Axes = tuple[str | None, ...]
"""Logical axes of an array, or of every array of a pytree."""


def per_device(
    function: Callable[..., Any], inputs: Sequence[Axes], outputs: Sequence[tuple[Axes, Sequence[int]]], *arguments: Any
) -> Any:
    """function(*arguments) on each device's own part, where a mesh is set; else as it is.

    Args:
        function: sees local shapes, and gives as many results as outputs has entries (one, if it has one).
        inputs: logical axes of each argument; None among the arguments stays None.
        outputs: logical axes and global shape of each result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*arguments)
    pairs = zip(arguments, inputs, strict=True)
    in_specs = tuple(jax.tree.map(lambda x, names=names: spec(names, x.shape, mesh), tree) for tree, names in pairs)
    out_specs = tuple(spec(names, shape, mesh) for names, shape in outputs)
    whole = out_specs[0] if len(outputs) == 1 else out_specs
    return jax.shard_map(function, in_specs=in_specs, out_specs=whole, check_vma=False)(*arguments)


def num_parts(mesh: Any) -> int:
    """Parts that weights are split into."""
    return mesh.shape[KV] * mesh.shape[GROUP]


def vocab_axis(vocab_size: int) -> tuple[str, ...] | None:
    """The mesh axes that split a vocabulary inside per_device; None where it is whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or num_parts(mesh) == 1:
        return None
    return MODEL if _split("vocab", vocab_size, mesh) else None
