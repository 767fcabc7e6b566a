"""A rank is killed, or its storage fails, at every call of a save: the checkpoint before or the new one is left."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from stoker.checkpoint import fence, read_state, verify
from tests.checkpoint.crash import CALLS, GRID, NEW, check_what_is_left, new_run, strike, why_not
from tests.checkpoint.simulated import begin, cut, end, save, small_model, start

needs_strace = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
LEAST = {"write": 5, "fsync": 4, "rename": 3, "mkdir": 1, "unlink": 3}  # calls that rank 0 makes in one thread
MOST = 60
OFTEN = ("write", "fsync", "unlink")  # so many calls that the test is long
STRUCK = [pytest.param(call, marks=pytest.mark.long if call in OFTEN else ()) for call in CALLS]


@needs_strace
@pytest.mark.parametrize("call", STRUCK)
def test_killed_at_any_call_of_a_save_the_checkpoint_before_or_the_new_one_is_left(tmp_path: Path, call: str) -> None:
    steps = set()
    for rank in range(GRID.world):
        for number in range(1, MOST):
            directory = tmp_path / f"{rank}-{number}"
            new_run(directory)
            blow = strike(directory, rank, call, number, "signal=SIGKILL")
            steps.add(check_what_is_left(directory, blow))
            fence(directory, 2)  # and the run continues
            save(start(directory, 2, attempt=2, keep=1), 3, cut(NEW, GRID))
            assert [entry.name for entry in directory.iterdir() if "partial" in entry.name] == []
            shutil.rmtree(directory)
            if not blow.struck:
                break
        assert number > LEAST[call] or rank > 0, "so few calls were there to be struck"
        assert number < MOST - 1
    assert steps == ({2} if call == "unlink" else {1, 2}), "nothing is removed before the commit"


@needs_strace
@pytest.mark.parametrize(("call", "error", "said"), [("fsync", "EIO", "Input/output"), ("write", "ENOSPC", "No space")])
def test_an_error_at_any_call_fails_the_save_on_all_ranks(tmp_path: Path, call: str, error: str, said: str) -> None:
    failed = 0
    for rank in range(GRID.world):
        for number in range(1, MOST):
            directory = tmp_path / f"{rank}-{number}"
            new_run(directory)
            blow = strike(directory, rank, call, number, f"error={error}")
            step = check_what_is_left(directory, blow)
            if not blow.struck:
                assert blow.errors == [None, None] and step == 2
                break
            failed += blow.errors != [None, None]
            if step == 1:
                assert all(said in (told or "") and "\n" not in (told or "") for told in blow.errors), blow.errors
            assert not list(directory.glob("*.partial"))
            shutil.rmtree(directory)
        assert number < MOST - 1
    assert failed >= 6


def test_of_two_attempts_that_write_the_same_step_exactly_one_commits(tmp_path: Path) -> None:
    """Without a fence between them: as if both had been started at once."""
    for step in range(1, 11):
        attempts = {number: start(tmp_path, 2, attempt=number) for number in (1, 2)}
        models = {number: small_model(10 * step + number) for number in attempts}
        gate = threading.Barrier(2)

        def race(number: int, step: int = step, gate: threading.Barrier = gate, **run) -> None:
            gate.wait(10)
            begin(run["attempts"][number], step, cut(run["models"][number], GRID), {"attempt": number})

        threads = [
            threading.Thread(target=race, args=(number,), kwargs={"attempts": attempts, "models": models})
            for number in attempts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        committed = [
            number
            for number, writers in attempts.items()
            if not any(report.error for report in [reports[0] for reports in end(writers)][:1])
        ]
        assert len(committed) == 1, "rank 0 of exactly one attempt has committed"
        checkpoint = tmp_path / f"step-{step:08d}"
        assert read_state(checkpoint) == {"attempt": committed[0]} and verify(checkpoint) == []
