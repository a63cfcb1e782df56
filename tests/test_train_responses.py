"""Answers to training prompts: those of generate, each once whatever was killed, and later turns after earlier ones."""

import json

import pytest
from models import VOCAB, LetterTokenizer, random_target

from specjax.config import SamplingParams
from specjax.errors import ConfigError
from specjax.evaluate.prompts import Prompt
from specjax.generate import SpeculativeDecoder
from specjax.slots import completions
from specjax.train import responses

STOP = 7
PROMPTS = [Prompt(f"p{index}", "any", ("abcdefgh"[: index + 1],)) for index in range(6)]
TALK = Prompt("talk", "chat", ("hello", "and then", "bye"))


class ChatTokenizer(LetterTokenizer):
    """A template of one token before each text, which says whose it is."""

    chat_template = "own"

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        tokens = []
        for message in messages:
            tokens += [1 if message["role"] == "user" else 2, *self(message["content"])["input_ids"]]
        return {"input_ids": tokens + [2]}


@pytest.fixture(scope="module")
def decoder():
    target = random_target(3, tokenizer=ChatTokenizer(), stop_token_ids=(STOP,))
    return SpeculativeDecoder(target, None, max_batch_size=3)


def answer(decoder, path, prompts, temperatures=(0.0, 1.0), max_prompt_tokens=60):
    return list(responses.generate(decoder, prompts, path, 8, max_prompt_tokens, temperatures))


def test_completions_are_the_tokens_of_generate(decoder):
    prompts = [list(range(10, 10 + length)) for length in (3, 30, 7, 1, 12, 5, 9)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=4 + 3 * i) for i in range(len(prompts))]
    found = {completion.index: completion for completion in completions(decoder, prompts, params)}
    assert sorted(found) == list(range(len(prompts)))
    for index, prompt in enumerate(prompts):
        result = decoder.generate([prompt], params[index])
        assert found[index].token_ids == result.token_ids[0]
        assert found[index].finish_reason == result.finish_reasons[0]


def test_the_file_holds_each_answer_once_as_generate_gives_it(decoder, tmp_path):
    path = tmp_path / "new" / "responses.jsonl"
    found = answer(decoder, path, PROMPTS)
    assert responses.read(path) == found
    assert sorted(response.id for response in found) == [f"p{index}#0" for index in range(6)]
    for response in found:
        index = int(response.id[1])
        sampling = SamplingParams(temperature=(0.0, 1.0)[index % 2], seed=index, max_tokens=8)
        assert decoder.generate([response.prompt], sampling).token_ids[0] == response.response
        assert all(0 <= token < VOCAB for token in response.response)


def test_a_killed_run_goes_on_to_the_same_answers(decoder, tmp_path):
    whole = answer(decoder, tmp_path / "whole.jsonl", PROMPTS)
    path = tmp_path / "killed.jsonl"
    stream = responses.generate(decoder, PROMPTS, path, 8, 60, (0.0, 1.0))
    next(stream), next(stream)
    stream.close()
    with path.open("a") as file:
        file.write('{"id": "p5#0", "cate')  # a line that a kill tore
    assert len(responses.read(path)) == 2
    assert len(answer(decoder, path, PROMPTS)) == 4
    assert sorted(responses.read(path)) == sorted(whole)
    assert answer(decoder, path, PROMPTS) == []


def test_later_turns_are_asked_after_the_targets_own_earlier_answers(decoder, tmp_path):
    found = {response.id: response for response in answer(decoder, tmp_path / "r.jsonl", [TALK])}
    assert list(found) == ["talk#0", "talk#1", "talk#2"]
    first, second = found["talk#0"], found["talk#1"]
    tokenizer = decoder.target.tokenizer
    assert second.prompt[: len(first.prompt)] == first.prompt
    said = tokenizer(tokenizer.decode(first.response))["input_ids"]
    assert second.prompt[len(first.prompt) :] == [*said, 1, *tokenizer("and then")["input_ids"], 2]


def test_later_turns_follow_answers_of_a_run_before(decoder, tmp_path):
    whole = answer(decoder, tmp_path / "whole.jsonl", [TALK])
    stream = responses.generate(decoder, [TALK], tmp_path / "r.jsonl", 8, 60, (0.0, 1.0))
    next(stream)
    stream.close()
    answer(decoder, tmp_path / "r.jsonl", [TALK])
    assert responses.read(tmp_path / "r.jsonl") == whole


def test_prompts_that_are_too_long_are_left_out_and_so_are_their_later_turns(decoder, tmp_path):
    prompts = [Prompt("long", "any", ("x" * 70, "more")), PROMPTS[0]]
    assert [response.id for response in answer(decoder, tmp_path / "r.jsonl", prompts)] == ["p0#0"]


def test_damage_is_refused_by_file_and_line(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(ConfigError, match=r"r\.jsonl'.*specjax respond"):
        responses.read(path)
    fine = json.dumps(responses.Response("a#0", "", [1], [2], "stop")._asdict())
    path.write_text(f'{fine}\n{{"id": 3}}\n{fine}\n')
    with pytest.raises(ConfigError, match=r"r\.jsonl:2"):
        responses.read(path)


def test_answers_that_come_along_are_whole_and_of_no_evaluation_prompt():
    found = responses.read("built_in_smollm2")
    assert len(found) > 2500 and sum(len(response.response) for response in found) > 400_000
    assert len({response.id for response in found}) == len(found)
    for response in found:
        assert response.prompt and response.response and response.finish_reason in ("stop", "length")
        assert 0 <= min(response.prompt + response.response) <= max(response.prompt + response.response) < 49152
    sources = {response.id.split("/")[0] for response in found}
    assert not sources & {"spec-bench", "mt-bench", "humaneval", "gsm8k-test", "vicuna-bench", "mbpp"}
