"""The report as one HTML file: no script, no network, light and dark, readable on a telephone and on a wide screen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import stoker
from stoker.conf.units import loss_unit
from stoker.launch.report import experts
from stoker.launch.report.escaping import text
from stoker.launch.report.gather import Attempt, Gathered
from stoker.launch.report.svg import COLOURS, Chart, Line
from stoker.launch.report.tables import Table, facts, lasting, moment, percent, tables
from stoker.trainer.report.curves import Curve
from stoker.trainer.report.goodput import BOOKS, MOMENTS, Account, Span
from stoker.trainer.report.task_results import PREFIX, task_metrics

MOST_ATTEMPTS = 100  # in the timeline
MOST_SPANS = 400  # of the whole timeline; shorter ones would not be seen
MOST_TASKS = 12  # charts of metrics of tasks
MOST_BANDS = 2  # runs in one chart; bands of more cover each other
_PHASES = {  # of `profile.phases_every`: metric, label
    "phase_data_seconds": "waiting for rows",
    "phase_forward_seconds": "forward",
    "phase_backward_seconds": "backward",
    "phase_update_seconds": "update",
    "phase_communication_exposed_seconds": "communication not hidden",
    "phase_bubble_seconds": "pipeline bubble",
}

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--text:#1b2129;--dim:#5a6472;--edge:#d9dde3;
--c0:#2563b8;--c1:#c2540f;--c2:#1b7f4d;--c3:#8b3fb5;--c4:#a87900;--c5:#c0264f;
--training:#2f9e62;--data:#d39a18;--checkpoint:#3577c8;--evaluation:#8757c4;--startup:#8a94a3;--lost:#cc3b3b;--down:#c9ced6}
@media(prefers-color-scheme:dark){:root{--bg:#11151a;--card:#1a2027;--text:#e6e9ed;--dim:#9aa5b3;--edge:#303843;
--c0:#6aa5ee;--c1:#f0924c;--c2:#4fbf86;--c3:#bf86e0;--c4:#dcb23c;--c5:#f0718f;
--training:#3fae73;--data:#d9a93a;--checkpoint:#5390db;--evaluation:#a07bd8;--startup:#7b8695;--lost:#df5a5a;--down:#3d4652}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--text);font:15px/1.45 system-ui,sans-serif}
main{max-width:1360px;margin:0 auto;padding:16px}h1{font-size:22px;margin:4px 0;overflow-wrap:anywhere}
h2{font-size:16px;margin:26px 0 8px}p{margin:4px 0}.dim,.note{color:var(--dim)}.note{font-size:13px}
.path{overflow-wrap:anywhere;font-size:13px}.grid-of{display:grid;gap:12px}
.facts{grid-template-columns:repeat(auto-fill,minmax(126px,1fr));margin:14px 0}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.card{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:8px 10px;min-width:0}
.card b{display:block;font-size:18px;font-weight:600;overflow-wrap:anywhere}.card h3{font-size:14px;margin:0 0 2px}
.key{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;color:var(--dim)}.key span{overflow-wrap:anywhere}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px;background:var(--c)}
svg{width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
.grid{stroke:var(--edge);stroke-width:1;fill:none}.mark{stroke:var(--dim);opacity:.6;stroke-dasharray:2 3}
.line{stroke:var(--c);stroke-width:1.8;fill:none;stroke-linejoin:round}.band{fill:var(--c);opacity:.22}
.area{fill:var(--c);opacity:.75}circle{fill:var(--c)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;width:100%}
th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--edge);vertical-align:top}
th{color:var(--dim);font-weight:600;white-space:nowrap}td{white-space:nowrap}
td:last-child{white-space:normal;overflow-wrap:anywhere;min-width:160px}
.figures td+td,.figures th+th{text-align:right;white-space:nowrap;min-width:0;font-variant-numeric:tabular-nums}
.row{display:grid;grid-template-columns:36px 1fr;gap:8px;align-items:center;margin:3px 0;font-size:13px}
.row>b{font-weight:400;text-align:right;color:var(--dim)}.bar{position:relative;height:18px;background:var(--card);
border-radius:3px;overflow:hidden}.bar i{position:absolute;top:0;bottom:0;min-width:1px;background:var(--c)}
.row p{grid-column:2;margin:-2px 0 3px;color:var(--dim);overflow-wrap:anywhere}summary{cursor:pointer;margin:18px 0 8px;
font-weight:600}.bad{border-left:4px solid var(--lost);padding-left:10px}
"""


def page(runs: list[Gathered], now: float | None = None) -> str:
    """The whole file, of one run or of several overlaid."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    written = moment(time.time() if now is None else now)
    body = [f"<h1>{text(title)}</h1>"]
    for run in runs:
        who = f"<b>{text(run.name)}</b>: " if len(runs) > 1 else ""
        body.append(f'<p>{who}{text(run.state)}</p><p class="dim path">{text(run.path)}</p>')
    for run in runs:
        if run.problems:
            whose = f" of {text(run.name)}" if len(runs) > 1 else ""
            what = f"{len(run.problems):,} parts{whose} could not be read and are missing; the last table lists them"
            body.append(f'<p class="bad">{what}.</p>')
    if len(runs) == 1:
        cards = "".join(
            f'<div class="card"><span class="note">{text(name)}</span><b>{text(value)}</b></div>'
            for name, value in facts(runs[0])
        )
        body.append(f'<div class="grid-of facts">{cards}</div>')
    found = tables(runs)
    first = sum(not table.folded for table in found[:2]) if len(runs) > 1 else 0  # results and differences, of several
    body += [_table(table) for table in found[:first]]
    drawn = [_card(chart, runs) for chart in charts(runs)]
    body.append(f'<h2>Over steps</h2><div class="grid-of charts">{"".join(drawn)}</div>' if any(drawn) else "")
    body += [_experts(run.experts, run.name if len(runs) > 1 else "") for run in runs if run.experts is not None]
    body += [_timeline(run, len(runs) > 1) for run in runs if run.accounts]
    body += [_table(table) for table in found[first:]]
    body.append(f'<p class="note">Written by stoker {text(stoker.__version__)} on {text(written)}.</p>')
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def charts(runs: list[Gathered]) -> list[Chart]:
    """The charts of these runs; those without a curve are left out."""
    alone = len(runs) == 1
    marks = _marks(runs[0]) if alone else []
    units = {loss_unit(run.config.objective) for run in runs if run.config is not None}
    found = [Chart("Loss", "; ".join(sorted(units)), _losses(runs), marks)]
    for metric, title, unit, from_zero in (
        ("grad_norm", "Gradient norm", "before clipping", False),
        ("lr", "Learning rate", "", True),
        ("tokens_per_second", "Speed", "valid tokens per second", True),
        ("mfu", "Model FLOPs utilisation", "share of the published peak", True),
        ("step_seconds", "Step time", "seconds", True),
        ("loss_scale", "Loss scale", "fp16", False),
        ("expert_load", "Busiest expert", "tokens over the mean of its layer", True),
        ("expert_entropy", "Entropy of the experts", "1: all have equally many tokens", False),
    ):
        if not (alone and metric == "step_seconds"):
            found.append(Chart(title, unit, _of_each(runs, metric), marks, from_zero=from_zero))
    found.append(Chart("Memory", "bytes that a rank has held at most so far", _memory(runs), marks, from_zero=True))
    if alone:
        found += [_step_breakdown(runs[0], marks), _phases(runs[0])]
    for key in task_metrics(dict.fromkeys(key for run in runs for key in run.curves.newest))[:MOST_TASKS]:
        lines = [replace(line, dots=True, band=False) for line in _of_each(runs, key)]
        found.append(Chart(key.removeprefix(PREFIX), "task of lm-eval", lines, marks))
    dots = [Line(line.label, line.curve, line.colour, dots=True) for line in _of_each(runs, "checkpoint_seconds")]
    found.append(Chart("Saves", "seconds, from the snapshot to the commit", dots, marks, from_zero=True))
    return [chart for chart in found if chart.lines]


def _of_each(runs: list[Gathered], metric: str) -> list[Line]:
    band = len(runs) <= MOST_BANDS
    return [
        Line(run.name, curve, place, band=band)
        for place, run in enumerate(runs)
        if (curve := run.curves.of(metric)) is not None
    ]


def _memory(runs: list[Gathered]) -> list[Line]:
    """Of the rank with the most; for a run alone, also of that with the least."""
    worst, least = _of_each(runs, "memory_peak_bytes"), _of_each(runs, "memory_least_bytes")
    if len(runs) > 1 or not worst or not least:
        return worst
    return [replace(worst[0], label="most of a rank"), replace(least[0], label="least of a rank", colour=1)]


def _losses(runs: list[Gathered]) -> list[Line]:
    if len(runs) == 1:
        of = runs[0].curves.of
        validation = [("validation", of("val_loss")), ("training sample", of("train_loss"))]
        lines = [Line("training", curve, 0) for curve in [of("loss")] if curve is not None]
        return lines + [
            Line(label, curve, place, dots=True, band=False)
            for place, (label, curve) in enumerate(validation, 1)
            if curve is not None
        ]
    return _of_each(runs, "loss") + [
        Line(f"{line.label}, validation", line.curve, line.colour, dots=True, dashed=True, band=False)
        for line in _of_each(runs, "val_loss")
    ]


def _step_breakdown(run: Gathered, marks: list[tuple[int, str]]) -> Chart:
    """The seconds of every step: waiting for rows, and the rest."""
    whole, data = run.curves.of("step_seconds"), run.curves.of("data_seconds")
    lines = []
    if whole is not None and data is not None:
        waiting, rest = Curve(), Curve()
        for one, other in zip(whole.points, data.points, strict=False):
            if (one.first, one.last) == (other.first, other.last):
                rest.add(one.last, max(0.0, one.mean - other.mean))
                waiting.add(one.last, other.mean)
        lines = [Line("computing and communicating", rest, 0), Line("waiting for rows", waiting, 1)]
    return Chart("Step time", "seconds", lines, marks, stacked=True, from_zero=True)


def _phases(run: Gathered) -> Chart:
    lines = [
        Line(label, curve, place)
        for place, (metric, label) in enumerate(_PHASES.items())
        if (curve := run.curves.of(metric)) is not None
    ]
    return Chart("Phases of profiled steps", "seconds", lines, stacked=True, from_zero=True)


def _marks(run: Gathered) -> list[tuple[int, str]]:
    """Steps after which another attempt continued."""
    return [
        (attempt.beginning.from_step, f"attempt {attempt.number} continues from step {attempt.beginning.from_step:,}")
        for attempt in run.attempts[1:][-MOST_ATTEMPTS:]
        if attempt.beginning is not None and attempt.beginning.from_step > 0
    ]


def _card(chart: Chart, runs: list[Gathered]) -> str:
    key = ""
    if len(runs) > 1 or len(chart.lines) > 1:
        key = "".join(
            f'<span><i style="--c:var(--c{line.colour % COLOURS})"></i>{text(line.label)}</span>'
            for line in chart.lines
        )
    unit = f' <span class="note">{text(chart.unit)}</span>' if chart.unit else ""
    return f'<div class="card"><h3>{text(chart.title)}{unit}</h3>{chart.draw()}<div class="key">{key}</div></div>'


def _experts(found: experts.ExpertTokens, name: str) -> str:
    """The picture of a run's experts, of the newest step that has one."""
    key = "".join(
        f'<span><i style="--c:var({colour});opacity:{opacity}"></i>{text(label)}</span>'
        for label, colour, opacity in experts.key()
    )
    title = f"Tokens of each expert{f' of {text(name)}' if name else ''}"
    note = f"A row is a layer, a column an expert; {text(found.in_words())}. Tokens over the mean of the layer:"
    card = f'<div class="card">{found.draw()}</div>'
    return f'<h2>{title}</h2><p class="note">{note}</p><div class="key">{key}</div>{card}'


def _timeline(run: Gathered, named: bool) -> str:
    """A row for each attempt, on one axis of time."""
    shown = run.accounts[-MOST_ATTEMPTS:]
    begin, end = min(a.began for a in shown), max(a.ended for a in shown)
    if not 0 < end - begin < 1e10:
        return ""
    why = {attempt.number: _why(attempt) for attempt in run.attempts}
    rows = [
        f'<div class="row"><b>{account.number}</b><div class="bar">{"".join(_bars(account, begin, end))}</div>'
        f"<p>{text(why.get(account.number, ''))}</p></div>"
        for account in shown
    ]
    key = "".join(
        f'<span><i style="--c:var(--{name})"></i>{name} {lasting(run.seconds[name])} '
        f"({percent(run.seconds[name] / run.total_seconds)})</span>"
        for name in BOOKS
        if run.seconds[name] > 0
    )
    left_out = f", the newest {len(shown)} of {len(run.accounts):,}" if len(shown) < len(run.accounts) else ""
    title = f"Timeline of the attempts{f' of {text(run.name)}' if named else ''}"
    note = (
        f"{text(moment(begin))} to {text(moment(end))}, {text(lasting(end - begin))}{left_out}. An attempt keeps "
        f"its times at up to {MOMENTS} moments; between two of them the parts are in this order, not in that of time."
    )
    return f'<h2>{title}</h2><p class="note">{note}</p><div class="key">{key}</div>{"".join(rows)}'


def _why(attempt: Attempt) -> str:
    """How it ended: messages of Stoker's name the outcome where a person or the last step decided it."""
    if not attempt.message or attempt.message.startswith(attempt.outcome):
        return attempt.message or attempt.outcome
    return f"{attempt.outcome}: {attempt.message}"


def segments(account: Account, least: float = 0.0) -> list[tuple[str, float, float]]:
    """The parts of an attempt's bar: book, begin and end in seconds since the epoch, one after the other.

    Spans shorter than `least` seconds are drawn together. Within a span the books have a fixed order.
    """
    order = ("startup", "training", "data", "checkpoint", "evaluation", "lost", "down")
    at = account.began
    found: list[tuple[str, float, float]] = []
    for span in _at_least(account.spans, least):
        for book in order:
            seconds = span.get(book, 0.0)
            if seconds > 0:
                begin = found.pop()[1] if found and found[-1][0] == book else at
                at += seconds
                found.append((book, begin, at))
    return found


def _at_least(spans: list[Span], least: float) -> Iterator[dict[str, float]]:
    """The seconds of spans by book; short ones together until they last `least` seconds."""
    together: dict[str, float] = {}
    for span in spans:
        together = {name: together.get(name, 0.0) + span.seconds.get(name, 0.0) for name in BOOKS}
        if sum(together.values()) >= least:
            yield together
            together = {}
    if together:
        yield together


def _bars(account: Account, begin: float, end: float) -> Iterator[str]:
    parts = segments(account, (end - begin) / MOST_SPANS)
    if account.down_before > 0:
        parts = [("down", account.began - account.down_before, account.began), *parts]
    for book, start, stop in parts:
        left, width = 100 * (start - begin) / (end - begin), 100 * (stop - start) / (end - begin)
        if left + width < 0 or left > 100:
            continue
        place = f"left:{max(0.0, left):.3f}%;width:{min(100.0, width):.3f}%"
        title = f"{book} {lasting(stop - start)}" + (" before the attempt" if start < account.began else "")
        yield f'<i style="--c:var(--{book});{place}" title="{text(title)}"></i>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{text(column)}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    note = f'<p class="note">{text(table.note)}</p>' if table.note else ""
    kind = ' class="figures"' if table.numbers else ""
    inner = f'{note}<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if table.folded:
        return f"<details><summary>{text(table.title)}</summary>{inner}</details>"
    return f"<h2>{text(table.title)}</h2>{inner}"
