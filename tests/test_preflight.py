"""specjax preflight: its numbers against what can be computed by hand, its refusals, and what does not fit."""

import importlib
import json
import types

import jax
import pytest

from pallas_kernels.tpu_cost import CHIPS
from specjax import cli
from specjax.cli import shipped_configs
from specjax.errors import ConfigError
from specjax.preflight import compile as compiling
from specjax.preflight import experiment, report
from specjax.preflight.compile import plan
from specjax.preflight.experiment import LAYOUTS, Preflight, read_topology, shipped_models
from specjax.preflight.hlo import Round
from specjax.target import decoder
from specjax.target.families import from_hf

pytestmark = pytest.mark.usefixtures("usual_compiler")
V, D, F, L, N, K, H = 1024, 256, 512, 2, 8, 4, 32
DRAFT_V, B, S, G, PARTS = 512, 8, 512, 2, 4
WIDTH = 2
"""Bytes of a bfloat16."""

LAYER = (D * (N + 2 * K) * H + N * H * D + 3 * D * F) // PARTS
"""Weights of a decoder layer on a device, without norms: all of them are split."""

HEAD_LAYER = LAYER + D * (N + 2 * K) * H // PARTS
"""The same of the head's, whose attention reads the embedding, too."""

CACHE = B * K * S * H * 2 * WIDTH // PARTS
"""Bytes of a layer's keys and values on a device."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model's config.json."""
    pytest.importorskip("libtpu")
    folder = tmp_path_factory.mktemp("model")
    fields = {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def run(model, *more):
    """The exit code of a preflight of the tiny model."""
    return cli.main(
        [
            "preflight",
            "--config=preflight_llama31_8b_eagle3",
            f"--config.model={model}",
            f"--config.head.draft_vocab_size={DRAFT_V}",
            "--config.head.taps=(0,1,2)",
            f"--config.context={S}",
            f"--config.drafts=({G},)",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """What preflight.json says of the tiny model on v6e:2x2, and the folder that it is in."""
    workdir = tmp_path_factory.mktemp("preflight")
    assert run(model, "--topology=v6e:2x2", f"--workdir={workdir}") == 0
    return json.loads((workdir / report.JSON).read_text()), workdir


def test_weights_and_caches_of_a_device_are_those_computed_by_hand(found):
    summary, _ = found
    target = L * (LAYER + 2 * D) + D + 2 * V * D // PARTS
    assert summary["weights"]["target"] == WIDTH * target
    # fc is whole on every device; the norms are of embedding, feature, MLP and output.
    head = 3 * D * D + HEAD_LAYER + 4 * D + D * DRAFT_V // PARTS
    assert summary["weights"]["drafter"] == WIDTH * head + 4 * DRAFT_V
    assert summary["caches"] == {"target": L * CACHE, "drafter": CACHE}


def test_the_compiler_counts_no_less_and_aliases_both_caches(found):
    summary, _ = found
    plain, speculative = summary["programs"]
    for row, caches in ((plain, L * CACHE), (speculative, (L + 1) * CACHE)):
        memory = row["memory"]
        assert row["cache_bytes"] == caches and row["caches_aliased"]
        # All that a decode program gives back is an argument, but for a table of pointers.
        assert caches <= memory["aliased"] <= memory["outputs"] <= memory["aliased"] + 4096
        assert memory["arguments"] >= summary["weights"]["target"] + caches
        assert memory["headroom"] == pytest.approx(CHIPS["v6e"].hbm_bytes - memory["total"], abs=1)


def test_weights_lie_as_the_rounds_read_them(tmp_path):
    """A copy of them before the rounds would take a call's time and, while it runs, as much memory again."""
    fields = json.loads((experiment.MODELS / "llama31_8b" / "config.json").read_text())
    fields |= {"num_hidden_layers": 2, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = importlib.import_module("specjax.configs.preflight_llama31_8b_eagle3").get_config()
    config.model, config.head.draft_vocab_size = str(tmp_path), 2048
    config.head.taps = (0, 1, 2)
    planned = plan(Preflight.from_config(config), read_topology("v6e:2x2"))
    compiled = compiling.compile_program(planned, 2)
    weights = compiling.device_bytes(compiled.params)
    assert weights > 400e6 and compiled.round.copied["params"] < 0.02 * weights


def test_no_weights_logits_or_caches_cross_devices(found):
    summary, _ = found
    plain, speculative = (row["collectives"] for row in summary["programs"])
    # Two a layer, one of the embedding, two of the best token, one of whether logits are finite.
    assert {kind: x["number"] for kind, x in plain.items()} == {"all-reduce": 2 * L + 4}
    # The head: its layer and its embedding once after the round and once for every draft but the first, and the best
    # token of every draft.
    assert {kind: x["number"] for kind, x in speculative.items()} == {"all-reduce": 2 * L + 4 + 3 * G + 2 * G}
    states = B * (G + 1) * D * 4
    assert speculative["all-reduce"]["bytes"] < (2 * L + 4 + 3 * G) * states + 4096 * 2 * (G + 1)


def test_the_least_traffic_is_weights_and_live_caches_of_every_pass(found):
    summary, _ = found
    plain, speculative = (row["traffic"]["least"] for row in summary["programs"])
    target = WIDTH * (L * (LAYER + 2 * D) + D + V * D // PARTS)
    expected = target + L * CACHE * (1 + 1 / S) + WIDTH * B * D
    assert plain == pytest.approx(expected)
    passes = [G + 1, *[1] * (G - 1)]
    expected = target + L * CACHE * (1 + (G + 1) / S) + WIDTH * B * (G + 1) * D
    expected += WIDTH * (3 * D * D + G * D * DRAFT_V // PARTS)
    expected += sum(WIDTH * (HEAD_LAYER + 4 * D) + CACHE * (1 + width / S) for width in passes)
    assert speculative == pytest.approx(expected)


def test_times_add_up_and_speedups_follow(found):
    summary, _ = found
    plain, speculative = summary["programs"]
    for row in (plain, speculative):
        seconds = row["seconds"]
        assert seconds["operations"] == pytest.approx(row["cycles"] / CHIPS["v6e"].hertz)
        assert seconds["round"] == pytest.approx(max(seconds["operations"], seconds["hbm"]) + seconds["links"])
        assert seconds["ratio"] == pytest.approx(seconds["round"] / seconds["roofline"])
        assert 0 < row["cycles"] and 0 < row["traffic"]["bytes"]
    assert plain["over_plain"] == 1 and speculative["over_plain"] > 1
    for line in summary["predictions"]:
        length = 1 + line["acceptance"] + line["acceptance"] ** 2
        assert line["acceptance_length"] == [pytest.approx(length)]
        assert line["speedup"] == [pytest.approx(length / speculative["over_plain"])]
        assert line["best_drafts"] == G


def test_the_report_says_that_nothing_was_run(found, capsys):
    summary, workdir = found
    assert summary["compiled_not_run"].startswith("Compiled, not run")
    assert summary["fits"] and summary["schema"] == report.SCHEMA and summary["num_devices"] == 4
    assert summary["mesh"] == {"data": 1, "model": 4} and summary["capacity"] == S and summary["seconds"] > 0
    svg = (workdir / report.PLOT).read_text()
    assert svg.startswith("<?xml") and svg.rstrip().endswith("</svg>")
    assert sorted(path.name for path in workdir.iterdir()) == [report.JSON, report.PLOT]
    from rich.console import Console

    Console(width=120).print(*report.tables(summary), sep="\n")
    out = capsys.readouterr().out
    assert "Compiled, not run" in out and "in full" in out and "K=2" in out and "Speed-up" in out


def test_what_does_not_fit_is_a_result_with_numbers_and_exit_code_3(model, tmp_path, capsys):
    assert run(model, "--topology=v5e:2x2", "--config.batch=400000", f"--workdir={tmp_path}") == cli.DOES_NOT_FIT == 3
    summary = json.loads((tmp_path / report.JSON).read_text())
    assert not summary["fits"] and summary["caches"]["target"] == L * CACHE * 50_000
    largest = summary["largest"]["batch"]
    per_row, available = (L + 1) * CACHE / B + 4 * S, CHIPS["v5e"].hbm_bytes  # caches and tokens
    assert 0.98 * available < largest * per_row < available and f"batch={largest}" in summary["remedies"]
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_what_the_compiler_refuses_for_memory_does_not_fit(model, monkeypatch):
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 20.00G exceeds available HBM (15.75G).\nmore"

    def refuse(self, state):
        def lower(*args):
            raise jax.errors.JaxRuntimeError(said)

        return types.SimpleNamespace(lower=lower)

    monkeypatch.setattr(compiling.Programs, "decoding", refuse)
    tiny = Preflight(model=str(model), context=S)
    compiled = compiling.compile_program(plan(tiny, read_topology("v5e:2x2")), 0)
    summary = report.summarize(plan(tiny, read_topology("v5e:2x2")), [compiled])
    assert not summary["fits"] and summary["programs"][0]["refusal"] == said.splitlines()[0]


def refusal(make, *args, **fields):
    with pytest.raises(ConfigError) as caught:
        make(*args, **fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v6x:2x2", "v6e:2x2"),
        ("v5ee:2x4", "v5e:2x4"),
        ("v6e:3x3", "v6e:2x4"),
        ("v5p:9", "v5p:2x2x2"),
        ("v6e", "v6e:2x2"),
    ],
)
def test_an_unknown_topology_names_the_nearest(name, nearest):
    pytest.importorskip("libtpu")
    assert nearest in refusal(read_topology, name)


@pytest.mark.parametrize("chip", LAYOUTS)
def test_libtpu_knows_the_chips(chip):
    pytest.importorskip("libtpu")
    layout = LAYOUTS[chip][-6]
    assert {device.platform for device in read_topology(f"{chip}:{layout}").devices} == {"tpu"}


def test_without_libtpu_the_package_is_named(monkeypatch):
    monkeypatch.setitem(experiment.importlib.sys.modules, "libtpu", None)
    assert "`pip install libtpu`" in refusal(read_topology, "v6e:2x2")


def test_a_model_that_is_not_there_names_the_nearest():
    message = refusal(Preflight(model="lama31_8b").read_model)
    assert "llama31_8b is the nearest" in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data": 3, "batch": 9}, "2 is the nearest"),
        ({"data": 3}, "2 is the nearest"),
        ({"model_parts": 3}, "expected 2, the nearest"),
        ({"context": 5000}, "at most 4096"),
        ({"capacity": 256}, "such as 512"),
        ({"drafts": (2,)}, "config.drafts=(2,)"),
        ({"acceptance_by_position": (0.5, 0.6)}, "don't increase"),
    ],
)
def test_what_does_not_fit_together_is_named(model, fields, named):
    def make():
        plan(Preflight(model=str(model), **({"context": S} | fields)), read_topology("v6e:2x2"))

    assert named in refusal(make)


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name.startswith("preflight_")])
def test_shipped_preflights_can_be_planned(name):
    pytest.importorskip("libtpu")
    config, _ = cli.parse("preflight", [f"--config={name}"], {})
    planned = plan(Preflight.from_config(config), read_topology("v5p:2x2x2"))
    assert planned.experiment.model in shipped_models() and planned.model.num_kv_heads == 8
    assert planned.head.draft_vocab_size == 32000 and len(planned.head.taps) == 3


def test_the_shipped_8b_has_as_many_weights_as_is_known():
    shapes = decoder.param_shapes(Preflight(model="llama31_8b").read_model())
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 8_030_261_248


HLO = """HloModule jit_decode

%slices (param_0: bf16[8,2,4096,128], param_1: s32[]) -> bf16[8,2,256,128] {
  %param_0 = bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %ds = bf16[8,2,256,128]{3,2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%param_0, %zero, %zero, %param_1, %zero)
}

%updates (param_2: bf16[8,2,4096,128], param_3: bf16[1,2,8,128]) -> bf16[8,2,4096,128] {
  %param_2 = bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %param_3 = bf16[1,2,8,128]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %at = s32[]{:T(128)} constant(0)
  ROOT %dus = bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_2, %param_3, %at, %at, %at, %at)
}

%product (param_4: bf16[4096,1024], param_5: bf16[8,4096]) -> bf16[8,1024] {
  %param_4 = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %param_5 = bf16[8,4096]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %dot = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} convolution(%param_5, %param_4), dim_labels=bf_io->bf
}

%block (p: (bf16[8,2,4096,128], s32[])) -> (bf16[8,2,4096,128], s32[]) {
  %p = (bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %cache_in = bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=0
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  %part = bf16[8,2,256,128]{3,2,1,0:T(8,128)(2,1)S(1)} fusion(%cache_in, %i), kind=kLoop, calls=%slices, \
backend_config={"estimated_cycles":"100"}
  ROOT %t = (bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%cache_in, %i)
}

%cheap (c: s32[8]) -> s32[8] {
  %c = s32[8]{0:T(128)S(1)} parameter(0)
  ROOT %low = s32[8]{0:T(128)S(1)} add(%c, %c), backend_config={"estimated_cycles":"10"}
}

%dear (d: s32[8]) -> s32[8] {
  %d = s32[8]{0:T(128)S(1)} parameter(0)
  ROOT %high = s32[8]{0:T(128)S(1)} multiply(%d, %d), backend_config={"estimated_cycles":"1000"}
}

%unknown (u: s32[8]) -> s32[8] {
  %u = s32[8]{0:T(128)S(1)} parameter(0)
  ROOT %often = s32[8]{0:T(128)S(1)} while(%u), condition=%c, body=%cheap, metadata={op_name="jit(decode)/verify/while"}
}

%round (s: (bf16[8,2,4096,128], bf16[4096,1024])) -> (bf16[8,2,4096,128], bf16[4096,1024]) {
  %s = (bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}, bf16[4096,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %cache = bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %weights = bf16[4096,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %x = bf16[8,4096]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %y = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%weights, %x), kind=kOutput, calls=%product, \
backend_config={"estimated_cycles":"5000"}
  %sum = f32[8,1024]{1,0:T(8,128)S(1)} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  %new = bf16[1,2,8,128]{3,2,1,0:T(8,128)(2,1)S(1)} constant({...})
  %written = bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)} fusion(%cache, %new), kind=kLoop, calls=%updates, \
backend_config={"estimated_cycles":"20"}
  %carry = (bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) tuple(%written, %x)
  %loop = (bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}) while(%carry), condition=%c, body=%block, \
metadata={op_name="jit(decode)/while/body/score/Decoder/layer_0/attention/shard_map/while"}
  %which = s32[8]{0:T(128)S(1)} conditional(%i, %x, %x), branch_computations={%unknown, %dear}
  %mixed = (bf16[8,1,16,128]{3,2,1,0:T(8,128)(2,1)S(1)}, bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}) \
custom-call(%x, %cache), custom_call_target="tpu_custom_call"
  ROOT %out = (bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}, bf16[4096,1024]{1,0:T(8,128)(2,1)}) tuple(%written, %weights)
}

ENTRY %main (a: bf16[4096,1024], b: bf16[8,2,4096,128]) -> bf16[8,2,4096,128] {
  %a = bf16[4096,1024]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="params.target['head']"}
  %b = bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="state.cache.keys[0]"}
  %turned = bf16[4096,1024]{0,1:T(8,128)(2,1)} copy(%a), backend_config={"estimated_cycles":"300"}
  %first = (bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}, bf16[4096,1024]{0,1:T(8,128)(2,1)}) tuple(%b, %turned)
  %rounds = (bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)}, bf16[4096,1024]{0,1:T(8,128)(2,1)}) while(%first), \
condition=%c, body=%round, metadata={op_name="jit(decode)/while"}
  ROOT %result = bf16[8,2,4096,128]{3,2,1,0:T(8,128)(2,1)} get-tuple-element(%rounds), index=0
}
"""


def test_a_round_is_read_from_the_loop_of_a_program():
    weights, block, cache = 4096 * 1024 * 2, 8 * 2 * 256 * 128 * 2, 8 * 2 * 4096 * 128 * 2
    chip, blocks, live = CHIPS["v6e"], 4, 0.25
    found = Round(HLO, chip, blocks, {(2, 8, 128, 4096): live})
    cost, kernel_bytes = found.cost, live * cache
    # Weights once, the blocks of the loop, the entries written in place (whole tiles), and the kernel's live part. Of
    # the branches the one that has no loop of unknown length.
    assert cost.bytes == weights + blocks * block + 2 * 8 * 128 * 2 + kernel_bytes
    kernel_cycles = kernel_bytes / chip.bytes_per_second * chip.hertz
    assert cost.cycles == pytest.approx(5000 + 20 + blocks * 100 + 1000 + kernel_cycles)
    assert cost.collectives == {"all-reduce": 1} and cost.collective_bytes == {"all-reduce": 8 * 1024 * 4}
    assert cost.sent == 2 * 3 / 4 * 8 * 1024 * 4 and (cost.kernels, cost.unestimated) == (1, 1)
    assert found.around.cycles == 300 and found.around.bytes == 2 * weights
    assert found.copied == {"params": weights, "state": 0}


def test_a_program_without_the_loop_is_refused():
    with pytest.raises(ValueError, match="no loop of jit"):
        Round(HLO.replace('op_name="jit(decode)/while"}', 'op_name="jit(other)"}'), CHIPS["v6e"], 1, {})


def test_a_config_of_qwen_has_norms_of_queries_and_keys():
    assert Preflight(model="qwen3_8b").read_model().qk_norm
    assert from_hf({"model_type": "qwen3"} | _fields("qwen3_32b")).num_layers == 64


def _fields(name):
    return json.loads((experiment.MODELS / name / "config.json").read_text())
