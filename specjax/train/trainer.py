"""Training of draft heads: one command from prompts to a head, which goes on exactly where a kill stopped it."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from specjax import processes
from specjax.checkpoints.load import Target, load_target
from specjax.config import MeshConfig
from specjax.errors import ConfigError, SpecJAXError
from specjax.evaluate.environment import device_name
from specjax.evaluate.files import plain_dict, prepare_workdir, write_json, write_text
from specjax.evaluate.prompts import load_prompts
from specjax.generate import enable_compilation_cache
from specjax.sharding import put, put_all
from specjax.train import data, features, losses, responses
from specjax.train.begin import inherit, with_sharding
from specjax.train.respond import FILE, RespondConfig, answer, respond_config
from specjax.train.students import HeadStudent, Student, student_for

FEATURES = ("cache", "on_the_fly")
SCHEDULES = ("cosine", "linear", "constant")
MAY_CHANGE = ("log_every", "checkpoint_every", "eval_every", "eval_batches", "mesh", "distributed")
"""Fields that a resumed run may have other values of: they don't change what is learnt."""
MUON_MOMENTUM, NEWTON_SCHULZ = 0.95, (3.4445, -4.775, 2.0315)
MATRICES = {"qkv": (1, 1), "gate_up": (1, 1), "out": (0, 3)}
"""Weights that are not one matrix from their first axis to the others: axes that count matrices, and axes read. Those
that count (a KV head's projections, gate and up) stand behind those that are read, and the rest is what is written."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a training step reads.

    Attributes:
        length: tokens of a row.
        rows: in a batch.
        held_out_every: about one prompt of so many validates; 0 for none.
    """

    length: int = 512
    rows: int = 4
    held_out_every: int = 50

    def __post_init__(self) -> None:
        for field in ("length", "rows"):
            if getattr(self, field) < 1:
                raise ConfigError(f"data.{field}={getattr(self, field)}: expected an integer >= 1.")
        if self.held_out_every < 0 or self.held_out_every == 1:
            raise ConfigError(f"data.held_out_every={self.held_out_every}: expected 0 (none) or at least 2.")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (1711.05101) behind a limit on the gradient's norm.

    Attributes:
        learning_rate: the highest, after warm-up.
        warmup_steps: in which it rises linearly from 0.
        schedule: of the decay, one of SCHEDULES.
        final_fraction: of the learning rate that is left at the last step.
        b1, b2: of the moments.
        weight_decay: of weights with two axes and more.
        clip_norm: largest global norm of the gradient.
        muon_rms: root mean square of a matrix's step over the learning rate, where the steps of the matrices in layers
            are made orthogonal (Muon, scaled as 2502.16982 does with 0.2); 0 leaves all weights to AdamW.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 50
    schedule: str = "cosine"
    final_fraction: float = 0.05
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 0.5
    muon_rms: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"optimizer.schedule={self.schedule!r}: expected one of {SCHEDULES}.")
        for field in ("learning_rate", "clip_norm"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"optimizer.{field}={getattr(self, field)}: expected a number > 0.")
        if not self.muon_rms >= 0:
            raise ConfigError(f"optimizer.muon_rms={self.muon_rms}: expected a number >= 0; 0.2 is usual.")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run; see configs/train_eagle3_smollm2.py, which comments on every field."""

    target: str
    head: dict[str, Any]
    steps: int
    dtype: str = ""
    responses: str = ""
    respond: RespondConfig = dataclasses.field(default_factory=RespondConfig)
    texts: str = ""
    num_texts: int = 0
    features: str = "cache"
    features_dir: str = ""
    init_from: str = ""
    loss_vocab_size: int = 0
    compute_dtype: str = "float32"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    unroll: tuple[tuple[int, int], ...] = ((0, 1),)
    loss: losses.LossSettings = dataclasses.field(default_factory=losses.LossSettings)
    log_every: int = 10
    checkpoint_every: int = 100
    eval_every: int = 100
    eval_batches: int = 8
    seed: int = 0
    mesh: MeshConfig = MeshConfig()
    distributed: processes.Distributed = dataclasses.field(default_factory=processes.Distributed)

    def __post_init__(self) -> None:
        for field in ("steps", "log_every", "checkpoint_every", "eval_every"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: expected an integer >= 1.")
        if self.features not in FEATURES:
            raise ConfigError(f"features={self.features!r}: expected one of {FEATURES}.")
        for field in ("checkpoint_every", "eval_every"):
            if getattr(self, field) % self.log_every:
                raise ConfigError(
                    f"{field}={getattr(self, field)}: expected a multiple of log_every={self.log_every}, so that no "
                    "logged line is cut in two; change one of them."
                )
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"compute_dtype={self.compute_dtype!r}: expected 'float32' or 'bfloat16'.")
        starts = [start for start, _ in self.unroll]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or min(n for _, n in self.unroll) < 1:
            raise ConfigError(
                f"unroll={self.unroll}: expected ((0, n), (step, n), ...) with rising steps and n >= 1, such as "
                "((0, 1), (1000, 3))."
            )
        if self.mesh.model != 1:
            raise ConfigError(
                f"mesh.model={self.mesh.model}: expected 1; training splits rows alone, over mesh.data devices."
            )
        if self.data.rows % self.mesh.data:
            raise ConfigError(f"data.rows={self.data.rows}: expected a multiple of mesh.data={self.mesh.data}.")

    @classmethod
    def from_config(cls, config: ConfigDict) -> "TrainConfig":
        """The frozen form of a config file's fields.

        Raises:
            ConfigError: an unknown or missing field, or a wrong value.
        """
        fields = plain_dict(config)
        nested = {"data": DataConfig, "optimizer": OptimizerConfig, "loss": losses.LossSettings}
        for name, kind in nested.items():
            if name in fields:
                fields[name] = _filled(kind, fields[name], f"{name}.")
        fields["mesh"] = MeshConfig.model_validate(fields.get("mesh", {}))
        fields["distributed"] = processes.Distributed.from_config(fields.get("distributed"))
        if "respond" in fields:
            fields["respond"] = respond_config(fields["respond"])
        if "unroll" in fields:
            fields["unroll"] = tuple((int(start), int(num)) for start, num in fields["unroll"])
        filled: TrainConfig = _filled(cls, fields, "")
        return filled

    def fields(self) -> dict[str, Any]:
        """As JSON holds them."""
        return dataclasses.asdict(self) | {"mesh": self.mesh.model_dump()}

    def num_unrolled(self, step: int) -> int:
        """Draft steps that the loss of this training step goes through."""
        return next(num for start, num in reversed(self.unroll) if start <= step)


def _filled(kind: Any, fields: dict[str, Any], prefix: str) -> Any:
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(f"{prefix}{name}={value!r}: is no field; expected one of {', '.join(known)}.")
    for name, field in known.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in fields and not optional:
            raise ConfigError(f"{prefix}{name}: is missing; add it to the config.")
    return kind(**fields)


class TrainState(NamedTuple):
    """What a training step changes.

    Attributes:
        params: float32 weights of the head, of what reads states raw in units of their root mean squares.
        opt_state: the optimiser's.
        step: steps done, int32[].
    """

    params: Any
    opt_state: Any
    step: jax.Array


def make_optimizer(config: OptimizerConfig, steps: int) -> tuple[optax.GradientTransformation, Any]:
    """The optimiser, and its learning rate as a function of the step."""
    rest, final = max(steps - config.warmup_steps, 1), config.learning_rate * config.final_fraction
    after: Any = optax.constant_schedule(config.learning_rate)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, rest, config.final_fraction)
    if config.schedule == "linear":
        after = optax.linear_schedule(config.learning_rate, final, rest)
    before = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    schedule = optax.join_schedules([before, after], [config.warmup_steps])

    def learning_rate(count: Any) -> Any:
        return schedule(count + 1)  # no step has rate 0

    decayed = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = optax.adamw(learning_rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed)
    if config.muon_rms:
        adamw = optax.partition({"muon": _muon(config, learning_rate), "adamw": adamw}, _optimizers)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), learning_rate


def _muon(config: OptimizerConfig, learning_rate: Any) -> optax.GradientTransformation:
    """Momentum whose every matrix is made orthogonal. See MATRICES for what a weight's matrices are."""

    def step(path: Any, momentum: jax.Array) -> jax.Array:
        num_groups, reads = MATRICES.get(path[-1].key, (0, 1))
        order = [*range(reads, reads + num_groups), *range(reads), *range(reads + num_groups, momentum.ndim)]
        grouped = momentum.transpose(order)
        matrices = grouped.reshape(math.prod(grouped.shape[:num_groups]), math.prod(momentum.shape[:reads]), -1)
        scaled = config.muon_rms * math.sqrt(max(matrices.shape[1:])) * orthogonalized(matrices)
        return scaled.reshape(grouped.shape).transpose(np.argsort(order).tolist())

    return optax.chain(
        optax.trace(MUON_MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(step, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def orthogonalized(matrices: jax.Array) -> jax.Array:
    """About U V^T of each U S V^T, by five quintic Newton-Schulz iterations (Jordan et al. 2024), float32[N, a, b].

    Products read bfloat16 and add up in float32, which CPUs with AMX do four times faster than what optax's asks for.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.swapaxes(1, 2)).swapaxes(1, 2)

    def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    x = matrices / (jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True) + 1e-8)
    for _ in range(5):
        a, b, c = NEWTON_SCHULZ
        gram = product("nij,nkj->nik", x, x)
        x = a * x + product("nij,njk->nik", b * gram + c * product("nij,njk->nik", gram, gram), x)
    return x


def _optimizers(params: Any) -> Any:
    """Which optimiser takes each weight: Muon neither norms nor what is indexed by tokens."""

    def chosen(path: Any, weight: jax.Array) -> str:
        return "muon" if weight.ndim > 1 and path[-1].key not in ("head", "embedding") else "adamw"

    return jax.tree_util.tree_map_with_path(chosen, params)


def train(config: TrainConfig, workdir: str | os.PathLike[str], progress: Any = None) -> dict[str, Any]:
    """Trains a head; workdir then holds head/, summary.json, metrics.jsonl, tensorboard/ and checkpoints/.

    The same command again goes on where it stopped, with the batches and numbers of a run that never did.

    Several processes (config.distributed) share the rows of a batch, and need a workdir that all of them see; process 0
    prepares the data, and writes all but its parts of the checkpoints.

    Args:
        progress: called with (done, total, description).

    Returns:
        The summary.

    Raises:
        SpecJAXError: bad input, a workdir of another run, or a loss that is not finite.
    """
    processes.join(config.distributed)
    fields = config.fields()
    processes.same_everywhere({name: value for name, value in fields.items() if name != "distributed"}, "config")
    workdir = Path(workdir).absolute()
    prepare_workdir(workdir)
    _check_same_run(workdir / "config.json", config)
    enable_compilation_cache()
    target = load_target(config.target, dtype=config.dtype or None)
    student = student_for(target.config, **config.head)
    found = _training_responses(config, target, workdir, progress)
    store = _open_store(config, target, student, found, workdir, progress)
    trainer = Trainer(config, workdir, target, student, store)
    # Not before: a run that was refused leaves the folder free for a corrected one.
    if processes.is_writer():
        write_json(workdir / "config.json", fields)
    return trainer.run(progress)


class Trainer:
    """The loop and what it holds; train makes one."""

    def __init__(self, config: TrainConfig, workdir: Path, target: Target, student: Student, store: data.Store):
        num_devices = config.mesh.data
        if num_devices > len(jax.devices()):
            raise ConfigError(f"mesh.data={num_devices}: expected at most {len(jax.devices())}, the devices there are.")
        if jax.process_count() > 1 and num_devices < len(jax.devices()):
            raise ConfigError(f"mesh.data={num_devices}: expected {len(jax.devices())}, the devices of all processes.")
        size, vocab_size = student.draft_vocab_size, target.config.vocab_size
        if not 1 <= size <= vocab_size:
            raise ConfigError(f"head.draft_vocab_size={size}: expected 1 to {vocab_size}, the target's vocabulary.")
        self.config, self.workdir, self.student = config, workdir, student
        trained, held_out = data.split(store.names, config.data.held_out_every)
        counts = data.count_tokens(store, trained, target.config.vocab_size)
        if not counts.sum():
            raise ConfigError("responses: hold no token to learn from; expected answers of the target.")
        size = size if size < vocab_size else config.loss_vocab_size
        mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.by_row = NamedSharding(mesh, PartitionSpec("data"))
        self.inherited, self.vocabulary = None, None
        if config.init_from:
            self.inherited, self.vocabulary = inherit(config.init_from, student, target, self.replicated)
        if self.vocabulary is None and size:
            self.vocabulary = data.choose_vocabulary(counts, size)
        self.facts: dict[str, float] = {"sequences": len(trained), "sequence_tokens": int(store.lengths[trained].sum())}
        if self.vocabulary is not None:
            unseen = data.count_tokens(store, held_out, target.config.vocab_size)
            self.facts["coverage"] = data.coverage(self.vocabulary, counts)
            self.facts["coverage_held_out"] = data.coverage(self.vocabulary, unseen)
        self.data_digest = _digest(store, self.vocabulary)
        rows = data.Rows(store, trained, config.data.length, config.seed)
        self.batches = iter(data.batches(rows, config.data.rows, config.seed))
        evaluated = data.Rows(store, held_out, config.data.length, config.seed)
        self.held_out = data.in_order(evaluated, config.data.rows, config.eval_batches)
        self.optimizer, self.learning_rate = make_optimizer(config.optimizer, config.steps)
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        kept = np.arange(target.config.vocab_size, dtype=np.int32) if self.vocabulary is None else self.vocabulary
        # Validation asks what decoding will see: the tokens that will be drafted, and the target's whole law.
        seen = losses.freeze(target.params, jnp.asarray(kept), self.compute_dtype, whole=True)
        self.frozen_to_validate = put_all(seen, self.replicated)
        self.frozen = self.frozen_to_validate._replace(whole_head=None)
        on_the_fly = config.features == "on_the_fly"
        self.target_params = put_all(target.params, self.replicated) if on_the_fly else None
        self.target_config = target.config
        # A product that reads the target's states raw learns in units of their root mean square: some channels are
        # hundreds of times larger than others, and steps that treat all alike hardly move what the small ones do.
        # Measured where a state is begun, and restored with it.
        self.rows = rows
        self.units: jax.Array | None = None
        self.begin_with = {name: target.params[name] for name in ("embedding", "head", "final_norm")}, seen.kept
        self.programs: dict[int, Any] = {}
        self.flops: dict[int, float] = {}
        self.num_tokens = 0
        self.seconds = 0.0

    def run(self, progress: Any = None) -> dict[str, Any]:
        """Trains to the last step and writes the head and the summary."""
        from tensorboardX import SummaryWriter

        config = self.config
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        with ocp.CheckpointManager(self.workdir / "checkpoints", options=options) as manager:
            state = self._restore_or_init(manager)
            step = int(state.step)
            log = MetricsLog(self.workdir / "metrics.jsonl", step)
            folder = str(self.workdir / "tensorboard")
            board = SummaryWriter(folder, purge_step=step + 1, write_to_disk=processes.is_writer())
            pending: list[Any] = []
            began, tokens_before = time.perf_counter(), self.num_tokens
            while step < config.steps:
                batch = next(self.batches)
                self.num_tokens += int(np.count_nonzero(batch.segments))
                num_unrolled = config.num_unrolled(step)
                batch = put_all(batch, self.by_row)
                program, compile_seconds = self._program(state, batch, num_unrolled)
                began += compile_seconds
                state, metrics = program(state, batch, self.frozen, self.target_params)
                pending.append(metrics)
                step += 1
                if step % config.log_every == 0 or step == config.steps:
                    line = self._line(step, num_unrolled, pending)
                    seconds = time.perf_counter() - began
                    self.seconds += seconds
                    line["tokens_per_second"] = (self.num_tokens - tokens_before) / seconds
                    line["matmul_flops_per_second"] = self.flops[num_unrolled] * len(pending) / seconds
                    if self.held_out and (step % config.eval_every == 0 or step == config.steps):
                        line["validation"] = self._validate(state.params)
                    log.append(line)
                    _to_board(board, line)
                    if progress:
                        progress(step, config.steps, _describe(line))
                    pending = []
                    began, tokens_before = time.perf_counter(), self.num_tokens
                if step % config.checkpoint_every == 0 or step == config.steps:
                    self._save(manager, state)
                    began = time.perf_counter()
            board.close()
        return self._finish(state, log)

    def timed_step(self, num_unrolled: int) -> tuple[Callable[[], float], float]:
        """For benchmarks: what does one more step and gives its seconds; and a step's floating-point operations."""
        state, batch = self._new_state(), put_all(next(self.batches), self.by_row)
        program, _ = self._program(state, batch, num_unrolled)

        def run() -> float:
            nonlocal state
            began = time.perf_counter()
            state, _ = jax.block_until_ready(program(state, batch, self.frozen, self.target_params))
            return time.perf_counter() - began

        return run, self.flops[num_unrolled]

    def _restore_or_init(self, manager: ocp.CheckpointManager) -> TrainState:
        """The last checkpoint's state, and the data and counters brought to it; else a new state."""
        latest = manager.latest_step()
        if latest is None:
            return self._new_state()
        abstract = with_sharding(jax.eval_shape(self._init, *self.begin_with), self.replicated)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()), run=ocp.args.JsonRestore())
        found = manager.restore(latest, args=arguments)
        if found.run["data"] != self.data_digest:
            raise SpecJAXError(
                f"workdir={str(self.workdir)!r}: was trained on other sequences than responses, texts and "
                "held_out_every give now; restore them, or start in a new workdir (init_from goes on from this head)."
            )
        self.batches.set_state(found.run["batches"])
        self.num_tokens, self.seconds = found.run["num_tokens"], found.run["seconds"]
        if self.student.reads_raw:
            self.units = put(np.array(found.run["units"], np.float32), self.replicated)
        return TrainState(**found.state)

    def _new_state(self) -> TrainState:
        if self.student.reads_raw:
            self.units = self._rms_of_states(data.in_order(self.rows, self.config.data.rows, 1)[0])
        begin_with = put_all(self.begin_with, self.replicated)
        state: TrainState = jax.jit(self._init, out_shardings=self.replicated)(*begin_with)
        if self.inherited is None:
            return state
        return state._replace(params=jax.jit(self._to_units, out_shardings=self.replicated)(self.inherited))

    def _init(self, target_params: Any, kept: jax.Array) -> TrainState:
        params = self.student.init(jax.random.key(self.config.seed), target_params, kept)
        return TrainState(params, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def _save(self, manager: ocp.CheckpointManager, state: TrainState) -> None:
        run = {"data": self.data_digest, "batches": self.batches.get_state()}
        run |= {"num_tokens": self.num_tokens, "seconds": self.seconds}
        run["units"] = None if self.units is None else np.asarray(self.units).tolist()
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), run=ocp.args.JsonSave(run))
        manager.save(int(state.step), args=arguments)

    def _program(self, state: TrainState, batch: data.Batch, num_unrolled: int) -> tuple[Any, float]:
        """The compiled training step, and the seconds that compiling it took just now."""
        if num_unrolled in self.programs:
            return self.programs[num_unrolled], 0.0
        began = time.perf_counter()
        step = functools.partial(self._step, num_unrolled=num_unrolled)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=self.replicated)
        lowered = jitted.lower(state, batch, self.frozen, self.target_params)
        self.flops[num_unrolled] = float((lowered.cost_analysis() or {}).get("flops", math.nan))
        self.programs[num_unrolled] = lowered.compile()
        return self.programs[num_unrolled], time.perf_counter() - began

    def _step(
        self, state: TrainState, batch: data.Batch, frozen: Any, target_params: Any, num_unrolled: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = self._with_features(batch, target_params)

        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

        def loss(params: Any) -> Any:
            params = self._to_compute(self._from_units(params))
            return self.student.loss(self.config.loss, params, frozen, batch, num_unrolled, key)

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        metrics = {"loss": value} | metrics | {"gradient_norm": optax.tree.norm(gradients)}
        return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics

    def _with_features(self, batch: data.Batch, target_params: Any) -> data.Batch:
        if target_params is not None:
            taps, final, best = features.target_features(
                self.target_config, target_params, batch.tokens, batch.positions, batch.segments, self.student.taps
            )
            batch = batch._replace(best=best, final=final, taps=taps if self.student.taps else None)
        # Activations stay float32: products round them to the weights' dtype, the rest of the step does not.
        wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
        return batch._replace(final=wide(batch.final), taps=wide(batch.taps))

    def _rms_of_states(self, batch: data.Batch) -> jax.Array:
        """Of each channel of what a head reads raw, float32[n, D_t], over the tokens of a batch.

        At least a thousandth of the largest of its tap.
        """

        def measure(batch: data.Batch, target_params: Any) -> jax.Array:
            batch = self._with_features(batch, target_params)
            states = batch.taps if self.student.taps else batch.final[:, :, None]
            counted = (batch.segments > 0)[..., None, None]
            rms = jnp.sqrt((counted * states**2).sum(axis=(0, 1)) / counted.sum())
            return jnp.maximum(rms, 1e-3 * rms.max(axis=-1, keepdims=True))

        measured = jax.jit(measure, out_shardings=self.replicated)
        return measured(put_all(batch, self.by_row), self.target_params)

    def _to_units(self, params: Any) -> Any:
        """The weights that learn, from those that decode."""
        if self.units is None:
            return params
        assert isinstance(self.student, HeadStudent)  # which alone reads states
        return self.student.scaled(params, self.units)

    def _from_units(self, params: Any) -> Any:
        """The weights that decode, from those that learn."""
        if self.units is None:
            return params
        assert isinstance(self.student, HeadStudent)
        return self.student.scaled(params, 1.0 / self.units)

    def _to_compute(self, arrays: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(self.compute_dtype), arrays)

    def _validate(self, params: Any) -> dict[str, Any]:
        """Means over the held-out batches, with as many draft steps as training ends with, of decoding's own laws."""
        if -1 not in self.programs:
            num_unrolled = max(num for _, num in self.config.unroll)

            def evaluate(params: Any, batch: data.Batch, frozen: Any, target_params: Any) -> Any:
                batch = self._with_features(batch, target_params)
                params = self._to_compute(self._from_units(params))
                value, metrics = self.student.loss(self.config.loss, params, frozen, batch, num_unrolled)
                return {"loss": value} | metrics

            self.programs[-1] = jax.jit(evaluate, out_shardings=self.replicated)
        batches = (put_all(batch, self.by_row) for batch in self.held_out)
        found = [self.programs[-1](params, batch, self.frozen_to_validate, self.target_params) for batch in batches]
        return _means(jax.device_get(found))

    def _line(self, step: int, num_unrolled: int, pending: Sequence[Any]) -> dict[str, Any]:
        """A line of metrics.jsonl: means over the steps since the last one.

        Raises:
            SpecJAXError: a loss is not finite.
        """
        found = jax.device_get(pending)
        for index, metrics in enumerate(found):
            if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["gradient_norm"]):
                raise SpecJAXError(
                    f"step={step - len(found) + index + 1}: loss={metrics['loss']}, gradient_norm="
                    f"{metrics['gradient_norm']}; expected finite numbers. The last checkpoint is kept; lower "
                    "optimizer.learning_rate or optimizer.clip_norm and start in a new workdir."
                )
        rate = float(self.learning_rate(step - 1))
        return {"step": step, "num_unrolled": num_unrolled, "learning_rate": rate, "tokens": self.num_tokens} | _means(
            found
        )

    def _finish(self, state: TrainState, log: "MetricsLog") -> dict[str, Any]:
        params = jax.jit(self._from_units, out_shardings=self.replicated)(state.params)
        write_head(self.workdir / "head", self.student.fields(), params, self.vocabulary)
        last = log.lines[-1]
        validated = [line["validation"] for line in log.lines if "validation" in line]
        summary = {
            "target": self.config.target,
            "head": self.student.fields(),
            "device": device_name(),
            "steps": self.config.steps,
            "tokens": self.num_tokens,
            "minutes": self.seconds / 60,
            "tokens_per_second": self.num_tokens / self.seconds if self.seconds else math.nan,
            "matmul_flops_per_second": last["matmul_flops_per_second"],
            "num_weights": sum(x.size for x in jax.tree.leaves(state.params)),
            **self.facts,
            "final": {k: v for k, v in last.items() if k != "validation"},
            "validation": validated[-1] if validated else None,
        }
        if processes.is_writer():
            write_json(self.workdir / "summary.json", summary)
        return summary


class MetricsLog:
    """metrics.jsonl: one line each log_every steps, each step once, whatever was killed; process 0 writes it."""

    def __init__(self, path: Path, step: int):
        """Opens it at a step; lines beyond it, and a torn last one, are dropped."""
        self.path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        self.lines: list[dict[str, Any]] = [line for line in lines if line["step"] <= step]
        if processes.is_writer():
            write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if not processes.is_writer():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _means(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of metrics over steps or batches; arrays as lists."""
    return {name: np.mean([np.float64(metrics[name]) for metrics in found], axis=0).tolist() for name in found[0]}


def _to_board(board: Any, line: dict[str, Any], prefix: str = "train") -> None:
    for name, value in line.items():
        if name == "validation":
            _to_board(board, value | {"step": line["step"]}, "validation")
        elif isinstance(value, list):
            for index, part in enumerate(value):
                board.add_scalar(f"{prefix}/{name}_{index + 1}", part, line["step"])
        elif name != "step":
            board.add_scalar(f"{prefix}/{name}", value, line["step"])


def _describe(line: dict[str, Any]) -> str:
    accuracy = " ".join(f"{value:.2f}" for value in line.get("accuracy", []))
    validation = line.get("validation")
    held_out = f", held out {validation['loss']:.3f}" if validation else ""
    return f"loss {line['loss']:.3f}{held_out}, accuracy {accuracy}, {line['tokens_per_second']:.0f} tokens/s"


def write_head(path: Path, fields: dict[str, Any], params: Any, vocabulary: np.ndarray | None) -> None:
    """Writes a head: params/ (orbax), head.json, and vocabulary.npy, the tokens that it learnt; all processes call."""
    temporary = path.with_name(path.name + ".partial")
    if processes.is_writer():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    processes.barrier("folder of the head")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary.absolute() / "params", params)
    if processes.is_writer():
        write_json(temporary / "head.json", fields)
        if vocabulary is not None:
            np.save(temporary / "vocabulary.npy", vocabulary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    processes.barrier("the head")


def _digest(store: data.Store, vocabulary: np.ndarray | None) -> str:
    """What of the data a checkpoint depends on: the sequences, and which token each output stands for."""
    digest = hashlib.sha256(json.dumps([store.names, np.asarray(store.lengths).tolist()]).encode())
    digest.update(b"" if vocabulary is None else np.asarray(vocabulary, np.int64).tobytes())
    return digest.hexdigest()


def _check_same_run(path: Path, config: TrainConfig) -> None:
    """Compares with the config.json of the run before, where there is one.

    Raises:
        SpecJAXError: they differ in what is learnt.
    """
    if not path.is_file():
        return
    content = json.loads(json.dumps(config.fields()))
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted((before.keys() | content.keys()) - set(MAY_CHANGE)):
        if before.get(name) != content.get(name):
            raise SpecJAXError(
                f"workdir={str(path.parent)!r}: holds a training with {name}={before.get(name)!r}, but this config "
                f"has {content.get(name)!r}; choose another folder or remove it."
            )


def _training_responses(config: TrainConfig, target: Target, workdir: Path, progress: Any) -> list[responses.Response]:
    """The responses to learn from, generated first where the config names no file, and the plain texts."""
    found: list[responses.Response] = []
    if config.responses:
        found = responses.read(config.responses)
        if not found:
            raise ConfigError(f"responses={config.responses!r}: holds none; expected what `specjax respond` writes.")
    elif config.respond.prompts:
        if processes.is_writer():
            answer(config.respond, target, workdir / FILE, progress)
        processes.barrier("answers")
        found = responses.read(workdir / FILE)
    if config.texts:
        if target.tokenizer is None:
            raise ConfigError(
                f"target={config.target!r}: has no tokenizer, which texts need; leave config.texts empty."
            )
        if Path(config.texts).suffix == ".txt":
            texts = [(Path(config.texts).stem, Path(config.texts).read_text(encoding="utf-8"))]
        else:
            prompts = load_prompts(config.texts, config.num_texts)
            texts = [(prompt.id, "\n".join(prompt.turns)) for prompt in prompts]
        found += features.texts_as_responses(target.tokenizer, texts, config.data.length)
    if not found:
        raise ConfigError("responses='': and respond.prompts and texts are empty too; expected one of them.")
    vocab_size = target.config.vocab_size
    for response in found:
        if max(response.prompt + response.response, default=0) >= vocab_size:
            raise ConfigError(
                f"responses={config.responses!r}: {response.id!r} holds a token id beyond the target's {vocab_size}; "
                "expected responses of this target."
            )
    return found


def _open_store(
    config: TrainConfig,
    target: Target,
    student: Student,
    found: Sequence[responses.Response],
    workdir: Path,
    progress: Any,
) -> data.Store:
    if config.features == "on_the_fly":
        return features.TokenStore(found)
    directory = Path(config.features_dir) if config.features_dir else workdir / "features"
    if processes.is_writer():
        features.write(directory, found, target, student.taps, progress)
    processes.barrier("features")
    return features.FeatureCache(directory, found, target, student.taps)
