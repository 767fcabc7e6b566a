"""kill -9 of a run whose update rules, average and batch have state of their own: it goes on as if nothing had been."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from tests.extent import some
from tests.launch.runs import assert_same_state, overrides, steps_of, train_forked, train_here

STEPS = 16
KILLED = 11  # behind a checkpoint and a few more steps
LONG = [f"steps={STEPS}", "checkpoint.every=4", "tracker=none", "optim.lr=1e-3", "optim.eps=1e-6", "parallel.zero=2"]
RAMP = "batch.ramp=[[4,640],[12,1700]]"  # five steps of 4 sequences, three of 12, then of 8: killed among the last
RULES = {
    "muon": ["optim=muon", "optim.groups=[{role: embedding, name: lion, lr: 1e-4}, {role: vector, weight_decay: 0.3}]"],
    "lion": ["optim=lion", "optim.lr=1e-4", "optim.ema=0.9"],
    "lamb": ["optim=lamb", "optim.ema=0.9", "schedule=wsd", "schedule.decays=[[6,10]]", "schedule.warmup_steps=2"],
}
LAYOUTS = [["parallel.tp=2"], ["parallel.pp=2", "parallel.zero=1"], ["parallel.cp=2", "parallel.zero=3"]]
CASES = [(rule, layout) for number, rule in enumerate(RULES) for layout in LAYOUTS[number:] + LAYOUTS[:number]]


@pytest.mark.long
@pytest.mark.parametrize(("rule", "elsewhere"), some(CASES, len(CASES)), ids=str)
def test_a_killed_run_is_the_undisturbed_one_bitwise_and_on_another_layout_within_rounding(
    home: Path, rule: str, elsewhere: list[str]
) -> None:
    def words(name: str, *more: str) -> tuple[Path, list[str]]:
        run = home / f"{rule}-{name}-{elsewhere[0]}"
        return run, overrides(run, home / "text", *LONG, RAMP, *RULES[rule], *more)

    whole, undisturbed = words("whole")
    train_here(home, undisturbed)
    sizes = [4] * 5 + [12] * 3 + [8] * (STEPS - 8)
    assert [step[-1] for step in steps_of(whole)] == [32 * rows for rows in accumulate(sizes)]
    for name, layout in (("here", []), ("elsewhere", elsewhere)):
        run, killed = words(name, f"faults=[{{at: {KILLED}, rank: 1, do: kill}}]")
        assert train_forked(home, killed)[0] != 0
        assert not any(RunDirectory(run).checkpoints.glob(f"step-*{STEPS}"))
        train_here(home, [f"run.dir={run}", *layout])
        if not layout:
            assert steps_of(run) == steps_of(whole)
            assert_same_state(run, whole)
            continue
        for found, expected in zip(steps_of(run), steps_of(whole), strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
