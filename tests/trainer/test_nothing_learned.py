"""Data and models from which nothing can be learned end a run, or are named, and never "complete" it."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

from stoker.trainer.report.metrics import read
from tests import world
from tests.launch.runs import overrides, write_text

USER, ASSISTANT = "user", "assistant"


def conversations(path: Path, question: int, answers: list[bool]) -> Path:
    """One of two turns for each of `answers`, without the second where it is False; questions of so many words."""
    with open(path, "w") as file:
        for number, answered in enumerate(answers):
            turns = [{"role": USER, "content": f"question {number} " + "long prompt " * question}]
            turns += [{"role": ASSISTANT, "content": "yes"}] if answered else []
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def trained(words: list[list[str]]) -> tuple[list[tuple[str, str]], str]:
    """On a rank: run after run in this process; outcomes and messages, those of errors too, and what was shown."""
    import torch.distributed as dist

    import stoker

    found, shown = [], io.StringIO()
    for each in words:
        if dist.is_initialized():
            dist.destroy_process_group()
        try:
            with redirect_stdout(shown):
                ending = stoker.run(each)
            found.append((ending.outcome.value, ending.message))
        except ValueError as error:
            found.append(("error", str(error)))
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found, shown.getvalue()


def words(folder: Path, name: str, data: Path, *more: str) -> list[str]:
    return overrides(
        folder / name, data, "data=chat", "seq_len=64", "batch.size=2", "batch.micro_size=1", "steps=8",
        "parallel.zero=0",
        f"data.cache={folder / 'cache' / name}", "log.progress=plain", *more,
    )  # fmt: skip


def test_masked_batches_take_no_update_are_counted_and_do_not_complete_a_run(tmp_path: Path) -> None:
    none = conversations(tmp_path / "none.jsonl", 6, [False] * 40)
    few = conversations(tmp_path / "few.jsonl", 2, [n % 3 == 0 for n in range(40)])
    (((first, second, third, fourth), shown),) = world.run(
        trained,
        1,
        [
            words(tmp_path, "none", none, "data.packing=padded"),
            words(tmp_path, "limit", none, "data.packing=padded", "nonfinite.limit=3"),
            words(tmp_path, "few", few, "data.packing=padded", "steps=12"),
            words(tmp_path, "evaluated", none, "data.packing=padded", "eval.sequences=4", "data.validation=0.4"),
        ],
    )
    why = "without a label to train on (prompts longer than seq_len=64, or no turn that is trained on?)"
    assert first == ("failed", f"8 steps in a row, up to step 8, {why}")
    assert second[0] == "failed" and "4 steps in a row" in second[1], "known a step late"
    assert third[0] == "completed"
    assert fourth[0] == "error" and "no token of the validation sequences is a label" in fourth[1]

    lines = read(tmp_path / "none" / "metrics.jsonl")
    assert [(line["updates"], line["loss"], line["empty"], line["skipped"]) for line in lines] == [
        (0, None, True, True)
    ] * 8
    lines = read(tmp_path / "few" / "metrics.jsonl")
    empty = [line for line in lines if line.get("empty")]
    assert 0 < len(empty) < 12 and all(line["loss"] is None and line["skipped"] for line in empty)
    assert lines[-1]["updates"] == 12 - len(empty)
    assert shown.count("warning: step 1: no token of the batch is a label") == 3
    assert "step 1 skipped: no label in the whole batch" in shown
    assert f"({12 - len(empty)} updates, {len(empty)} skipped, {len(empty)} of them without labels)" in shown


def test_a_model_that_no_gradient_reaches_fails_and_a_part_of_one_is_named(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    models = "model.target=tests.parallel.odd_models:"
    data = ["data=text", "batch.size=4", "steps=3"]
    (((zeroed, deaf), shown),) = world.run(
        trained,
        1,
        [
            words(tmp_path, "zeroed", text, *data, f"{models}Zeroed"),
            words(tmp_path, "deaf", text, *data, f"{models}Deaf"),
        ],
    )
    assert zeroed[0] == "error" and "step 1: the gradient norm is exactly 0" in zeroed[1]
    assert deaf[0] == "completed"
    named = "the gradient of layers.1.inner.bias, layers.1.inner.weight, layers.1.norm.weight, layers.1.outer.bias, "
    assert f"warning: step 1: {named}layers.1.outer.weight is exactly zero" in shown
