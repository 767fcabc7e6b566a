"""What `Checkpoints` promises the trainer: snapshot, reports, retention, nothing overwritten."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import pytest
import torch

from stoker import checkpoint
from stoker.checkpoint import CheckpointMismatch, describe, newest, read_tensors, staging
from stoker.checkpoint.names import MANIFEST
from stoker.checkpoint.retention import Retention
from stoker.checkpoint.storage import discard
from stoker.parallel.shards import Chunk, Shard, whole
from tests.checkpoint.simulated import (
    Grid,
    begin,
    blank,
    cut,
    end,
    holds,
    resume_all,
    save,
    saved,
    small_model,
    start,
)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def hold_copies(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Snapshots wait for the returned event before they copy anything."""
    go = threading.Event()
    fill = staging.StagingPool.fill

    def late(self, shards, snapshot):
        assert go.wait(10)
        return fill(self, shards, snapshot)

    monkeypatch.setattr(staging.StagingPool, "fill", late)
    return go


def test_what_changes_after_await_staged_is_not_in_the_checkpoint(tmp_path):
    tensors = {("param", "w"): torch.randn(500, 300)}
    writers, ranks = start(tmp_path, 2), cut(tensors, Grid(rows=2))
    begin(writers, 1, ranks)
    for writer, shards in zip(writers, ranks, strict=True):
        writer.await_staged()
        shards[0].data.zero_()
    end(writers)
    ((_, value),) = read_tensors(newest(tmp_path)[0])
    assert torch.equal(value, tensors["param", "w"])


def test_save_returns_before_the_copy_and_await_staged_waits_for_it(tmp_path, monkeypatch):
    go = hold_copies(monkeypatch)
    (writer,) = start(tmp_path, 1)
    (shards,) = cut(small_model(), Grid())
    state = {"rows": [1]}
    writer.save(1, shards, state)
    state["rows"].append(2)
    awaited = threading.Thread(target=writer.await_staged)
    awaited.start()
    awaited.join(0.05)
    assert awaited.is_alive() and writer.finished() == []
    go.set()
    awaited.join(10)
    assert not awaited.is_alive()
    writer.wait()
    assert checkpoint.read_state(newest(tmp_path)[0]) == {"rows": [1]}


def test_sync_mode_returns_after_the_commit(tmp_path):
    (writer,) = start(tmp_path, 1, mode="sync")
    writer.save(1, cut(small_model(), Grid())[0], {})
    assert names(tmp_path) == ["step-00000001"]
    (report,) = writer.finished()
    assert 0 < report.staged_seconds <= report.written_seconds <= report.seconds and report.bytes > 0


def test_one_save_is_in_flight(tmp_path):
    writers, ranks = start(tmp_path, 2), cut(small_model(), Grid(rows=2))
    writers[1].save(1, ranks[1], {})
    second = threading.Thread(target=writers[1].save, args=(2, ranks[1], {}))
    second.start()
    second.join(0.05)
    assert second.is_alive()  # rank 0 has not committed step 1
    writers[0].save(1, ranks[0], {})
    writers[0].save(2, ranks[0], {})
    second.join(10)
    assert [[report.error for report in reports] for reports in end(writers)] == [[None, None]] * 2
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_reports_are_given_once_and_wait_leaves_them_for_finished(tmp_path):
    (writer,) = start(tmp_path, 1)
    for step in (1, 2):
        writer.save(step, [], {})
    assert [report.step for report in writer.wait()] == [1, 2]
    assert [report.step for report in writer.finished()] == [1, 2]
    assert writer.finished() == writer.wait() == []


def test_a_step_that_is_committed_is_not_saved_again(tmp_path):
    (writer,) = start(tmp_path, 1)
    save([writer], 1, [[]], {"which": "first"})
    save([writer], 1, [[]], {"which": "second"})
    assert checkpoint.read_state(newest(tmp_path)[0]) == {"which": "first"}


def test_something_else_under_the_name_is_never_overwritten(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    writers = start(tmp_path, 2)
    begin(writers, 1, cut(small_model(), Grid(rows=2)))
    for (report,) in end(writers):
        assert "exists already" in (report.error or "")
    assert list((tmp_path / "step-00000001").iterdir()) == []


def test_the_newest_valid_ones_are_kept(tmp_path):
    (writer,) = start(tmp_path, 1, keep=2)
    for step in (1, 2, 3):
        save([writer], step, [[]])
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / MANIFEST).write_text("broken")
    save([writer], 4, [[]])
    # The broken one does not count: 2 and 4 are the two valid ones.
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_every_rule_of_retention_keeps_its_checkpoints():
    losses = {step: None if step == 60 else abs(step - 25) / 10 for step in range(10, 110, 10)} | {35: float("nan")}
    assert Retention(2).kept(losses) == {100, 90}
    assert Retention(1, keep_every=40).kept(losses) == {100, 40, 80}
    assert Retention(1, keep_best=3).kept(losses) == {100, 20, 30, 40}, "of equal ones the newer first; 60 and 35 not"
    assert Retention(1, keep_best=99).kept(losses) == set(losses) - {60, 35}


def test_the_best_by_validation_loss_are_kept_and_broken_ones_do_not_count(tmp_path):
    (writer,) = start(tmp_path, 1, keep=1, keep_best=1)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, None)):
        save([writer], step, [[]], {"val_loss": loss})
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    save([writer], 5, [[]], {"val_loss": 1.5})
    assert names(tmp_path) == ["step-00000005"]


def test_a_checkpoint_on_its_way_out_is_never_a_candidate(tmp_path, monkeypatch):
    saved(tmp_path, {}, 1, 2)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # as if killed in the middle
    discard(tmp_path / "step-00000001")
    assert [path.name for path in newest(tmp_path)] == ["step-00000002"]
    assert not (tmp_path / "step-00000001.removed" / MANIFEST).exists(), "manifest first"
    monkeypatch.undo()
    checkpoint.fence(tmp_path, 2)
    assert names(tmp_path) == ["FENCE", "step-00000002"]


def test_the_pool_follows_shards_that_change(tmp_path):
    """Optimizer state appears at the first update."""
    (writer,) = start(tmp_path, 1)
    tensors = small_model()
    parameters = {key: value for key, value in tensors.items() if key[0] == "param"}
    writer.prepare(cut(parameters, Grid())[0])
    save([writer], 1, cut(parameters, Grid()))
    save([writer], 2, cut(tensors, Grid()))
    ranks = blank(cut(tensors, Grid()))
    assert resume_all(tmp_path, ranks) == [{"step": 2}] and holds(ranks, tensors)


def test_shards_that_are_views_are_stored_as_what_they_show(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    shards = [
        Shard("transposed", "param", (6, 4), whole((6, 4)), base.T),
        Shard("column", "param", (4, 1), whole((4, 1)), base[:, 2:3]),
        Shard("trained", "param", (4, 6), whole((4, 6)), torch.nn.Parameter(base.clone())),
    ]
    save(start(tmp_path, 1), 1, [shards])
    found = dict(read_tensors(newest(tmp_path)[0]))
    assert torch.equal(found["transposed"], base.T) and torch.equal(found["column"], base[:, 2:3])
    assert torch.equal(found["trained"], base)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (Shard("w", "param", (2,), whole((2,)), torch.zeros(2, dtype=torch.complex64)), "complex64"),
        (Shard("w", "param", (2,), whole((2,)), torch.zeros(3)), "param/w"),
        (Shard("w", "param", (2,), Chunk((1,), (2,)), torch.zeros(2)), "param/w"),
        (Shard("w", "param", (2,), whole((2,)), torch.zeros(2), 2, 2), "replica 2 of 2"),
    ],
)
def test_a_shard_that_cannot_be_stored_is_refused(tmp_path, shard, message):
    (writer,) = start(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        writer.prepare([shard])
    writer.save(1, [shard], {})
    writer.await_staged()
    (report,) = writer.wait()
    assert message in (report.error or "") and names(tmp_path) == ["step-00000001.attempt-1.failed.json"]


def test_a_state_that_json_cannot_hold_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError):
        start(tmp_path, 1)[0].save(1, [], {"rng": torch.zeros(1)})


def matrix(name: str, rows: range, shape: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float32) -> list[Shard]:
    chunk = Chunk((rows.start, 0), (len(rows), shape[1]))
    return [Shard(name, "param", shape, chunk, torch.zeros(chunk.sizes, dtype=dtype))]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([matrix("w", range(0, 2)), matrix("w", range(3, 4))], "6 of its 8 elements"),
        ([matrix("w", range(0, 3)), matrix("w", range(2, 4))], "overlap"),
        ([matrix("w", range(0, 4)), matrix("w", range(0, 4))], "overlap"),
        ([matrix("w", range(0, 2)), matrix("w", range(2, 4), dtype=torch.float16)], "F16"),
        ([matrix("w", range(0, 2)), matrix("w", range(2, 4), shape=(5, 2))], r"(5, 2)"),
    ],
)
def test_tensors_that_are_not_whole_are_never_committed(tmp_path, ranks, message):
    writers = start(tmp_path, 2)
    begin(writers, 1, ranks)
    for (report,) in end(writers):
        assert "param/w" in (report.error or "") and message in (report.error or "")
    assert newest(tmp_path) == [] and not list(tmp_path.glob("*.partial"))


def test_a_list_of_checkpoints_shows_their_contents(tmp_path):
    writers = start(tmp_path, 2)
    save(writers, 1, cut(small_model(), Grid(rows=2)), {"layout": "dp_shard 2", "loss": 2.5})
    save(writers, 2, cut(small_model(), Grid(rows=2)), {"loss": "nonsense"})
    (tmp_path / "step-00000002" / "rank-00001.safetensors").write_bytes(b"")
    first, second = describe(tmp_path)
    assert (first.step, first.ranks, first.layout, first.loss, first.problem) == (1, 2, "dp_shard 2", 2.5, None)
    assert first.tensors == len(small_model()) and first.attempt == 1
    assert second.loss is None and "rank-00001.safetensors: 0 bytes" in (second.problem or "")
    assert describe(tmp_path / "absent") == newest(tmp_path / "absent") == []


def test_another_model_is_refused_by_all_ranks_naming_all_that_differs(tmp_path):
    tensors = {("param", name): torch.zeros(4, 2) for name in ("kept", "shaped", "typed", "gone")}
    saved(tmp_path, tensors, 1)
    other = {
        ("param", "kept"): torch.zeros(4, 2),
        ("param", "shaped"): torch.zeros(4, 3),
        ("param", "typed"): torch.zeros(4, 2, dtype=torch.int32),
        ("param", "new"): torch.zeros(1),
    }
    for error in resume_all(tmp_path, cut(other, Grid(rows=3))):
        assert isinstance(error, CheckpointMismatch)
        for part in (
            "param/shaped has shape (4, 2), the model's has (4, 3)",
            "param/typed is F32, the model's is I32",
            "param/new is missing",
            "param/gone is not in the model",
        ):
            assert part in str(error)
        assert "kept" not in str(error)
    assert len(newest(tmp_path)) == 1  # not damage


def test_ranks_that_hold_different_tensors_miss_none(tmp_path):
    """Pipeline stages: no rank has a place for all tensors, together they have."""
    tensors = {("param", name): torch.randn(4) for name in "ab"}
    saved(tmp_path, tensors, 1)
    (a, b) = blank(cut(tensors, Grid()))[0]
    assert resume_all(tmp_path, [[a], [b]]) == [{"step": 1}] * 2
    assert holds([[a], [b]], tensors)
    (error, _) = resume_all(tmp_path, [[a], [a]])
    assert "param/b is not in the model" in str(error)


def test_a_rank_that_cannot_read_stops_all_and_condemns_nothing(tmp_path, monkeypatch):
    saved(tmp_path, small_model(), 1)
    ranks = cut(small_model(), Grid(rows=2))
    load = checkpoint.load

    def unlucky(stored, shards, near):
        if shards[0] is ranks[1][0]:
            raise PermissionError("no right to read")
        return load(stored, shards, near)

    monkeypatch.setattr("stoker.checkpoint.resuming.load", unlucky)
    for error in resume_all(tmp_path, ranks):
        assert isinstance(error, OSError) and "no right to read" in str(error)
    assert len(newest(tmp_path)) == 1


@pytest.mark.parametrize("damaged", [0, 1])
def test_where_one_rank_finds_damage_and_another_cannot_read_nothing_is_condemned(tmp_path, monkeypatch, damaged):
    """Whether it is damaged cannot be known by all: it may be the same fault of a machine or of the network."""
    saved(tmp_path, small_model(), 1)
    ranks = cut(small_model(), Grid(rows=2))

    def unlucky(stored, shards, near):
        if shards[0] is ranks[damaged][0]:
            raise checkpoint.DamagedCheckpoint("block 3 is not as written")
        raise PermissionError("no right to read")

    monkeypatch.setattr("stoker.checkpoint.resuming.load", unlucky)
    for error in resume_all(tmp_path, ranks):
        assert isinstance(error, OSError) and f"no right to read (seen by rank {1 - damaged})" in str(error)
    assert names(tmp_path) == ["step-00000001"] and len(newest(tmp_path)) == 1


def test_a_sound_manifest_of_another_format_is_refused_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("stoker.checkpoint.format.FORMAT", 2)
    saved(tmp_path, small_model(), 1)
    monkeypatch.undo()
    (error,) = resume_all(tmp_path, cut(small_model(), Grid()))
    assert isinstance(error, CheckpointMismatch) and "another version of Stoker" in str(error)
    assert names(tmp_path) == ["step-00000001"]


def test_the_room_imports_nothing_that_unpickles():
    for path in Path(checkpoint.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in imported} & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"torch.load", "torch.save", "eval", "exec", "numpy.load", "np.load"}
