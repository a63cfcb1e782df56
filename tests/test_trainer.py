"""Training runs of tiny heads: they learn, go on after a kill as if nothing had been, and refuse what can't be."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from models import QUICK, random_target
from safetensors.numpy import load_file, save_file
from test_heads import random_weights

from specjax.checkpoints.heads import num_drafts_of
from specjax.cli import main
from specjax.errors import ConfigError, SpecJAXError
from specjax.heads import config as heads
from specjax.heads import network
from specjax.target.decoder import AttendWithin
from specjax.train import features, trainer
from specjax.train.export import export, read_trained
from specjax.train.responses import Response
from specjax.train.students import HeadStudent

STEPS, LOG, CHECKPOINT = 12, 2, 4
TIMES = ("tokens_per_second", "matmul_flops_per_second")

CHILD = """
import json, os, signal, sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[3]))
from ml_collections import ConfigDict
from specjax.train import features, trainer
from specjax.train.export import export
features.FORWARD_ROWS = 2

def progress(done, total, description):
    if description.startswith("loss") and done == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

config = trainer.TrainConfig.from_config(ConfigDict(json.loads(sys.argv[1])))
trainer.train(config, sys.argv[2], progress)
"""


@pytest.fixture(autouse=True)
def small_forward_passes(monkeypatch):
    monkeypatch.setattr(features, "FORWARD_ROWS", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target and responses that a head can learn: counting up."""
    folder = tmp_path_factory.mktemp("training")
    tiny.write_directory(folder / "target", tiny.hf_config("llama-untied"))
    random = np.random.RandomState(0)
    with (folder / "responses.jsonl").open("w") as file:
        for index in range(40):
            first, num = random.randint(1, 40), random.randint(8, 24)
            tokens = list(range(first, first + num))
            response = Response(f"p{index}#0", "count", tokens[:4], tokens[4:], "length")
            file.write(json.dumps(response._asdict()) + "\n")
    return folder


def fields(folder: Path, **changes) -> dict:
    config = {
        "target": str(folder / "target"),
        "dtype": "float32",
        "head": {"method": "eagle3", "taps": [0, 1, 2], "draft_vocab_size": 50},
        "responses": str(folder / "responses.jsonl"),
        "features_dir": str(folder / "features"),
        "data": {"length": 32, "rows": 4, "held_out_every": 8},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "muon_rms": 0.2},
        "steps": STEPS,
        "unroll": [[0, 1], [6, 2]],
        "log_every": LOG,
        "checkpoint_every": CHECKPOINT,
        "eval_every": CHECKPOINT,
        "eval_batches": 2,
    }
    return config | changes


def run(folder: Path, workdir: Path, **changes) -> dict:
    return trainer.train(trainer.TrainConfig.from_config(ConfigDict(fields(folder, **changes))), workdir)


def run_child(folder: Path, workdir: Path, num_devices: int = 1, killed_at: int = 0, **changes) -> int:
    command = [sys.executable, "-c", CHILD, json.dumps(fields(folder, **changes)), str(workdir)]
    done = subprocess.run(
        [*command, str(num_devices), str(killed_at)],
        env=os.environ | QUICK,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def curve(workdir: Path) -> list[dict]:
    """metrics.jsonl less what a clock measured."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The workdir of a whole run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "FORWARD_ROWS", 2)
        run(folder, folder / "whole")
    return folder / "whole"


def test_a_run_learns_and_writes_its_head_logs_and_summary(uninterrupted):
    lines = curve(uninterrupted)
    assert [line["step"] for line in lines] == list(range(LOG, STEPS + 1, LOG))
    assert [line["num_unrolled"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert len(lines[-1]["accuracy"]) == 2
    assert [line["step"] for line in lines if "validation" in line] == [4, 8, 12]
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["tokens"] == lines[-1]["tokens"] > 0
    assert summary["tokens_per_second"] > 0 and summary["matmul_flops_per_second"] > 0
    assert 0.5 < summary["coverage"] <= 1
    assert summary["validation"]["loss"] == lines[-1]["validation"]["loss"]
    kept = np.load(uninterrupted / "head" / "vocabulary.npy")
    assert len(kept) == 50 and (np.diff(kept) > 0).all()
    assert json.loads((uninterrupted / "head" / "head.json").read_text())["method"] == "eagle3"
    assert list((uninterrupted / "tensorboard").iterdir())
    assert {path.name for path in (uninterrupted / "checkpoints").iterdir()} == {"8", "12"}


def test_a_killed_run_goes_on_to_the_same_curve_exactly(folder, uninterrupted, tmp_path):
    assert run_child(folder, tmp_path, killed_at=6) == -signal.SIGKILL
    assert [line["step"] for line in curve(tmp_path)] == [2, 4, 6]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line that a kill tore
    run(folder, tmp_path)
    assert curve(tmp_path) == curve(uninterrupted)
    kept = [np.load(path / "head" / "vocabulary.npy") for path in (tmp_path, uninterrupted)]
    np.testing.assert_array_equal(*kept)


def test_a_finished_run_trains_no_further(folder, uninterrupted):
    before = curve(uninterrupted)
    summary = run(folder, uninterrupted)
    assert curve(uninterrupted) == before
    assert summary["final"]["step"] == STEPS


def test_two_devices_learn_what_one_learns(folder, uninterrupted, tmp_path):
    assert run_child(folder, tmp_path, num_devices=2, mesh={"data": 2}) == 0
    found, expected = ([line["loss"] for line in curve(path)] for path in (tmp_path, uninterrupted))
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # sums in another order


def test_features_computed_in_the_step_teach_what_cached_ones_teach(folder, tmp_path):
    losses = []
    for kind in ("cache", "on_the_fly"):
        run(folder, tmp_path / kind, features=kind, steps=LOG, unroll=[[0, 1]])
        losses.append(curve(tmp_path / kind)[-1]["loss"])
    np.testing.assert_allclose(*losses, rtol=5e-3)  # the cache is bfloat16


@pytest.mark.parametrize("head", [{"method": "eagle"}, {"method": "mtp"}])
def test_heads_with_the_targets_vocabulary_train_too(folder, tmp_path, head):
    loss = {"kind": "soft_ce", "feature_weight": 1.0}
    run(folder, tmp_path, head=head, loss_vocab_size=40, loss=loss, steps=LOG, compute_dtype="bfloat16")
    assert np.isfinite(curve(tmp_path)[-1]["loss"])
    learnt = np.load(tmp_path / "head" / "vocabulary.npy")
    assert len(learnt) == 40
    if head["method"] == "eagle":
        exported = export(tmp_path, tmp_path / "out")
        assert json.loads((exported / "token_map.json").read_text()) == learnt.tolist()


def test_a_run_begins_with_the_weights_it_is_given(folder, uninterrupted, tmp_path):
    run(folder, tmp_path / "on", init_from=str(uninterrupted / "head"), steps=LOG, unroll=[[0, 2]])
    run(folder, tmp_path / "new", steps=LOG, unroll=[[0, 2]])
    assert curve(tmp_path / "on")[0]["loss"] < curve(tmp_path / "new")[0]["loss"]
    with pytest.raises(ConfigError, match="init_from='nowhere'"):
        run(folder, tmp_path / "missing", init_from="nowhere")


HARDLY = {"learning_rate": 1e-12, "warmup_steps": 0, "weight_decay": 0.0}
RAW_EAGLE3 = {"method": "eagle3", "taps": [0, 1, 2], "draft_vocab_size": 50}
HEADS = [
    {"method": "eagle", "layernorms": True},
    {"method": "mtp", "wiring": "qwen3_next", "qk_norm": True},
    RAW_EAGLE3,
    RAW_EAGLE3 | {"fc_norm": True},
]


def assert_same_heads(first: Path, second: Path) -> None:
    """As far as float32 tells weights that went through units from those that did not."""
    (_, before, learnt), (_, after, learnt_after) = read_trained(first / "head"), read_trained(second / "head")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), before, after)
    np.testing.assert_array_equal(learnt, learnt_after)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["training", "checkpoint"])
def test_a_run_that_hardly_learns_writes_the_head_that_it_began_with(folder, tmp_path, head, kind):
    common = {"head": head, "loss_vocab_size": 40, "steps": LOG, "unroll": [[0, 1]]}
    run(folder, tmp_path / "first", **common)
    begin = tmp_path / "first" / "head"
    if kind == "checkpoint":
        begin = export(tmp_path / "first", tmp_path / "exported", dtype="float32")
    run(folder, tmp_path / "second", **common, init_from=str(begin), optimizer=HARDLY)
    assert_same_heads(tmp_path / "first", tmp_path / "second")


def test_a_draft_model_goes_on_from_its_checkpoint(folder, tmp_path):
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 32}
    common = {"head": {"method": "draft_model", **sizes}, "loss_vocab_size": 40, "steps": LOG, "unroll": [[0, 1]]}
    run(folder, tmp_path / "first", **common)
    exported = export(tmp_path / "first", tmp_path / "exported", num_speculative_tokens=3, dtype="float32")
    assert num_drafts_of(exported) == 3
    run(folder, tmp_path / "second", **common, init_from=str(exported), optimizer=HARDLY)
    assert_same_heads(tmp_path / "first", tmp_path / "second")


def test_a_head_of_another_kind_or_size_to_begin_with_is_refused_by_name(folder, tmp_path):
    run(folder, tmp_path / "first", head=RAW_EAGLE3, steps=LOG, unroll=[[0, 1]])
    exported = export(tmp_path / "first", tmp_path / "exported")
    draft_model = {"method": "draft_model", "width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    others = {
        "has mlp_width=.*, but what config.head describes has 24": RAW_EAGLE3 | {"mlp_width": 24},
        "has method='eagle3', but what config.head describes has 'mtp'": {"method": "mtp"},
        "init_from=.*(method='eagle3'|model_type)": draft_model | {"mlp_width": 32},
    }
    for name in (str(tmp_path / "first"), str(tmp_path / "first" / "head"), str(exported)):
        for message, head in others.items():
            with pytest.raises(ConfigError, match=message):
                run(folder, tmp_path / "second", head=head, init_from=name)
    with pytest.raises(ConfigError, match="init_from=.*expected what `specjax train` wrote"):
        run(folder, tmp_path / "second", init_from=str(tmp_path))


@pytest.mark.parametrize("embedding_first", [True, False])
@pytest.mark.parametrize("taps", [(), (0, 1, 2)])
def test_scaled_weights_are_the_same_function_of_scaled_states(embedding_first, taps):
    layer = dataclasses.replace(random_target(0).config, num_layers=1, sliding_windows=(None,))
    config = heads.eagle(layer, layer.width)
    if taps:
        config = heads.eagle3(layer, layer.width, taps, layer.vocab_size)
    student = HeadStudent(dataclasses.replace(config, embedding_first=embedding_first))
    assert student.reads_raw
    keys = jax.random.split(jax.random.key(0), 4)
    features = jax.random.normal(keys[0], (2, 5, len(taps) or 1, layer.width))
    factors = jnp.exp(jax.random.normal(keys[1], features.shape[2:]))
    shared = network.Shared(jax.random.normal(keys[2], (layer.vocab_size, layer.width)), jnp.zeros((layer.width, 1)))
    tokens, positions = jnp.arange(10).reshape(2, 5), jnp.tile(jnp.arange(5), (2, 1))
    attends = [AttendWithin(jnp.tril(jnp.ones((2, 5, 5), bool)))]

    def outputs(params, features):
        feature = network.fuse(student.config, params, features)
        return network.run(student.config, params, shared, tokens, feature, positions, attends).hidden

    params = random_weights(student.config, 3)
    found = outputs(student.scaled(params, factors), features / factors)
    np.testing.assert_allclose(found, outputs(params, features), rtol=1e-3, atol=1e-4)


def test_channels_of_the_targets_states_may_have_any_scale(folder, tmp_path):
    shutil.copytree(folder / "target", tmp_path / "target")
    path = tmp_path / "target" / "model.safetensors"
    tensors = load_file(path)
    factors = 2.0 ** np.random.RandomState(0).randint(-4, 5, tensors["model.norm.weight"].shape).astype(np.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * factors
    tensors["lm_head.weight"] = tensors["lm_head.weight"] / factors
    save_file(tensors, path)
    losses = []
    for target in (folder, tmp_path):
        once = {"steps": 1, "log_every": 1, "checkpoint_every": 1, "eval_every": 1, "unroll": [[0, 1]]}
        changes = {"target": str(target / "target"), "features_dir": str(target / "features")}
        run(folder, target / "scaled", head=HEADS[0], loss_vocab_size=40, **once, **changes)
        losses.append(curve(target / "scaled")[0]["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(folder, tmp_path):
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "clip_norm": 1e30}
    with pytest.raises(SpecJAXError, match=r"step=\d+: loss=.*learning_rate"):
        run(folder, tmp_path, optimizer=wild)
    assert all(np.isfinite(line["loss"]) for line in curve(tmp_path))
    assert not (tmp_path / "head").exists()


def test_a_workdir_of_another_training_is_refused(folder, uninterrupted):
    with pytest.raises(SpecJAXError, match="seed=0"):
        run(folder, uninterrupted, seed=5)


def test_muon_makes_the_steps_of_matrices_orthogonal_and_leaves_the_rest_to_adamw():
    rms, rate = 0.5, 1e-2
    config = trainer.OptimizerConfig(
        muon_rms=rms, learning_rate=rate, warmup_steps=0, schedule="constant", weight_decay=0.0
    )
    optimizer, _ = trainer.make_optimizer(config, 10)
    shapes = {"qkv": (48, 2, 5, 8), "gate_up": (48, 2, 96), "out": (2, 3, 8, 48), "down": (96, 48), "head": (48, 200)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = {name: jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    steps = jax.device_get(optimizer.update(gradients, optimizer.init(zeros), zeros)[0])
    matrices = {
        "one key's queries": steps["qkv"][:, 1].reshape(48, -1),
        "gate": steps["gate_up"][:, 0],
        "out": steps["out"].reshape(-1, 48),
        "down": steps["down"],
    }
    for name, matrix in matrices.items():
        # Five Newton-Schulz iterations leave singular values between 0.68 and 1.13 (and bfloat16 a little more).
        found = np.linalg.svd(matrix, compute_uv=False) / (rate * rms * np.sqrt(max(matrix.shape)))
        assert 0.6 < found.min() < found.max() < 1.25, name
    # The first step of AdamW is the gradient's sign, where the gradient is not tiny.
    np.testing.assert_allclose(np.median(np.abs(steps["head"])), rate, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"responses": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"responses": ""}, "responses=''"),
        ({"data": {"rows": 400, "length": 32}}, "rows=400"),
        ({"data": {"rows": 3}, "mesh": {"data": 2}}, r"data.rows=3"),
        ({"mesh": {"data": 64}, "data": {"rows": 64}}, "mesh.data=64"),
        ({"mesh": {"model": 2}}, "mesh.model=2"),
        ({"features": "none"}, "features='none'"),
        ({"checkpoint_every": 5}, "checkpoint_every=5"),
        ({"unroll": [[3, 1]]}, "unroll="),
        ({"optimizer": {"schedule": "steps"}}, "optimizer.schedule='steps'"),
        ({"optimizer": {"lr": 1}}, "optimizer.lr=1"),
        ({"optimizer": {"muon_rms": -1}}, "optimizer.muon_rms=-1"),
        ({"colour": 1}, "colour=1"),
        ({"head": {"method": "eagle3", "taps": [0, 1, 3]}}, r"taps=\[0, 1, 2\]"),
        ({"head": {"method": "eagle3", "taps": [0, 1, 2], "draft_vocab_size": 98}}, "draft_vocab_size"),
        ({"compute_dtype": "int8"}, "compute_dtype='int8'"),
    ],
)
def test_bad_input_is_refused_by_name(folder, uninterrupted, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        run(folder, tmp_path, **changes)


def test_the_train_command_trains_from_a_config_file(folder, tmp_path, capsys, monkeypatch):
    # The test's own config file: the shipped ones name a target that a test has not got.
    lines = f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({fields(folder)!r})\n"
    (tmp_path / "config.py").write_text(lines)
    arguments = ["train", f"--config={tmp_path / 'config.py'}"]
    assert main([*arguments, f"--workdir={tmp_path / 'run'}", "--config.steps=2"]) == 0
    assert "2 steps" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "--workdir" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eagle3", "eagle", "mtp"])
def test_shipped_configs_are_complete(name):
    from importlib import import_module

    config = import_module(f"specjax.configs.train_{name}_smollm2").get_config()
    frozen = trainer.TrainConfig.from_config(config)
    missing = {field for field in frozen.__dataclass_fields__} - set(config.keys())
    assert frozen.head["method"] == name and not missing
