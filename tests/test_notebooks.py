"""The notebooks: run from top to bottom in a small size, and what is stored of a full run of the same cells."""

import ast
import base64
import html.parser
import json
import re

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from run_notebooks import FOLDER, NAMES, code_cells, digest, execute, read

from specjax.checkpoints.pretrained import resolve
from specjax.evaluate.prompts import SETS, load_prompts
from specjax.tokenizer import decode_text, load_tokenizer
from specjax.train import responses

LARGEST = 600_000
"""Bytes of a stored notebook."""

every_notebook = pytest.mark.parametrize("name", NAMES)


class Run:
    """A notebook after a run, and the folder that it ran in."""

    def __init__(self, notebook, workdir):
        self.notebook, self.workdir = notebook, workdir

    def cell(self, part):
        """The one code cell that holds a text."""
        [found] = [cell for cell in code_cells(self.notebook) if part in cell.source]
        return found

    def printed(self, part):
        """What a cell printed to standard output."""
        return "".join(out.text for out in self.cell(part).outputs if out.get("name") == "stdout")

    def shown(self, part, kind):
        """What a cell displayed of a MIME type."""
        return [out.data[kind] for out in self.cell(part).outputs if kind in out.get("data", {})]

    def num_pictures(self, part):
        """PNG images that a cell displayed."""
        images = [base64.b64decode(text) for text in self.shown(part, "image/png")]
        assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images)
        return len(images)

    def coloured(self, part):
        """The pieces of one answer, as (class, text), from the view that a cell shows."""
        [source] = self.shown(part, "text/html")
        return Pieces(source).found


class Pieces(html.parser.HTMLParser):
    """Texts of the first answer in an AnswerView, with their classes."""

    def __init__(self, source):
        super().__init__()
        self.found, self.kind = [], None
        self.feed(source.partition('<div class="sjx-text">')[2])

    def handle_starttag(self, tag, attrs):
        self.kind = dict(attrs).get("class")

    def handle_endtag(self, tag):
        self.kind = None

    def handle_data(self, data):
        if self.kind:
            self.found.append((self.kind.removeprefix("sjx-"), data))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function: the name of a notebook -> its Run in the small size, made once."""
    made = {}

    def of(name):
        if name not in made:
            workdir = tmp_path_factory.mktemp(name)
            made[name] = Run(execute(name, "small", workdir), workdir)
        return made[name]

    return of


def answer_of(pieces):
    """The text of an answer's view, without what was rejected."""
    text = "".join(text for kind, text in pieces if kind != "rejected")
    return text.replace("↵\n", "\n").removesuffix("<|im_end|>")


def kinds_shown(cells):
    """For each cell the MIME types of each of its displays, but for plain text."""
    return [[{*out.data} - {"text/plain"} for out in cell.outputs if "data" in out] for cell in cells]


@every_notebook
def test_notebooks_define_nothing(name):
    for cell in code_cells(read(name)):
        tree = ast.parse(TransformerManager().transform_cell(cell.source))
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
        assert not [node for node in ast.walk(tree) if isinstance(node, kinds)], cell.source


@every_notebook
def test_no_cell_asks_for_a_kind_of_device(name):
    for cell in code_cells(read(name)):
        assert not re.search(r"jax_platform|xla_flags|\"cpu\"|'cpu'", cell.source, re.IGNORECASE), cell.source


@every_notebook
def test_stored_outputs_are_those_of_the_stored_cells(name):
    notebook = read(name)
    command = f"python tests/run_notebooks.py {name}"
    assert notebook.metadata.get("specjax", {}).get("outputs_of") == digest(notebook), f"run {command}"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [out for cell in cells for out in cell.outputs]
    assert "error" not in {out.output_type for out in outputs}
    # Neither warnings nor the traces of progress bars.
    assert [out.text for out in outputs if out.get("name") == "stderr" or "\r" in out.get("text", "")] == []
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@every_notebook
def test_links_lead_to_notebooks_that_are_there(name):
    text = "".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links and all((FOLDER / link).is_file() for link in links)


@pytest.mark.slow
@every_notebook
def test_every_cell_runs(run, name):
    stored, executed = read(name), run(name).notebook
    assert [cell.source for cell in executed.cells] == [cell.source for cell in stored.cells]
    cells = code_cells(executed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [out for cell in cells for out in cell.outputs if out.output_type == "error"] == []
    # What shows something in the full size does so here.
    assert kinds_shown(cells) == kinds_shown(code_cells(stored))


@pytest.mark.slow
def test_the_quickstart_shows_the_same_text_with_and_without_speculation(run):
    quickstart = run("quickstart")
    pattern = re.compile(r"(.*)\n\n(\d+) tokens in (\d+) rounds, \d+ tokens/s\n(.*)", re.DOTALL)
    plain, num_tokens, num_rounds, _ = pattern.fullmatch(quickstart.printed("plain.stream")).groups()
    assert num_rounds == num_tokens and len(plain) > 20
    speculative, num_tokens_too, fewer, said = pattern.fullmatch(quickstart.printed("speculative.stream")).groups()
    assert (speculative, num_tokens_too) == (plain, num_tokens) and int(fewer) < int(num_rounds)
    assert said == "same text as without speculation: True\n"
    for part in ("result.show()", 'results["eagle3"].show()'):
        assert answer_of(quickstart.coloured(part)) == plain
    methods = quickstart.printed("decoders = ")
    rows = re.findall(r"(\w+) +([\d.]+) tokens a round, +(\d+) of +(\d+) drafts .* decoding: (\w+)", methods)
    assert [row[0] for row in rows] == ["eagle3", "ngram", "hybrid"]
    for _, length, accepted, drafted, same in rows:
        assert 1 <= float(length) <= 5 and int(accepted) <= int(drafted) and same == "True"
    assert quickstart.num_pictures("plots.acceptance") == 1


@pytest.mark.slow
def test_the_quickstart_colours_the_tokens_by_origin(run):
    quickstart = run("quickstart")
    accepted = int(re.search(r"ngram +[\d.]+ tokens a round, +(\d+)", quickstart.printed("decoders = "))[1])
    assert [kind for kind, _ in quickstart.coloured("result.show()")].count("accepted") == accepted > 0
    kinds = {kind for kind, _ in quickstart.coloured("sampled.show()")}
    assert {"rejected", "next"} <= kinds <= {"accepted", "rejected", "next"}
    assert "same text as without speculation: True" in quickstart.printed("sampled.show()")


@pytest.mark.slow
def test_the_quickstart_evaluates_without_mismatch(run):
    quickstart = run("quickstart")
    [table] = quickstart.shown("run.evaluate", "text/markdown")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    assert rows[0][0] == "method" and [row[0] for row in rows[1:]] == ["plain", "eagle3", "ngram"]
    assert [row[-1] for row in rows[1:]] == ["", "1 / 0 / 0", "1 / 0 / 0"]
    assert quickstart.num_pictures("run.evaluate") == 4
    # The line of progress stands there once, at its end.
    [line] = [text for text in quickstart.shown("run.evaluate", "text/plain") if re.match(r"\d+/\d+ ", text)]
    assert line.startswith("3/3 ")
    assert (quickstart.workdir / "workdir" / "quickstart" / "report.html").is_file()


@pytest.mark.slow
def test_a_trained_head_decodes_losslessly_and_worse_than_the_shipped_one(run):
    training = run("train_a_head")
    assert training.num_pictures("plots.training") == training.num_pictures("plots.acceptance") == 1
    found = re.findall(r"(this|shipped) head +([\d.]+) tokens a round; 1 of 1", training.printed("plots.acceptance"))
    lengths = {name: float(length) for name, length in found}
    assert 1 <= lengths["this"] < lengths["shipped"] <= 5
    assert {kind for kind, _ in training.coloured("mine.generate")} >= {"next", "rejected"}
    workdir = training.workdir / "workdir"
    lines = (workdir / "head" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
    assert json.loads((workdir / "my-eagle3" / "config.json").read_text())["speculators_model_type"] == "eagle3"


@pytest.mark.slow
def test_the_training_notebook_learns_from_no_evaluation_prompt(run):
    answers = responses.read(run("train_a_head").workdir / "workdir" / "answers" / "all.jsonl")
    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
    learnt = [decode_text(tokenizer, answer.prompt) for answer in answers]
    evaluated = {prompt.text for name in SETS if name != "built_in_training" for prompt in load_prompts(name)}
    assert len(learnt) == 6 and len(evaluated) > 400
    assert [text for text in learnt for prompt in evaluated if prompt in text] == []


@pytest.mark.slow
def test_the_step_taken_apart_is_the_step(run):
    step = run("read_the_step")
    assert "the same tokens as step by step: True" in step.printed("once = step")
    verified = step.printed("round_uniforms")
    rows = re.findall(r"([\d.]+) \* ([\d.]+) = ([\d.]+)  against ([\d.]+): (passes|fails)", verified)
    passed = [held == "passes" for *_, held in rows]
    assert len(rows) == 4
    for (u, q, product, p, _), held in zip(rows, passed, strict=True):
        # Three digits of u and q are printed, and four of the rest.
        assert float(product) == pytest.approx(float(u) * float(q), abs=2e-3) and (float(product) < float(p)) == held
    num_accepted = int(re.search(r"num_accepted \[(\d)\]", verified)[1])
    assert num_accepted == [*passed, False].index(False)
    before, after = map(int, re.search(r"length \[(\d+)\] -> \[(\d+)\]", step.printed("jax.jit(commit")).groups())
    assert after - before == num_accepted + 1


@pytest.mark.slow
def test_counted_outcomes_have_the_targets_law(run):
    """The seed is fixed; with another one this fails by chance once in 10,000."""
    step = run("read_the_step")
    printed = step.printed("chisquare(")
    rows = re.findall(r"([\w-]+) +\[([\d. ]+)\]  accepted ([\d.]+)(?:  p-value (\S+))?", printed)
    found = {name: (float(accepted), chance) for name, _, accepted, chance in rows}
    assert list(found) == ["residual", "medusa-typical", "exact"]
    assert float(found["residual"][1]) > 1e-4
    assert float(found["medusa-typical"][1]) < 1e-12
    # Five standard deviations of 20,000 coins, and the last digit.
    assert found["residual"][0] == pytest.approx(found["exact"][0], abs=5 * (0.24 / 20_000) ** 0.5 + 0.0005)
    assert step.num_pictures("plots.grouped_bars") == 1


@pytest.mark.slow
def test_the_step_is_compiled_for_an_absent_tpu(run):
    pytest.importorskip("libtpu")
    step = run("read_the_step")
    tables = "".join(step.shown("preflight(config", "text/plain"))
    for phrase in ("v5e:1x1", "K=4", "memory, GiB", "caches aliased", "time a round, ms", "Compiled, not run"):
        assert phrase in tables
    assert re.search(r"caches aliased +in full +in full", tables)
    assert step.num_pictures("preflight(config") == 1
