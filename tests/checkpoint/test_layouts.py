"""What is written under one layout is read under any other, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stoker.checkpoint import newest, read_state, read_tensors, verify
from stoker.checkpoint.format import Piece, ShardIndex
from stoker.checkpoint.plan import pieces_to_write
from stoker.checkpoint.reader import load
from stoker.checkpoint.stored import Stored, open_checkpoint
from stoker.checkpoint.tiling import PRIME, assemble, cover, tiling_problem
from stoker.parallel.dtypes import DTYPES
from stoker.parallel.shards import Chunk, Shard, whole
from tests.checkpoint.simulated import Grid, blank, cut, holds, random_tensor, resume_all, same_bits, save, saved, start

grids = st.builds(Grid, st.integers(1, 4), st.integers(1, 3), st.integers(1, 2))
shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
slow = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@slow
@given(
    shapes=st.lists(shapes, min_size=1, max_size=5),
    dtypes=st.data(),
    old=grids,
    new=grids,
    limit=st.sampled_from([None, 1024]),
)
def test_any_layout_reads_what_any_other_wrote(shapes, dtypes, old, new, limit):
    tensors = {}
    for number, shape in enumerate(shapes):
        dtype = dtypes.draw(st.sampled_from(list(DTYPES.values())))
        tensors["param" if number % 2 else "optim.exp_avg", f"t{number}"] = random_tensor(shape, dtype, number)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save(start(directory, old.world, staging_limit=limit), 7, cut(tensors, old))
        ranks = blank(cut(tensors, new))
        assert resume_all(directory, ranks) == [{"step": 7}] * new.world
        assert holds(ranks, tensors)
        assert verify(newest(directory)[0]) == []
        whole_tensors = dict(read_tensors(newest(directory)[0], "optim.exp_avg"))
        assert all(same_bits(value, tensors["optim.exp_avg", name]) for name, value in whole_tensors.items())
        assert len(whole_tensors) == sum(kind == "optim.exp_avg" for kind, _ in tensors)


@pytest.mark.parametrize(("old", "new"), [(Grid(3, 2), Grid(2, 3, 2)), (Grid(), Grid(4))], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_parameter_is_read_in_the_dtype_that_a_run_holds_it_in(tmp_path, stored, old, new):
    """Frozen ones are held in the compute dtype. Optimizer state has one dtype only."""
    shapes = {"matrix": (37, 70), "vector": (9,), "scalar": (), "nothing": (0, 3)}
    values = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in shapes.items()}
    save(start(tmp_path, old.world), 1, cut({("param", name): v.to(stored) for name, v in values.items()}, old))
    for held in (torch.float32, torch.bfloat16):
        tensors = {("param", name): value.to(stored).to(held) for name, value in values.items()}
        ranks = blank(cut(tensors, new))
        assert resume_all(tmp_path, ranks) == [{"step": 1}] * new.world
        assert holds(ranks, tensors)
    moments = {("optim.exp_avg", "matrix"): values["matrix"]}
    save(start(tmp_path, old.world, attempt=2), 2, cut(moments, old))
    narrow = {key: value.bfloat16() for key, value in moments.items()}
    assert all("is F32, the model's is BF16" in str(error) for error in resume_all(tmp_path, cut(narrow, new)))


@given(shape=shapes, replicas=st.integers(1, 9), name=st.text(max_size=3))
def test_the_pieces_of_all_replicas_tile_the_shard(shape, replicas, name):
    chunk = Chunk(tuple(3 for _ in shape), shape)
    data = torch.empty(shape)
    outer = tuple(size + 5 for size in shape)
    pieces = [
        piece
        for replica in range(replicas)
        for piece in pieces_to_write(Shard(name, "param", outer, chunk, data, replica, replicas))
    ]
    moved = [Chunk((*(start - 3 for start in piece.offsets),), piece.sizes) for piece in pieces]
    assert tiling_problem(shape, moved) is None


def test_replicas_share_the_writing_evenly():
    sizes = [0] * 8
    for layer in range(64):
        for name, shape in ((f"{layer}.matrix", (129, 64)), (f"{layer}.norm", (64,))):
            for replica in range(8):
                shard = Shard(name, "param", shape, whole(shape), torch.empty(shape), replica, 8)
                sizes[replica] += sum(piece.numel for piece in pieces_to_write(shard))
    assert max(sizes) < 1.02 * sum(sizes) / 8


@given(data=st.data(), shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
def test_tiling_is_proven_exactly(data, shape):
    count = data.draw(st.integers(1, 4))
    chunks = []
    for _ in range(count):
        offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        size = tuple(data.draw(st.integers(1, whole - start)) for whole, start in zip(shape, offset, strict=True))
        chunks.append(Chunk(offset, size))
    times = torch.zeros(shape, dtype=torch.int64)
    for chunk in chunks:
        times[chunk.within(whole(shape))] += 1
    assert (tiling_problem(shape, chunks) is None) == bool((times == 1).all())


@given(data=st.data(), shape=st.lists(st.integers(1, 5), max_size=2).map(tuple))
def test_the_cover_of_all_ranks_agrees_with_the_list_of_all_pieces(data, shape):
    """Tensors of one shape, so that a gap in one could make up for an overlap in another."""
    indexes = []
    for rank in range(data.draw(st.integers(1, 3))):
        pieces = []
        for name in data.draw(st.lists(st.sampled_from("ab"), max_size=3)):
            offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
            size = tuple(data.draw(st.integers(1, n - start)) for start, n in zip(offset, shape, strict=True))
            pieces.append(Piece(name, "param", "F32", shape, Chunk(offset, size), 0))
        indexes.append(ShardIndex(rank, 1, 1, 0, 1024, (), tuple(pieces)))
    covers, origins = zip(*(cover(index.pieces) for index in indexes), strict=True)
    begun = [origin for of_rank in origins for origin in of_rank]
    try:
        count = len(assemble(indexes))
    except ValueError:
        count = None
    whole_ones = len(begun) if sum(covers) % PRIME == 0 and len(set(begun)) == len(begun) else None
    assert whole_ones == count


def test_a_scalar_is_written_once():
    assert tiling_problem((), [whole(())]) is None
    assert tiling_problem((), []) is not None
    assert tiling_problem((), [whole(()), whole(())]) is not None


def test_a_shard_file_is_a_safetensors_file(tmp_path):
    tensors = {("param", name): random_tensor((5, 3), dtype, 1) for name, dtype in DTYPES.items()}
    saved(tmp_path, tensors, 1, grid=Grid(rows=2))
    found = load_file(tmp_path / "step-00000001" / "rank-00001.safetensors")
    assert same_bits(found["param/BF16@2,0"], tensors["param", "BF16"][2:])
    assert len(found) == len(tensors)


def test_pieces_larger_than_a_block_are_read_in_parts(tmp_path):
    tensors = {("param", "w"): random_tensor((50, 7, 3), torch.float32, 1)}
    saved(tmp_path, tensors, 1, grid=Grid(rows=3, columns=2))
    ranks = blank(cut(tensors, Grid(rows=2, columns=3)))
    resume_all(tmp_path, ranks)
    assert holds(ranks, tensors)


def test_only_the_blocks_that_are_needed_are_read(tmp_path):
    tensors = {("param", "w"): random_tensor((64, 256), torch.float32, 1)}  # a row is a block
    saved(tmp_path, tensors, 1, grid=Grid())
    path = tmp_path / "step-00000001" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    first_half = blank(cut(tensors, Grid(rows=2)))[:1]
    load(open_checkpoint(path.parent), first_half[0])
    assert holds(first_half, tensors)


def test_a_rank_on_an_unchanged_layout_reads_one_index(tmp_path, monkeypatch):
    """And one of another layout reads on until it has all it needs: not what all ranks wrote."""
    tensors = {("param", name): random_tensor((24, 5), torch.float32, n) for n, name in enumerate("abc")}
    saved(tmp_path, tensors, 1, grid=Grid(rows=12))
    stored, read, index = open_checkpoint(newest(tmp_path)[0]), [], Stored.index
    monkeypatch.setattr(Stored, "index", lambda self, rank: read.append(rank) or index(self, rank))
    for world, rank, expected in ((12, 7, {7}), (6, 0, {0, 1}), (6, 3, {6, 7})):
        read.clear()
        shards = blank(cut(tensors, Grid(rows=world)))[rank]
        load(stored, shards, (rank + 0.5) / world)
        assert set(read) == expected and holds([shards], tensors)


def test_two_shards_may_need_the_same_elements(tmp_path):
    tensors = {("param", "w"): random_tensor((40, 16), torch.float32, 1)}
    saved(tmp_path, tensors, 1)
    (shards,) = blank(cut(tensors, Grid()))
    rows = shards[0].chunk.rows(7, 33)
    shards.append(Shard("w", "param", (40, 16), rows, torch.zeros(rows.sizes)))
    load(open_checkpoint(newest(tmp_path)[0]), shards)
    assert holds([shards], tensors)


def test_only_selected_tensors_are_read(tmp_path):
    tensors = {("param", name): random_tensor((5, 3), torch.float32, 1) for name in ("a", "b")}
    saved(tmp_path, tensors, 1)
    assert [name for name, _ in read_tensors(newest(tmp_path)[0], select=lambda name: name == "b")] == ["b"]


def test_the_state_comes_back_as_it_was(tmp_path):
    state = {"tokens": 3, "loss": 0.1, "data": {"rows": [1, 2**60], "name": "ä"}, "none": None}
    save(start(tmp_path, 1), 1, cut({}, Grid()), state)
    assert read_state(newest(tmp_path)[0]) == state


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"staging_limit": 1 << 20}], ids=str)
def test_tensors_on_a_gpu_are_saved_as_they_were_when_save_was_called(tmp_path, options):
    data = torch.zeros(1 << 24, device="cuda")
    (writer,) = start(tmp_path, 1, **options)
    shard = Shard("w", "param", tuple(data.shape), whole(tuple(data.shape)), data)
    for step in range(1, 6):
        for _ in range(50):
            data.add_(1)  # still queued when save is called
        writer.save(step, [shard], {})
        writer.await_staged()
        data.add_(1000)
        data.sub_(1000)
        assert not [report.error for report in writer.wait() if report.error]
        ((_, value),) = read_tensors(newest(tmp_path)[0])
        assert bool((value == 50 * step).all())
