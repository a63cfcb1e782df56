"""The benchmark measures every claim that its config names, on a tiny model."""

import json
import sys
import types

import pytest

from specjax.configs import bench_smollm2, train_eagle3_smollm2, train_eagle_smollm2
from specjax.evaluate.benchmark import benchmark
from specjax.evaluate.report import benchmark_table


@pytest.fixture
def tiny_trainings(monkeypatch):
    """Names of configs that train small heads."""
    for name, config in (("tiny_eagle3", train_eagle3_smollm2), ("tiny_eagle", train_eagle_smollm2)):
        fields = config.get_config()
        fields.head.mlp_width = 32
        fields.data.length, fields.data.rows = 16, 2
        if "taps" in fields.head:
            fields.head.taps, fields.head.draft_vocab_size = (0, 1, 2), 50
        fields.loss_vocab_size = 0
        monkeypatch.setitem(
            sys.modules, f"specjax.configs.{name}", types.SimpleNamespace(get_config=lambda fields=fields: fields)
        )
    return {"eagle3": "tiny_eagle3", "eagle": "tiny_eagle"}


def test_every_claim_gets_a_row(model, own_cache, tiny_trainings, tmp_path):
    config = bench_smollm2.get_config()
    config.target = str(model)
    config.num_prompts, config.max_tokens, config.repeats, config.step_repeats, config.batch = 1, 8, 1, 1, 2
    config.step_context, config.batched_repeats = 100, 2
    config.training = tiny_trainings
    del config.batched_methods["eagle3, auto"]  # its head is another model's
    done = []
    results = benchmark(config, tmp_path, lambda *step: done.append(step))
    assert done[-1][0] == done[-1][1] == len(done)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == results
    claims = [row["claim"] for row in results["rows"]]
    training = [claim for claim in claims if claim.startswith("training step")]
    assert [claim.split(",")[1].strip() for claim in training] == ["eagle", "eagle3"]
    assert {"ngram over plain decoding", "batch 2 over batch 1"} < set(claims)
    again, *auto = [row for row in results["rows"] if row["claim"].endswith("over plain decoding, batch 2")]
    assert [row["claim"].split(" over")[0] for row in (again, *auto)] == ["plain decoding again", "ngram, auto"]
    assert again["goal"] == "noise" and auto[0]["goal"] == ">= 0.97"
    assert len(results["in_turns"]) == 2
    for turns in results["in_turns"]:
        assert {name: measured["tokens"] for name, measured in turns.items()} == dict.fromkeys(turns, 8)
    for row in results["rows"]:
        assert row["ratio"] is None or row["ratio"] > 0
        assert row["claim"] in benchmark_table(results)
