"""Evaluation on a tiny model: the summary, resuming, the near-tie oracle."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from models import random_target

from specjax import SamplingParams, SpeculativeDecoder
from specjax.errors import ConfigError, SpecJAXError
from specjax.evaluate import oracle, report, run
from specjax.evaluate.prompts import load_prompts

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def config(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "category": "ab"[i % 2], "turns": ["he he " * (i + 1), "second"]} for i in range(3)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ConfigDict(
        {
            "target": str(model),
            "dtype": "float32",
            "prompts": str(prompts),
            "chat": True,
            "num_prompts": 0,
            "repeats": 2,
            "sampling": {"temperature": 0.0, "max_tokens": 16},
            "methods": {"ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}},
        }
    )


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def test_the_summary_holds_what_was_measured(config, tmp_path):
    summary = run.evaluate(config, tmp_path / "w")
    assert json.loads((tmp_path / "w" / "summary.json").read_text())["target"] == config.target
    assert summary["prompts"] == 3 and summary["dtype"] == "float32" and summary["baseline"]["tokens_per_second"] > 0
    row = summary["methods"]["ngram"]
    assert row["num_speculative_tokens"] == 3
    assert row["mismatch"] == 0 and row["identical"] + row["near_tie"] == 3
    fastest = [
        min(
            (x for x in lines_of(tmp_path / "w") if x["prompt"] == p and x["method"] == "ngram"),
            key=lambda x: x["decode_seconds"],
        )
        for p in ("p0", "p1", "p2")
    ]
    tokens = sum(len(x["token_ids"]) for x in fastest)
    assert row["tokens_per_second"] == pytest.approx(tokens / sum(x["decode_seconds"] for x in fastest))
    assert row["efficiency"] == pytest.approx(row["speedup"] / row["acceptance_length"])
    assert set(summary["by_category"]) == {"a", "b"}
    assert "| ngram" in report.summary_table(summary)


def test_a_killed_run_is_resumed_without_losing_or_repeating_work(config, tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total, description):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        run.evaluate(config, tmp_path, kill)
    before = lines_of(tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"prompt": "p1", "meth')  # a line cut short by the kill
    run.evaluate(config, tmp_path)
    after = lines_of(tmp_path)
    assert after[:5] == before
    keys = [(line["prompt"], line["method"], line["repeat"]) for line in after]
    assert len(set(keys)) == len(keys) == 12


def test_another_experiments_workdir_is_refused(config, tmp_path):
    run.evaluate(config, tmp_path)
    config.repeats = 1
    with pytest.raises(SpecJAXError, match="repeats was 2, is 1"):
        run.evaluate(config, tmp_path)


def test_an_unwritable_workdir_is_refused_before_the_model_is_loaded(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.target = "/nowhere"
    with pytest.raises(SpecJAXError, match="cannot be written to"):
        run.evaluate(config, tmp_path / "file" / "w")


def test_a_method_named_plain_is_refused(config, tmp_path):
    config.methods = ConfigDict({"plain": {"method": "ngram"}})
    with pytest.raises(ConfigError, match="plain"):
        run.evaluate(config, tmp_path)


def test_sampled_runs_report_no_agreement(config, tmp_path):
    config.sampling.temperature = 1.0
    row = run.evaluate(config, tmp_path)["methods"]["ngram"]
    assert (row["identical"], row["near_tie"], row["mismatch"]) == (None, None, None)


@pytest.fixture(scope="module")
def greedy():
    target = random_target(0)
    prompt = np.random.RandomState(0).randint(0, 97, 20).tolist()
    return target, prompt, SpeculativeDecoder(target).generate([prompt], SamplingParams(max_tokens=10)).token_ids[0]


def test_equal_outputs_are_identical(greedy):
    target, prompt, plain = greedy
    assert oracle.compare_greedy(target, prompt, plain, plain) == "identical"


def test_a_wrong_token_is_a_mismatch(greedy):
    target, prompt, plain = greedy
    wrong = [*plain[:4], (plain[4] + 1) % 97, *plain[5:]]
    assert oracle.compare_greedy(target, prompt, plain, wrong) == "mismatch"


def test_a_missing_end_is_a_mismatch(greedy):
    target, prompt, plain = greedy
    assert oracle.compare_greedy(target, prompt, plain, plain[:-1]) == "mismatch"


def test_a_tie_of_the_two_best_tokens_is_a_near_tie(greedy):
    """A copy of the best token's output column makes two tokens exactly equal."""
    import dataclasses

    target, prompt, plain = greedy
    other = next(token for token in range(97) if token not in plain and token not in prompt)
    head = target.params["head"].at[:, other].set(target.params["head"][:, plain[4]])
    tied = dataclasses.replace(target, params=target.params | {"head": head})
    flipped = [*plain[:4], other, *plain[5:]]
    assert oracle.compare_greedy(tied, prompt, plain, flipped) == "near_tie"
    assert oracle.compare_greedy(target, prompt, plain, flipped) == "mismatch"


def test_the_built_in_prompts_load_and_cover_twelve_categories():
    prompts = load_prompts("built_in")
    assert len(prompts) == len({prompt.category for prompt in prompts}) == 12
    assert len(load_prompts("built_in", 3)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts"),
        ("{", "not JSON"),
        ('{"id": "a", "turns": []}', ":1"),
        ('{"turns": ["x"]}', ":1"),
        ('{"id": "a", "turns": ["x"]}\n{"id": "a", "turns": ["y"]}', "occurs twice"),
        ('{"id": "a", "turns": ["x"]}\n[1]', ":2"),
    ],
)
def test_bad_prompt_files_are_refused_by_line(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(SpecJAXError, match=message):
        load_prompts(str(path))
