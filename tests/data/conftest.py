from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from stoker.conf.schema import BatchConfig, Config, DataConfig
from stoker.conf.targets import import_target
from stoker.data.cache import TokenCache, open_cache
from stoker.data.documents import documents_of

WORDS = ["stoker", "feeds", "the", "furnace", "while", "a", "train", "moves", "through", "night", "über", "hills"]


def write_texts(folder: Path, count: int, seed: int = 0) -> None:
    """`count` files of different texts, old enough for their stamps to be trusted."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        text = " ".join(chance.choices(WORDS, k=chance.randrange(1, 60)))
        write_text(folder / f"text-{number:03}.txt", f"{number} {seed} {text}\n")


def write_text(path: Path, text: str | bytes) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.utime(path, (time.time() - 60,) * 2)


def cache_of(config: DataConfig) -> TokenCache:
    return open_cache(config, documents_of(import_target(config.target)(config), config.target))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Forty short texts in a folder, a fifth of them for validation, rows of 16 tokens."""
    write_texts(tmp_path / "texts", 40)
    data = DataConfig(
        target="stoker.data.text:open_source",
        name="texts",
        path=str(tmp_path / "texts"),
        cache=str(tmp_path / "cache"),
        validation=0.2,
    )
    return Config(data=data, seq_len=16, batch=BatchConfig(size=24))
