"""Several trackers at once, a CSV file, MLflow, the endpoint for Prometheus, and the command for alerts."""

from __future__ import annotations

import csv
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config, TrackerConfig
from stoker.trainer.report import alerts
from stoker.trainer.report.alerts import Alerts
from stoker.trainer.report.endpoint import Prometheus
from stoker.trainer.report.goodput import BOOKS
from stoker.trainer.report.metrics import MetricsFile
from stoker.trainer.report.observers import Observers
from stoker.trainer.report.tracker_sinks import Csv, Mlflow
from stoker.trainer.report.trackers import Tracker
from stoker.trainer.runtime.outcome import Ending, Outcome, write_ending
from tests.trainer.report.fake_wandb import Fake, Screen
from tests.trainer.report.observed import a_config, a_run, record


def job(run: RunDirectory, **more: Any) -> dict[str, Any]:
    return {"run_dir": str(run.path), "trainer_pid": 1, "name": "first", "project": "stoker", "config": {}, **more}


def rows(run: RunDirectory) -> list[dict[str, str]]:
    with open(run.path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_two_trackers_at_once_each_get_every_step_and_one_that_fails_leaves_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(tmp_path / "fake", monkeypatch)
    monkeypatch.setenv("FAKE_RAISES_AT", "2")
    run, screen = a_run(tmp_path / "run"), Screen()
    config = TrackerConfig(names=["wandb", "csv"])
    observers = Observers(MetricsFile(run.metrics), [screen])
    for name in config.names:
        observers.add(Tracker(name, config, run, say=observers.message))
    observers.start(a_config(), None, 200, {"layout": "1 rank"})
    for step in range(1, 6):
        observers.step(record(step))
    observers.finish("completed", 5)
    assert fake.notes("step") == [1] and any("tracker wandb switched off" in line for line in screen.messages)
    assert [row["step"] for row in rows(run)] == ["1", "2", "3", "4", "5"]


def test_a_csv_file_gets_a_column_for_a_late_metric_and_no_step_twice_after_a_restart(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    sink = Csv(job(run), "", 1, print)
    sink.log(1, {"loss": 2.5, "lr": 1e-3})
    sink.log(2, {"loss": 2.25, "lr": 1e-3, "val_loss": 3.0})
    sink.log(3, {"loss": 2.0})
    sink.close(None)
    again = Csv(job(run), "", 3, print)
    again.log(3, {"loss": 1.5, "lr": 5e-4})
    again.close("completed")
    assert rows(run) == [
        {"step": "1", "loss": "2.5", "lr": "0.001", "val_loss": ""},
        {"step": "2", "loss": "2.25", "lr": "0.001", "val_loss": "3.0"},
        {"step": "3", "loss": "1.5", "lr": "0.0005", "val_loss": ""},
    ]


@pytest.mark.long
def test_mlflow_keeps_its_run_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'stoker[mlflow]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = a_run(tmp_path / "run")
    config = {"optim": {"lr": 1e-3}, "steps": 4, "model": {"path": "x" * 900}}
    for first, last in ((1, 2), (3, 4)):
        sink = Mlflow(job(run, config=config), "abc", first, print)
        for step in range(first, last + 1):
            sink.log(step, {"loss": 1.0 / step})
        sink.flush()
        sink.close("completed")
    client = mlflow.MlflowClient(f"sqlite:///{run.path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("stoker").experiment_id])
    assert found.data.params["optim.lr"] == "0.001" and found.info.status == "FINISHED"
    history = [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "loss")]
    assert history == [(step, 1.0 / step) for step in range(1, 5)]


def endpoint(run: RunDirectory, said: list[str]) -> Prometheus:
    return Prometheus(job(run, host="127.0.0.1", port=0), "", 1, said.append)


def test_prometheus_reads_what_the_endpoint_serves(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    run, said = a_run(tmp_path / "run"), []
    for number, began in ((1, 1000.0), (2, 1100.0)):
        run.attempt(number).mkdir(parents=True)
        book = {"began": began, "time": began + 80, "resumed_from": 0, "seconds": {"training": 80.0}, "marks": []}
        run.seconds(number).write_text(json.dumps(book))
    write_ending(run, 2, Ending(Outcome.COMPLETED, "", 7))
    sink = endpoint(run, said)
    try:
        sink.log(7, {"loss": 2.5, "tokens_per_second": 1234.5, "step_seconds": 0.25, "tokens": 7000, "unknown": 1.0})
        address = said[0].rpartition(" ")[2]
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address.replace("/metrics", "/config.yaml"), timeout=10)
    finally:
        sink.close("completed")
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    values = {name: family.samples[0].value for name, family in families.items()}
    assert (values["stoker_step"], values["stoker_loss"], values["stoker_tokens_per_second"]) == (7, 2.5, 1234.5)
    assert values["stoker_restarts"] == 1 and families["stoker_restarts"].type == "counter"
    assert values["stoker_goodput_ratio"] == pytest.approx(80 / 180)
    assert {sample.labels["book"] for sample in families["stoker_seconds"].samples} == set(BOOKS)
    assert time.time() - values["stoker_last_step_time_seconds"] < 60


def test_scrapes_read_the_books_once_in_a_while_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = a_run(tmp_path / "run"), []
    sink = endpoint(run, [])
    monkeypatch.setattr("stoker.trainer.report.endpoint.goodput", lambda *_: calls.append(1) or (_ for _ in ()).throw)
    try:
        sink._booked = (time.monotonic(), ["kept 1.0"])
        for _ in range(200):
            assert sink.text().endswith("kept 1.0\n")
    finally:
        sink.close(None)
    assert calls == []


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


def alert(run: RunDirectory, told: Path, outcome: str | None, on: tuple[str, ...] = alerts.EVENTS) -> list[str]:
    """What the command learnt: its variables, and the JSON on its standard input."""
    command = f'echo "$STOKER_EVENT $STOKER_STEP $STOKER_OUTCOME $STOKER_MESSAGE" >> {told}; cat >> {told}'
    sink = Alerts(job(run, command=command, on=list(on), attempt="1"), "", 1, print)
    sink.log(5, {})
    sink.close(outcome)
    return told.read_text().splitlines() if told.exists() else []


@pytest.mark.parametrize(
    ("ending", "given", "event"),
    [
        (Ending(Outcome.COMPLETED, "completed at step 9", 9), "completed", "end 9 completed completed at step 9"),
        (Ending(Outcome.PREEMPTED, "saved", 9), "preempted", "end 9 preempted saved"),
        (Ending(Outcome.HUNG, "rank 3 makes no progress", 4), None, "hang 4 hung rank 3 makes no progress"),
        (Ending(Outcome.FAILED, "out of memory"), "failed", "failure 5 failed out of memory"),
        (Ending(Outcome.NONFINITE, "nan", 6), "nonfinite", "failure 6 nonfinite nan"),
        (None, None, "failure 5 failed rank 0 left no exit record"),
    ],
)
def test_each_end_runs_the_command_with_what_happened(
    tmp_path: Path, told: Path, monkeypatch: pytest.MonkeyPatch, ending: Ending | None, given: str | None, event: str
) -> None:
    monkeypatch.setattr(alerts, "OUTCOME_SECONDS", 0.0)
    run = a_run(tmp_path / "run")
    run.attempt(1).mkdir(parents=True)
    if ending is not None:
        write_ending(run, 1, ending)
    line, values = alert(run, told, given)
    assert line == event
    assert json.loads(values)["event"] == event.split()[0] and json.loads(values)["run"] == str(run.path)


def test_a_rollback_is_an_event_and_what_is_not_wanted_runs_nothing(tmp_path: Path, told: Path) -> None:
    run = a_run(tmp_path / "run")
    assert alert(run, told, "rolled back", on=("end",)) == []
    assert alert(run, told, "rolled back")[0].startswith("rollback 5 rolled back the run went back")


def test_a_command_that_hangs_is_killed_and_no_step_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(alerts, "COMMAND_SECONDS", 0.2)
    run = a_run(tmp_path / "run")
    sink = Alerts(job(run, command="sleep 60 & wait", on=["rollback"], attempt="1"), "", 1, print)
    began = time.monotonic()
    sink.close("rolled back")
    assert time.monotonic() - began < 20 and "killed after" in capfd.readouterr().err

    config = Config()
    config.alerts.command = "sleep 60"
    tracker = Tracker("alerts", config.tracker, run, say=print)
    tracker.start(config, None, 10, {"attempt": "1"})
    MetricsFile(run.metrics).start(config, None, 10, {})
    assert tracker._process is not None
    began = time.monotonic()
    tracker.finish("completed", 3)
    assert time.monotonic() - began < 2, "the end does not wait for a command"
    tracker._process.kill()
    tracker._process.wait()
