"""Data that differ from what was written are never loaded, however they were changed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker.checkpoint import (
    CheckpointMismatch,
    DamagedCheckpoint,
    describe,
    load,
    newest,
    open_checkpoint,
    read_state,
    read_tensors,
    verify,
)
from stoker.checkpoint.compare import compare
from stoker.checkpoint.format import decode_index, decode_manifest, decode_state, digest, encode_manifest
from stoker.checkpoint.names import MANIFEST
from stoker.checkpoint.stored import read_manifest
from tests.checkpoint.simulated import Grid, blank, cut, holds, resume_all, saved, small_model

OLD, NEW = small_model(1), small_model(2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 (OLD) and 2 (NEW), each written by two ranks."""
    saved(tmp_path, OLD, 1)
    saved(tmp_path, NEW, 2)
    return tmp_path


def files(directory: Path) -> list[Path]:
    return sorted((directory / "step-00000002").iterdir())


def read_everything(checkpoint: Path) -> None:
    (shards,) = cut(NEW, Grid())
    load(open_checkpoint(checkpoint), shards)


def test_every_flipped_bit_is_found_and_named(run):
    chance = random.Random(0)
    sizes = {path: path.stat().st_size for path in files(run)}
    for number in range(500):
        # Half of the flips in any file alike, half in proportion to the bytes.
        path = chance.choices(list(sizes), list(sizes.values()) if number % 2 else None)[0]
        place = chance.randrange(sizes[path])
        content = path.read_bytes()
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        problems = verify(path.parent)
        assert problems and all(path.name in problem for problem in problems), (path, place, problems)
        if path.suffix == ".safetensors":
            index = decode_index(path.with_name(path.name.replace("safetensors", "index.json")).read_bytes(), "")
            named = [piece.tensor for piece in index.pieces if piece.start <= place < piece.stop]
            assert f"block {place // 1024} " in problems[0] and all(name in problems[0] for name in named)
        if path.suffix == ".json":
            with pytest.raises(DamagedCheckpoint, match=path.name):
                read_everything(path.parent)
        path.write_bytes(content)
    assert verify(run / "step-00000002") == []


@pytest.mark.parametrize("number", range(6))
def test_a_flip_makes_all_ranks_fall_back_and_sets_the_checkpoint_aside(run, number, caplog):
    path = files(run)[number]
    content = bytearray(path.read_bytes())
    content[-1] ^= 16
    path.write_bytes(content)
    ranks = blank(cut(NEW, Grid(rows=3)))
    assert resume_all(run, ranks) == [{"step": 1}] * 3
    assert holds(ranks, OLD)
    assert [entry.name for entry in (run / "damaged").iterdir()] == ["step-00000002"]
    assert [path.name for path in newest(run)] == ["step-00000001"]
    assert path.name in caplog.text and "step-00000002" in caplog.text


def test_where_no_checkpoint_is_sound_all_ranks_raise_and_none_continues(run):
    for step in (1, 2):
        path = run / f"step-{step:08d}" / "rank-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    errors = resume_all(run, cut(NEW, Grid(rows=2)))
    for error in errors:
        assert isinstance(error, DamagedCheckpoint) and "step-00000001/rank-00001.safetensors" in str(error)
        assert "\n" not in str(error) and "damaged/" in str(error)
    assert newest(run) == [] and len(list((run / "damaged").iterdir())) == 2
    assert resume_all(run, cut(NEW, Grid(rows=2))) == [None, None], "the next start begins anew"


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("how", ["removed", "emptied", "cut", "longer", "linked", "directory", "pipe"])
def test_a_file_that_is_not_what_was_written_is_damage(run, number, how):
    path = files(run)[number]
    content = path.read_bytes()
    path.unlink()
    if how in ("emptied", "cut", "longer"):
        path.write_bytes({"emptied": b"", "cut": content[:-1], "longer": content + b" "}[how])
    elif how == "linked":
        elsewhere = run / "elsewhere"
        elsewhere.write_bytes(content)
        path.symlink_to(elsewhere)  # even the right bytes: a checkpoint is read only from its own directory
    elif how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    with pytest.raises(DamagedCheckpoint, match=path.name):
        read_everything(path.parent)
    assert any(path.name in problem for problem in verify(path.parent))
    assert describe(run)[-1].problem is not None and describe(run)[0].problem is None
    (ranks,) = (blank(cut(NEW, Grid())),)
    assert resume_all(run, ranks) == [{"step": 1}] and holds(ranks, OLD)


@pytest.mark.parametrize("pattern", ["rank-0000{}.safetensors", "rank-0000{}.index.json"])
def test_swapped_files_are_found(run, pattern):
    first, second = (run / "step-00000002" / pattern.format(rank) for rank in (0, 1))
    first.rename(run / "kept")
    second.rename(first)
    (run / "kept").rename(second)
    with pytest.raises(DamagedCheckpoint, match="rank-0000"):
        read_everything(first.parent)


@pytest.mark.parametrize("number", range(6))
def test_a_stale_file_of_another_checkpoint_is_found(run, number):
    path = files(run)[number]
    shutil.copy(run / "step-00000001" / path.name, path)
    with pytest.raises(DamagedCheckpoint):
        read_everything(path.parent)
    (ranks,) = (blank(cut(NEW, Grid())),)
    assert resume_all(run, ranks) == [{"step": 1}] and holds(ranks, OLD)


def test_a_file_cut_anywhere_is_found_and_named(run):
    chance = random.Random(1)
    for path in files(run):
        content = path.read_bytes()
        for length in {0, 1, len(content) - 1, *(chance.randrange(len(content)) for _ in range(20))}:
            path.write_bytes(content[:length])
            with pytest.raises(DamagedCheckpoint, match=path.name):
                read_everything(path.parent)
            assert any(path.name in problem for problem in verify(path.parent))
        path.write_bytes(content)
    read_everything(run / "step-00000002")


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(run):
    (run / "step-00000002").rename(run / "step-00000009")
    with pytest.raises(DamagedCheckpoint, match="step 9, but it holds step 2"):
        read_everything(run / "step-00000009")


def test_set_aside_twice_both_are_kept(run):
    for _ in range(2):
        (run / "step-00000002" / MANIFEST).write_text("{}")
        resume_all(run, blank(cut(NEW, Grid())))
        saved(run, NEW, 2)
    assert sorted(entry.name for entry in (run / "damaged").iterdir()) == ["step-00000002", "step-00000002.1"]


def test_verify_names_every_bad_block_and_reports_progress(run):
    path = run / "step-00000002" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    for block in (1, 3):
        content[block * 1024 + 5] ^= 1
    path.write_bytes(content)
    seen = []
    problems = verify(path.parent, lambda done, total: seen.append((done, total)))
    assert ["block 1" in problems[0], "block 3" in problems[1], len(problems)] == [True, True, 2]
    total = read_manifest(path.parent).bytes
    assert seen[-1] == (total, total) and len(seen) > 5


# An untrusted checkpoint: consistent in its digests, but not written by Stoker.


def forge(checkpoint: Path, name: str, change) -> None:
    """Change the JSON of an index (head and body as one object) or of the state, and make all digests fit."""
    path = checkpoint / name
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")]
    value = change({key: value for line in lines for key, value in line.items()})
    if len(lines) == 2 and isinstance(value, dict):
        body = {key: value[key] for key in lines[1] if key in value}
        text = json.dumps(body).encode()
        head = {key: value[key] for key in lines[0] if key in value} | {"body": asdict(digest(text))}
        value = json.dumps(head).encode() + b"\n" + text
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    manifest = read_manifest(checkpoint)
    manifest.files[name] = digest(path.read_bytes().partition(b"\n")[0] if len(lines) == 2 else path.read_bytes())
    (checkpoint / MANIFEST).write_bytes(encode_manifest(manifest))


def with_piece(**changes):
    def change(index):
        piece = next(piece for piece in index["pieces"] if piece["name"] == "layer.0")
        piece.update(changes)
        return index

    return change


def with_index(**changes):
    return lambda index: index | changes


BIG = 1 << 61
FORGERIES = {
    "negative start": with_piece(bytes=[-8, 1912]),
    "huge bytes": with_piece(bytes=[0, 1 << 70]),
    "beyond the file": with_piece(bytes=[BIG, BIG + 1920]),
    "not aligned": with_piece(bytes=[1001, 2921]),
    "negative offset": with_piece(offset=[-1, 0]),
    "outside its tensor": with_piece(offset=[13, 0]),
    "too few dims": with_piece(offset=[0]),
    "huge shape": with_piece(shape=[BIG, BIG]),
    "another shape": with_piece(shape=[24, 41]),
    "overlap": with_piece(offset=[1, 0]),
    "no dtype": with_piece(dtype="F8"),
    "number as name": with_piece(name=7),
    "float": with_piece(shape=[24.0, 40]),
    "true": with_piece(shape=[True, 40]),
    "renamed": with_piece(name="../../etc/passwd"),
    "a piece less": lambda index: index | {"pieces": index["pieces"][1:]},
    "a piece twice": lambda index: index | {"pieces": index["pieces"] + index["pieces"][:1]},
    "pieces of null": with_index(pieces=[None]),
    "no pieces": with_index(pieces=None),
    "no blocks": with_index(blocks=[]),
    "no cover": with_index(cover=None),
    "long cover": with_index(cover="f" * 33),
    "origins of numbers": with_index(origins=[1]),
    "zero block": with_index(block_bytes=0),
    "block of a byte": with_index(block_bytes=1),
    "huge block": with_index(block_bytes=BIG),
    "huge file": with_index(file_bytes=BIG),
    "another rank": with_index(rank=1),
    "another step": with_index(step=1),
    "a list": lambda index: [index],
    "empty": lambda index: b"",
    "not json": lambda index: b"\x80\x04\x95",
    "deep": lambda index: b"[" * 100_000,
    "a number of 10000 digits": lambda index: b"9" * 10_000,
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_index_is_refused_with_the_file_or_tensor_named(run, what):
    forge(run / "step-00000002", "rank-00000.index.json", FORGERIES[what])
    with pytest.raises(DamagedCheckpoint, match="step-00000002"):
        read_everything(run / "step-00000002")
    assert verify(run / "step-00000002")
    with pytest.raises(DamagedCheckpoint):
        list(read_tensors(run / "step-00000002"))
    assert describe(run)[1].step == 2


@pytest.mark.parametrize("state", [b"", b"[]", b"[" * 100_000, b"\xff", b"{" + b"9" * 9999])
def test_a_forged_state_is_refused(run, state):
    forge(run / "step-00000002", "state.json", lambda _: state)
    with pytest.raises(DamagedCheckpoint, match=r"state\.json"):
        read_state(run / "step-00000002")


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "rank-00000.index.json/..", "rank-1.index.json", "/etc/passwd"]
)
def test_a_manifest_cannot_lead_out_of_its_directory(run, name):
    manifest = read_manifest(run / "step-00000002")
    manifest.files[name] = manifest.files["state.json"]
    (run / "step-00000002" / MANIFEST).write_bytes(encode_manifest(manifest))
    with pytest.raises(DamagedCheckpoint, match="it lists"):
        read_everything(run / "step-00000002")


def test_a_header_that_differs_from_the_index_is_found_by_verify(run):
    """Other programs read the header, Stoker reads the index: both must hold the same."""

    def rename(index):
        for piece in index["pieces"]:
            piece["name"] = piece["name"].replace("layer.0", "layer.9")
        return index

    for rank in (0, 1):
        forge(run / "step-00000002", f"rank-0000{rank}.index.json", rename)
    assert any("its header does not match" in problem for problem in verify(run / "step-00000002"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
keys = ("format", "rank", "step", "attempt", "time", "bytes", "tensors", "files", "file_bytes", "block_bytes", "blocks")
objects = st.dictionaries(st.sampled_from((*keys, "pieces", "digest")), json_values)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=st.binary(max_size=80) | objects.map(lambda value: json.dumps(value).encode()))
def test_decoders_answer_any_bytes_with_a_value_or_a_damaged_checkpoint(content):
    for decode in (decode_index, decode_manifest, decode_state):
        with contextlib.suppress(DamagedCheckpoint):
            decode(content, "here")


FORBIDDEN = ("exec", "compile", "pickle.find_class", "os.system", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
_watching = threading.local()


def _watch(event: str, _arguments: object) -> None:
    if event in FORBIDDEN and getattr(_watching, "on", False):
        raise AssertionError(f"{event} while a checkpoint is read")


sys.addaudithook(_watch)


def answers_of(checkpoint: Path) -> None:
    """Every operation on a checkpoint works or is refused, and no foreign code runs."""
    _watching.on = True
    try:
        for act in (read_everything, read_state, lambda path: compare(path, path)):
            with contextlib.suppress(DamagedCheckpoint, CheckpointMismatch):
                act(checkpoint)
        assert all("\n" not in problem for problem in verify(checkpoint))
        describe(checkpoint.parent)
    finally:
        _watching.on = False


fuzzed = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@pytest.mark.long
@fuzzed
@given(number=st.integers(0, 5), place=st.floats(0, 1), cut_out=st.integers(0, 40), put_in=st.binary(max_size=40))
def test_a_checkpoint_with_any_bytes_changed_is_as_written_or_refused(number, place, cut_out, put_in):
    with tempfile.TemporaryDirectory() as folder:
        saved(Path(folder), NEW, 2)
        path = files(Path(folder))[number]
        content = path.read_bytes()
        start = int(place * len(content))
        changed = content[:start] + put_in + content[start + cut_out :]
        path.write_bytes(changed)
        answers_of(path.parent)
        if changed != content:
            assert verify(path.parent)
            with pytest.raises(DamagedCheckpoint):
                read_everything(path.parent)


@pytest.mark.long
@fuzzed
@given(
    name=st.sampled_from(["rank-00000.index.json", "rank-00001.index.json", "state.json"]),
    key=st.sampled_from((*keys, "pieces", "cover", "origins", "body")),
    inside=st.sampled_from([None, "name", "kind", "dtype", "shape", "offset", "size", "bytes"]),
    value=json_values,
)
def test_a_checkpoint_forged_with_any_values_never_runs_code_nor_fails_without_a_message(name, key, inside, value):
    """Its digests are right: its contents reach every reader."""

    def change(values):
        if inside is None or "pieces" not in values:
            return values | {key: value}
        values["pieces"][0][inside] = value
        return values

    with tempfile.TemporaryDirectory() as folder:
        saved(Path(folder), NEW, 2)
        forge(Path(folder) / "step-00000002", name, change)
        answers_of(Path(folder) / "step-00000002")
