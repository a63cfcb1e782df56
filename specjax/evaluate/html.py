"""A report as one HTML page that needs nothing else: no script, no font, no file and no network."""

import html
from collections.abc import Iterator, Sequence

from specjax import view
from specjax.evaluate import content
from specjax.evaluate.content import Answer, Note, Plot, Run, Section, Source, Table

SHORT_QUESTION = 300
"""Characters up to which a question is shown in full; of a longer one half as many, and the rest can be unfolded."""

LONG_CELL, LONG_HEADER = 40, 16
"""Characters from which on a text in a table, or the name of a column, is broken into lines."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Browsers then load nothing and run nothing, whatever a prompt or an answer holds."""

CSS = """
:root{color-scheme:light;--ink:#1b1f24;--soft:#57606a;--line:#d8dee4;--paper:#fff;--tint:#f6f8fa;--accent:#0b5394}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--tint);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header{max-width:1180px;margin:0 auto;padding:0 20px}
header{padding-top:36px}
h1{font-size:clamp(1.5rem,1.1rem + 1.6vw,2.1rem);line-height:1.2;margin:0 0 .3em;overflow-wrap:anywhere}
h2{font-size:1.3rem;line-height:1.3;margin:0 0 .7em}
h3{font-size:1rem;margin:1.2em 0 .4em;overflow-wrap:anywhere}
h4{font-size:.92rem;margin:.9em 0 .2em;overflow-wrap:anywhere}
p{margin:.5em 0;overflow-wrap:anywhere}
.setting,.note{color:var(--soft)}
.note{font-size:.86rem;line-height:1.45}
.warning{background:#fff4d6;border:1px solid #d9b44a;border-left-width:6px;border-radius:6px;padding:.6em .9em;
  color:#4d3800}
nav{display:flex;flex-wrap:wrap;gap:.2em 1.1em;margin:1.1em 0 0;font-size:.92rem}
a{color:var(--accent)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,150px),1fr));gap:12px;margin:20px 0 0;
  padding:0}
.facts div{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.facts b{display:block;font-size:1.75rem;line-height:1.2;font-variant-numeric:tabular-nums}
.facts span{color:var(--soft);font-size:.88rem;overflow-wrap:anywhere}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;margin:20px 0;padding:22px 24px}
.scroll{overflow-x:auto;margin:.2em 0 .4em;border:1px solid var(--line);border-radius:6px}
.scroll:focus-visible{outline:2px solid var(--accent)}
table{border-collapse:collapse;width:100%;font-size:.88rem;line-height:1.4}
th,td{padding:.45em .75em;text-align:left;white-space:nowrap;border-top:1px solid var(--line);vertical-align:top}
thead th{background:var(--tint);border-top:0;font-weight:600;color:#33393f;vertical-align:bottom}
thead th.wrap{white-space:normal;min-width:8em}
.number{text-align:right;font-variant-numeric:tabular-nums}
td.long{white-space:pre-wrap;overflow-wrap:anywhere;min-width:16em}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,max(320px,34%)),1fr));gap:18px 28px;
  margin:1em 0;align-items:start}
figure{margin:0;max-width:540px;min-width:0}
figure svg{display:block;width:100%;height:auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
pre{background:var(--tint);border:1px solid var(--line);border-radius:6px;padding:.8em 1em;overflow-x:auto;
  font-size:.82rem;line-height:1.45;margin:.4em 0}
.question{white-space:pre-wrap;overflow-wrap:anywhere;border-left:3px solid var(--line);
  padding:.1em 0 .1em .9em;margin:.4em 0;color:#33393f}
summary{cursor:pointer;overflow-wrap:anywhere}
details{margin:.4em 0}
details>summary>b{font-weight:600;font-size:1rem}
details[open]>summary>.begin{display:none}
.example+.example{border-top:1px solid var(--line);margin-top:1.4em}
footer{max-width:1180px;margin:0 auto;padding:0 20px 36px;color:var(--soft);font-size:.86rem}
@media (max-width:600px){main,header,footer{padding-left:12px;padding-right:12px}section{padding:16px 14px;
  border-radius:8px}}
@media print{
body{background:#fff;font-size:11pt}nav{display:none}main,header,footer{max-width:none}
section{border:0;padding:0;margin:18pt 0}.scroll{overflow:visible;border:0}
table{font-size:7.5pt}th,td{white-space:normal;padding:.25em .4em}td.long,thead th.wrap{min-width:0}
.plots{grid-template-columns:1fr 1fr}
figure,.facts div,tr{break-inside:avoid}h2,h3{break-after:avoid}
details::details-content{content-visibility:visible;block-size:auto}
}
"""


def page(runs: Sequence[Run], warnings: Sequence[str] = ()) -> str:
    """The report on some runs.

    Args:
        warnings: besides what the runs' own content says.
    """
    heading = _escape(content.title(runs))
    sections = content.sections(runs)
    body = [f"<header><h1>{heading}</h1>", *_settings(runs)]
    body += [f'<p class="warning" role="alert">{_escape(text)}</p>' for text in (*warnings, *content.warnings_of(runs))]
    body += _facts(runs)
    links = (f'<a href="#section-{index}">{_escape(one.title)}</a>' for index, one in enumerate(sections))
    body += [f'<nav aria-label="Sections">{"".join(links)}</nav></header><main>']
    body += [_section(index, section) for index, section in enumerate(sections)]
    body += ["</main><footer>Written by specjax report from summary.json.</footer>"]
    text = "\n".join(body)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{heading}</title><style>{CSS}{view.CSS}</style></head>\n<body>\n{text}\n</body></html>\n"
    )


def _settings(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        label = f"<b>{_escape(run.label)}</b>: {_escape(str(run.summary.get('target')))}, " if run.label else ""
        yield f'<p class="setting">{label}{_escape(content.setting(run.summary))}</p>'


def _facts(runs: Sequence[Run]) -> Iterator[str]:
    facts = content.facts(runs)
    if facts:
        tiles = (f"<div><b>{_escape(fact.value)}</b><span>{_escape(fact.about)}</span></div>" for fact in facts)
        yield f'<div class="facts">{"".join(tiles)}</div>'


def _section(index: int, section: Section) -> str:
    """Tables and all else in their order, the plots together where the first of them stands."""
    blocks: list[str] = []
    plots: list[str] = []
    place: int | None = None
    for number, part in enumerate(section.parts):
        match part:
            case Plot():
                place = len(blocks) if place is None else place
                plots.append(_plot(f"plot-{index}-{number}", part))
            case Table():
                blocks.append(_table(part, section.title))
            case Note():
                blocks.append(f'<p class="note">{_escape(part.text)}</p>')
            case Source():
                blocks.append(
                    f"<details><summary>{_escape(part.title)}</summary><pre>{_escape(part.text)}</pre></details>"
                )
            case Answer():
                blocks.append(_answer(part))
    if plots:
        blocks.insert(place or 0, f'<div class="plots">{"".join(plots)}</div>')
    return f'<section id="section-{index}"><h2>{_escape(section.title)}</h2>{"".join(blocks)}</section>'


def _plot(prefix: str, plot: Plot) -> str:
    svg = plot.draw(prefix).replace("<svg", f'<svg role="img" aria-label="{_escape(plot.about)}"', 1)
    return f"<figure>{svg}</figure>"


def _table(table: Table, above: str) -> str:
    """A table in a container of its own, in which it scrolls where it is wider than the page."""

    def head_cell(name: str) -> str:
        kinds = ["number"] * (name not in table.texts) + ["wrap"] * (len(name) > LONG_HEADER)
        return f'<th scope="col" class="{" ".join(kinds)}">{_escape(name)}</th>'

    def cell(name: str, text: str) -> str:
        kind = "number" if name not in table.texts else "long" if len(text) > LONG_CELL else ""
        return f'<td class="{kind}">{_escape(text)}</td>' if kind else f"<td>{_escape(text)}</td>"

    head = "".join(map(head_cell, table.header))
    rows = "".join(f"<tr>{''.join(map(cell, table.header, row))}</tr>" for row in table.rows)
    note = f'<p class="note">{_escape(table.note)}</p>' if table.note else ""
    body = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_escape(table.title)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )
    if table.folded:
        return f"<details><summary><b>{_escape(table.title)}</b></summary>{body}</details>"
    return body if table.title == above else f"<h3>{_escape(table.title)}</h3>{body}"


def _answer(answer: Answer) -> str:
    question = f'<div class="question">{_escape(answer.question)}</div>'
    if len(answer.question) > SHORT_QUESTION:
        begin = " ".join(answer.question[: SHORT_QUESTION // 2].split())
        about = f'<b>Question</b> <span class="begin">{_escape(begin)} …</span>'
        question = f"<details><summary>{about}</summary>{question}</details>"
    methods = "".join(
        f'<h4>{_escape(name)}</h4><div class="sjx">{view.legend_html([rounds])}{view.answer_html(rounds)}</div>'
        for name, rounds in answer.methods
    )
    return f'<div class="example"><h3>{_escape(answer.title)}</h3>{question}{methods}</div>'


def _escape(text: str) -> str:
    """Text as HTML, also inside attributes, without what UTF-8 can't hold."""
    return html.escape(text.encode("utf-8", errors="replace").decode("utf-8"))
