"""The programs that would run, compiled for devices that are not there: arrays are shapes, dtypes and places."""

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specjax import cache as kv
from specjax.config import MeshConfig
from specjax.drafters.base import Drafter
from specjax.drafters.head import HeadWeights, head
from specjax.drafters.ngram import ngram
from specjax.drafters.plain import plain
from specjax.errors import ConfigError
from specjax.generate import Programs, finished_rows, init_state
from specjax.heads import config as heads
from specjax.heads import network
from specjax.heads.config import HeadConfig
from specjax.preflight.experiment import Preflight, Topology
from specjax.preflight.hlo import Round
from specjax.sharding import make_mesh, param_places, state_shardings
from specjax.step import DecodeState, Params, System
from specjax.target import decoder
from specjax.target.families import ModelConfig
from specjax.verify import build_rule


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled, and where everything lies.

    Attributes:
        experiment: see Preflight.
        topology: see Topology.
        model: the target.
        head: of the drafter; None where it has none.
        mesh: over the topology's devices.
    """

    experiment: Preflight
    topology: Topology
    model: ModelConfig
    head: HeadConfig | None
    mesh: Mesh

    @property
    def dtype(self) -> Any:
        """Of weights and caches."""
        return jnp.dtype(self.experiment.dtype)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A decode program.

    Attributes:
        drafts: a round; 0 decodes plainly.
        params, state: its arrays.
        seconds: spent on compiling it, tracing included.
        memory: as the compiler says, in bytes of a device: arguments, outputs, aliased (outputs that are arguments),
            temporaries and code; None where it does not fit.
        round: what it costs; None where it does not fit.
        refusal: what the compiler says where it does not fit, or "".
    """

    drafts: int
    params: Params
    state: DecodeState
    seconds: float
    memory: dict[str, int] | None
    round: Round | None
    refusal: str


def plan(experiment: Preflight, topology: Topology) -> Plan:
    """Reads what an experiment names.

    Raises:
        ConfigError: it does not fit together, or not on the topology; names the nearest that does.
        CheckpointError: a config.json that can't be read.
    """
    model = experiment.read_model()
    size = len(topology.devices)
    if size % experiment.data:
        near = max(n for n in range(1, experiment.data + 1) if size % n == 0)
        raise ConfigError(
            f"config.mesh.data={experiment.data}: {topology.name} has {size} devices; expected a divisor, of "
            f"which {near} is the nearest."
        )
    mesh_config = MeshConfig(data=experiment.data, model=experiment.model_parts or size // experiment.data)
    if size % mesh_config.num_devices:
        near = max(n for n in range(1, mesh_config.model + 1) if size % (n * experiment.data) == 0)
        raise ConfigError(
            f"config.mesh.model={mesh_config.model}: {topology.name} has {size} devices, which data={experiment.data} "
            f"times so many do not divide; expected {near}, the nearest, or 0 for all."
        )
    method, parts = experiment.method, mesh_config.model
    wanted = None if method is None else method.draft_tensor_parallel_size
    if wanted not in (None, 1, parts):
        raise ConfigError(
            f"config.speculative.draft_tensor_parallel_size={wanted}: expected 1, or {parts} as the mesh has."
        )
    head_config = None
    if method is not None and method.method != "ngram":
        head_config = heads.for_target(model, method.method, **experiment.head)  # type: ignore[arg-type]
    mesh = make_mesh(mesh_config, model, topology.devices)
    return Plan(experiment, topology, model, head_config, mesh)


def shapes(plan: Plan, drafts: int) -> tuple[Programs, Params, DecodeState]:
    """The programs of a number of drafts, and the arrays that they would be called with."""
    model, dtype, mesh, experiment = plan.model, plan.dtype, plan.mesh, plan.experiment
    found = decoder.param_shapes(model, dtype)
    target = _placed(found, param_places(found, decoder.param_axes(model), mesh))
    drafter, drafter_params = _drafter(plan, drafts, target)
    method = experiment.method
    _, rule = build_rule(method.model_copy(update={"num_speculative_tokens": drafts}) if method and drafts else None)
    system = System(functools.partial(decoder.apply, model), drafter, rule)

    def init_cache(batch: int, capacity: int) -> kv.KVCache:
        return decoder.init_cache(model, batch, capacity, dtype)

    params = Params(target, drafter_params)
    rows = finished_rows(experiment.batch, experiment.positions)
    state = jax.eval_shape(functools.partial(init_state, system, init_cache), params, rows)
    return Programs(system, init_cache, mesh=mesh), params, _placed(state, state_shardings(state, mesh))


def _drafter(plan: Plan, drafts: int, target: Any) -> tuple[Drafter, Any]:
    method, config = plan.experiment.method, plan.head
    if not drafts or method is None:
        return plain(), ()
    if config is None:
        shortest, longest = method.prompt_lookup_min, method.prompt_lookup_max
        assert shortest is not None and longest is not None  # validated
        return ngram(drafts, shortest, longest), ()
    found = network.param_shapes(config, plan.dtype)
    whole = method.draft_tensor_parallel_size == 1
    own = _placed(found, param_places(found, network.param_axes(config), plan.mesh, whole))
    vocabulary = _everywhere((config.draft_vocab_size,), jnp.int32, plan.mesh) if config.reduced else None
    weights = HeadWeights(own, network.Shared(target["embedding"], target["head"]), vocabulary)  # type: ignore[arg-type]
    sample = method.draft_sample_method == "probabilistic"
    return head(config, drafts, plan.dtype, sample, method.max_model_len), weights


def _placed(arrays: Any, where: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), arrays, where)


def _everywhere(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def device_bytes(arrays: Any) -> int:
    """Bytes of a device's part of abstract arrays, without padding; arrays that are shared count once."""
    leaves = {id(x): x for x in jax.tree.leaves(arrays)}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def caches(state: Any) -> list[kv.KVCache]:
    """The caches in a state or a part of it."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kv.KVCache))
    return [leaf for leaf in leaves if isinstance(leaf, kv.KVCache)]


def compile_program(plan: Plan, drafts: int) -> Compiled:
    """Compiles the decode program of a number of drafts; 0 is plain decoding."""
    began = time.perf_counter()
    programs, params, state = shapes(plan, drafts)
    needed, available = device_bytes((params, state)), plan.topology.chip.hbm_bytes
    if needed > available:
        refusal = f"weights and caches alone take {needed / 2**30:.2f} of {available / 2**30:.2f} GiB"
        return Compiled(drafts, params, state, time.perf_counter() - began, None, None, refusal)
    num_rounds = _everywhere((), jnp.int32, plan.mesh)
    try:
        # Abstract, because constants that tracing computes can't be computed on devices that are not there.
        with jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh):
            program = programs.decoding(state).lower(params, state, num_rounds).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).splitlines()[0]
        return Compiled(drafts, params, state, time.perf_counter() - began, None, None, refusal)
    seconds = time.perf_counter() - began
    said = program.memory_analysis()
    memory = {
        "arguments": said.argument_size_in_bytes,
        "outputs": said.output_size_in_bytes,
        "aliased": said.alias_size_in_bytes,
        "temporaries": said.temp_size_in_bytes,
        "code": said.generated_code_size_in_bytes,
    }
    context, positions = plan.experiment.context, plan.experiment.positions
    arrays = [keys for cache in caches(state) for keys in cache.keys]
    live = {tuple(sorted(x.sharding.shard_shape(x.shape))): context / positions for x in arrays}
    costs = Round(program.as_text(), plan.topology.chip, -(-context // kv.BLOCK), live)
    return Compiled(drafts, params, state, seconds, memory, costs, "")


def compile_all(plan: Plan, advance: Callable[[int, int, str], None]) -> Iterator[Compiled]:
    """Compiles plain decoding and every number of drafts, some at a time; in order."""
    wanted = (0, *plan.experiment.drafts)
    advance(0, len(wanted), "compiling")
    with concurrent.futures.ThreadPoolExecutor(plan.experiment.compilers) as pool:
        for done, compiled in enumerate(pool.map(functools.partial(compile_program, plan), wanted), start=1):
            advance(done, len(wanted), f"compiled in {compiled.seconds:.0f} s")
            yield compiled
