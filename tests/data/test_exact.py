"""The rows of a run do not depend on where it runs: every counted source, packing and mixture."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from stoker.conf.schema import Config
from stoker.data import IndexedLoader, open_rows, read_rows
from stoker.data.indexed import IndexPlan
from stoker.data.mixed import MixedPlan
from stoker.data.rows import LABELS, TOKENS
from stoker.parallel.batch import IGNORE_INDEX, Batch
from tests.data.batches import digest, together
from tests.data.counted import BATCH, KINDS, changed, mixture, standard_library
from tests.extent import some


def run(
    config: Config, starts: Sequence[tuple[int, int, int]], state: str | None = None, steps: Sequence[int] = ()
) -> tuple[list[str], str]:
    """The digests of the global batches of a run started anew for each (dp, workers, batches), and its last state."""
    found = []
    for dp, workers, batches in starts:
        streams = [
            IndexedLoader(open_rows(config, "train"), BATCH, r, dp, workers=workers, prefetch=2) for r in range(dp)
        ]
        try:
            for stream in streams:
                if state is not None:
                    stream.load_state(json.loads(state))
            for number in range(batches):
                step = steps[number] if steps else None
                found.append(digest(together([next_of(stream, step) for stream in streams])))
            states = {json.dumps(stream.state(), sort_keys=True) for stream in streams}
            assert len(states) == 1
            state = states.pop()
        finally:
            for stream in streams:
                stream.close()
    assert state is not None
    return found, state


@pytest.fixture(params=KINDS)
def config(request, tmp_path):
    return KINDS[request.param](tmp_path)


def batches_of_an_epoch(config: Config) -> int:
    return open_rows(config, "train").rows_per_epoch // BATCH


@pytest.mark.long
def test_every_split_into_resumes_reads_the_same_batches(config):
    edge = batches_of_an_epoch(config)  # the batch that spans two epochs
    starts = [(8, 0, 0), (6, 1, 2), (3, 0, edge), (3, 2, 0), (1, 3, 2), (4, 1, 1), (2, 4, 1)]
    expected, _ = run(config, [(1, 0, sum(batches for _, _, batches in starts))])
    assert run(config, starts)[0] == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.long
@pytest.mark.parametrize("dp", some([3, 1, 6, 2, 4, 8], 2))
def test_no_number_of_ranks_and_workers_changes_a_batch_of_a_mixture(tmp_path, dp):
    config = mixture(tmp_path)
    expected = [digest(read_rows(open_rows(config, "train"), range(BATCH * n, BATCH * n + BATCH))) for n in range(4)]
    for workers in range(5):
        assert run(config, [(dp, workers, 1), (dp, workers, 3)])[0] == expected


def test_a_state_saved_again_without_a_step_is_unchanged(config):
    _, state = run(config, [(2, 0, 3)])
    assert run(config, [(3, 0, 0)], state)[1] == state


def test_any_row_is_found_at_once_however_late(config):
    plan = open_rows(config, "train")
    late = read_rows(plan, [10**12, 10**12 + 1])  # a mode that walked there would never arrive
    assert late.tokens.shape == (2, config.seq_len)


def learned_tokens(plan: IndexPlan, numbers: np.ndarray) -> np.ndarray:
    """The place, in the source's tokens, of every label of the rows `numbers`."""
    pieces = plan.pieces(numbers)
    width = plan.seq_len + 1
    found = []
    for row in range(len(numbers)):
        mine = pieces.rows == row
        places = np.concatenate(
            [np.arange(b, b + n) for b, n in zip(pieces.begins[mine], pieces.lengths[mine], strict=True)]
        )[:width]
        begins = np.cumsum([0, *pieces.lengths[mine]])[:-1]
        kept = np.ones(len(places), bool)
        kept[0] = False
        if plan.document_mask:
            kept[begins[begins < len(places)]] = False
        found.append(places[kept])
    return np.concatenate(found)


@pytest.mark.parametrize("packing", ["concatenated", "best_fit", "padded"])
def test_an_epoch_of_real_text_tiles_the_tokens_of_every_document(tmp_path, packing):
    plan = open_rows(changed(standard_library(tmp_path), packing=packing, document_mask=True), "train")
    assert isinstance(plan, IndexPlan)
    count, total = plan.rows_per_epoch, len(plan.tokens.ids)
    expected = np.ones(total, np.int64)
    expected[plan.tokens.starts] = 0  # nothing comes before a document's first token
    if packing == "concatenated":
        expected[count * plan.seq_len + 1 :] = 0  # the last tokens, fewer than a row, are in none
        assert total - (count * plan.seq_len + 1) < plan.seq_len
    for epoch in range(2):
        numbers = np.arange(epoch * count, (epoch + 1) * count)
        places = learned_tokens(plan, numbers)
        assert np.array_equal(np.bincount(places, minlength=total), expected)
        out = np.empty((4, count, plan.seq_len), np.int32)
        plan.read(numbers, out)
        labels = out[LABELS][out[LABELS] != IGNORE_INDEX]
        assert np.array_equal(labels, plan.tokens.ids[places])  # the planes match the pieces


def test_a_mixture_reads_each_source_in_the_order_of_the_single_source(tmp_path):
    plan = open_rows(mixture(tmp_path), "train")
    assert isinstance(plan, MixedPlan)
    rows = np.arange(20 * BATCH)
    out = np.empty((4, len(rows), plan.seq_len), np.int32)
    plan.read(rows, out)
    sources, _ = plan.mixture.assign(rows)
    for number, source in enumerate(plan.plans):
        mine = out[:, sources == number]
        alone = np.empty_like(mine)
        source.read(np.arange(mine.shape[1]), alone)
        assert np.array_equal(mine, alone)
    few = plan.counts(len(rows))["few"]
    assert few["rows"] == plan.plans[0].total_rows  # its epochs are over, and it has left


def test_the_shares_of_a_mixture_are_its_weights_in_every_phase(tmp_path):
    plan = open_rows(mixture(tmp_path), "train")

    def got(first: int, last: int) -> list[int]:
        counts = [plan.counts(row) for row in (first, last)]
        return [counts[1][name]["rows"] - counts[0][name]["rows"] for name in ("few", "lines", "ids")]

    for step, weights in ((1, (2, 5, 3)), (2, (2, 5, 3)), (3, (1, 1, 2)), (4, (1, 1, 2))):
        rows = got((step - 1) * BATCH, step * BATCH)
        for count, weight in zip(rows, weights, strict=True):
            assert abs(count - BATCH * weight / sum(weights)) <= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_changed_in_mid_run_hold_from_there_on_and_do_not_change_earlier_rows(tmp_path, workers):
    config = changed(mixture(tmp_path), phases=[])
    before, state = run(config, [(2, workers, 3)])
    other = changed(config, weights={"few": 0, "lines": 1, "ids": 1})
    after, later = run(other, [(3, workers, 2), (2, workers, 2)], state)
    plan = open_rows(other, "train")
    plan.resume(json.loads(later)["weights"], 7 * BATCH, 7)
    rows = [digest(read_rows(plan, range(BATCH * n, BATCH * n + BATCH))) for n in range(7)]
    assert rows == before + after
    assert after != run(config, [(1, 0, 4)], state)[0]
    counts = [plan.counts(n * BATCH) for n in (3, 7)]
    assert counts[0]["few"] == counts[1]["few"]
    for name in ("lines", "ids"):
        assert abs(counts[1][name]["rows"] - counts[0][name]["rows"] - 2 * BATCH) <= 3


def test_a_phase_begins_at_its_step_on_every_resume(tmp_path):
    config = changed(mixture(tmp_path), phases=[{"from_step": 6, "weights": {"ids": 1}}])
    expected, _ = run(config, [(1, 0, 8)])
    for first in range(1, 8):
        assert run(config, [(2, 0, first), (3, 0, 8 - first)])[0] == expected


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_rows_of_skipped_steps_are_not_read_and_shift_nothing(tmp_path, workers):
    config = mixture(tmp_path)
    expected, _ = run(config, [(1, 0, 9)])
    found, state = run(config, [(2, workers, 4)], steps=[1, 4, 5, 9])
    assert found == [expected[0], expected[3], expected[4], expected[8]]
    assert json.loads(state)["row"] == 9 * BATCH


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"fw": 1}}, "data.weights names fw, and the sources are few, lines, ids"),
        ({"weights": {"few": 0}}, "data.weights: no source has a weight above 0"),
        ({"weights": {"few": "much"}}, "the weight of few is much, not a number from 0 on"),
        ({"phases": [{"from_step": 1, "weights": {"few": 1}}]}, "from_step=1 must be a step after 1"),
        ({"phases": [{"weights": {"few": 1}}]}, r"data.phases\[0\] is \{from_step: STEP"),
        ({"sources": {"a": {"path": "x"}}}, "data.sources.a needs a kind"),
        ({"sources": {"a": {"kind": "txt"}}}, "data.sources.a.kind=txt: choose from chat, "),
        ({"sources": {"a": {"kind": "text", "paht": "x"}}}, "data.sources.a has paht, and a source has kind, target"),
        ({"sources": {"a": {"kind": "text", "max_epochs": 0}}}, "a.max_epochs=0: must be a whole number above 0"),
        ({"sources": {"a": 3}}, "data.sources.a=3: a source is a dictionary"),
        ({"path": "/books"}, "data.path=/books with data.sources: each of them has its path"),
        ({"sources": {}, "phases": []}, "data.temperature=2.0: a single source has no weights"),
        ({"tokenizer": "bpe"}, "data.tokenizer=bpe is trained on one source"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_one_clear_error(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        open_rows(changed(mixture(tmp_path), **{"temperature": 2.0} | change), "train")


def test_sources_of_different_packings_and_row_lengths_have_separate_tables(tmp_path):
    config = KINDS["best_fit"](tmp_path)
    first = open_rows(config, "train").rows_per_epoch
    config.seq_len = 64
    second = open_rows(config, "train").rows_per_epoch
    assert second < first and len(list((tmp_path / "cache").glob("table-*[!k]"))) == 2
    again = open_rows(config, "train")
    assert isinstance(again, IndexPlan) and again.table is not None
    base = again.table.begins.base
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)  # the table stays in its file


def test_a_damaged_table_is_made_again(tmp_path, caplog):
    config = KINDS["best_fit"](tmp_path)
    expected = digest(read_rows(open_rows(config, "train"), range(BATCH)))
    (table,) = (path for path in (tmp_path / "cache").glob("table-*") if path.is_dir())
    (table / "begins").write_bytes(b"short")
    assert digest(read_rows(open_rows(config, "train"), range(BATCH))) == expected
    assert "row table" in caplog.text and "damaged and made again" in caplog.text


def test_evaluation_rows_of_a_mixture_come_from_all_sources(tmp_path):
    config = mixture(tmp_path)
    plan = open_rows(config, "validation")
    assert plan.total_rows == sum(one.rows_per_epoch for one in plan.plans)  # type: ignore[union-attr]
    out = np.empty((4, plan.total_rows, plan.seq_len), np.int32)
    plan.read(np.arange(plan.total_rows), out)
    assert len({row.tobytes() for row in out[TOKENS]}) > plan.total_rows / 2


def next_of(stream: IndexedLoader, step: int | None) -> Batch:
    if step is not None:
        stream.pass_over(step)
    return stream.next()
