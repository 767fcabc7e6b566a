"""When a rank is taken for hung, who is named, and what its answers mean."""

from __future__ import annotations

import importlib
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.trainer.runtime.hang_report import (
    AWAITING,
    BACKWARD,
    COLLECTIVES,
    WAITING,
    Finding,
    Frame,
    behind,
    explain,
    innermost,
    state_of,
    table,
)
from stoker.trainer.runtime.process import Phase, Stamp
from stoker.trainer.runtime.stack_dump import MAIN_ANSWERS, THREAD_ANSWERS
from stoker.trainer.runtime.watchdog import ALLOWED, GENEROUS, LEAST_SECONDS, REST, STEPS, Watch, Watchdog

STACK = """Thread 0x00007f (most recent call first):
  File "/x/trainer/stack dump.py", line 50 in _listen
  File "/usr/lib/threading.py", line 982 in run

Current thread 0x00007f (most recent call first):
  File "/x/models/attention.py", line 7 in forward
  File "/x/trainer/loop.py", line 70 in fit
"""


HELPER = """Thread 0x00007e (most recent call first):
  File "/y/torch/distributed/distributed_c10d.py", line 2810 in broadcast
  File "/x/data/streams/exchange.py", line 60 in _receive

"""


def stamp(step: int, phase: str, first_step: int = 1) -> Stamp:
    return Stamp(step, Phase(phase), 0.0, 1, "host", first_step)


def watched(hang_seconds: float | None, *seen: tuple[float, dict[int, Stamp]]) -> Watch:
    watch = Watch(hang_seconds)
    for now, stamps in seen:
        watch.see(stamps, now)
    return watch


def test_a_rank_that_does_not_move_in_a_steady_phase_hangs_after_the_given_seconds() -> None:
    watch = watched(5.0, (0.0, {0: stamp(1, "data")}), (1.0, {0: stamp(2, "data")}))
    assert not watch.hangs(5.9)
    assert not watch.hangs(6.0), "as long as it may stay there, to the moment"
    assert watch.hangs(6.1)
    watch.see({0: stamp(2, "update")}, 6.0)
    assert not watch.hangs(6.1), "it moved"


@pytest.mark.parametrize("at", [stamp(0, "build"), stamp(3, "evaluate"), stamp(3, "save"), stamp(3, "last_save")])
def test_rare_phases_may_take_longer(at: Stamp) -> None:
    watch = watched(5.0, (0.0, {0: stamp(1, "data")}), (1.0, {0: stamp(2, "data")}), (2.0, {0: at}))
    assert not watch.hangs(2.0 + 5.0 * GENEROUS - 0.1)
    assert watch.hangs(2.0 + 5.0 * GENEROUS + 0.1)


def test_every_phase_has_a_limit() -> None:
    assert ALLOWED.keys() == set(Phase)


def test_a_stopped_rank_is_given_no_more_time_for_a_rare_phase() -> None:
    watch = watched(5.0, (0.0, {0: stamp(1, "data")}), (1.0, {0: stamp(2, "data")}), (2.0, {0: stamp(3, "save")}))
    assert not watch.hangs(6.9, stopped={0})
    assert watch.hangs(7.1, stopped={0})
    assert not watch.hangs(7.1, stopped={1})


def test_the_first_step_may_compile() -> None:
    watch = watched(5.0, (0.0, {0: stamp(7, "forward_backward", first_step=7)}))
    assert not watch.hangs(20.0)


def test_the_first_step_that_is_looked_at_need_not_be_the_first_that_was_taken() -> None:
    watch = watched(5.0, (0.0, {0: stamp(9, "forward_backward", first_step=7)}))
    assert watch.hangs(5.1), "steps may be faster than looks"


def test_without_a_limit_it_follows_the_median_step() -> None:
    steps = [(10.0 * number, {0: stamp(number, "data")}) for number in range(1, 8)]
    watch = watched(None, *steps)
    assert watch.limit(stamp(7, "data")) == STEPS * 10.0 == 300.0
    assert not watch.hangs(70.0 + 300.0) and watch.hangs(70.0 + 300.1)
    assert watched(None, *((0.1 * n, {0: stamp(n, "data")}) for n in range(1, 8))).limit(
        stamp(7, "data")
    ) == pytest.approx(LEAST_SECONDS)


def test_who_waits_for_a_slow_save_of_another_rank_does_not_hang() -> None:
    stamps = {0: stamp(4, "save"), 1: stamp(5, "update")}
    watch = watched(5.0, (0.0, {0: stamp(1, "data"), 1: stamp(1, "data")}), (1.0, stamps))
    assert not watch.hangs(30.0), "rank 0 is behind, and a save may take its time"
    assert watch.hangs(60.0)


@pytest.mark.parametrize(
    ("kernel", "stacks", "phase", "busy", "state"),
    [
        ("", STACK, "update", False, "its process is gone"),
        ("Z", "", "update", False, "its process is gone"),
        ("T", "", "update", False, "stopped by a signal (SIGSTOP)"),
        ("D", "", "update", False, "in the kernel: a disk or a driver"),
        ("S", "", "update", False, "does not answer"),
        ("S", STACK, "update", False, "in a C call that keeps the interpreter, asleep"),
        ("R", STACK, "update", True, "in a C call that keeps the interpreter, computing"),
        ("S", STACK + THREAD_ANSWERS, "update", False, "in a C call, asleep"),
        ("R", STACK + THREAD_ANSWERS + MAIN_ANSWERS, "update", True, "in Python, computing"),
        ("S", STACK + THREAD_ANSWERS + MAIN_ANSWERS, "data", False, "waits for its rows"),
        ("S", STACK.replace("/x/models/attention.py", "/y/torch/distributed/distributed_c10d.py"), "update", False,
         WAITING),
        ("S", HELPER + STACK + THREAD_ANSWERS + MAIN_ANSWERS, "update", False, "in Python, asleep"),
        ("S", STACK.replace('models/attention.py", line 7 in forward',
                            'stoker/parallel/replicated.py", line 154 in wait'), "update", False, WAITING),
        ("S", STACK.replace('x/models/attention.py", line 7 in forward', 'usr/lib/threading.py", line 327 in wait'),
         "update", False, "in a C call that keeps the interpreter, asleep"),
        ("S", HELPER + STACK.replace('/x/models/attention.py", line 7 in forward',
                              '/y/torch/autograd/graph.py", line 7 in _engine_run_backward'), "update", False, WAITING),
    ],
)  # fmt: skip
def test_answers_show_where_a_rank_is(kernel: str, stacks: str, phase: str, busy: bool, state: str) -> None:
    assert state_of(kernel, stacks, Phase(phase), busy) == state


def test_every_function_in_which_a_rank_is_taken_to_wait_exists() -> None:
    for module in COLLECTIVES:
        assert Frame(importlib.import_module(module).__file__ or "", "1", "any").is_of(module)
    for place in (*AWAITING, BACKWARD):
        module, _, name = place.partition(":")
        code = attrgetter(name)(importlib.import_module(module)).__code__
        assert Frame(code.co_filename, "1", code.co_name).is_of(place)
        assert not Frame(code.co_filename, "1", "another").is_of(place)


def test_the_innermost_frame_is_that_of_the_main_thread() -> None:
    assert innermost(STACK) == "models/attention.py:7 forward"
    assert innermost("") == ""


def finding(rank: int, step: int, phase: str, state: str = WAITING) -> Finding:
    return Finding(rank, "n1", step, Phase(phase), 12.0, state, "a/b.py:1 f")


def test_who_is_behind_is_named_and_those_that_wait_are_not() -> None:
    ranks = [finding(0, 7, "update"), finding(1, 7, "forward_backward", "in Python, asleep"), finding(2, 7, "update")]
    assert [f.rank for f in behind(ranks)] == [1]
    same_place = [finding(0, 7, "update"), finding(1, 7, "update", "in a C call, asleep")]
    assert [f.rank for f in behind(same_place)] == [1]
    assert explain(ranks) == (
        "rank 1 on n1 holds the run up, for 12 s in forward_backward of step 7: in Python, asleep (a/b.py:1 f)"
    )
    assert table(ranks).splitlines()[1].startswith("1 ")


def test_a_rank_that_waits_in_a_collective_the_others_have_left_is_not_blamed() -> None:
    ranks = [finding(0, 7, "update"), finding(1, 8, "data", "in Python, asleep"), finding(2, 8, "update")]
    assert explain(ranks) == (
        "rank 0 on n1 waits in update of step 7 (a/b.py:1 f) for ranks that have left it: "
        "a message was lost, or ranks run different collectives"
    )


def test_ranks_that_all_wait_for_each_other_have_lost_a_connection() -> None:
    ranks = [finding(0, 7, "update"), finding(1, 7, "update")]
    assert explain(ranks) == "all 2 ranks wait for each other in update of step 7: a connection or a message was lost"


def test_the_more_there_is_to_read_the_more_seldom_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, clock = [], [100.0]

    def read(_folder: Path) -> dict[int, Stamp]:
        looks.append(clock[0])
        clock[0] += 0.1  # of a great many ranks
        return {}

    monkeypatch.setattr("stoker.trainer.runtime.watchdog.read_stamps", read)
    monkeypatch.setattr("stoker.trainer.runtime.watchdog.time", SimpleNamespace(monotonic=lambda: clock[0]))
    watchdog = Watchdog(RunDirectory(tmp_path), 1, range(8), None, lambda _: None)
    while clock[0] < 116:
        watchdog.look()
        clock[0] += 0.25
    assert looks == pytest.approx([100.0, 100.0 + 0.1 * REST, 100.0 + 0.2 * REST, 100.0 + 0.3 * REST], abs=1.0)


def test_ranks_that_were_frozen_together_with_the_watchdog_do_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ended = [100.0], []
    monkeypatch.setattr("stoker.trainer.runtime.watchdog.read_stamps", lambda _: {0: stamp(2, "data")})
    monkeypatch.setattr("stoker.trainer.runtime.watchdog.time", SimpleNamespace(monotonic=lambda: clock[0]))
    watchdog = Watchdog(RunDirectory(tmp_path), 1, range(1), 15.0, lambda _: None)
    monkeypatch.setattr(watchdog, "_end", ended.append)

    def look_until(moment: float) -> None:
        while clock[0] < moment:
            watchdog.look()
            clock[0] += 0.25

    look_until(110.0)
    clock[0] += 3600.0  # all are suspended
    look_until(3600.0 + 124.0)
    assert not ended, "14 s since they run again"
    look_until(3600.0 + 127.0)
    assert ended and 15.0 < ended[0][0] < 17.0, "who does not go on then hangs after the usual time"


def test_a_watchdog_does_not_outlive_its_rank(tmp_path: Path) -> None:
    program = [sys.executable, "-P", "-m", "stoker.trainer.runtime.watchdog"]
    dead = subprocess.run([*program, "1", str(tmp_path), "1", "0", "1", ""], timeout=60)
    assert dead.returncode == 1, "its rank, which was not process 1, had died before it began"
