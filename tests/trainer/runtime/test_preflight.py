from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from stoker.conf.rundir import RunDirectory
from stoker.conf.values import ConfigError
from stoker.trainer.runtime import preflight as meeting
from stoker.trainer.runtime.preflight import Machine, ask_for_attempt, meet, tell_attempt
from stoker.trainer.runtime.process import Place


def meet_all(runs: list[RunDirectory], machines: list[Machine | None]) -> list[str | ConfigError | None]:
    """Results of ranks on two machines of two, each as a thread."""
    runs[0].attempt(1).mkdir(parents=True)
    store = dist.HashStore()
    found: list[str | ConfigError | None] = [None] * 4

    def rank(number: int) -> None:
        place = Place(number, 4, number % 2, 2, 0)
        try:
            found[number] = meet(store, runs[number // 2], 1, place, machines[number // 2])
        except ConfigError as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def reduce_step(store: dist.Store, number: int, world: int) -> list[int]:
    """Which attempt each rank takes itself to be of."""
    heard: list[int] = []
    others = [threading.Thread(target=lambda: heard.append(ask_for_attempt(store))) for _ in range(world - 1)]
    for thread in others:
        thread.start()
    tell_attempt(store, number, world, 20.0)
    for thread in others:
        thread.join(20)
    return heard


def test_ranks_agree_on_the_attempt_in_spite_of_earlier_keys_in_the_store() -> None:
    store = dist.HashStore()
    assert reduce_step(store, 1, 4) == [1, 1, 1]
    store.set(f"stoker/asked/{store.add('stoker/asked', 1)}", "killed")  # before it was answered
    store.add("stoker/asked", 1)  # or before it could write its name
    assert reduce_step(store, 2, 4) == [2, 2, 2]
    assert reduce_step(store, 3, 2) == [3]
    assert reduce_step(store, 4, 1) == []
    with pytest.raises(ConfigError, match="only 1 of 2 ranks have connected"):
        tell_attempt(store, 5, 2, 0.1)


def test_machines_that_share_the_run_directory_continue(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert meet_all([run, run], [None, None]) == [None] * 4
    assert list(run.attempt(1).iterdir()) == [], "the mark is gone"


def test_a_run_directory_that_is_not_shared_is_one_line_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "SHARED_SECONDS", 0.2)
    apart = [RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")]
    found = meet_all(apart, [None, None])
    assert all(isinstance(word, ConfigError) for word in found), found
    assert "is not shared" in str(found[0]) and "\n" not in str(found[0]) and str(found[3]) == str(found[0])


def test_a_name_that_resolves_to_loopback_matters_only_between_machines(tmp_path: Path) -> None:
    alone = Machine("n1", True, "127.0.1.1")
    run = RunDirectory(tmp_path / "one")
    assert meet_all([run, run], [alone, alone]) == [None] * 4
    run = RunDirectory(tmp_path / "two")
    found = meet_all([run, run], [Machine("n2", True, None), alone])
    assert all(isinstance(word, ConfigError) for word in found)
    assert "n1 resolves its own name to 127.0.1.1" in str(found[2])


@pytest.mark.parametrize(("ahead", "words"), [(42.0, "42 s behind"), (-42.0, "42 s ahead of"), (2.0, None)])
def test_a_wrong_clock_is_reported_once_for_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float, words: str | None
) -> None:
    """Rank 0's clock is `ahead`: only rank 0 reads the time to publish it."""
    real: Callable[[], float] = meeting.time.time
    asked: list[int] = []

    class Clock:
        monotonic, sleep = staticmethod(meeting.time.monotonic), staticmethod(meeting.time.sleep)

        @staticmethod
        def time() -> float:
            asked.append(1)
            return real() + ahead if len(asked) == 1 else real()

    monkeypatch.setattr(meeting, "time", Clock)
    run = RunDirectory(tmp_path)
    told = [word for word in meet_all([run, run], [None, None])[2:] if word is not None]
    assert len(told) == (words is not None)
    assert words is None or words in str(told[0])
