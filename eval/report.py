"""A report of finished runs from their result files alone: one HTML page, and the same as Markdown.

The page needs nothing beside itself: no script, no font, no picture from elsewhere; it follows the
reader's light or dark colours and prints.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from . import charts
from .cli import CommandError
from .compare import (
    Comparison,
    add_options,
    check_options,
    compare,
    counted,
    load,
    notes,
    points,
    remarks,
    smallest_p,
)
from .fidelity import Fidelity, Summary, decimal, load_fidelity, summarise
from .results import Arm, Header, Result, write_text, writing

__all__ = ["Evaluation", "html", "main", "markdown", "read"]

_VERDICTS = ("non-inferior", "undecided", "inferior")
# Groups with more tasks than this are drawn as a group alone; their tasks fold into a table.
_MOST_TASKS = 20


@dataclass(frozen=True)
class Evaluation:
    """A run and what it says.

    Attributes:
        name: of its directory.
        header, results: its files; arms by family, then by samples.
        comparisons: every arm against dense.
        fidelity: every arm against dense on text; may be empty.
        remarks: what is missing or mixed.
        margin, confidence: what the comparisons used.
    """

    name: str
    header: Header
    results: list[Result]
    comparisons: list[Comparison]
    fidelity: list[Summary]
    remarks: list[str]
    margin: float
    confidence: float


def read(run: Path, *, margin: float, confidence: float, unfinished: bool = False) -> Evaluation:
    """Read a run and compare its arms.

    Raises:
        CommandError: not a run, unfinished (unless allowed), or its results do not fit together.
    """
    header, results, missing = load(run, unfinished)
    families = _families(header)
    arms = sorted(header.arms.items(), key=lambda item: _place(item[1], families))
    header = replace(header, arms=dict(arms))
    measured = load_fidelity(run, header)
    fidelity = summarise(measured)
    if not results and not fidelity:
        raise CommandError(f"{run}: no result is finished")
    comparisons = compare(header, results, margin=margin, confidence=confidence)
    return Evaluation(
        name=run.resolve().name,
        header=header,
        results=results,
        comparisons=sorted(comparisons, key=lambda row: len(row.tasks) == 1),  # groups first
        fidelity=fidelity,
        remarks=[*remarks(header, results, missing), *_unknown_weights(measured)],
        margin=margin,
        confidence=confidence,
    )


def _unknown_weights(measured: Sequence[Fidelity]) -> list[str]:
    count = sum(not result.weights for result in measured)
    if not count:
        return []
    return [
        f"{count} of {len(measured)} results on text are of an older version, which does not say what "
        "weights answered: whether they are the run's is not known."
    ]


# Tables, as rows of text that HTML and Markdown share


@dataclass(frozen=True)
class _Table:
    """Cells as text, in groups of rows under a heading each (empty for none); `numeric` columns are
    aligned on the right."""

    head: list[str]
    groups: list[tuple[str, list[list[str]]]]
    numeric: frozenset[int] = frozenset()


def _scores(comparisons: Sequence[Comparison], confidence: float) -> _Table:
    head = ["arm", "seeds", "score", f"difference [{confidence:.0%}]", "verdict"]
    head += ["documents for 80%", "lost / gained", "p", "same text", "value rows read"]
    head += ["tokens/s (dense)"]
    groups: dict[str, list[list[str]]] = {}
    for row in comparisons:
        heading = (
            f"{row.title}: {row.documents:,} documents, dense {_score(row.dense, row.dense_error)}"
        )
        if row.reason is not None:
            heading += f", no verdict: {row.reason}"
        tests = row.mcnemar or []
        groups.setdefault(heading, []).append(
            [
                row.arm,
                str(len(row.seeds)),
                _score(row.score, row.score_error),
                points(row.difference),
                "no verdict" if row.verdict == "none" else row.verdict,
                "-" if row.documents_needed is None else f"{row.documents_needed:,}",
                ", ".join(f"{test.lost}/{test.gained}" for test in tests) or "-",
                f"{smallest_p(tests):.2g}" if tests else "-",
                f"{row.agreement:.1%}",
                _share(row.rows_read),
                f"{_number(row.tokens_per_second)} ({_number(row.dense_tokens_per_second)})",
            ]
        )
    return _Table(head, list(groups.items()), frozenset(range(1, len(head))) - {4})


def _fidelity(summaries: Sequence[Summary]) -> _Table:
    head = ["arm", "seeds", "context", "tokens", "KL(dense ‖ arm), nats per token [95%]"]
    head += ["same top token [95%]", "perplexity (dense)"]
    rows = [
        [
            s.arm,
            str(len(s.seeds)),
            f"{s.context:,}",
            f"{s.tokens:,}",
            f"{decimal(s.kl.value)} [{decimal(s.kl.low)}, {decimal(s.kl.high)}]",
            f"{s.agreement.value:.2%} [{s.agreement.low:.2%}, {s.agreement.high:.2%}]",
            f"{s.perplexity:.3f} ({s.dense_perplexity:.3f})",
        ]
        for s in summaries
    ]
    return _Table(head, [("", rows)], frozenset(range(1, len(head))))


def _arms(header: Header) -> _Table:
    rows = []
    for arm in header.arms.values():
        settings = ", ".join(
            f"{k}={v}"
            for k, v in (arm.config or {}).items()
            if k != "seed" and v not in ({}, None)  # a result's seed replaces the config's
        )
        seeds = "0 (draws nothing)" if arm.deterministic else ", ".join(map(str, header.seeds))
        rows.append([arm.name, arm.method, settings or "-", seeds])
    return _Table(["arm", "method", "settings", "seeds"], [("", rows)])


def _provenance(evaluation: Evaluation) -> _Table:
    """Where the figures come from: values in which results differ, with how many have each."""
    header, results = evaluation.header, evaluation.results
    rows = [[f"model: {name}", _plain(value)] for name, value in header.model.items()]
    sources = [result.provenance for result in results] or [header.provenance]
    for name in dict.fromkeys(name for source in sources for name in source):
        if name == "date":
            rows.append(["finished", _range(sorted(str(source.get(name)) for source in sources))])
        elif name == "versions":
            packages = dict.fromkeys(n for source in sources for n in source.get(name, {}))
            rows += [
                [f"version: {n}", _values([s.get(name, {}).get(n) for s in sources])]
                for n in packages
            ]
        elif name != "processes" or not results:
            rows.append([name, _values([source.get(name) for source in sources])])
    if results:
        rows.append(["processes", _values([result.processes for result in results])])
        sizes = sorted(result.batch_size for result in results)
        rows.append(["documents decoded together, at most", _range(sizes)])
    rows += [
        [f"setting: {name}", _plain(value)]
        for name, value in header.settings.items()
        if name != "tasks"
    ]
    for settings in header.settings.get("tasks", []):
        given = [f"{k} {v}" for k, v in settings.items() if k != "task" and v is not None]
        rows.append([f"task: {settings['task']}", ", ".join(given) or "all of its documents"])
    rows.append(["configuration hash", header.config_hash])
    fallbacks: Counter[str] = Counter()
    for result in results:
        fallbacks.update(result.counters.fallbacks)
    rows.append(["fallbacks to dense", _plain(dict(fallbacks)) if fallbacks else "none"])
    versions = sorted({f"{r.task.name} {r.task.version:g}" for r in results})
    rows.append(["task versions", ", ".join(versions)])
    return _Table(["", ""], [("", rows)])


def _values(values: Sequence[Any]) -> str:
    """A value that all share, or each with how many results have it."""
    counts = Counter(_plain(value) for value in values)
    return next(iter(counts)) if len(counts) == 1 else f"{counted(counts)} results"


def _range(ordered: Sequence[Any]) -> str:
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _score(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _short(value: float) -> str:
    """A plain decimal without the zeros at its end."""
    text = decimal(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "-"
    return "-" if value is None else str(value)


def _subjects(evaluation: Evaluation) -> set[str]:
    """Tasks of groups too large to show one by one."""
    groups = [row for row in evaluation.comparisons if len(row.tasks) > _MOST_TASKS]
    return {task for row in groups for task in row.tasks}


# Charts


def _family(arm: Arm) -> tuple[str, int] | None:
    """What arms of a line have in common, and where on the line this one is; None for dense."""
    config = arm.config or {}
    if arm.method == "top-k":
        return "top-k", int(config["k"])
    if arm.method != "santa" or config.get("estimator") == "dense":
        return None
    names = [str(config.get("estimator", "systematic"))]
    if config.get("kernel", "auto") != "auto":
        names.append(str(config["kernel"]))
    if config.get("layers"):
        names.append("layers set apart")
    return ", ".join(names), int(config.get("samples", 128))


def _place(arm: Arm, families: dict[str, int]) -> tuple[int, int]:
    """Where an arm stands in tables: dense first, then by family and by samples."""
    family = _family(arm)
    if family is None:
        return (-1 if arm.method == "dense" else len(families)), 0
    return families[family[0]], family[1]


def _families(header: Header) -> dict[str, int]:
    """Lines of the charts and their colours."""
    found = (_family(arm) for arm in header.arms.values())
    names = dict.fromkeys(family[0] for family in found if family is not None)
    return {name: i for i, name in enumerate(names)}


def _accuracy_charts(evaluation: Evaluation, against_rows: bool) -> str:
    families = _families(evaluation.header)
    hidden = _subjects(evaluation)
    by_task: dict[str, list[Comparison]] = {}
    for row in evaluation.comparisons:
        if row.task not in hidden:
            by_task.setdefault(row.task, []).append(row)
    drawn = []
    for rows in by_task.values():
        lines: dict[str, list[charts.Point]] = {}
        for row in rows:
            family = _family(evaluation.header.arms[row.arm])
            x = row.rows_read if against_rows else family and family[1]
            if family is None or not x:
                continue
            # The interval of the difference, laid around dense: what the comparison rests on.
            low, high = row.dense + row.difference.low, row.dense + row.difference.high
            low, high = 100 * max(0.0, low), 100 * min(1.0, high)
            point = charts.Point(
                100 * x if against_rows else x, 100 * row.score, low, high, row.arm
            )
            lines.setdefault(family[0], []).append(point)
        if lines:
            drawn.append(
                charts.lines(
                    rows[0].title,
                    [charts.Series(name, families[name], line) for name, line in lines.items()],
                    x_label="value rows read, %" if against_rows else "samples (k for top-k)",
                    y_label="score",
                    reference=("dense", 100 * rows[0].dense),
                    y_ticks="{:.4g}".format,
                    y_limits=(0.0, 100.0),
                    round_x=against_rows,
                )
            )
    return _grid(drawn, charts.legend(list(families.items()), "dense"))


def _forests(evaluation: Evaluation) -> str:
    hidden = _subjects(evaluation)
    by_arm: dict[str, list[charts.Interval]] = {}
    for row in evaluation.comparisons:
        if row.task not in hidden:
            d = row.difference
            interval = charts.Interval(
                row.task.replace(", above the floor", " *"),
                100 * d.value,
                100 * d.low,
                100 * d.high,
                row.verdict,
            )
            by_arm.setdefault(row.arm, []).append(interval)
    every = [interval for intervals in by_arm.values() for interval in intervals]
    if not every:
        return ""
    span = (min(one.low for one in every), max(one.high for one in every))
    drawn = [
        charts.forest(
            arm,
            intervals,
            margin=100 * evaluation.margin,
            x_label="points against dense",
            span=span,
        )
        for arm, intervals in by_arm.items()
    ]
    key = "".join(
        f'<span class="{verdict}"><b class="pill">{verdict if verdict != "none" else "no verdict"}</b>'
        "</span>"
        for verdict in (*_VERDICTS, "none")
    )
    return _grid(drawn, f'<p class="legend">{key}</p>', wide=True)


def _fidelity_charts(evaluation: Evaluation) -> str:
    families = _families(evaluation.header)
    drawn = []
    for title, label, log in (
        ("KL to dense", "nats per token", True),
        ("same top token as dense", "% of tokens", False),
    ):
        lines: dict[str, list[charts.Point]] = {}
        for s in evaluation.fidelity:
            family = _family(evaluation.header.arms[s.arm])
            estimate, scale = (s.kl, 1) if log else (s.agreement, 100)
            if family is None or (log and estimate.value <= 0):
                continue
            values = (scale * estimate.value, scale * estimate.low, scale * estimate.high)
            lines.setdefault(family[0], []).append(charts.Point(family[1], *values, s.arm))
        if lines:
            drawn.append(
                charts.lines(
                    title,
                    [charts.Series(name, families[name], line) for name, line in lines.items()],
                    x_label="samples (k for top-k)",
                    y_label=label,
                    y_ticks=_short if log else "{:.4g}".format,
                    y_limits=(0.0, 100.0),
                    log_y=log,
                )
            )
    return _grid(drawn, charts.legend(list(families.items())))


def _latency_chart(evaluation: Evaluation) -> str:
    """Speed of decode steps against the difference to dense: of groups, and of tasks in none."""
    families = _families(evaluation.header)
    groups = {task for row in evaluation.comparisons if len(row.tasks) > 1 for task in row.tasks}
    drawn = []
    for task in dict.fromkeys(row.task for row in evaluation.comparisons if row.task not in groups):
        lines: dict[str, list[charts.Point]] = {}
        rows = [row for row in evaluation.comparisons if row.task == task]
        for row in rows:
            family = _family(evaluation.header.arms[row.arm])
            speed = row.tokens_per_second
            if family is None or not speed > 0:
                continue
            d = row.difference
            name = f"{row.arm}, {_number(speed)} tokens/s"
            point = charts.Point(speed, 100 * d.value, 100 * d.low, 100 * d.high, name)
            lines.setdefault(family[0], []).append(point)
        if lines:
            series = [charts.Series(name, families[name], line) for name, line in lines.items()]
            speed = rows[0].dense_tokens_per_second
            if speed > 0:
                dense = charts.Point(speed, 0.0, 0.0, 0.0, f"dense, {_number(speed)} tokens/s")
                series.append(charts.Series("dense", -1, [dense]))
            drawn.append(
                charts.lines(
                    rows[0].title,
                    series,
                    x_label="tokens per second, over the batch",
                    y_label="points against dense",
                    reference=("dense", 0.0),
                    x_ticks="{:,.10g}".format,
                    y_ticks=lambda value: f"{value:+.3g}" if value else "0",
                    round_x=True,
                    joined=False,
                )
            )
    return _grid(drawn, charts.legend([*families.items(), ("dense", -1)]))


def _speed_note(results: Sequence[Result]) -> str:
    """What the tokens per second of a run are, and are not."""
    sizes = _range(sorted(result.batch_size for result in results))
    own = {str(result.provenance.get("dense_attention", "sdpa")) for result in results}
    name = ", ".join("SDPA" if one == "sdpa" else one for one in sorted(own))
    return (
        "tokens that went through decode steps per second of time, prefill left out: all of the model, "
        f"over batches of at most {sizes} documents, on a machine that other programs may have used. "
        f"Dense is the model's own {name} under the batch's mask, which copies grouped keys and values "
        "for every query head: the ratio is not that of the kernels."
    )


def _grid(drawn: Iterable[str], key: str, wide: bool = False) -> str:
    figures = "".join(f"<figure>{one}</figure>" for one in drawn)
    return f'{key}<div class="grid{" wide" if wide else ""}">{figures}</div>' if figures else ""


# HTML

_STYLE = Path(__file__).with_name("report.css")


def html(evaluations: Sequence[Evaluation]) -> str:
    """The page."""
    title = "Sampled decode attention against dense"
    body = "".join(_article(evaluation) for evaluation in evaluations)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>\n{_STYLE.read_text()}</style></head>\n<body><header><h1>{title}</h1>"
        '<p class="sub">Every arm decodes the same prompts from the same prefilled cache; prefill is '
        f"dense in all of them.</p></header>\n{body}</body></html>\n"
    )


def _article(evaluation: Evaluation) -> str:
    header = evaluation.header
    hidden = _subjects(evaluation)
    shown = [row for row in evaluation.comparisons if row.task not in hidden]
    folded = [row for row in evaluation.comparisons if row.task in hidden]
    sections = [
        f"<article><h2>{escape(evaluation.name)}</h2><p class='sub'>{escape(_subtitle(evaluation))}</p>"
    ]
    sections += [f'<p class="warn">{escape(remark)}</p>' for remark in evaluation.remarks]
    if shown:
        explained = _notes(evaluation)
        sections.append(f'<div class="cards">{"".join(_cards(evaluation, shown))}</div>')
        sections.append("<h3>Scores</h3>" + _html_table(_scores(shown, evaluation.confidence)))
        items = "".join(f"<li>{escape(note)}</li>" for note in explained)
        sections.append(f'<ul class="notes">{items}</ul>')
    if folded:
        one_by_one = _html_table(_scores(folded, evaluation.confidence))
        sections.append(
            f"<details><summary>{len(hidden)} tasks one by one</summary>{one_by_one}</details>"
        )
    for heading, text, drawn in (
        (
            "Differences to dense",
            "One panel for each arm, all on one axis. Shaded: right of minus "
            f"{100 * evaluation.margin:g} points, where the whole interval has to lie. "
            "*: the tasks above the floor.",
            _forests(evaluation),
        ),
        (
            "Score against samples",
            "Bars: the interval of the difference, around dense.",
            _accuracy_charts(evaluation, against_rows=False),
        ),
        (
            "Score against value rows read",
            "At equal rows, sampling and keeping the top k can be compared.",
            _accuracy_charts(evaluation, against_rows=True),
        ),
        (
            "Latency beside accuracy",
            f"Tokens/s: {_speed_note(evaluation.results)}" if evaluation.results else "",
            _latency_chart(evaluation),
        ),
    ):
        if drawn:
            sections.append(f"<h3>{heading}</h3><p class='sub'>{escape(text)}</p>{drawn}")
    if evaluation.fidelity:
        sections.append(
            "<h3>Fidelity on text</h3><p class='sub'>The text's own tokens are fed through decode "
            "steps; next-token distributions are compared with dense, which differs from itself by "
            f"{decimal(evaluation.fidelity[0].dense_kl)} nats when it decodes again.</p>"
            + _html_table(_fidelity(evaluation.fidelity))
            + _fidelity_charts(evaluation)
        )
    for heading, table in (("Arms", _arms(header)), ("Provenance", _provenance(evaluation))):
        sections.append(f"<details><summary>{heading}</summary>{_html_table(table)}</details>")
    return "\n".join([*sections, "</article>\n"])


def _notes(evaluation: Evaluation) -> list[str]:
    """What the columns of the table of scores mean."""
    speed = f"tokens/s: {_speed_note(evaluation.results)}"
    return [*notes(evaluation.margin, evaluation.confidence), speed]


def _subtitle(evaluation: Evaluation) -> str:
    header = evaluation.header
    parts = [str(header.model.get("name"))]
    if header.model.get("adapter"):
        parts.append(f"with adapter {header.model['adapter']}")
    sources = [result.provenance for result in evaluation.results] or [header.provenance]
    for name in ("dtype", "device", "commit"):
        values = [str(s[name])[: 10 if name == "commit" else None] for s in sources if s.get(name)]
        if values:
            label = "commit " if name == "commit" else ""
            parts.append(label + ", ".join(dict.fromkeys(values)))
    dates = sorted(str(source["date"])[:10] for source in sources if source.get("date"))
    return " · ".join([*parts, _range(dates)] if dates else parts)


def _cards(evaluation: Evaluation, rows: Sequence[Comparison]) -> Iterable[str]:
    """For each arm: its groups of tasks, on how many single tasks it has which verdict, what it read."""
    for arm in evaluation.header.arms:
        mine = [row for row in rows if row.arm == arm and len(row.tasks) == 1]
        mine = mine or [row for row in rows if row.arm == arm]
        if not mine:
            continue
        verdicts = [row.verdict for row in mine]
        judged = len(verdicts) - verdicts.count("none")
        groups = "".join(
            f'<p class="{row.verdict}">{escape(row.title)}: <b class="pill">'
            f"{row.verdict if row.reason is None else 'no verdict'}</b>"
            f"{'' if row.reason is None else ' (' + escape(row.reason) + ')'}, "
            f"{escape(points(row.difference))}</p>"
            for row in rows
            if row.arm == arm and len(row.tasks) > 1
        )
        worst = min(mine, key=lambda row: row.difference.value)
        counts = ", ".join(
            f'<span class="{v}"><b class="pill">{verdicts.count(v)} {v}</b></span>'
            for v in _VERDICTS
            if v in verdicts
        )
        said = f"{counts} ({judged} of {len(mine)} tasks judged)"
        if not counts:
            reasons = dict.fromkeys(row.reason for row in mine if row.reason is not None)
            said = f"no verdict: {escape('; '.join(reasons))}"
        if mine[0].task in (row.task for row in rows if len(row.tasks) > 1):
            said = ""  # a group whose tasks are folded: what there is to say stands above
        shares = [row.rows_read for row in mine if row.rows_read is not None]
        ends = dict.fromkeys(_share(f(shares)) for f in (min, max)) if shares else ["not counted"]
        read = " to ".join(ends)
        lowest = f"lowest difference {100 * worst.difference.value:+.2f}, {escape(worst.task)}"
        if len(mine) == 1:
            lowest = f"difference {escape(points(worst.difference))}"
        yield (
            f'<div class="card"><b>{escape(arm)}</b>{groups}'
            + (f"<p>{said}</p><p>{lowest}</p>" if said else "")
            + f"<p>value rows read: {read}</p></div>"
        )


def _html_table(table: _Table) -> str:
    def cell(tag: str, i: int, text: str) -> str:
        if text in (*_VERDICTS, "no verdict"):
            kind = text if text in _VERDICTS else "none"
            return f'<{tag} class="{kind}"><b class="pill">{text}</b></{tag}>'
        kind = "n" if i in table.numeric else "wrap" if len(text) > 40 else ""
        return f'<{tag} class="{kind}">{escape(text)}</{tag}>'

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, i, text) for i, text in enumerate(cells))}</tr>"

    head = f"<thead>{line('th', table.head)}</thead>" if any(table.head) else ""
    bodies = []
    for heading, rows in table.groups:
        name, colon, rest = heading.partition(":")
        title = f"<b>{escape(name)}</b>{escape(colon + rest)}"
        above = (
            f'<tr class="group"><td colspan="{len(table.head)}">{title}</td></tr>'
            if heading
            else ""
        )
        bodies.append(f"<tbody>{above}{''.join(line('td', row) for row in rows)}</tbody>")
    return f'<div class="scroll"><table>{head}{"".join(bodies)}</table></div>'


# Markdown


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The tables of the page, without its charts."""
    out = ["# Sampled decode attention against dense", ""]
    for evaluation in evaluations:
        out += [f"## {evaluation.name}", "", _subtitle(evaluation), ""]
        for remark in evaluation.remarks:
            out += [f"**{remark}**", ""]
        if evaluation.comparisons:
            out += [*_markdown_table(_scores(evaluation.comparisons, evaluation.confidence)), ""]
            out += [f"- {note}" for note in _notes(evaluation)] + [""]
        if evaluation.fidelity:
            out += [
                "### Fidelity on text",
                "",
                *_markdown_table(_fidelity(evaluation.fidelity)),
                "",
            ]
        out += ["### Arms", "", *_markdown_table(_arms(evaluation.header)), ""]
        out += ["### Provenance", "", *_markdown_table(_provenance(evaluation)), ""]
    return "\n".join(out)


def _markdown_table(table: _Table) -> Iterable[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    yield line(table.head)
    yield line(["---:" if i in table.numeric else "---" for i in range(len(table.head))])
    for heading, rows in table.groups:
        if heading:
            yield line([f"**{heading}**", *[""] * (len(table.head) - 1)])
        yield from map(line, rows)


def main(prog: str, argv: Sequence[str]) -> None:
    """Run `python -m eval report`."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="directory of a run")
    parser.add_argument(
        "--out", type=Path, help="directory of report.html and report.md; default: the first run"
    )
    add_options(parser)
    arguments = parser.parse_args(argv)
    check_options(arguments)
    evaluations = [
        read(
            run,
            margin=arguments.margin / 100,
            confidence=arguments.confidence / 100,
            unfinished=arguments.unfinished,
        )
        for run in arguments.runs
    ]
    out = arguments.out or arguments.runs[0]
    for name, text in (("report.html", html(evaluations)), ("report.md", markdown(evaluations))):
        with writing(out / name):
            write_text(out / name, text)
    print(f"{out / 'report.html'}, {out / 'report.md'}")
