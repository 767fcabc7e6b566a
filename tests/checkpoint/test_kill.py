"""kill -9 at any moment leaves the checkpoint before, or the new one, bit for bit."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path

import pytest

from stoker.checkpoint import fence, newest, resume
from tests.checkpoint.simulated import Grid, Tensors, begin, blank, cut, end, holds, resume_all, small_model, start
from tests.world import CONTEXT

ROUNDS = [3, pytest.param(30, marks=pytest.mark.long)]


def model_at(step: int) -> Tensors:
    return small_model(step)


def save_for_ever(directory: Path, attempt: int, pipe) -> None:
    fence(directory, attempt)
    grid = Grid(rows=1 + attempt % 3)
    state = resume(directory, cut(small_model(), Grid())[0], lambda text: [text], 0)
    step = state["step"] if state else 0
    writers = start(directory, grid.world, attempt=attempt, keep=2)
    pipe.send(step)
    while True:
        step += 1
        begin(writers, step, cut(model_at(step), grid))
        if not any(report.error for reports in end(writers) for report in reports):
            pipe.send(step)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_killed_save_leaves_the_checkpoint_before_or_the_new_one(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(0)
    committed = 0
    unfinished = 0
    for attempt in range(1, rounds + 1):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=save_for_ever, args=(tmp_path, attempt, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.poll(60)
        assert ours.recv() >= committed  # it continued from there
        for _ in range(chance.randrange(3)):
            assert ours.poll(60)
            committed = ours.recv()
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        with suppress(EOFError):  # until it has sent everything
            while True:
                committed = ours.recv()
        unfinished += len(list(tmp_path.glob("*.partial")))
        if not committed:
            continue
        candidates = newest(tmp_path)
        ranks = blank(cut(model_at(0), Grid(rows=2)))
        (state, _) = resume_all(tmp_path, ranks)
        assert state["step"] in (committed, committed + 1) and f"{state['step']:08d}" in candidates[0].name
        assert holds(ranks, model_at(state["step"]))
        assert not (tmp_path / "damaged").exists()
        committed = state["step"]
    assert committed >= rounds // 2 and unfinished  # it did save, and was killed in the middle of it
