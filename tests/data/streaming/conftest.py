from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import BatchConfig, Config, DataConfig
from stoker.data.streaming.loader import StreamingLoader
from stoker.data.streaming.opening import open_sources
from stoker.data.streaming.packed import Packing
from stoker.data.streaming.stream_rows import Shape
from stoker.data.tokenizer import ByteTokenizer, Tokenizer

BYTES = ByteTokenizer()


def documents(count: int, seed: int = 0) -> list[str]:
    """Texts of very unequal length, each with its number in it."""
    chance = random.Random(seed)
    return [f"[{n}]" + "x" * chance.choice([0, 3, 20, 20, 20, 90, 400]) + f"({n})" for n in range(count)]


def write_lines(folder: Path, texts: list[Any], shards: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        lines = [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts) if n % shards == shard]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """JSON lines of 300 documents in three shards: splits of 1 KiB, windows of 2, 6 streams, rows of 32 tokens."""
    write_lines(tmp_path / "texts", documents(300))
    data = DataConfig(
        target="stoker.data.text:open_source",
        splits="stoker.data.streaming.sources:open_text",
        name="texts",
        path=str(tmp_path / "texts"),
        validation=0.0,
        mode="streaming",
        streams=12,
        shuffle_window=2,
        split_bytes=1024,
        assign_every=3,
        epochs=1,
    )
    return Config(data=data, seq_len=32, batch=BatchConfig(size=24))


@pytest.fixture
def opener(config: Config) -> Callable[..., StreamingLoader]:
    """Opens the stream of one rank of `config`, as it is when it is called."""
    return partial(open_stream, config)


def open_stream(
    config: Config,
    dp_rank: int = 0,
    dp: int = 1,
    packing: str = "concatenated",
    tokenizer: Tokenizer = BYTES,
    **options,
) -> StreamingLoader:
    data = config.data
    windows, mixture = open_sources(config, tokenizer)
    return StreamingLoader(
        windows,
        Shape(data.streams, data.assign_every, Packing(packing, config.seq_len)),
        config.batch.size,
        dp_rank,
        dp,
        mixture=mixture,
        document_mask=bool(data.document_mask),
        **options,
    )
