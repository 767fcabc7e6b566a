"""What packing promises is kept by the model and by what a run reports."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from stoker.conf.compose import compose
from stoker.data import open_rows, read_rows
from stoker.parallel.batch import IGNORE_INDEX
from stoker.trainer.report.metrics import read
from tests import world
from tests.data.counted import KINDS, changed, chat
from tests.launch.runs import overrides, steps_of
from tests.models.tiny import decoder, shape
from tests.trainer.test_python_api import trained


@pytest.mark.parametrize("packing", ["concatenated", "best_fit", "padded"])
@pytest.mark.parametrize("kind", ["text", "chat", "mixture"])
def test_changing_a_document_changes_no_logit_of_another(tmp_path: Path, kind: str, packing: str) -> None:
    config = changed(KINDS[kind](tmp_path), packing=packing, document_mask=True)
    config.seq_len = 400
    rows = read_rows(open_rows(config, "train"), range(20))
    model = decoder(shape(vocab_size=320))
    shared = [row for row in range(20) if rows.documents[row].max() > 0]
    assert len(shared) > 2, "too few rows hold two documents: the test would prove nothing"
    for row in shared[:3]:
        one = rows[row : row + 1]
        before = model(one.tokens, one.positions, one.documents).detach()
        for document in one.documents[0].unique():
            mine = one.documents[0] == document
            other = torch.where(mine, (one.tokens + 7) % 256, one.tokens)
            after = model(other, one.positions, one.documents).detach()
            assert torch.equal(before[~mine], after[~mine])
            assert not torch.equal(before[mine], after[mine])


def test_without_a_mask_documents_do_see_each_other(tmp_path: Path) -> None:
    config = changed(KINDS["text"](tmp_path), packing="best_fit", document_mask=False)
    config.seq_len = 400
    rows = read_rows(open_rows(config, "train"), range(20))
    row = next(row for row in range(20) if (rows.documents[row] == 1).any())
    one, model = rows[row : row + 1], decoder(shape(vocab_size=320))
    mine = one.documents[0] == 0
    before = model(one.tokens, one.positions, None)
    after = model(torch.where(mine, (one.tokens + 7) % 256, one.tokens), one.positions, None)
    assert not torch.equal(before[one.documents[0] == 1], after[one.documents[0] == 1])


def test_the_tokens_a_run_reports_are_the_labels_it_learned(tmp_path: Path) -> None:
    """And only rows of the steps that are not passed over."""
    data = chat(tmp_path).data
    words = overrides(
        tmp_path / "run", Path(str(data.path)), "data=chat", "seq_len=256", "batch.size=4", "batch.micro_size=2",
        "steps=6",
        f"data.cache={data.cache}", "data.validation=0.1", "skip_steps=[[2,3],[5,5]]", "checkpoint.every=0",
    )  # fmt: skip
    assert world.run(trained, 1, words, fresh=True) == [("completed", 6)]
    plan = open_rows(dataclasses.replace(compose(words)), "train")
    assert plan.document_mask
    steps = read(tmp_path / "run" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 4, 6]
    seen = 0
    for step in steps:
        rows = read_rows(plan, range(4 * step["step"] - 4, 4 * step["step"]))
        seen += int((rows.labels != IGNORE_INDEX).sum())
        assert step["tokens"] == seen
        assert step["updates"] == steps.index(step) + 1


@pytest.mark.long
def test_a_run_that_passes_over_steps_and_resumes_reads_what_one_that_never_stopped_reads(tmp_path: Path) -> None:
    data = KINDS["mixture"](tmp_path).data
    sources = ",".join(
        f"{name}:{{kind:{source['kind']},path:'{source['path']}',weight:{source['weight']},"
        f"args:{{{','.join(f'{k}:{v}' for k, v in source.get('args', {}).items())}}}}}"
        for name, source in data.sources.items()
    )
    common = [
        "seq_len=32", "batch.size=4", "batch.micro_size=2", "checkpoint.every=2", f"data.cache={data.cache}",
        f"data.sources={{{sources}}}", "data.phases=[{from_step:4,weights:{ids:1,few:3}}]", "skip_steps=[[3,4],[7,7]]",
        "schedule.total_steps=9",
    ]  # fmt: skip
    whole = overrides(tmp_path / "whole", tmp_path, "data.path=null", *common, "steps=9")
    first = overrides(tmp_path / "parts", tmp_path, "data.path=null", *common, "steps=5")
    second = overrides(tmp_path / "parts", tmp_path, "data.path=null", *common, "steps=9")
    assert world.run(trained, 1, whole, fresh=True) == [("completed", 9)]
    assert world.run(trained, 1, first, fresh=True) == [("completed", 5)]
    assert world.run(trained, 1, second, fresh=True) == [("completed", 9)]
    one, two = steps_of(tmp_path / "whole"), steps_of(tmp_path / "parts")
    assert [step[0] for step in one] == [1, 2, 5, 6, 8, 9] and one == two
