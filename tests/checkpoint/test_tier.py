"""`checkpoint.dir`: checkpoints in a faster place, found in the run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.checkpoint import make_tier, newest, tier_problem
from tests.checkpoint.simulated import saved, small_model


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "checkpoints"


def test_what_is_saved_elsewhere_is_found_in_the_run_directory(checkpoints: Path, tmp_path: Path) -> None:
    fast = tmp_path / "nvme" / "run"
    for _ in range(2):  # the second start finds the link
        make_tier(checkpoints, fast)
    saved(checkpoints, small_model(), 1)
    assert [path.name for path in newest(checkpoints)] == ["step-00000001"] == [path.name for path in newest(fast)]
    assert tier_problem(checkpoints, fast) is None


def test_an_emptied_disk_is_made_again(checkpoints: Path, tmp_path: Path) -> None:
    fast = tmp_path / "nvme"
    make_tier(checkpoints, fast)
    fast.rmdir()
    assert tier_problem(checkpoints, fast) is None and newest(checkpoints) == []
    make_tier(checkpoints, fast)
    saved(checkpoints, small_model(), 1)
    assert newest(fast)


def test_what_a_start_without_a_checkpoint_left_is_no_obstacle(checkpoints: Path, tmp_path: Path) -> None:
    (checkpoints / "step-00000001.attempt-1.partial").mkdir(parents=True)
    (checkpoints / "FENCE").write_text("{}")
    make_tier(checkpoints, tmp_path / "nvme")
    assert checkpoints.is_symlink() and list(checkpoints.iterdir()) == []
    assert [entry.name for entry in checkpoints.parent.iterdir()] == ["checkpoints"]


def refused(checkpoints: Path, elsewhere: Path | None) -> str:
    problem = tier_problem(checkpoints, elsewhere)
    assert problem is not None
    with pytest.raises(ValueError) as raised:
        make_tier(checkpoints, elsewhere)
    assert str(raised.value) == problem
    return problem


def test_a_run_has_its_checkpoints_in_one_place(checkpoints: Path, tmp_path: Path) -> None:
    saved(checkpoints, small_model(), 1)
    assert "holds the checkpoints of this run" in refused(checkpoints, tmp_path / "nvme")
    assert newest(checkpoints)


def test_a_run_does_not_change_its_place_by_an_override(checkpoints: Path, tmp_path: Path) -> None:
    make_tier(checkpoints, tmp_path / "nvme")
    for other in (None, tmp_path / "other"):
        assert f"keeps its checkpoints in {tmp_path / 'nvme'}" in refused(checkpoints, other)


def test_a_place_is_one_runs(checkpoints: Path, tmp_path: Path) -> None:
    saved(tmp_path / "nvme", small_model(), 1)
    assert "holds the checkpoints of another run" in refused(checkpoints, tmp_path / "nvme")


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/fast"])
def test_the_run_directory_is_no_other_place(checkpoints: Path, inside: str) -> None:
    assert "is in the run directory" in refused(checkpoints, checkpoints.parent / inside)


def test_a_url_is_for_the_second_tier(checkpoints: Path) -> None:
    assert "checkpoint.remote" in refused(checkpoints, Path("s3://bucket/run"))
