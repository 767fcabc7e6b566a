"""Numbers of a run for Prometheus: `GET /metrics`, answered by a process beside rank 0.

The ranks do nothing for a scrape: the process reads metrics.jsonl, which rank 0 writes anyhow. It listens on the
loopback address unless `prometheus.host` says otherwise, knows this one path, and serves numbers only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.goodput import goodput
from stoker.trainer.report.tracker_sinks import Values

GOODPUT_SECONDS = 10.0  # after which the books are read again
_OF_STEPS = {  # metric of a step: name, help, counter or gauge
    "step": ("stoker_step", "Last step: global batches attempted.", "gauge"),
    "loss": ("stoker_loss", "Loss of the last step, nats per valid token or as the objective counts.", "gauge"),
    "val_loss": ("stoker_val_loss", "Validation loss of the last evaluation, in the same unit.", "gauge"),
    "grad_norm": ("stoker_grad_norm", "Gradient norm of the last step, before clipping.", "gauge"),
    "lr": ("stoker_learning_rate", "Learning rate of the last step.", "gauge"),
    "tokens": ("stoker_tokens", "Valid tokens trained so far.", "gauge"),
    "tokens_per_second": ("stoker_tokens_per_second", "Valid tokens per second of the last step.", "gauge"),
    "step_seconds": ("stoker_step_seconds", "Seconds of the last step.", "gauge"),
    "data_seconds": ("stoker_data_seconds", "Seconds of the last step spent waiting for rows.", "gauge"),
    "mfu": ("stoker_mfu", "Share of the peak FLOPs used in the last step.", "gauge"),
}


class Prometheus:
    """The sink: keeps the newest values, and a server that prints them."""

    def __init__(self, job: Values, run_id: str, first_step: int, say: Callable[[str], None]) -> None:
        self._run, self._pid = RunDirectory(Path(job["run_dir"])), job["trainer_pid"]
        self._values: dict[str, float] = {}
        self._updated = 0.0  # when the last step was seen, seconds since the epoch
        self._booked: tuple[float, list[str]] = (-GOODPUT_SECONDS, [])
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer((job["host"], job["port"]), _handler(self.text))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        say(f"metrics for Prometheus at http://{job['host']}:{self._server.server_port}/metrics")

    def log(self, step: int, values: dict[str, float]) -> None:
        with self._lock:
            self._values |= {**values, "step": step}
            self._updated = time.time()

    def flush(self) -> None:
        pass

    def close(self, outcome: str | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def text(self) -> str:
        """The values in Prometheus' text format."""
        with self._lock:
            values, updated = dict(self._values), self._updated
        lines: list[str] = []
        for key, (name, what, kind) in _OF_STEPS.items():
            if key in values:
                lines += _metric(name, what, kind, float(values[key]))
        if updated:
            lines += _metric("stoker_last_step_time_seconds", "When the last step was seen.", "gauge", updated)
        lines += _metric("stoker_resident_bytes", "Memory of rank 0's process.", "gauge", _resident(self._pid))
        return "\n".join([*lines, *self._of_the_books(), ""])

    def _of_the_books(self) -> list[str]:
        made, lines = self._booked
        if time.monotonic() - made < GOODPUT_SECONDS:
            return lines
        try:
            spent = goodput(self._run, time.time())
        except (OSError, ValueError):  # another version's, or being written: the next scrape reads it again
            return lines
        lines = _metric("stoker_restarts_total", "Attempts after the first.", "counter", max(0, spent.attempts - 1))
        lines += _metric("stoker_goodput_ratio", "Share of all seconds that trained.", "gauge", spent.share)
        lines += ["# HELP stoker_seconds Seconds of the run by book.", "# TYPE stoker_seconds gauge"]
        lines += [f'stoker_seconds{{book="{book}"}} {seconds:.3f}' for book, seconds in spent.seconds.items()]
        self._booked = (time.monotonic(), lines)
        return lines


def _metric(name: str, what: str, kind: str, value: float) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}", f"{name} {value!r}"]


def _resident(pid: int) -> float:
    try:
        return float(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, IndexError):
        return 0.0


def _handler(text: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds for a client to send its request

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            data = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
