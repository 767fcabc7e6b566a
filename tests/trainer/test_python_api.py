from __future__ import annotations

from pathlib import Path

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


def test_best_fit_rows_are_attended_within_documents_unless_told_otherwise(tmp_path: Path) -> None:
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
