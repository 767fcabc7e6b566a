"""What `stoker probe` found, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from stoker.conf.printable import printable
from stoker.launch.probe.machine import Report
from stoker.trainer.probe.facts import Facts
from stoker.trainer.probe.judge import machines
from stoker.trainer.probe.products import dtype_of

MOST_ROWS = 16


def print_report(report: Report) -> None:
    """All of it; findings and the bottleneck last, where they are seen."""
    facts, console = report.facts, Console(highlight=False, width=200)
    count = len(machines(facts))
    plural = f"{len(facts)} ranks on {count} machine{'s' if count > 1 else ''}"
    print(printable(f"{plural}, all at once: {facts[0].device}"))
    print()
    console.print(_rates(report), soft_wrap=True)
    for table in (_axes(facts), _links(facts), _folders(facts)):
        if table.row_count:
            print()
            console.print(table, soft_wrap=True)
    print()
    for line in _lines(report):
        print(printable(line))


def _rates(report: Report) -> Table:
    facts, precision = report.facts, dtype_of(report.config.precision)
    right = ("median", "least", "rank")
    heads = (Column(name, justify="right" if name in right else "left") for name in ("of a rank", *right, ""))
    table = Table(*heads, box=None, pad_edge=False)
    rows = [
        *(
            (f"products {dtype}, best", [each.peaks[dtype] / 1e9 for each in facts], "GFLOP/s")
            for dtype in facts[0].peaks
        ),
        (f"products {precision}, the model's", [each.own / 1e9 for each in facts if each.own], "GFLOP/s"),
        ("memory, read and written", [each.memory / 1e9 for each in facts if each.memory], "GB/s"),
        ("host to device", [each.to_device / 1e9 for each in facts if each.to_device], "GB/s"),
        ("device to host", [each.from_device / 1e9 for each in facts if each.from_device], "GB/s"),
    ]  # fmt: skip
    for name, values, unit in rows:
        if values:
            lowest = facts[values.index(min(values))].rank if len(values) == len(facts) else 0
            cells = [f"{value:,.1f}" for value in (statistics.median(values), min(values))]
            table.add_row(name, *cells, str(lowest), unit)
    return table


def _axes(facts: Sequence[Facts]) -> Table:
    head = ["messages over", "kind", "groups", "of ranks", "latency", "rate of the slowest", "up to"]
    table = Table(*(Column(name, justify="left" if n < 2 else "right") for n, name in enumerate(head)), box=None)
    table.pad_edge = False
    for at, link in enumerate(facts[0].axes):
        groups = {tuple(each.axes[at].ranks): each.axes[at] for each in facts}
        line = min((group.line for group in groups.values()), key=lambda line: line.rate)
        cells = [
            f"{len(groups)}",
            f"{len(link.ranks)}",
            f"{line.latency * 1e6:,.0f} us",
            f"{line.rate / 1e9:,.2f} GB/s",
        ]
        table.add_row(link.axis, link.kind, *cells, f"{link.largest / 2**20:g} MiB")
    return table


def _links(facts: Sequence[Facts]) -> Table:
    """The slowest first."""
    head = ["from", "to", "latency", "rate"]
    table = Table(*(Column(name, justify="left" if n < 2 else "right") for n, name in enumerate(head)), box=None)
    table.pad_edge = False
    hosts = {each.rank: each.host for each in facts}
    found = sorted(((each, link) for each in facts for link in each.links), key=lambda pair: pair[1].line.rate)
    for each, link in found[:MOST_ROWS]:
        cells = [f"{link.line.latency * 1e6:,.0f} us", f"{link.line.rate / 1e9:,.3f} GB/s"]
        table.add_row(printable(each.host), printable(hosts[link.to]), *cells)
    return table


def _folders(facts: Sequence[Facts]) -> Table:
    table = Table("folder", "", Column("rate", justify="right"), "path", box=None, pad_edge=False)
    found = [(each, folder) for each in facts for folder in each.folders]
    for each, folder in found[:MOST_ROWS]:
        rate = f"{folder.rate / 1e9:,.2f} GB/s" if folder.rate is not None else "-"
        place = printable(f"{each.host}:{folder.path}" if len(machines(facts)) > 1 else folder.path)
        table.add_row(folder.what, folder.way, rate, f"{place}  {folder.why}".rstrip())
    return table


def _lines(report: Report) -> list[str]:
    lines = []
    if report.needs is not None:
        needs = report.needs
        lines.append(
            f"the run needs at most {needs.data / 1e6:,.3g} MB/s of data and {needs.checkpoints / 1e6:,.3g} MB/s to "
            "checkpoints, on all machines together"
        )
    lines += [f"{finding.severity}: {finding.text}" for finding in report.findings]
    if not report.findings:
        lines.append("nothing unusual: ranks, links, clocks, versions and limits are as they should be")
    return [*lines, report.sentence]
