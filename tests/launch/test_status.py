"""`stoker status` and the views of a running process agree."""

from __future__ import annotations

import io
import time
from pathlib import Path

from stoker.conf.rundir import RunDirectory, write_config
from stoker.launch.status import attempts_of, facts
from stoker.trainer.report.metrics import MetricsFile
from stoker.trainer.report.progress import PlainProgress
from stoker.trainer.runtime.outcome import Beginning, write_beginning
from stoker.trainer.runtime.process import Phase, Stamp
from tests.trainer.report.observed import a_config, record


def test_status_and_the_view_of_the_process_have_one_estimate_of_speed_and_of_the_time_left(tmp_path: Path) -> None:
    """Steps of an earlier attempt were five times faster, the first of this one warms up, and one saves."""
    run, screen = RunDirectory(tmp_path), io.StringIO()
    config = a_config(steps=1000)
    write_config(run, config)
    run.attempt(1).mkdir(parents=True)
    run.attempt(2).mkdir()
    write_beginning(run, 2, Beginning(time.time(), from_step=40, ranks=1, host="here"))
    metrics, view = MetricsFile(run.metrics), PlainProgress(screen, every=1)
    metrics.start(config, None, 1000, {})
    view.start(config, 40, 1000, {})
    for step in range(1, 41):
        metrics.step(record(step, step_seconds=0.1))
    alive = Stamp(1, Phase.DATA, time.time(), 1, "here")
    for count, step in enumerate(range(41, 120), 1):
        seconds = 20.0 if count == 1 else 3.0 if step == 60 else 0.5
        one = record(step, step_seconds=seconds, tokens_per_second=1000 / seconds)
        metrics.step(one)
        view.step(one)
        if count in (1, 2, 40, 79):
            shown = dict(facts(run, attempts_of(run, alive), alive))
            line = screen.getvalue().splitlines()[-1]
            assert line.endswith(f"eta {shown['time left']}") and shown["speed"].split()[0] in line, (line, shown)
    assert shown["time left"] == "7m 20s"  # 881 steps of half a second
