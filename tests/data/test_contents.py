"""Samples of shards: the same wherever shards lie and however they are called, and others when their bytes are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stoker.conf.schema import DataConfig
from stoker.data.remote.contents import content_of
from stoker.data.remote.lookup import look_up
from stoker.data.remote.shards import Shard
from stoker.data.remote.store import Store
from stoker.data.streaming.tables import open_hf
from tests.data.server import serving

LARGE = 3 << 20  # bytes: more than the samples of a shard


def sampled(root: Path, *paths: object) -> str | None:
    return content_of(look_up(list(map(str, paths))), Store(), root)


@pytest.mark.parametrize("place", [0, LARGE - 1, 10_000])
def test_a_byte_inside_the_samples_of_a_large_shard_changes_its_content(tmp_path, place):
    (tmp_path / "a.jsonl").write_bytes(b"x" * LARGE)
    before = sampled(tmp_path, tmp_path / "a.jsonl")
    data = bytearray(b"x" * LARGE)
    data[place] = ord("y")
    (tmp_path / "a.jsonl").write_bytes(data)
    assert sampled(tmp_path, tmp_path / "a.jsonl") != before
    (tmp_path / "a.jsonl").write_bytes(b"x" * (LARGE + 1))
    assert sampled(tmp_path, tmp_path / "a.jsonl") != before


def test_any_byte_of_a_small_shard_and_the_order_of_shards_count(tmp_path):
    paths = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for n, path in enumerate(paths):
        path.write_bytes(b"%d" % n * 100_000)
    before = sampled(tmp_path, *paths)
    assert sampled(tmp_path, *paths[::-1]) != before
    paths[1].write_bytes(b"1" * 54_321 + b"2" + b"1" * (100_000 - 54_322))
    assert sampled(tmp_path, *paths) != before


def test_shards_on_a_server_have_the_content_that_they_have_here(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(b"0123456789" * (LARGE // 10))
    here = sampled(tmp_path, tmp_path / "texts" / "a.jsonl")
    with serving(tmp_path / "texts") as server:
        assert sampled(tmp_path, f"{server.url}/a.jsonl") == here
        read = sum(server.sent.values())
        assert sampled(tmp_path, f"{server.url}/a.jsonl") == here
        assert sum(server.sent.values()) - read < 100  # its ETag is known


def test_the_output_of_a_command_has_none(tmp_path):
    assert content_of([Shard("pipe:cat a.tar", -1)], Store(), tmp_path) is None


def test_the_files_of_a_dataset_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    path = tmp_path / "d" / "a.jsonl"
    path.parent.mkdir()
    config = DataConfig(args={"dataset": str(path.parent)}, cache=str(tmp_path / "cache"))
    path.write_text(json.dumps({"text": "one"}) + "\n")
    before = open_hf(config).fingerprint
    assert before["content"] is not None and open_hf(config).fingerprint == before
    path.write_text(json.dumps({"text": "two"}) + "\n")
    assert open_hf(config).fingerprint != before
