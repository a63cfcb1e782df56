"""A mesh changes no token, gathers nothing large, and is refused where it cannot be."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import QUICK, random_target
from sharding_cases import CASES, VOCAB

import specjax
from specjax import sharding
from specjax.config import MeshConfig
from specjax.errors import ConfigError
from specjax.target import decoder

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found():
    """Case -> what it printed; all of them in one process that has eight devices."""
    done = subprocess.run(
        [sys.executable, str(HERE / "sharding_cases.py"), "8"],
        env=os.environ | QUICK | {"PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_one_device(case, found):
    assert found[case]["same"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nothing_large_crosses_devices_whole(case, found):
    # A gathered cache, head or row of logits would be at least as large as one row's part of the vocabulary.
    # Drawn drafts of a reduced vocabulary do: their laws are spread over the target's vocabulary.
    drawn = case in ("eagle3, sampled", "hybrid")
    assert found[case]["largest_gathered"] <= (4 * VOCAB // 2 if drawn else 256), found[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_state_is_updated_in_place(case, found):
    # All of the state but a few numbers is aliased, so caches are too.
    assert found[case]["output"] - found[case]["aliased"] <= 256, found[case]


TARGET = random_target(0, 96)


def mesh_of(model, data=1, **fields):
    config = dataclasses.replace(TARGET.config, **fields)
    devices = np.empty(64, object)
    devices[:] = [f"device {index}" for index in range(64)]
    return sharding.make_mesh(MeshConfig(data=data, model=model), config, list(devices))


@pytest.mark.parametrize(
    ("model", "kv_heads", "shape"), [(1, 2, (1, 1)), (2, 2, (2, 1)), (4, 2, (2, 2)), (4, 1, (1, 4)), (2, 4, (2, 1))]
)
def test_the_model_axis_is_split_over_kv_heads_first(model, kv_heads, shape):
    mesh = mesh_of(model, num_kv_heads=kv_heads)
    assert (mesh.shape["kv"], mesh.shape["group"]) == shape


def test_where_arrays_lie():
    mesh = mesh_of(4, data=2)
    assert sharding.spec(("batch", "kv_heads", None, None), (8, 2, 512, 8), mesh) == P("data", "kv", None, None)
    assert sharding.spec(("batch", None, "vocab"), (8, 5, 96), mesh) == P("data", None, ("kv", "group"))
    # What does not divide is whole: one row, three heads.
    assert sharding.spec(("batch", "kv_heads", None, None), (1, 3, 512, 8), mesh) == P(None, None, None, None)
    shardings = decoder.param_axes(TARGET.config)
    assert shardings["layer_0"]["qkv"] == P("width", "kv_heads", None, "head")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": 65}, r"MeshConfig: data=1 times model=65 is 65 devices, there are 64; expected .* at most 64"),
        (
            {"model": 3},
            r"MeshConfig.model=3: the target's num_heads=4 cannot be split so; .* of which 2 is the nearest",
        ),
        ({"model": 8}, r"MeshConfig.model=8: the target's num_heads=4 .* of which 4 is the nearest"),
        (
            {"model": 4, "vocab_size": 97},
            r"model=4: the target's vocab_size=97 .* of which 1 is the nearest",
        ),
        ({"model": 4, "mlp_width": 50}, r"MeshConfig.model=4: the target's mlp_width=50 .* of which 2 is the nearest"),
    ],
)
def test_what_a_mesh_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        mesh_of(**fields)


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError, match=r"is 1024 devices, there are \d+"):
        specjax.SpeculativeDecoder(TARGET, mesh=MeshConfig(data=512, model=2))


def test_one_device_is_a_mesh_too():
    result = specjax.SpeculativeDecoder(TARGET, mesh=MeshConfig()).generate(
        [[1, 2, 3]], specjax.SamplingParams(max_tokens=4)
    )
    plain = specjax.SpeculativeDecoder(TARGET).generate([[1, 2, 3]], specjax.SamplingParams(max_tokens=4))
    assert result.token_ids == plain.token_ids


def test_the_drafter_is_split_as_the_target_or_not_at_all():
    config = specjax.SpeculativeConfig(method="draft_model", assistant_early_exit=1, draft_tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"draft_tensor_parallel_size=2: expected 1, or 1 as the target's mesh has"):
        specjax.SpeculativeDecoder(TARGET, config)


def test_weights_are_sent_to_their_places_as_they_are_read(tmp_path, monkeypatch):
    import tiny

    directory = tiny.write_directory(tmp_path / "model", tiny.hf_config("llama-tied", vocab_size=96))
    whole = specjax.load_target(directory, dtype="float32")
    split = specjax.load_target(directory, dtype="float32", mesh=MeshConfig())
    assert split.mesh is not None
    expected = decoder.as_arrays(whole.params, decoder.param_shapes(whole.config))
    jax.tree.map(np.testing.assert_array_equal, split.params, expected)
    places = {x.sharding.mesh for x in jax.tree.leaves(split.params)}
    assert places == {split.mesh}


@pytest.mark.parametrize("mesh", [None, MeshConfig()])
def test_where_memory_is_tiled_kernels_lie_with_long_axes_last(mesh, tmp_path, monkeypatch):
    import tiny

    directory = tiny.write_directory(tmp_path / "model", tiny.hf_config("llama-tied", vocab_size=96))
    usual = specjax.load_target(directory, dtype="float32")
    monkeypatch.setattr(sharding, "_is_tiled", lambda device: True)
    target = specjax.load_target(directory, dtype="float32", mesh=mesh)
    order = {name: array.format.layout.major_to_minor for name, array in target.params["layer_0"].items()}
    assert order["qkv"] == (1, 2, 0, 3) and order["gate_up"] == (1, 0, 2)
    assert all(found == tuple(range(len(found))) for name, found in order.items() if name not in ("qkv", "gate_up"))
    config = specjax.SpeculativeConfig(method="draft_model", assistant_early_exit=1, num_speculative_tokens=2)
    params = specjax.SamplingParams(max_tokens=8)
    found = specjax.SpeculativeDecoder(target, config).generate([[3, 1, 4]], params)
    assert found.token_ids == specjax.SpeculativeDecoder(usual).generate([[3, 1, 4]], params).token_ids
