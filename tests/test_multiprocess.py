"""Several processes decode, evaluate and train as one does, agree on what they run, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from models import QUICK
from multiprocess_cases import TARGET, plain, train
from test_checkpoints_gguf import write_llama

import specjax
from specjax import processes
from specjax.errors import ConfigError

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TWO = "eagle3@1x4", "evaluate@2x2", "train@4x1", "differ"
FOUR = "plain@4x1", "die"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the cases read: two tiny targets, prompts, responses, and the config of an evaluation and of a training."""
    folder = tmp_path_factory.mktemp("processes")
    tiny.write_directory(folder / "target", tiny.hf_config("llama-tied", **TARGET))
    model = write_llama(folder / "tiny.gguf", {"llama.context_length": 512})
    turns = ["he he ", "second"], ["he he he he "], ["hello hello he he"]
    write_lines(folder / "prompts.jsonl", [{"id": f"p{i}", "category": "a", "turns": t} for i, t in enumerate(turns)])
    random = np.random.RandomState(0)
    counting = [list(range(first, first + 16)) for first in random.randint(1, 40, 40)]
    rows = [{"id": f"p{i}#0", "category": "count", "finish_reason": "length"} for i in range(40)]
    rows = [row | {"prompt": t[:4], "response": t[4:]} for row, t in zip(rows, counting, strict=True)]
    write_lines(folder / "responses.jsonl", rows)
    evaluation = {
        "target": str(model),
        "dtype": "float32",
        "prompts": str(folder / "prompts.jsonl"),
        "batch_size": 2,
        "sampling": {"temperature": 0.0, "max_tokens": 16},
        "methods": {"ngram": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}},
    }
    training = {
        "target": str(folder / "target"),
        "dtype": "float32",
        "head": {"method": "eagle3", "taps": [0, 1, 2], "draft_vocab_size": 48},
        "responses": str(folder / "responses.jsonl"),
        "data": {"length": 32, "rows": 4, "held_out_every": 8},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
        "steps": 6,
        **dict.fromkeys(("log_every", "checkpoint_every"), 2),
        "eval_every": 6,
        "eval_batches": 1,
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "training.json").write_text(json.dumps(training))
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_all(folder, num, devices, cases):
    """Runs cases in so many processes. Returns of each its exit code, its lines by case and its standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "PYTHONPATH": str(HERE.parent),
        "JAX_PLATFORMS": "cpu",
        **QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "SPECJAX_CACHE": str(folder / "cache"),
    }
    command = [sys.executable, str(HERE / "multiprocess_cases.py"), str(port), str(num)]
    started = [
        subprocess.Popen(
            [*command, str(index), str(devices), str(folder), *cases],
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(num)
    ]
    try:
        outputs = [process.communicate(timeout=1200) for process in started]
    finally:
        for process in started:
            process.kill()
    lines = [[json.loads(line) for line in out.splitlines() if line.startswith('{"case"')] for out, _ in outputs]
    return [
        (process.returncode, {line["case"]: line for line in found}, error)
        for process, found, (_, error) in zip(started, lines, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def two(folder):
    """Of each of two processes with two devices: exit code, lines by case, standard error."""
    return run_all(folder, 2, 2, TWO)


@pytest.fixture(scope="module")
def four(folder):
    """The same of four processes with one device."""
    return run_all(folder, 4, 1, FOUR)


def found_by(all_found, case):
    """What the processes found, which must be the same, as a list of one."""
    assert all(case in found for _, found, _ in all_found), [error[-2000:] for *_, error in all_found]
    return [found[case] for _, found, _ in all_found]


@pytest.fixture(scope="module")
def alone(folder):
    """What one process decodes."""
    return plain(folder)


def test_two_processes_decode_as_one_does(alone, two):
    # Drafts change no token: plain decoding says what an EAGLE-3 head's answers must be.
    for found in found_by(two, "eagle3@1x4"):
        assert found["greedy"] == alone["greedy"]
        assert found["part"] == 0.5  # each process loads its half of the weights


def test_four_processes_decode_as_one_does(alone, four):
    for found in found_by(four, "plain@4x1"):
        assert {name: found[name] for name in alone} == alone
    assert any(len(text) < 12 for text in alone["ends"])


def test_an_evaluation_has_one_writer_and_the_answers_of_one_process(folder, two):
    for found in found_by(two, "evaluate@2x2"):
        assert (found["identical"], found["mismatch"]) == (4, 0)
    workdir = folder / "evaluation"
    lines = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 5  # 2 turns of 2 methods, and the examples
    answers = {(a["prompt"], a["turn"], a["method"]): a for line in lines for a in line.get("answers", ())}
    decoder = specjax.SpeculativeDecoder(specjax.load_target(folder / "tiny.gguf", "float32"), max_batch_size=4)
    asked = [[{"role": "user", "content": text}] for text in ("he he ", "he he he he ", "hello hello he he")]
    reply = {"role": "assistant", "content": answers["p0", 0, "plain"]["text"]}
    asked.append([*asked[0], reply, {"role": "user", "content": "second"}])
    expected = decoder.generate(asked, specjax.SamplingParams(max_tokens=16)).token_ids
    for (name, turn), tokens in zip([("p0", 0), ("p1", 0), ("p2", 0), ("p0", 1)], expected, strict=True):
        assert answers[name, turn, "plain"]["token_ids"] == answers[name, turn, "ngram"]["token_ids"] == tokens
    assert sorted(path.name for path in workdir.iterdir()) == sorted(
        ["config.json", "results.jsonl", "summary.json", "report.md", "report.html"]
    )
    assert json.loads((workdir / "config.json").read_text())["mesh"] == {"data": 2, "model": 2}


def test_a_training_goes_on_and_ends_as_that_of_one_process(folder, two):
    expected = train(folder)
    for found in found_by(two, "train@4x1"):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["validation"] == pytest.approx(expected["validation"], rel=1e-2, abs=1e-4)
    lines = (folder / "training-2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def test_processes_with_different_configs_end_with_what_differs(two):
    # A process may hear of the other's error before it has said its own, which is the same.
    for code, _, error in two:
        assert code == 1
        assert re.search(r"config.batch_size=(1 on process 0, 2 on process 1|2 on process 1, 1 on process 0)", error)


def test_a_killed_process_ends_the_others(four):
    codes = [code for code, *_ in four]
    assert codes[3] == -signal.SIGKILL and 0 not in codes
    told = "unhealthy (stopped sending heartbeats)", "as it does when another process dies", "ends too"
    for _, _, error in four[:3]:
        assert any(text in error for text in told), error[-2000:]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_processes": 0}, r"config.distributed.num_processes=0: expected an integer >= 1"),
        ({"num_processes": 2, "process_id": 2}, r"process_id=2: expected 0 <= process_id < num_processes=2"),
        ({"coordinator_address": "here"}, r"coordinator_address='here': expected 'HOST:PORT'"),
        ({"address": "here:1"}, r"config.distributed.address='here:1': is no field; expected some of enabled"),
        ({"heartbeat_timeout_seconds": 0}, r"heartbeat_timeout_seconds=0: expected seconds >= 1"),
    ],
)
def test_what_the_field_cannot_be(field, message):
    with pytest.raises(ConfigError, match=message):
        processes.join(field)


def test_joining_after_the_first_use_of_jax_is_an_error():
    assert processes.is_writer()  # which asks jax
    field = {"enabled": True, "coordinator_address": "127.0.0.1:1", "num_processes": 1, "process_id": 0}
    with pytest.raises(ConfigError, match=r"config.distributed: .* Join before the first use of JAX"):
        processes.join(field)


def test_one_process_is_its_own_company(tmp_path):
    processes.barrier("nobody")
    processes.same_everywhere({"a": 1}, "config")
    assert processes.of_first([1, 2]) == [1, 2]
    with processes.own_folder(tmp_path, ["a"]) as folder:
        assert folder == tmp_path
