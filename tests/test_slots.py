"""Continuous batching: every prompt gets what it would get alone, and so do its counts."""

import numpy as np
import pytest
from models import random_target

from specjax.config import SamplingParams, SpeculativeConfig
from specjax.generate import SpeculativeDecoder
from specjax.slots import completions

PROMPTS = [(np.arange(length) % (3 + length % 4) + 10).tolist() for length in (3, 30, 7, 1, 12, 5, 9, 21, 2, 14)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_that_change_hands_give_the_tokens_and_counts_of_one_by_one(rows, temperature):
    """Ragged prompts and lengths in float32; at 8 rows two prompts are refilled together."""
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=2)
    target = random_target(3, stop_token_ids=(7,))
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=4 + 3 * i) for i in range(len(PROMPTS))]
    alone = SpeculativeDecoder(target, config, max_batch_size=1)
    stream = completions(SpeculativeDecoder(target, config, max_batch_size=rows), PROMPTS, params, rounds=3)
    found = {completion.index: completion for completion in stream}
    assert sorted(found) == list(range(len(PROMPTS)))
    for index, prompt in enumerate(PROMPTS):
        result, completion = alone.generate([prompt], params[index]), found[index]
        assert completion.token_ids == result.token_ids[0]
        assert completion.finish_reason == result.finish_reasons[0]
        assert completion.acceptance_counts.tolist() == result.metrics.acceptance_counts.tolist()
        assert completion.drafted == result.metrics.drafted
    assert sum(completion.drafted for completion in found.values()) > 0
    assert stream.prefill_seconds > 0 and stream.decode_seconds > 0 and stream.compile_seconds > 0


def test_a_row_takes_the_next_prompt_while_the_others_go_on():
    """One long answer and many short ones in two rows: the short ones finish first, one after the other."""
    target = random_target(3)
    params = [SamplingParams(max_tokens=40 if index == 0 else 4, ignore_eos=True) for index in range(6)]
    decoder = SpeculativeDecoder(target, None, max_batch_size=2)
    order = [completion.index for completion in completions(decoder, [[5]] * 6, params, rounds=4)]
    assert order == [1, 2, 3, 4, 5, 0]


def test_what_takes_turns_sees_every_call():
    """advance decodes so many rounds and tells who finished; the iterator has the others, and None comes behind all."""
    target = random_target(3)
    params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in (2, 2, 9, 5)]
    decoder = SpeculativeDecoder(target, None, max_batch_size=2)
    whole = {done.index: done.token_ids for done in completions(decoder, [[5]] * 4, params, rounds=4)}
    stream = completions(decoder, [[5]] * 4, params, rounds=4)
    calls = [stream.advance(), stream.advance(), list(stream), stream.advance(), stream.advance()]
    assert [call and [done.index for done in call] for call in calls] == [[0, 1], [], [3, 2], None, None]
    assert {done.index: done.token_ids for call in calls[:3] for done in call} == whole
