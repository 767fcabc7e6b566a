"""`parallel.engine=deepspeed` from the command line: settings, kills, and a change of engine in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.runs import command, finish, overrides, started, steps_of, wait_until_gone, write_text
from tests.launch.test_kills import STEPS, Killer

RUN = [f"steps={STEPS}", "checkpoint.every=2", "launch.max_restarts=20", "parallel.engine=deepspeed"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_text(folder / "text")
    return folder


def test_a_run_killed_at_random_moments_is_bitwise_the_undisturbed_one(home: Path) -> None:
    layout = [*RUN, "parallel.zero=3", "parallel.deepspeed.zero_optimization.reduce_bucket_size=9000"]
    reference, run = home / "undisturbed", home / "killed"
    status, output = finish(home, command("train", *overrides(reference, home / "text", *layout)))
    assert status == 0, output
    killer = Killer(run, seed=3)
    with started(home, command("train", *overrides(run, home / "text", *layout))) as process:
        for victim in ("rank", "rank in mid-save"):
            killer.strike(process, victim)
        output, _ = process.communicate(timeout=120)
        wait_until_gone(home)
    assert process.returncode == 0, output
    assert len(killer.kills) == 2
    assert steps_of(run) == steps_of(reference)


def test_a_setting_that_stoker_owns_is_refused_in_one_line(home: Path) -> None:
    words = overrides(home / "refused", home / "text", *RUN, "parallel.deepspeed.gradient_clipping=1.0")
    status, output = finish(home, command("train", *words))
    assert status != 0
    assert "parallel.deepspeed.gradient_clipping is Stoker's to decide: set clip_norm" in output
    assert "Traceback" not in output
