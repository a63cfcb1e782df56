"""Reports: what they say, that they escape what they are given, and that a browser shows them whole."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import Browser, find_browser

from specjax import cli
from specjax.errors import SpecJAXError
from specjax.evaluate import html, plots, report, run
from specjax.evaluate.content import MISSING, Run
from specjax.metrics import Metrics

CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
    "translation",
    "summarization",
    "qa",
    "rag",
)
GAINS = {
    "ngram": (0.96, 0.93, 1.02, 1.18, 1.55, 2.42, 1.0, 0.97, 1.21, 1.71, 1.04, 1.62),
    "eagle3": (1.12, 1.08, 1.21, 1.47, 1.58, 1.4, 1.19, 1.15, 0.94, 1.33, 1.22, 1.3),
}
COUNTS = {"ngram": [9120, 640, 331, 190, 122, 84, 410], "eagle3": [4310, 2680, 1390, 720, 405]}
ANSWER = [
    ((), 0, "A"),
    ((" prime", " number", " is"), 3, " a"),
    ((" natural", " integer", " number"), 1, " number"),
    ((" greater", " than", " zero"), 2, " 1"),
    ((), 0, " that"),
    ((" has", " only", " one"), 0, " is"),
    ((" divisible", " only", " by"), 3, " 1"),
    ((" and", " itself", "."), 3, "\n"),
    ((" def",), 0, "é < 3 & 日"),
]


def _method(name, rule, rate, speedup):
    counts = COUNTS[name]
    rounds, drafted = sum(counts), 6 * sum(counts)
    accepted = sum(i * count for i, count in enumerate(counts))
    length = 1 + accepted / rounds
    return {
        "method": name,
        "num_speculative_tokens": len(counts) - 1,
        "rule": rule,
        "lossless": rule != "medusa-typical",
        "tokens_per_second": rate,
        "tokens_per_second_median": rate * 0.97,
        "tokens_per_second_range": [rate * 0.94, rate],
        "num_tokens": 28311,
        "prefill_seconds": 41.3,
        "decode_seconds": 28311 / rate,
        "speedup": speedup,
        "speedup_interval": [speedup - 0.11, speedup + 0.13],
        "acceptance_length": length,
        "acceptance_length_interval": [length - 0.06, length + 0.07],
        "acceptance_rate": accepted / drafted,
        "acceptance_rate_by_position": [sum(counts[i:]) / rounds for i in range(1, len(counts))],
        "acceptance_counts": counts,
        "drafted": drafted,
        "efficiency": speedup / length,
        "identical": 236 if name == "ngram" else 238,
        "near_tie": 4 if name == "ngram" else 2,
        "mismatch": 0,
    }


def sample_summary(**changes):
    """A finished run of 240 prompts with every field measured; numbers as on a small CPU."""
    by_category = {
        category: {
            "plain": {"tokens_per_second": 27.3, "acceptance_length": 1.0, "speedup": 1.0, "turns": 20},
            **{
                name: {
                    "tokens_per_second": 27.3 * gains[i],
                    "acceptance_length": 1.1 * gains[i],
                    "speedup": gains[i],
                    "turns": 20,
                }
                for name, gains in GAINS.items()
            },
        }
        for i, category in enumerate(CATEGORIES)
    }
    rounds = [{"drafts": list(drafts), "accepted": accepted, "next": after} for drafts, accepted, after in ANSWER]
    question = "Explain what a prime number is to a child of ten years. " * 9 + '</script><b>Write & escape "it"</b>'
    return {
        "schema": 2,
        "target": "smollm2-135m-instruct",
        "dtype": "float32",
        "device": "cpu, 2 cores, Intel(R) Xeon(R) Processor @ 2.10GHz",
        "commit": "9acf42d0b1c2d3e4f5a60718293a4b5c6d7e8f90",
        "warnings": [],
        "versions": {"specjax": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"},
        "config": {
            "target": "smollm2-135m-instruct",
            "sampling": {"max_tokens": 128},
            "methods": {"ngram": {"method": "ngram"}},
        },
        "prompts": 240,
        "turns": 240,
        "prompt_set": "spec_bench_odd",
        "batch_size": 1,
        "repeats": 3,
        "max_tokens": 128,
        "temperature": 0.0,
        "finished": True,
        "baseline": {
            "tokens_per_second": 27.3,
            "tokens_per_second_median": 26.6,
            "tokens_per_second_range": [25.1, 27.3],
            "num_tokens": 28307,
            "prefill_seconds": 40.9,
            "decode_seconds": 1036.9,
        },
        "methods": {
            "ngram": _method("ngram", "residual", 34.4, 1.26),
            "eagle3": _method("eagle3", "medusa-typical", 35.5, 1.3),
        },
        "comparisons": {
            "transformers": {
                "tokens_per_second": 20.6,
                "speedup": 0.75,
                "num_tokens": 28307,
                "identical": 239,
                "turns": 240,
            },
            "vllm": {"not_run": "vllm is not installed"},
        },
        "by_category": by_category,
        "failed": [
            {
                "prompt": "mt_103",
                "turn": 1,
                "method": "eagle3",
                "repeat": 0,
                "error": "the prompt has 2113 tokens; expected at most 2047",
            }
        ],
        "differences": [
            {
                "prompt": f"mt_{101 + i}",
                "turn": 0,
                "method": ("ngram", "eagle3")[i % 2],
                "kind": "near_tie",
                "at": 17 + 9 * i,
                "plain_text": " the",
                "text": "\n|a",
                "gap": 1.2e-5 * (i + 1),
                "noise": 9.1e-5,
            }
            for i in range(6)
        ],
        "costs": {
            "context": 200,
            "batch": [1, 8],
            "widths": [1, 2, 4, 5, 7, 9],
            "score_ms": [[34.1, 39.8, 48.6, 53.2, 66.4, 79.0], [88.3, 121.0, 190.5, 226.1, 291.7, 360.2]],
            "draft_ms": {
                "ngram": {"K": [2, 4, 6], "ms": [0.4, 0.5, 0.5]},
                "eagle3": {"K": [2, 4, 6], "ms": [7.3, 12.1, 17.2]},
            },
        },
        "predicted": {
            "ngram": {"K": [0, 2, 4, 6, 8], "speedup": [1.0, 1.14, 1.22, 1.27, 1.25]},
            "eagle3": {"K": [0, 2, 4, 6], "speedup": [1.0, 1.31, 1.28, 1.12]},
        },
        "profile": {
            "ngram": {"propose_ms": 0.5, "score_ms": 60.2, "verify_ms": 0.6, "commit_ms": 0.2, "round_ms": 61.9},
            "eagle3": {"propose_ms": 12.1, "score_ms": 53.2, "verify_ms": 0.6, "commit_ms": 4.3, "round_ms": 70.4},
        },
        "examples": [
            {"prompt": "mt_101", "category": "reasoning", "method": name, "question": question, "rounds": rounds}
            for name in ("ngram", "eagle3")
        ],
        "harness_overhead": 0.0123,
    } | changes


PHRASES = (
    "Evaluation of smollm2-135m-instruct",
    "Speed-up over plain decoding",
    "Acceptance by position",
    "Accepted drafts a round",
    "Speed-up by category",
    "Cost of scoring",
    "Predicted speed-up",
    "Time of a round",
    "not run: vllm is not installed",
    "expected at most 2047",
    "medusa-typical (lossy)",
    "9acf42d0b1c2d3e4f5a60718293a4b5c6d7e8f90",
)


class Page(HTMLParser):
    """An HTML page taken apart; fails where tags are not balanced."""

    VOID = "meta", "link", "br", "img", "input", "hr"

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text, self.classes = [], [], [], []
        self.feed(source)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] != "style":
            self.text.append(data)
            self.classes.append((self.open[-1][1].get("class", ""), data))

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def summary():
    return sample_summary()


@pytest.fixture(scope="module")
def source(summary):
    return html.page([Run("", summary)])


@pytest.fixture(scope="module")
def page(source):
    return Page(source)


@pytest.fixture
def write(tmp_path):
    """Writes a summary.json into a folder of a name, and returns the folder."""

    def write(name, content):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return folder

    return write


def test_the_page_and_the_markdown_say_what_was_measured(page, summary):
    shown = " ".join([*page.text, *(attributes.get("aria-label", "") for attributes in page.named("svg"))])
    for phrase in PHRASES:
        assert phrase in shown, phrase
    written = report.markdown([Run("", summary)]).replace("\\", "")
    tables = [phrase for phrase in PHRASES if phrase != "Speed-up over plain decoding"]
    assert [phrase for phrase in tables if phrase not in written] == []


def test_the_results_are_those_of_the_summary(page):
    cells = [text for _, text in page.classes]
    row = cells[cells.index("ngram", cells.index("Results")) :][:9]
    assert row == ["ngram", "residual", "6", "34.4", "33.4", "32.3 to 34.4", "1.26", "1.15 to 1.39", "1.48"]


def test_numbers_stand_at_the_right_and_texts_do_not(page):
    kinds = {text: kind for kind, text in page.classes}
    assert kinds["34.4"] == kinds["tokens/s"] == kinds["65382"] == "number"
    assert kinds["residual"] == kinds["medusa-typical (lossy)"] == ""


def test_plots_have_titles_alternatives_and_ids_of_their_own(page, source):
    figures = page.named("svg")
    assert len(figures) == 9
    assert all(len(attributes["aria-label"]) > 60 and attributes["role"] == "img" for attributes in figures)
    assert "ngram 1.26 (1.15 to 1.39)" in figures[0]["aria-label"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    linked = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', source)
    assert {one or other for one, other in linked} <= set(ids)


def test_notebooks_show_plots_as_png(summary, write):
    pictures = plots.of_report(write("run", summary), "Speed", "Acceptance")
    assert [repr(one) for one in pictures] == [
        "<plot: Speed-up over plain decoding>",
        "<plot: Tokens per second>",
        "<plot: Acceptance by position>",
        "<plot: Accepted drafts a round>",
    ]
    image, size = pictures[0]._repr_png_()
    assert image.startswith(b"\x89PNG") and size == {"width": round(plots.WIDTH * plots.NOTEBOOK_DPI)}
    # An image says its width in pixels there.
    assert int.from_bytes(image[16:20], "big") == 2 * size["width"]


def test_acceptance_of_results_is_plotted():
    metrics = {name: Metrics(np.array(counts), 99, 99, 1.0, 1.0, 1.0, 1.0) for name, counts in COUNTS.items()}
    [axes] = plots.acceptance(metrics).figure.axes
    for line, (name, counts) in zip(axes.lines, COUNTS.items(), strict=True):
        assert line.get_label() == name
        at_least = [sum(counts[i:]) / sum(counts) for i in range(1, len(counts))]
        assert list(line.get_ydata()) == pytest.approx(at_least)


def test_accuracy_is_plotted_over_the_steps_of_a_training(tmp_path):
    lines = [
        {"step": 10, "accuracy": [0.1]},
        {"step": 20, "accuracy": [0.3, 0.2], "validation": {"accuracy": [0.25, 0.15], "loss": 1.0}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [axes] = plots.training(tmp_path).figure.axes
    shown = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert shown == {
        "draft 1": ([10, 20], [0.1, 0.3]),
        "draft 2": ([20], [0.2]),
        "draft 1, held-out text": ([20], [0.25]),
        "draft 2, held-out text": ([20], [0.15]),
    }


def test_the_page_loads_nothing(page, source):
    assert "default-src 'none'" in page.named("meta")[1]["content"]
    assert not {"script", "link", "iframe", "img", "image", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "data"):
            assert attributes.get(name, "#").startswith("#")
    assert "://" not in source and "@import" not in source and not re.search(r"url\((?!#)", source)


def test_prompts_and_answers_cannot_become_markup(page, source, summary):
    assert "</script>" not in source and "<script" not in source
    assert '</script><b>Write & escape "it"</b>' in "".join(page.text)
    assert ("sjx-next", "é < 3 & 日") in page.classes
    written = report.markdown([Run("", summary)])
    assert "\\<script" not in written and '"\\\\n\\|a"' in written  # a bar inside a cell ends no column


def test_names_that_formats_give_a_meaning_are_shown_as_they_are():
    name = "_$x^2$ <b>|`é日\n" + "long" * 20
    row = sample_summary()["methods"]["ngram"]
    summary = sample_summary(
        methods={name: row}, by_category={"": {name: {"speedup": 2.0}}}, predicted=None, profile=None
    )
    text = "".join(Page(html.page([Run("", summary)])).text)
    assert name in text
    results = next(block for block in report.markdown([Run("", summary)]).split("\n\n") if block.startswith("| method"))
    assert len({len(re.sub(r"\\.", "", line).split("|")) for line in results.splitlines()}) == 1


def test_example_answers_are_coloured_by_origin(page):
    kinds = [kind for kind, _ in page.classes if kind.startswith("sjx-")]
    drafted = sum(len(drafts) for drafts, _, _ in ANSWER)
    accepted = sum(accepted for _, accepted, _ in ANSWER)
    legends = 2  # of each kind one in the legend of each of the two answers
    assert kinds.count("sjx-accepted") == legends + 2 * accepted
    assert kinds.count("sjx-rejected") == legends + 2 * (drafted - accepted)


def test_long_questions_are_folded(page):
    assert any("Explain what a prime number" in text and kind == "begin" for kind, text in page.classes)
    short = html.page([Run("", sample_summary(examples=[{**sample_summary()["examples"][0], "question": "Why?"}]))])
    assert '<div class="question">Why?</div>' in short and 'class="begin"' not in short


MINIMUM = {"schema": 2, "target": "t", "finished": True}


@pytest.mark.parametrize(
    "summary",
    [
        MINIMUM,
        dict.fromkeys(sample_summary()) | MINIMUM,
        sample_summary(methods={}, by_category={}, comparisons={}, examples=[], failed=[], differences=[], costs=None),
    ],
    ids=["missing", "null", "empty"],
)
def test_what_is_missing_is_left_out_or_said_to_be_not_measured(summary):
    source = html.page([Run("", summary)])
    page = Page(source)
    assert "Not measured." in page.text and "None" not in re.sub(
        "None: every prompt was answered.", "", "".join(page.text)
    )
    assert "nan" not in page.text
    assert "Not measured." in report.markdown([Run("", summary)]) and report.summary_table(summary)


def test_a_number_that_is_missing_is_a_dash_that_is_explained():
    summary = sample_summary()
    summary["methods"]["ngram"] |= {"speedup_interval": None, "efficiency": None, "identical": None}
    written = report.markdown([Run("", summary)])
    row = next(line for line in written.splitlines() if line.startswith("| ngram  | residual"))
    assert row.count(f" {MISSING} ") == 2 and f"{MISSING}: not measured." in written
    assert "not compared" in report.summary_table(summary)


def test_a_method_that_measured_nothing_has_a_row_of_dashes():
    summary = sample_summary()
    summary["methods"]["eagle3"] = dict.fromkeys(summary["methods"]["eagle3"]) | {
        "method": "eagle3",
        "rule": "residual",
    }
    summary["predicted"]["eagle3"] = None
    page = Page(html.page([Run("", summary)]))
    assert "eagle3" in page.text and len(page.named("svg")) == 9


def test_a_partial_run_says_so_at_the_top_and_a_finished_one_does_not(source):
    assert "partial run" not in source
    partial = html.page([Run("", sample_summary(finished=False))])
    assert 0 < partial.index("partial run") < partial.index('class="facts"')
    assert "partial run" in report.markdown([Run("", sample_summary(finished=False))])[:500]
    assert "(partial run)" in report.summary_table(sample_summary(finished=False))


def test_a_mismatch_is_said_at_the_top_and_listed_first():
    summary = sample_summary()
    summary["methods"]["ngram"]["mismatch"] = 1
    summary["differences"].append(summary["differences"][0] | {"kind": "mismatch", "prompt": "odd"})
    source = html.page([Run("", summary)])
    assert "ngram: 1 answer unlike plain decoding" in source[: source.index("<main>")]
    assert source.index("<td>odd</td>") < source.index("<td>near tie</td>")


def test_the_terminals_table_has_the_readmes_columns_the_median_and_the_interval(summary):
    lines = report.summary_table(summary).splitlines()
    for name in (
        "method",
        "rule",
        "G",
        "tokens/s",
        "median",
        "speed-up",
        "95 % interval",
        "tokens a round",
        "efficiency",
    ):
        assert f" {name} " in lines[2]
    assert "0.16 0.10 0.07 0.06 0.05 0.04" in lines[5] and "236 / 4 / 0" in lines[5] and "33.4" in lines[5]
    assert len({len(line) for line in lines[2:]}) == 1


def test_the_command_writes_both_files_and_leaves_no_other(write, summary, capsys):
    folder = write("w", summary)
    assert cli.main(["report", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md", "summary.json"]
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(("interrupted", "code"), [(False, 0), (True, 130)])
def test_an_evaluation_ends_with_a_report_even_when_it_is_interrupted(interrupted, code, write, monkeypatch):
    def evaluate(config, workdir, progress):
        content = sample_summary(finished=not interrupted)
        (folder / "summary.json").write_text(json.dumps(content))
        if interrupted:
            raise KeyboardInterrupt
        return content

    folder = write("w", "")
    monkeypatch.setattr(run, "evaluate", evaluate)
    assert cli.main(["evaluate", "--config=eval_smollm2", f"--workdir={folder}"]) == code
    assert ("partial run" in (folder / "report.html").read_text()) == interrupted


def test_several_runs_stand_side_by_side_under_their_folders_names(write, summary, tmp_path, capsys):
    first, second = write("before", summary), write("after", sample_summary())
    out = tmp_path / "both"
    assert cli.main(["report", str(first), str(second), f"--out={out}"]) == 0
    assert "warning" not in capsys.readouterr().err
    written = (out / "report.md").read_text()
    rows = re.findall(r"(?m)^\| (before|after) +\| (plain|ngram|eagle3) ", written.split("## Acceptance")[0])
    assert rows == [(run, name) for run in ("before", "after") for name in ("plain", "ngram", "eagle3")]
    page = Page((out / "report.html").read_text())
    assert "2 evaluations side by side" in page.text and "before: ngram" in page.named("svg")[0]["aria-label"]


def test_runs_of_equal_folder_names_are_told_apart_by_their_paths(write, summary):
    runs = report.read_runs([write("a/w", summary), write("b/w", summary)])
    assert runs[0].label != runs[1].label and runs[0].label.endswith("a/w")


@pytest.mark.parametrize(
    ("field", "value"), [("device", "1 x H100"), ("prompts", 80), ("prompt_set", "mt_bench_odd"), ("max_tokens", 64)]
)
def test_runs_that_cannot_be_compared_are_warned_about(field, value, write, summary, tmp_path, capsys):
    folders = [str(write("one", summary)), str(write("two", sample_summary(**{field: value})))]
    assert cli.main(["report", *folders, f"--out={tmp_path / 'out'}"]) == 0
    err = capsys.readouterr().err
    assert "warning" in err and field in err and str(value) in err
    source = (tmp_path / "out" / "report.html").read_text()
    assert f"{field} differs" in source[: source.index("<main>")]


@pytest.mark.parametrize(("field", "value"), [("categories", ["qa"]), ("chat", False)])
def test_runs_of_other_prompts_cannot_be_compared_either(field, value, write, summary, tmp_path, capsys):
    config = summary["config"] | {field: value}
    folders = [str(write("one", summary)), str(write("two", sample_summary(config=config)))]
    assert cli.main(["report", *folders, f"--out={tmp_path / 'out'}"]) == 0
    assert f"{field} differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "damaged"),
        ('{"schema": 2', "damaged"),
        ("[]", "schema='list'"),
        ("{}", "schema=None"),
        ('{"schema": 1}', "schema=1; expected 2"),
        ('{"schema": 2, "methods": []}', "methods is a list; expected dict"),
        ('{"schema": 2, "failed": {}}', "failed is a dict; expected list"),
    ],
)
def test_a_damaged_or_unknown_summary_is_refused(content, named, write, capsys):
    folder = write("w", content)
    assert cli.main(["report", str(folder)]) == 2
    err = capsys.readouterr().err
    assert named in err and "summary.json" in err
    assert [path.name for path in folder.iterdir()] == ["summary.json"]


def test_mistakes_of_the_command_line_are_explained(write, summary, tmp_path, capsys):
    folder = str(write("w", summary))
    for arguments, named in (
        ([str(tmp_path / "nowhere")], "holds no summary.json"),
        ([folder, str(write("v", summary))], "--out: is missing"),
        ([folder, folder, f"--out={tmp_path / 'o'}"], "given twice"),
        ([folder, f"--out={folder}/summary.json"], "cannot be written to"),
        ([], "DIR"),
        ([folder, "--colour=red"], "--colour"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert named in capsys.readouterr().err
    with pytest.raises(SpecJAXError, match="at least one"):
        report.write_report([])


OVERFLOWS = """
[...document.querySelectorAll('body *')].filter(one => {
  const box = one.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !one.closest('.scroll, pre, svg');
}).map(one => one.outerHTML.slice(0, 120))
"""
LETTERS_OUTSIDE = """
[...document.querySelectorAll('figure svg')].filter(svg => {
  const page = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('[id*="text_"]')].some(text => {
    const box = text.getBoundingClientRect();
    const [low, high] = [page.bottom + 1, page.top - 1];
    return box.left < page.left - 1 || box.right > page.right + 1 || box.top < high || box.bottom > low;
  });
}).map(svg => svg.getAttribute('aria-label'))
"""


@pytest.fixture(scope="module")
def browser():
    path = find_browser()
    if path is None:
        advice = "no Chromium was found: install it (Debian: apt-get install chromium) or name one in CHROMIUM"
        if os.environ.get("SPECJAX_BROWSER_TESTS") or os.environ.get("CI"):
            pytest.fail(f"{advice}. CI has to run this test.")
        pytest.skip(advice)
    with Browser(path) as browser:
        yield browser


@pytest.mark.parametrize("width", [390, 768, 1400])
@pytest.mark.parametrize("number", [1, 2])
def test_a_browser_shows_the_whole_report(number, width, browser, write, summary, tmp_path):
    folders = [write(f"run-{index}", summary) for index in range(number)]
    folder, _ = report.write_report(folders, tmp_path / "out")
    browser.open(folder / "report.html", width)
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
    assert browser.evaluate(OVERFLOWS) == []
    assert browser.evaluate(LETTERS_OUTSIDE) == []
    sizes = browser.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().width)")
    assert len(sizes) == 6 + 3 * number and min(sizes) > 300
    assert "34.4" in browser.evaluate("document.querySelector('table').innerText")
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert asked == [(folder / "report.html").resolve().as_uri()]
    assert not [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
