"""Where the process of a tracker sends steps: Weights & Biases, TensorBoard, MLflow, a CSV file.

`endpoint` (Prometheus) and `alerts` are sinks too. A tracker's library is imported when its sink is made.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Values = dict[str, Any]


class Sink(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self, outcome: str | None) -> None: ...


class Wandb:
    def __init__(self, job: Values, run_id: str, first_step: int, say: Callable[[str], None]) -> None:
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        self._run = wandb.init(
            project=job["project"],
            entity=job["entity"],
            name=job["name"],
            id=run_id,
            resume="allow",
            mode=job["mode"],
            dir=job["run_dir"],
            config=job["config"],
            settings={"console": "off", "x_stats_pid": job["trainer_pid"]},  # system metrics of rank 0, not ours
        )
        if job["mode"] == "online":
            say(f"wandb run at {self._run.url}")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        pass  # sends on its own schedule

    def close(self, outcome: str | None) -> None:
        self._run.summary["outcome"] = outcome or "killed"
        self._run.finish(exit_code=0 if outcome in ("completed", "stopped") else 1)


class TensorBoard:
    def __init__(self, job: Values, run_id: str, first_step: int, say: Callable[[str], None]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._session, self._summary = event_pb2.Event, event_pb2.SessionLog, summary_pb2.Summary
        self._writer = EventFileWriter(os.path.join(job["run_dir"], "tensorboard"))
        # Readers drop the steps from here on that older event files hold
        restart = self._session(status=self._session.START)
        self._writer.add_event(self._event(wall_time=time.time(), step=first_step, session_log=restart))

    def log(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars))
        self._writer.add_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, outcome: str | None) -> None:
        self._writer.close()


class Mlflow:
    """A run of MLflow; its id is MLflow's own, and our `run_id` a tag by which a restart finds it."""

    def __init__(self, job: Values, run_id: str, first_step: int, say: Callable[[str], None]) -> None:
        import mlflow
        from mlflow.entities import Metric, Param, RunTag

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(f"sqlite:///{job['run_dir']}/mlflow.db")
            say(f"mlflow writes to {job['run_dir']}/mlflow.db: MLFLOW_TRACKING_URI names a server")
        self._client, self._metric = mlflow.MlflowClient(), Metric
        self._waiting: list[Any] = []
        found = self._client.get_experiment_by_name(job["project"])
        experiment = found.experiment_id if found is not None else self._client.create_experiment(job["project"])
        runs = self._client.search_runs([experiment], filter_string=f"tags.`stoker.run_id` = '{run_id}'")
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(experiment, run_name=job["name"]).info.run_id
        params = [Param(key, text[:500]) for key, text in _flat(job["config"]) if text]
        for first in range(0, len(params), 100):
            tags = [RunTag("stoker.run_id", run_id)] if first == 0 else []
            self._client.log_batch(self._run, params=params[first : first + 100], tags=tags)

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [self._metric(key, float(value), now, step) for key, value in values.items()]
        if len(self._waiting) >= 500:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for first in range(0, len(waiting), 500):
            self._client.log_batch(self._run, metrics=waiting[first : first + 500])

    def close(self, outcome: str | None) -> None:
        self._client.set_tag(self._run, "outcome", outcome or "killed")
        well = outcome in ("completed", "stopped")
        self._client.set_terminated(self._run, "FINISHED" if well else "KILLED" if outcome is None else "FAILED")


class Csv:
    """`metrics.csv`: a row for each step. A metric that comes later gets a column, and the file is written again."""

    def __init__(self, job: Values, run_id: str, first_step: int, say: Callable[[str], None]) -> None:
        self._path = Path(job["run_dir"]) / "metrics.csv"
        self._columns: list[str] = ["step"]
        kept: list[dict[str, str]] = []
        if self._path.exists() and not self._path.is_symlink():
            with open(self._path, newline="") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or self._columns)
                kept = [row for row in reader if row["step"].isdecimal() and int(row["step"]) < first_step]
        self._rewrite(kept)

    def log(self, step: int, values: dict[str, float]) -> None:
        new = [key for key in values if key not in self._columns]
        if new:
            self._file.flush()
            with open(self._path, newline="") as file:
                rows = list(csv.DictReader(file))
            self._file.close()
            self._columns += new
            self._rewrite(rows)
        self._writer.writerow({"step": step, **values})

    def flush(self) -> None:
        self._file.flush()

    def close(self, outcome: str | None) -> None:
        self._file.close()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        fresh = self._path.with_name("metrics.csv.new")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        self._file = os.fdopen(handle, "w", newline="")
        self._writer = csv.DictWriter(self._file, self._columns, lineterminator="\n")
        self._writer.writeheader()
        self._writer.writerows(rows)
        self._file.flush()
        os.replace(fresh, self._path)


def _flat(values: Values, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and texts."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", "null" if value is None else str(value)))
    return found
