"""`stoker report`: what happened in one run, or in several beside each other.

`gather`       reads a run directory once, whatever state it is in; what cannot be read is listed
`tables`       the tables, as text
`svg`          line charts
`page`         one HTML file of charts, timeline and tables; `other_forms`: Markdown and JSON
`escaping`     text of a run directory never becomes markup
"""

from __future__ import annotations

from pathlib import Path

from stoker.conf.durable import write_whole
from stoker.conf.printable import printable
from stoker.conf.values import ConfigError
from stoker.launch.report.gather import gather
from stoker.trainer.report.progress import size

MOST_RUNS = 24  # in one report


def report(paths: list[str], out: str | None, form: str) -> int:
    """Write a report of the runs in `form` (html, md or json) to the file `out`.

    Without `out`, HTML goes to `report.html` and the others to the standard output. Raises ConfigError where a path is
    no run directory.
    """
    if len(paths) > MOST_RUNS:
        raise ConfigError(f"{len(paths)} runs: a report overlays at most {MOST_RUNS}; give fewer")
    runs = [gather(path) for path in paths]
    if form == "html":
        from stoker.launch.report.page import page

        made = page(runs)
    else:
        from stoker.launch.report.other_forms import as_json, as_markdown

        made = as_markdown(runs) if form == "md" else as_json(runs)
    if form != "html" and out is None:
        print(made if form == "json" else printable(made))
        return 0
    target = Path(out or "report.html").expanduser()
    data = made.encode()
    write_whole(target, data)
    print(f"{printable(str(target))}: {'a run' if len(runs) == 1 else f'{len(runs)} runs'}, {size(len(data))}")
    for run in runs:
        for problem in run.problems:
            print(printable(f"  {run.name}: not read: {problem}"))
    return 0
