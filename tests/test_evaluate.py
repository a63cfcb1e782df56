"""Evaluation on a tiny model: what a run measures and writes, and that it survives kills and failures."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from models import random_target

from specjax import SamplingParams, SpeculativeConfig, SpeculativeDecoder, cli
from specjax.checkpoints.load import load_target
from specjax.errors import ConfigError, SpecJAXError
from specjax.evaluate import compare, environment, oracle, report, run
from specjax.evaluate.experiment import COMPARISONS, Experiment
from specjax.evaluate.prompts import load_prompts
from specjax.evaluate.results import Answer, Results

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPTS = [
    {"id": "p0", "category": "a", "turns": ["he he ", "second"]},
    {"id": "p1", "category": "b", "turns": ["he he he he "]},
    {"id": "p2", "category": "a", "turns": ["hello hello he he"]},
]
TIMES = re.compile("seconds|per_second|speedup|efficiency|harness")


def write_prompts(path, records=PROMPTS):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def experiment_config(model, folder, **fields):
    method = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    prompts = folder / "prompts.jsonl"
    return ConfigDict(
        {
            "target": str(model),
            "dtype": "float32",
            "prompts": str(prompts) if prompts.exists() else write_prompts(prompts),
            "repeats": 2,
            "sampling": {"temperature": 0.0, "max_tokens": 16},
            "methods": {"ngram": method},
            **fields,
        }
    )


@pytest.fixture
def config(model, tmp_path):
    return experiment_config(model, tmp_path)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A finished run: its config, folder and summary."""
    folder = tmp_path_factory.mktemp("finished")
    config = experiment_config(model, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return config, folder / "w", run.evaluate(config, folder / "w")


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def answers_of(workdir):
    """Answers of one by one or batched runs by prompt, turn, method and repeat."""
    lines = [line for line in lines_of(workdir) if "extra" not in line]
    answers = [answer for line in lines for answer in line.get("answers", [line])]
    return {(line["prompt"], line["turn"], line["method"], line["repeat"]): line for line in answers}


def without_times(content):
    """A summary less all that depends on clocks."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if not TIMES.search(key)}
    return [without_times(value) for value in content] if isinstance(content, list | tuple) else content


def test_the_summary_holds_what_was_measured(finished):
    config, workdir, summary = finished
    on_disk = json.loads((workdir / "summary.json").read_text())
    assert on_disk["target"] == config.target and on_disk["finished"] and on_disk["schema"] == 2
    assert (summary["prompts"], summary["turns"], summary["dtype"]) == (3, 4, "float32")
    row = summary["methods"]["ngram"]
    assert row["num_speculative_tokens"] == 3 and summary["config"]["methods"]["ngram"]["num_speculative_tokens"] == 3
    assert row["mismatch"] == 0 and row["identical"] + row["near_tie"] == 4
    fastest = {}
    for (prompt, turn, method, _), answer in answers_of(workdir).items():
        best = fastest.setdefault((prompt, turn, method), answer)
        if answer["decode_seconds"] < best["decode_seconds"]:
            fastest[prompt, turn, method] = answer
    ours = [answer for key, answer in fastest.items() if key[2] == "ngram"]
    assert row["num_tokens"] == sum(len(answer["token_ids"]) for answer in ours)
    assert row["decode_seconds"] == pytest.approx(sum(answer["decode_seconds"] for answer in ours))
    assert row["tokens_per_second"] == pytest.approx(row["num_tokens"] / row["decode_seconds"])
    assert row["speedup"] == pytest.approx(row["tokens_per_second"] / summary["baseline"]["tokens_per_second"])
    assert row["efficiency"] == pytest.approx(row["speedup"] / row["acceptance_length"])
    low, high = row["tokens_per_second_range"]
    assert low <= row["tokens_per_second_median"] <= high <= row["tokens_per_second"] * (1 + 1e-9)
    assert row["speedup_interval"][0] <= row["speedup"] <= row["speedup_interval"][1]
    assert row["acceptance_length_interval"][0] <= row["acceptance_length"] <= row["acceptance_length_interval"][1]
    assert summary["failed"] == [] and 0 <= summary["harness_overhead"] < 1
    assert "| ngram" in report.summary_table(summary)
    assert "ngram" in (workdir / "report.md").read_text() and "</html>" in (workdir / "report.html").read_text()


def test_categories_are_summed_over_their_own_prompts(finished):
    _, workdir, summary = finished
    assert {name: row["ngram"]["turns"] for name, row in summary["by_category"].items()} == {"a": 3, "b": 1}
    counts = np.array(answers_of(workdir)["p1", 0, "ngram", 0]["acceptance_counts"])
    length = 1 + (counts * np.arange(counts.size)).sum() / counts.sum()
    assert summary["by_category"]["b"]["ngram"]["acceptance_length"] == pytest.approx(length)
    assert summary["by_category"]["b"]["plain"]["speedup"] == pytest.approx(1.0)


def test_methods_take_turns_within_each_prompt_turn_and_repeat(finished):
    keys = list(answers_of(finished[1]))
    units = [("p0", 0), ("p0", 1), ("p1", 0), ("p2", 0)]
    assert keys == [(*unit, method, repeat) for unit in units for repeat in (0, 1) for method in ("plain", "ngram")]


def test_a_second_turn_follows_plain_decodings_own_answer(finished):
    """Decoding the conversation by hand gives the recorded answer of either method."""
    config, workdir, _ = finished
    answers = answers_of(workdir)
    target = run.load_target(config.target)
    first = {"role": "assistant", "content": answers["p0", 0, "plain", 0]["text"]}
    history = [{"role": "user", "content": "he he "}, first, {"role": "user", "content": "second"}]
    expected = SpeculativeDecoder(target).generate([history], SamplingParams(max_tokens=16)).token_ids[0]
    assert answers["p0", 1, "plain", 1]["token_ids"] == answers["p0", 1, "ngram", 0]["token_ids"] == expected


def test_all_prompts_run_in_caches_of_one_capacity_that_holds_the_longest(config, tmp_path, monkeypatch):
    capacities, needed = [], []
    usual = SpeculativeDecoder.generate

    def recording(decoder, prompts, sampling_params, *, min_capacity, trace=False):
        result = usual(decoder, prompts, sampling_params, min_capacity=min_capacity, trace=trace)
        capacities.append(min_capacity)
        needed.append(len(prompts[0]) + sampling_params.max_tokens)
        return result

    monkeypatch.setattr(SpeculativeDecoder, "generate", recording)
    config.prompts = write_prompts(
        tmp_path / "more.jsonl", [*PROMPTS[1:], {"id": "long", "category": "a", "turns": ["he " * 600]}]
    )
    summary = run.evaluate(config, tmp_path / "w")
    assert {record["prompt"] for record in summary["failed"]} == {"long"}  # for which no capacity is reserved
    assert len(capacities) >= 8 and max(needed) <= capacities[0] <= 512 and len(set(capacities)) == 1


def test_examples_spell_the_recorded_answers(finished):
    _, workdir, summary = finished
    assert [(one["prompt"], one["category"], one["method"]) for one in summary["examples"]] == [
        ("p0", "a", "ngram"),
        ("p1", "b", "ngram"),
    ]
    for example in summary["examples"]:
        text = "".join("".join(r["drafts"][: r["accepted"]]) + r["next"] for r in example["rounds"])
        counts = np.array(answers_of(workdir)[example["prompt"], 0, "ngram", 0]["acceptance_counts"])
        assert text and len(example["rounds"]) == counts.sum()


@pytest.mark.parametrize("kept", [0.0, 0.13, 0.5, 0.98])
def test_a_killed_run_goes_on_to_the_same_summary(finished, kept, tmp_path):
    """Cut at any byte: whole lines are kept as they are, a torn one is measured again."""
    config, workdir, whole = finished
    shutil.copy(workdir / "config.json", tmp_path)
    content = (workdir / "results.jsonl").read_bytes()
    cut = content[: int(kept * len(content))]
    (tmp_path / "results.jsonl").write_bytes(cut)
    summary = run.evaluate(config, tmp_path)
    after = (tmp_path / "results.jsonl").read_bytes()
    assert after.startswith(cut[: cut.rfind(b"\n") + 1])
    assert len(answers_of(tmp_path)) == len(lines_of(tmp_path)) - 1 == 16  # and one line of examples
    assert without_times(summary) == without_times(whole)


def test_kill_9_twice_and_gone_on_with_equals_a_run_in_one_go(model, tmp_path):
    """The installed command in a process of its own, killed as soon as so many more answers are on disk."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    fields = [f"--config.prompts={prompts}", "--config.sampling.max_tokens=64", "--config.repeats=12"]
    assert cli.main([*command(model, tmp_path / "whole"), *fields]) == 0
    run_again = [sys.executable, "-m", "specjax.cli", *command(model, tmp_path / "w"), *fields]
    results = tmp_path / "w" / "results.jsonl"
    kept = b""
    for _ in range(2):
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(run_again, stdout=output, stderr=output)
            while process.poll() is None and not (results.exists() and results.stat().st_size > len(kept) + 3000):
                time.sleep(0.002)
            process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
        content = results.read_bytes()
        assert content.startswith(kept[: kept.rfind(b"\n") + 1])
        kept = content
    assert 0 < kept.count(b"\n") < 96
    assert cli.main(run_again[3:]) == 0
    assert results.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    whole, again = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "w"))
    assert len(answers_of(tmp_path / "w")) == len(lines_of(tmp_path / "w")) - 1 == 96
    assert without_times(again) == without_times(whole)


def test_results_cut_at_any_byte_are_read_up_to_the_last_whole_line(tmp_path):
    results = Results(tmp_path, {"a": 1})
    for index in range(3):
        results.append(Answer(f"é{index}", 0, "c", "plain", 0, token_ids=[index]))
    results.append_extra("costs", {"x": 1})
    content = results.path.read_bytes()
    for cut in range(len(content) + 1):
        results.path.write_bytes(content[:cut])
        read = Results(tmp_path, {"a": 1})
        num = content[:cut].count(b"\n")
        assert (len(read), len(read.extras)) == (min(num, 3), int(num > 3))
        assert results.path.read_bytes() == content[: content[:cut].rfind(b"\n") + 1]


def command(model, workdir):
    """`specjax evaluate` of n-grams, which need no weights."""
    methods = "--config.methods={'ngram': {'method': 'ngram', 'num_speculative_tokens': 6}}"
    return ["evaluate", "--config=eval_smollm2", f"--workdir={workdir}", f"--config.target={model}", methods]


def test_ctrl_c_leaves_a_valid_partial_summary_and_exit_code_130(model, tmp_path, monkeypatch, capsys):
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    arguments = command(model, tmp_path / "w")
    arguments += [f"--config.prompts={prompts}", "--config.sampling.max_tokens=16", "--config.repeats=1"]
    append = Results.append

    def interrupted(self, measured):
        append(self, measured)
        if len(self) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Results, "append", interrupted)
        assert cli.main(arguments) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    partial = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert not partial["finished"] and partial["baseline"]["num_tokens"] and len(lines_of(tmp_path / "w")) == 3
    assert partial["methods"]["ngram"]["mismatch"] is None  # texts are compared at the end
    assert "</html>" in (tmp_path / "w" / "report.html").read_text()
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "w" / "summary.json").read_text())["finished"]
    assert len(answers_of(tmp_path / "w")) == 8


def test_the_summary_is_refreshed_while_a_run_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "REFRESH_SECONDS", 0.0)
    seen = []

    def look(done, total, description):
        path = tmp_path / "summary.json"
        seen.append((done, json.loads(path.read_text())["baseline"]["num_tokens"] if path.exists() else 0, description))

    config.repeats = 1
    config.num_prompts = 1
    run.evaluate(config, tmp_path, look)
    assert seen[0][1] > 0 and seen[0][1] < seen[2][1]
    assert re.match(r"ngram: [\d.]+ tokens/s", seen[1][2])


def test_what_fails_is_recorded_and_the_run_goes_on(config, tmp_path, monkeypatch):
    """A prompt beyond the context fails for all, together with the turn behind it; one method fails on p1 alone."""
    records = [PROMPTS[0] | {"turns": ["z" * 600, "second"]}, *PROMPTS[1:]]
    write_prompts(tmp_path / "prompts.jsonl", records)
    config.repeats = 1
    generate = SpeculativeDecoder.generate

    def failing(self, prompts, *args, **kwargs):
        if self.config is not None and prompts == [asked["p1"]]:
            raise jax.errors.JaxRuntimeError("out of memory")
        return generate(self, prompts, *args, **kwargs)

    target = run.load_target(config.target)
    asked = {"p1": run.encode_prompt(target.tokenizer, PROMPTS[1]["turns"][0], True)}
    monkeypatch.setattr(SpeculativeDecoder, "generate", failing)
    summary = run.evaluate(config, tmp_path / "w")
    failed = {(f["prompt"], f["turn"], f["method"]): f["error"] for f in summary["failed"]}
    assert set(failed) == {("p0", t, m) for t in (0, 1) for m in ("plain", "ngram")} | {("p1", 0, "ngram")}
    assert "at most 511" in failed["p0", 0, "plain"] and "turn 0 of prompt 'p0'" in failed["p0", 1, "plain"]
    assert failed["p1", 0, "ngram"] == "out of memory"
    row = summary["methods"]["ngram"]
    answers = answers_of(tmp_path / "w")
    assert row["num_tokens"] == len(answers["p2", 0, "ngram", 0]["token_ids"])
    p2 = [answers["p2", 0, method, 0] for method in ("plain", "ngram")]
    rates = [len(answer["token_ids"]) / answer["decode_seconds"] for answer in p2]
    assert row["speedup"] == pytest.approx(rates[1] / rates[0])  # over the prompts that both could answer
    assert summary["baseline"]["num_tokens"] == sum(len(answers[p, 0, "plain", 0]["token_ids"]) for p in ("p1", "p2"))
    assert row["identical"] + row["near_tie"] == 1


def test_costs_that_cannot_be_measured_do_not_take_the_results_with_them(config, tmp_path, monkeypatch):
    config.update({"repeats": 1, "num_prompts": 1, "costs": True, "step_context": 40})
    measure = run.costs.measure_costs
    monkeypatch.setattr(run.costs, "REPEATS", 1)

    def failing(*_):
        raise jax.errors.JaxRuntimeError("out of memory")

    monkeypatch.setattr(run.costs, "measure_costs", failing)
    summary = run.evaluate(config, tmp_path / "w")
    assert summary["finished"] and summary["warnings"] == ["costs could not be measured: out of memory"]
    assert summary["methods"]["ngram"]["identical"] == 2 and summary["examples"]
    monkeypatch.setattr(run.costs, "measure_costs", measure)
    again = run.evaluate(config, tmp_path / "w")
    assert again["costs"] and not again["warnings"]


def test_a_context_too_long_for_costs_is_refused_before_anything_is_measured(config, tmp_path):
    config.update({"costs": True, "step_context": 10_000})
    with pytest.raises(ConfigError, match="step_context=10000"):
        run.evaluate(config, tmp_path / "w")
    assert not (tmp_path / "w" / "results.jsonl").exists()


def test_synthetic_acceptance_has_no_cost_curve():
    fields = {"method": "ngram", "num_speculative_tokens": 3, "rejection_sampling_strategy": "synthetic"}
    rates = SpeculativeConfig(**fields, synthetic_acceptance_rates=(0.8, 0.6, 0.4))
    assert not run.costs.has_draft_curve(rates)
    assert run.costs.has_draft_curve(SpeculativeConfig(method="ngram", num_speculative_tokens=3))


def test_other_libraries_warm_up_before_they_are_measured(config, tmp_path, monkeypatch):
    calls = []

    def generate(tokens):
        calls.append(tokens)
        return compare.Generated([1, 2], 1, 0.1, 0.1)

    monkeypatch.setattr(run, "_others", lambda *_: ({"transformers": generate}, {}))
    config.update({"repeats": 1, "num_prompts": 1, "methods": {}, "compare": ("transformers",)})
    run.evaluate(config, tmp_path / "w")
    assert len(calls) == 3 and calls[0] == calls[1]  # the first of two turns twice


def test_a_run_in_which_nothing_succeeds_ends_with_an_error(model, tmp_path, capsys):
    prompts = write_prompts(tmp_path / "prompts.jsonl", [{"id": "p", "turns": ["z" * 600]}])
    arguments = command(model, tmp_path / "w")
    assert cli.main([*arguments, f"--config.prompts={prompts}"]) == 2
    assert "nothing could be measured of plain, ngram" in capsys.readouterr().err


def test_batches_give_the_answers_of_one_by_one(model, tmp_path):
    """Ragged prompts, two turns, float32; rows change hands: three rows for eight prompts."""
    records = [{"id": f"p{i}", "category": "c", "turns": ["he llo " * (i % 5 + 1)] * (1 + i % 2)} for i in range(8)]
    write_prompts(tmp_path / "prompts.jsonl", records)
    fields = {"repeats": 1, "sampling": {"temperature": 0.0, "max_tokens": 12}}
    alone = run.evaluate(experiment_config(model, tmp_path, **fields), tmp_path / "alone")
    batched = run.evaluate(experiment_config(model, tmp_path, batch_size=3, **fields), tmp_path / "batched")
    compared = "token_ids", "text", "finish_reason", "acceptance_counts", "drafted", "error"
    one, many = answers_of(tmp_path / "alone"), answers_of(tmp_path / "batched")
    assert len(one) == 24 and one.keys() == many.keys()
    assert all(one[key][name] == many[key][name] for key in one for name in compared)
    row = batched["methods"]["ngram"]
    passes = [line for line in lines_of(tmp_path / "batched") if line.get("method") == "ngram"]
    assert row["decode_seconds"] == pytest.approx(sum(line["decode_seconds"] for line in passes)) and len(passes) == 2
    for name in ("acceptance_counts", "num_tokens", "identical", "near_tie", "mismatch"):
        assert row[name] == alone["methods"]["ngram"][name]
    assert row["speedup_interval"] is None and batched["by_category"]["c"]["ngram"]["tokens_per_second"] is None
    content = (tmp_path / "batched" / "results.jsonl").read_bytes()
    (tmp_path / "batched" / "results.jsonl").write_bytes(content[: len(content) // 2])
    again = run.evaluate(experiment_config(model, tmp_path, batch_size=3, **fields), tmp_path / "batched")
    assert without_times(again) == without_times(batched)


def test_a_number_of_drafts_that_varies_gives_plain_decodings_answers(model, tmp_path):
    method = {"method": "ngram", "num_speculative_tokens": "auto", "prompt_lookup_max": 2}
    config = experiment_config(model, tmp_path, repeats=1, batch_size=2, methods={"ngram": method})
    summary = run.evaluate(config, tmp_path / "w")
    row = summary["methods"]["ngram"]
    assert (row["identical"], row["near_tie"], row["mismatch"]) == (4, 0, 0) and summary["finished"]
    assert row["num_tokens"] == summary["baseline"]["num_tokens"] and not summary["failed"]


def test_other_libraries_decode_the_same_prompts_to_the_same_tokens(model, tmp_path):
    pytest.importorskip("torch")
    config = experiment_config(model, tmp_path, repeats=1, compare=COMPARISONS, assistant=str(model), methods={})
    config.num_prompts = 1
    summary = run.evaluate(config, tmp_path / "w")
    for name in ("transformers", "transformers-lookup", "transformers-assisted"):
        row = summary["comparisons"][name]
        assert row["identical"] == row["turns"] == 2 and row["num_tokens"] == summary["baseline"]["num_tokens"]
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / summary["baseline"]["tokens_per_second"])
    answer = answers_of(tmp_path / "w")["p0", 0, "transformers", 0]
    assert answer["timed_tokens"] == len(answer["token_ids"]) - 1  # prefill gives the first
    assert set(summary["comparisons"]) == set(COMPARISONS)
    assert {"torch", "transformers"} < set(summary["versions"]) and "vllm" not in summary["versions"]


def test_vllm_is_asked_as_its_documentation_says(model, tmp_path, monkeypatch):
    """A stand-in of the documented interface (vLLM itself does not run here) that decodes plainly."""
    decoder = SpeculativeDecoder(load_target(str(model), dtype="float32"))
    asked = []

    class Params:
        def __init__(self, *, temperature, max_tokens, stop_token_ids, ignore_eos):
            self.fields = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos)
            assert temperature == 0

    class LLM:
        def __init__(self, model, *, dtype, max_model_len, max_num_seqs, enable_prefix_caching):
            asked.append((Path(model).is_dir(), dtype, max_model_len, max_num_seqs, enable_prefix_caching))

        def generate(self, prompts, params, *, use_tqdm):
            (prompt,) = prompts
            token_ids = decoder.generate([prompt["prompt_token_ids"]], params.fields).token_ids[0]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=token_ids)])]

    vllm = types.ModuleType("vllm")
    vllm.__spec__, vllm.LLM, vllm.SamplingParams = ModuleSpec("vllm", None), LLM, Params
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    summary = run.evaluate(experiment_config(model, tmp_path, repeats=1, compare=("vllm",), methods={}), tmp_path / "w")
    assert asked == [(True, "float32", decoder.target.config.max_position, 1, False)]
    row = summary["comparisons"]["vllm"]
    assert row["identical"] == row["turns"] == 4 and row["num_tokens"] == summary["baseline"]["num_tokens"]
    answer = answers_of(tmp_path / "w")["p0", 0, "vllm", 0]
    assert answer["timed_tokens"] == len(answer["token_ids"]) - 1 and answer["prefill_seconds"] > 0


@pytest.mark.parametrize(
    ("name", "missing", "fields", "reason"),
    [
        ("transformers", "torch", {}, "torch is not installed"),
        ("vllm", "vllm", {}, "vllm is not installed"),
        ("transformers-assisted", None, {}, "config.assistant"),
        ("transformers", None, {"batch_size": 2}, "prompt by prompt"),
        ("transformers-lookup", None, {"sampling": SamplingParams(temperature=1.0)}, "temperature 0"),
        ("transformers", None, {"target": "/nowhere"}, "/nowhere"),
    ],
)
def test_comparisons_that_cannot_run_say_why(name, missing, fields, reason, monkeypatch):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda package: None if package == missing else package)
    experiment = Experiment(**{"target": "t", "prompts": "built_in", "compare": (name,)} | fields)
    ready, not_run = compare.comparisons(experiment, random_target(0))
    assert not ready and reason in not_run[name]


def test_costs_and_profile_are_measured_once_and_predict_speedups(model, tmp_path):
    config = experiment_config(model, tmp_path, repeats=1, costs=True, profile=True, step_context=40, num_prompts=1)
    config.methods.ngram.num_speculative_tokens = 1
    summary = run.evaluate(config, tmp_path / "w")
    measured, predicted = summary["costs"], summary["predicted"]["ngram"]
    assert (measured["context"], measured["batch"], measured["widths"]) == (40, [1], [1, 2])
    assert predicted["K"] == [0, 1] and predicted["speedup"][0] == 1.0
    row, draft = summary["methods"]["ngram"], measured["draft_ms"]["ngram"]["ms"][0]
    one, two = measured["score_ms"][0]
    share = row["drafted"] / sum(row["acceptance_counts"])
    cost = share * two + (1 - share) * one + draft + measured["rest_ms"]
    assert predicted["speedup"][1] == pytest.approx(row["acceptance_length"] * (one + measured["rest_ms"]) / cost)
    assert set(summary["profile"]) == {"plain", "ngram"}
    assert set(summary["profile"]["ngram"]) == {
        f"{part}_ms" for part in ("propose", "score", "verify", "commit", "round")
    }
    again = run.evaluate(config, tmp_path / "w")
    assert again["costs"] == measured and again["profile"] == summary["profile"]


def test_another_experiments_workdir_is_refused(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    other.repeats = 1
    with pytest.raises(SpecJAXError, match="repeats was 2, is 1"):
        run.evaluate(other, workdir)


def test_measurements_of_other_code_are_told_apart(tmp_path):
    for commit in ("one", "one", "two"):
        results = Results(tmp_path, {"a": 1}, commit)
        assert commit not in results.commits or len(results) == 1  # reading is no measurement
        results.append(Answer("p", 0, "c", "plain", len(results)))
    assert Results(tmp_path, {"a": 1}, "three").commits == ["one", "two"]
    assert json.loads((tmp_path / "config.json").read_text())["commits"] == ["one", "two"]


def test_the_commit_is_that_of_the_code_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    commit = environment.source_commit()
    assert commit is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", commit)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment.source_commit() is None


def test_an_unwritable_workdir_is_refused_before_the_model_is_loaded(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.target = "/nowhere"
    with pytest.raises(SpecJAXError, match="cannot be written to"):
        run.evaluate(config, tmp_path / "file" / "w")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": {"plain": {"method": "ngram"}}}, "methods.plain"),
        ({"methods": {"vllm": {"method": "ngram"}}}, "methods.vllm"),
        ({"repeats": 0}, "repeats=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"cost_batches": (0,)}, "cost_batches"),
        ({"compare": ("jax",)}, "'jax'"),
        ({"compare": "transformers"}, "expected a tuple"),
        ({"batch_size": 2, "sampling": {"stop": ["x"]}}, "sampling.stop"),
        ({"prompt": "x"}, "prompt='x'"),
        ({"target": ""}, "target=''"),
        ({"categories": ("c",)}, "expected some of a, b"),
    ],
)
def test_wrong_fields_are_refused_by_name(config, fields, message, tmp_path):
    config.unlock()
    config.update(fields)
    if "methods" in fields:
        config.methods = ConfigDict(fields["methods"])
    with pytest.raises(SpecJAXError, match=re.escape(message)):
        run.evaluate(config, tmp_path / "w")


def test_a_rule_that_does_not_fit_the_sampling_is_refused_before_anything_is_measured(config, tmp_path):
    config.sampling.temperature = 1.0
    config.methods.ngram.unlock()
    config.methods.ngram.rejection_sampling_strategy = "greedy"
    with pytest.raises(ConfigError, match="greedy"):
        run.evaluate(config, tmp_path / "w")
    assert not (tmp_path / "w" / "results.jsonl").exists()


@pytest.fixture(scope="module")
def greedy():
    target = random_target(0)
    prompt = np.random.RandomState(0).randint(0, 97, 20).tolist()
    return target, prompt, SpeculativeDecoder(target).generate([prompt], SamplingParams(max_tokens=10)).token_ids[0]


def test_equal_outputs_are_identical(greedy):
    target, prompt, plain = greedy
    assert oracle.compare_greedy(target, prompt, plain, plain) == ("identical", None, None, None)


def test_a_wrong_token_is_a_mismatch(greedy):
    target, prompt, plain = greedy
    wrong = [*plain[:4], (plain[4] + 1) % 97, *plain[5:]]
    found = oracle.compare_greedy(target, prompt, plain, wrong)
    assert (found.kind, found.at) == ("mismatch", 4) and found.gap > found.noise > 0


def test_a_missing_end_is_a_mismatch(greedy):
    target, prompt, plain = greedy
    assert oracle.compare_greedy(target, prompt, plain, plain[:-1]) == ("mismatch", 9, None, None)


def test_a_tie_of_the_two_best_tokens_is_a_near_tie(greedy):
    """A copy of the best token's output column makes two tokens exactly equal."""
    target, prompt, plain = greedy
    other = next(token for token in range(97) if token not in plain and token not in prompt)
    head = target.params["head"].at[:, other].set(target.params["head"][:, plain[4]])
    tied = dataclasses.replace(target, params=target.params | {"head": head})
    flipped = [*plain[:4], other, *plain[5:]]
    found = oracle.compare_greedy(tied, prompt, plain, flipped)
    assert (found.kind, found.at) == ("near_tie", 4) and 0 <= found.gap <= found.noise
    assert oracle.compare_greedy(target, prompt, plain, flipped).kind == "mismatch"


def test_the_built_in_prompts_load_and_cover_twelve_categories():
    prompts = load_prompts("built_in")
    assert len(prompts) == len({prompt.category for prompt in prompts}) == 12
    assert len(load_prompts("built_in", 3)) == 3


@pytest.mark.parametrize(
    ("name", "num_prompts", "num_turns", "num_categories"),
    [
        ("spec_bench_odd", 240, 280, 13),
        ("mt_bench_odd", 40, 80, 8),
        ("humaneval_first80", 80, 80, 1),
        ("gsm8k_test_100", 100, 100, 1),
    ],
)
def test_the_shipped_sets_are_complete(name, num_prompts, num_turns, num_categories):
    prompts = load_prompts(name)
    assert (len(prompts), sum(len(prompt.turns) for prompt in prompts)) == (num_prompts, num_turns)
    assert len({prompt.category for prompt in prompts}) == num_categories


def test_categories_are_chosen_before_the_number_is_limited():
    prompts = load_prompts("mt_bench_odd", 6, ("stem", "writing"))
    assert [prompt.category for prompt in prompts] == ["writing"] * 5 + ["stem"]
    with pytest.raises(SpecJAXError, match="'poetry' is not in prompts='mt_bench_odd'; expected some of writing, "):
        load_prompts("mt_bench_odd", categories=("poetry",))


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


def test_every_experiment_field_is_commented_in_the_shipped_config():
    text = Path(cli.config_path("eval_smollm2")).read_text()
    for field in dataclasses.fields(Experiment):
        assert re.search(rf"    # [^\n]+\n    config\.{field.name} = ", text), field.name
