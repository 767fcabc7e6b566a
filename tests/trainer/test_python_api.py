from __future__ import annotations

from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests import world
from tests.launch.runs import overrides, steps_of, write_text


def trained(words: list[str]) -> tuple[str, int | None]:
    import torch.distributed as dist

    import stoker

    dist.destroy_process_group()  # tests/world.py made one; a user's process has none
    ending = stoker.run(words)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return ending.outcome.value, ending.step


def test_a_run_from_python_is_the_same_run(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    words = overrides(
        tmp_path / "run", tmp_path / "text", "steps=3", "batch.micro_size=8", f"data.cache={tmp_path / 'cache'}"
    )
    assert world.run(trained, 1, words, fresh=True) == [("completed", 3)]
    assert [step[0] for step in steps_of(tmp_path / "run")] == [1, 2, 3]


def test_best_fit_rows_are_attended_within_documents_by_default(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    losses = []
    for name, more in (("default", []), ("asked", ["data.document_mask=true"])):
        words = overrides(
            tmp_path / name, tmp_path / "text", "steps=1", "batch.micro_size=8", f"data.cache={tmp_path / 'cache'}",
            "data.packing=best_fit", "seq_len=256", *more,
        )  # fmt: skip
        assert world.run(trained, 1, words, fresh=True) == [("completed", 1)]
        losses.append(steps_of(tmp_path / name)[0][2])
    assert losses[0] == losses[1]


def second_try(bad: list[str], good: list[str]) -> tuple[str, str, dict[str, tuple[object, object]]]:
    """A notebook: the first call fails after the ranks have met, the second is right. What differs after the first."""
    import torch.distributed as dist

    dist.destroy_process_group()  # tests/world.py made one; a user's process has none
    import gc
    import os
    import signal
    import threading
    from multiprocessing import active_children

    import torch
    import torch.distributed as dist

    import stoker

    def state() -> dict[str, object]:
        gc.collect()
        files = sorted(os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if name.isdecimal()
                       if os.path.islink(f"/proc/self/fd/{name}"))  # fmt: skip
        return {
            "group": dist.is_initialized(),
            "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
            "environment": dict(os.environ),
            "threads of torch": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "files": [name for name in files if "/run" in name or "attempts" in name],
            "children": len(active_children()),
            "checkpoint threads": [thread.name for thread in threading.enumerate() if "checkpoint" in thread.name],
            "processes": sorted(open(f"/proc/self/task/{os.getpid()}/children").read().split()),
        }

    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.set_num_threads(3)
    before = state()
    try:
        stoker.run(bad)
        raised = "nothing"
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    after = state()
    differing = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    return raised, stoker.run(good).outcome.value, differing


@pytest.mark.long
def test_after_a_run_that_failed_the_process_is_as_before_and_the_next_run_trains(tmp_path: Path) -> None:
    """With readers, a tracker and a checkpoint in flight when it fails."""
    write_text(tmp_path / "text")
    more = ("steps=3", "batch.micro_size=8", f"data.cache={tmp_path / 'cache'}", "parallel.zero=0", "data.workers=1")
    fails = ("faults=[{at: 2, do: oom}]", "checkpoint.every=1", "deterministic=true", "tracker=tensorboard")
    bad = overrides(tmp_path / "run-a", tmp_path / "text", *more, *fails)
    good = overrides(tmp_path / "run-b", tmp_path / "text", *more)
    [(raised, outcome, differing)] = world.run(second_try, 1, bad, good, fresh=True)
    assert "RuntimeError" in raised and outcome == "completed" and differing == {}
    ending = read_ending(RunDirectory(tmp_path / "run-a"), 1)
    assert ending is not None and ending.outcome is Outcome.FAILED and "memory" in ending.message
    bad = overrides(tmp_path / "run-c", tmp_path / "text", *more, "eval.sequences=100000")
    good = overrides(tmp_path / "run-c", tmp_path / "text", *more)
    [(raised, outcome, differing)] = world.run(second_try, 1, bad, good, fresh=True)
    assert "eval.sequences=100000" in raised and outcome == "completed" and differing == {}


def with_a_separate_group(words: list[str]) -> tuple[str, bool]:
    import torch.distributed as dist

    import stoker

    try:
        stoker.run(words)
    except ValueError as error:
        return str(error), dist.is_initialized()
    return "", False


def test_a_process_group_of_the_user_is_not_touched(tmp_path: Path) -> None:
    [(said, there)] = world.run(with_a_separate_group, 1, [f"run.dir={tmp_path / 'run'}"])
    assert "already has a process group" in said and there
