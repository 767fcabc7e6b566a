"""Each row of the table of exit statuses in docs/launch.md."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from stoker.conf.compose import compose
from stoker.conf.rundir import RunDirectory, next_attempt, write_config
from stoker.launch import local
from stoker.launch.cli import main
from stoker.trainer.replay import Replayed
from stoker.trainer.runtime.outcome import Ending, Outcome, write_ending

Status = Callable[[pytest.MonkeyPatch, RunDirectory], int]


def table() -> dict[str, str]:
    """What happened -> status."""
    text = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
    lines = text.partition("## Exit status\n")[2].partition("\n## ")[0].splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]
    return {what.strip(): status.strip() for what, status in rows[1:]}


def trained(outcome: Outcome | None, number: int | None = None) -> Status:
    """`stoker train` whose ranks end so, after a signal to the launcher if a number is given."""

    def status(patch: pytest.MonkeyPatch, run: RunDirectory) -> int:
        def ranks(agent: local._Agent) -> None:
            agent._attempts_before = len(run.attempt_numbers())
            if outcome is not None:
                write_ending(run, next_attempt(run), Ending(outcome, "so"))
            if number == signal.SIGINT and outcome is None:
                raise KeyboardInterrupt
            if number is not None:
                raise SignalException("asked", signal.Signals(number))

        patch.setattr(local._Agent, "run", ranks)
        config = compose([f"run.dir={run.path}", "launch.nproc=1"])
        return local.launch(config, 1, print)

    return status


def command(*words: str) -> Status:
    return lambda _, run: main([word.replace("RUN", str(run.path)) for word in words])


def interrupted(patch: pytest.MonkeyPatch, run: RunDirectory) -> int:
    def press(*_: object) -> int:
        raise KeyboardInterrupt

    patch.setattr("stoker.launch.status.status", press)
    return main(["status", str(run.path)])


def replayed(patch: pytest.MonkeyPatch, run: RunDirectory) -> int:
    write_config(run, compose([f"run.dir={run.path}"]))
    found = Replayed(1, 0, 0, 8, float("nan"), 1.0, [], "layers.0", None)
    patch.setattr("stoker.launch.replay.replay", lambda *_, **__: found)
    return main(["replay", str(run.path), "--step", "1"])


def damaged(patch: pytest.MonkeyPatch, run: RunDirectory) -> int:
    (run.checkpoints / "step-00000005").mkdir(parents=True)
    (run.checkpoints / "step-00000005" / "MANIFEST.json").write_text("{")
    return main(["checkpoint", "ls", str(run.path)])


ROWS: dict[str, list[tuple[Status, int]]] = {
    "the command has done what it was asked": [
        (command("config"), 0),
        (command("data", "plan", "--help"), 0),
        (trained(Outcome.COMPLETED), 0),
    ],
    "a person stopped training": [
        (trained(Outcome.STOPPED, signal.SIGINT), 0),
        (trained(Outcome.COMPLETED, signal.SIGINT), 0),
        (trained(Outcome.STOPPED), 0),
    ],
    "refused: the words name": [
        (command("trian"), 2),
        (command("train", "--fast"), 2),
        (command("train", "step=3"), 2),
        (command("status", "RUN/nowhere"), 2),
        (command("stop", ""), 2),
        (command("checkpoint", "ls", "RUN"), 2),
        (command("logs", "RUN", "--attempt", "7"), 2),
        (command("data", "peek", "RUN/nowhere", "--step", "1"), 2),
        (command("generate", "RUN", "--ids", "1"), 2),
    ],
    "refused: a config that cannot be trained": [
        (command("train", "run.dir=RUN", "parallel.tp=7"), 2),
        (command("train", "run.dir=RUN", "model.target=no_such_module:build"), 2),
        (command("train", "run.dir=RUN", "data=text", "data.path=RUN/nowhere"), 2),
        (command("data", "plan", "data=text", "data.path=RUN/nowhere"), 2),
    ],
    "training failed": [(trained(Outcome.FAILED), 1), (trained(Outcome.NONFINITE), 1), (trained(None), 1)],
    "`check`, `checkpoint diff` or `replay` found": [(replayed, 1)],
    "`checkpoint ls`, `checkpoint verify` or": [(damaged, 1)],
    "`status` of a run that failed": [(command("status", "RUN"), 1)],
    "`stop` or `checkpoint save`": [(command("stop", "RUN"), 1), (command("checkpoint", "save", "RUN"), 1)],
    "a deadline or a time limit": [(trained(Outcome.PREEMPTED), 75)],
    "SIGTERM, SIGUSR1 or SIGHUP": [
        (trained(Outcome.PREEMPTED, number), 128 + number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    ],
    "Ctrl-C twice": [(trained(None, signal.SIGINT), 130), (interrupted, 130)],
}


@pytest.mark.parametrize("what", table())
def test_the_table_is_what_happens(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(tmp_path / "run")
    run.attempts.mkdir(parents=True)
    [cases] = [cases for beginning, cases in ROWS.items() if what.startswith(beginning)]
    for place, (happens, expected) in enumerate(cases):
        try:
            found = happens(monkeypatch, run)
        except SystemExit as end:
            found = int(end.code or 0)
        assert found == expected, (what, place, capsys.readouterr())
        said = table()[what]
        assert str(expected) == said or (said == "128 + the signal" and expected > 128)


def test_a_launch_leaves_environment_and_logging_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = logging.getLogger("torch.distributed.elastic.agent.server.api")

    def state() -> tuple[object, ...]:
        return dict(os.environ), logging.root.manager.disable, agent.level

    monkeypatch.setattr(agent, "level", logging.WARNING)
    run = RunDirectory(tmp_path / "run")
    run.attempts.mkdir(parents=True)
    before = state()
    assert trained(Outcome.COMPLETED)(monkeypatch, run) == 0
    assert state() == before
