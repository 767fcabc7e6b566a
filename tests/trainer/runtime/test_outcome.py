from __future__ import annotations

from pathlib import Path

import pytest

from stoker.checkpoint import DamagedCheckpoint
from stoker.conf.rundir import RunDirectory, next_attempt
from stoker.trainer.failure import Attempt, fail
from stoker.trainer.runtime.outcome import (
    Beginning,
    Ending,
    Outcome,
    close_dead_attempts,
    is_first_of_launch,
    read_ending,
    write_beginning,
    write_ending,
)
from stoker.trainer.runtime.process import Console, Place


def test_the_first_outcome_of_an_attempt_is_kept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    number = next_attempt(run)
    assert read_ending(run, number) is None
    assert write_ending(run, number, Ending(Outcome.FAILED, "rank 1 ran out of memory", rank=1))
    assert not write_ending(run, number, Ending(Outcome.FAILED, "rank 0 lost rank 1", rank=0))
    ending = read_ending(run, number)
    assert ending is not None and ending.rank == 1 and ending.time > 0
    assert [path.name for path in run.attempt(number).iterdir()] == ["outcome.json"]


def test_a_new_attempt_records_the_outcome_of_ended_ones_only(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    dead, done, current = next_attempt(run), next_attempt(run), next_attempt(run)
    write_ending(run, done, Ending(Outcome.STOPPED, "stopped at step 3, saved", 3))
    close_dead_attempts(run, current)
    endings = [read_ending(run, attempt) for attempt in (dead, done, current)]
    assert [ending and ending.outcome for ending in endings] == [Outcome.FAILED, Outcome.STOPPED, None]


def test_the_first_of_a_launch_is_the_first_that_began_and_not_one_that_died_while_it_imported(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    earlier, died, begun, damaged, latest = (next_attempt(run) for _ in range(5))
    assert is_first_of_launch(run, earlier, "a")
    write_beginning(run, earlier, Beginning(1.0, 0, 1, "host", launch="a"))
    assert not is_first_of_launch(run, died, "a") and is_first_of_launch(run, died, "b")
    assert is_first_of_launch(run, begun, "b"), "the one before has not begun"
    write_beginning(run, begun, Beginning(2.0, 0, 1, "host", launch="b"))
    run.beginning(damaged).write_text("{")
    assert not is_first_of_launch(run, latest, "b") and is_first_of_launch(run, latest, "c")


def test_a_broken_outcome_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    number = next_attempt(run)
    run.outcome(number).write_text("{")
    with pytest.raises(ValueError, match=r"outcome\.json"):
        read_ending(run, number)


def raised(error: Exception) -> Exception:
    """With a traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "training", "retry"),
    [
        (RuntimeError("a peer is gone, or the device"), False, True),
        (ValueError("the data do not fit"), False, False),
        (ValueError("the data do not fit"), True, True),
        (DamagedCheckpoint("none is sound"), True, False),
    ],
    ids=str,
)
def test_a_failure_that_would_repeat_is_not_retried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, training: bool, retry: bool
) -> None:
    """And where a rollback finds no sound checkpoint no run starts over at step 0 without a request."""
    run = RunDirectory(tmp_path)
    place = Place(rank=1, world=2, local_rank=1, local_world=2, restart=0)
    attempt = Attempt(run, next_attempt(run), place, met=True, training=training, step=7)
    assert fail(raised(error), attempt, place, Console()) == 1
    ending = read_ending(run, attempt.number)
    assert ending is not None and (ending.retry, ending.rank, ending.step) == (retry, 1, 7)
    assert str(error) in ending.message
    assert "rank 1 failed" in capsys.readouterr().err
