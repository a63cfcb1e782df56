"""The trace of rounds: it tells every token's origin, and a program without it is unchanged."""

import dataclasses
import html.parser
import io
import types

import numpy as np
import pytest
from models import VOCAB, LetterTokenizer, random_target
from rich.console import Console

from specjax import SamplingParams, SpeculativeConfig, SpeculativeDecoder, view
from specjax.errors import SpecJAXError
from specjax.trace import Round, SpelledRound, spell
from specjax.view import AnswerView

PROMPTS = [np.random.RandomState(length).randint(0, VOCAB, length).tolist() for length in (1, 5, 40, 17, 3)]
LIMITS = [SamplingParams(max_tokens=num, temperature=num % 2, seed=num) for num in (30, 1, 23, 12, 7)]
G = 3


def draft_model(target, draft):
    config = SpeculativeConfig(method="draft_model", model="given", num_speculative_tokens=G)
    return SpeculativeDecoder(target, config, draft=draft)


@pytest.fixture(scope="module")
def target():
    return dataclasses.replace(random_target(0), tokenizer=LetterTokenizer())


@pytest.fixture(scope="module")
def systems(target):
    ngram = SpeculativeConfig(method="ngram", num_speculative_tokens=G, prompt_lookup_min=1, prompt_lookup_max=3)
    return {
        "plain": SpeculativeDecoder(target),
        "ngram": SpeculativeDecoder(target, ngram),
        "itself": draft_model(target, target),
    }


def tokens_of(rounds):
    return [token for round_ in rounds for token in round_.tokens]


@pytest.mark.parametrize("name", ["plain", "ngram", "itself"])
def test_the_rounds_of_a_ragged_batch_are_its_tokens_and_its_counts(name, systems):
    result = systems[name].generate(PROMPTS, LIMITS, trace=True)
    assert [tokens_of(rounds) for rounds in result.traces] == result.token_ids
    counts = np.zeros_like(result.metrics.acceptance_counts)
    for round_ in (round_ for rounds in result.traces for round_ in rounds):
        counts[round_.num_accepted] += 1
        assert round_.num_accepted <= len(round_.drafts) <= counts.size - 1
    assert counts.tolist() == result.metrics.acceptance_counts.tolist()
    assert sum(len(round_.drafts) for rounds in result.traces for round_ in rounds) == result.metrics.drafted


def test_drafts_are_those_that_were_proposed(target, systems):
    """The draft model is the target, so at temperature 0 it proposes the very text, also behind the answer's end."""
    [rounds] = systems["itself"].generate([PROMPTS[2]], SamplingParams(max_tokens=10), trace=True).traces
    text = systems["plain"].generate([PROMPTS[2]], SamplingParams(max_tokens=11)).token_ids[0]
    assert rounds[:2] == (Round(tuple(text[0:3]), 3, text[3]), Round(tuple(text[4:7]), 3, text[7]))
    assert rounds[2] == Round(tuple(text[8:11]), 1, text[9])


def test_rejected_drafts_are_kept(systems):
    [rounds] = systems["ngram"].generate([PROMPTS[2]], SamplingParams(max_tokens=60), trace=True).traces
    assert any(round_.num_accepted < len(round_.drafts) for round_ in rounds[:-1])
    for round_ in rounds[:-1]:
        assert round_.drafts[round_.num_accepted :][:1] != (round_.next_token,)


def test_a_trace_changes_no_token_and_its_absence_no_program(systems):
    system = systems["ngram"]
    without = system.generate(PROMPTS, LIMITS)
    num_compiled = system.programs.num_compiled
    assert system.generate(PROMPTS, LIMITS, trace=True).token_ids == without.token_ids
    again = system.generate(PROMPTS, LIMITS)
    assert without.traces is None and again.traces is None
    structures = {key[-1] for key in system.programs._compiled if key[0] == "decode"}
    assert len(structures) == 2 and sum("Trace" in str(structure) for structure in structures) == 1
    traced = system.programs.num_compiled
    system.generate(PROMPTS, LIMITS, trace=True)
    assert system.programs.num_compiled == traced >= num_compiled


def test_a_stop_string_cuts_the_rounds_as_it_cuts_the_tokens(systems):
    whole = systems["itself"].generate([PROMPTS[2]], SamplingParams(max_tokens=40)).texts[0]
    for begin in (4, 5, 6, 7):  # every place in a round
        params = SamplingParams(max_tokens=40, stop=whole[begin : begin + 4])
        result = systems["itself"].generate([PROMPTS[2]], params, trace=True)
        assert result.finish_reasons == ["stop"]
        assert tokens_of(result.traces[0]) == result.token_ids[0]


def test_more_prompts_than_rows_keep_their_own_rounds(target):
    system = SpeculativeDecoder(target, max_batch_size=2)
    result = system.generate(PROMPTS, LIMITS, trace=True)
    assert [tokens_of(rounds) for rounds in result.traces] == result.token_ids


def test_eager_execution_records_the_same_rounds(target, systems):
    config = systems["ngram"].config.model_copy(update={"enforce_eager": True})
    params = SamplingParams(max_tokens=2)
    eager = SpeculativeDecoder(target, config).generate([PROMPTS[4]], params, trace=True)
    assert eager.traces == systems["ngram"].generate([PROMPTS[4]], params, trace=True).traces


class ByteTokenizer:
    """Token i is the byte i: characters beyond ASCII take several tokens."""

    def decode(self, tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False):
        return bytes(tokens).decode("utf-8", errors="replace")


def bytewise(text):
    return list(text.encode())


def test_spelled_rounds_join_to_the_text_even_across_parts_of_characters():
    text = "né → 日本 <b>&amp;\n🙂"
    tokens = bytewise(text)
    rounds = [
        Round(tuple(tokens[i : i + 3]), len(tokens[i : i + 4]) - 1, tokens[i : i + 4][-1])
        for i in range(0, len(tokens), 4)
    ]
    spelled = spell(rounds, ByteTokenizer())
    assert "".join("".join(r.drafts[: r.accepted]) + r.next for r in spelled) == text


def test_an_unfinished_character_at_the_end_is_spelled_as_the_tokenizer_does():
    tokens = bytewise("a🙂")[:-1]
    spelled = spell([Round((), 0, token) for token in tokens], ByteTokenizer())
    assert "".join(r.next for r in spelled) == ByteTokenizer().decode(tokens)


def test_rejected_drafts_are_spelled_as_what_they_would_have_added():
    [first, second] = spell([Round((104, 105, 106), 1, 120), Round((), 0, 121)], ByteTokenizer())
    assert first == SpelledRound(("h", "i", "j"), 1, "x") and second.next == "y"


def test_without_a_tokenizer_ids_are_spelled():
    assert spell([Round((5, 6), 1, 7)], None) == [SpelledRound(("5 ", "6 "), 1, "7 ")]


class Tags(html.parser.HTMLParser):
    """Texts by the class of their innermost element, and whether tags are balanced."""

    def __init__(self, source):
        super().__init__()
        self.open, self.texts, self.names = [], [], set()
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.open.append((tag, dict(attrs).get("class", "")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1][1], data))


DANGEROUS = [SpelledRound(("<script>", "&", '"'), 1, "\n</div>"), SpelledRound((), 0, "\x1b[31m\u202e\ud800")]


def test_the_view_says_the_origin_of_every_token_and_escapes_it():
    source = AnswerView([DANGEROUS])._repr_html_()
    tags = Tags(source)
    # Elements say it again where a site drops styles.
    assert tags.names == {"style", "div", "ins", "s", "b", "span"}
    answer = tags.texts[-5:]
    assert answer[0] == ("sjx-accepted", "<script>")
    assert answer[1:3] == [("sjx-rejected", "&"), ("sjx-rejected", '"')]
    assert answer[3] == ("sjx-next", "↵\n</div>")
    assert answer[4] == ("sjx-plain", "␛[31m\ufffd\ufffd")
    source.encode()  # no lone surrogate is left


def test_a_round_that_the_end_cut_shows_nothing_as_rejected():
    text = AnswerView([[SpelledRound(("a", "b", "c"), 1, "b")]]).marked()
    assert text.endswith("[a](b)") and "rejected" not in text


def test_without_colours_marks_show_the_origins(capsys):
    print(AnswerView([[SpelledRound((" x", " y", " z"), 2, " w"), SpelledRound((), 0, "!")]]))
    shown = capsys.readouterr().out
    assert shown.endswith("[ x y]~ z~( w)!\n") and "\x1b" not in shown and "[accepted draft] 2" in shown


def test_in_a_terminal_rejected_drafts_are_struck_through():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=200)
    console.print(AnswerView([DANGEROUS]))
    shown = console.file.getvalue()
    assert "\x1b[2;9m&" in shown and "\x1b[31m" not in shown


def test_a_notebook_has_one_line_of_progress_that_changes_in_place(monkeypatch):
    shown = []
    handle = types.SimpleNamespace(update=shown.append)
    monkeypatch.setattr("IPython.display.display", lambda line, display_id: shown.append(line) or handle)
    with pytest.raises(KeyboardInterrupt), view.notebook_progress() as advance:
        for done in range(1000):
            advance(done, 1000, "<decoding>")
        raise KeyboardInterrupt
    # Not each of a thousand is shown, but what was reached is.
    assert len(shown) < 100 and shown[-1] == view.ProgressLine(999, 1000, "<decoding>")
    assert repr(shown[-1]) == "999/1000 <decoding>" and "&lt;decoding&gt;" in shown[-1]._repr_html_()


def test_show_needs_a_trace_and_a_prompt_of_that_number(systems):
    system = systems["ngram"]
    with pytest.raises(SpecJAXError, match="trace=True"):
        system.generate([PROMPTS[1]], SamplingParams(max_tokens=3)).show()
    result = system.generate(PROMPTS[:2], SamplingParams(max_tokens=9), trace=True)
    with pytest.raises(SpecJAXError, match="index=2"):
        result.show(2)
    assert len(result.show().answers) == 2
    [rounds] = result.show(1).answers
    assert "".join("".join(r.drafts[: r.accepted]) + r.next for r in rounds) == result.texts[1]
