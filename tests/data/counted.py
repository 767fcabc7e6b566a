"""Small data of every counted kind, by name."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stoker.conf.schema import BatchConfig, Config, DataConfig
from tests.data.conftest import WORDS, write_texts

BATCH = 24  # rows: divides over 1, 2, 3, 4, 6 and 8 ranks
Make = Callable[[Path], Config]


def base(folder: Path, seq_len: int = 16, **data: object) -> Config:
    values = {"cache": str(folder / "cache"), "validation": 0.1} | data
    return Config(data=DataConfig(**values), seq_len=seq_len, batch=BatchConfig(size=BATCH))  # type: ignore[arg-type]


def write_lines(path: Path, values: list[object]) -> None:
    lines = "".join(json.dumps(value) + "\n" for value in values).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    os.utime(path, (time.time() - 60,) * 2)


def conversations(count: int, seed: int = 0) -> list[object]:
    chance = random.Random(seed)

    def say(role: str, number: int) -> dict[str, str]:
        return {"role": role, "content": f"{number} " + " ".join(chance.choices(WORDS, k=chance.randrange(1, 6)))}

    return [
        {"messages": [say(role, number) for _ in range(chance.randrange(1, 3)) for role in ("user", "assistant")]}
        for number in range(count)
    ]


def text(folder: Path) -> Config:
    write_texts(folder / "texts", 40)
    return base(folder, target="stoker.data.text:open_source", name="texts", path=str(folder / "texts"))


def masked(folder: Path) -> Config:
    config = text(folder)
    config.data.document_mask = True
    return config


def best_fit(folder: Path) -> Config:
    config = text(folder)
    config.data.packing, config.seq_len = "best_fit", 48
    return config


def padded(folder: Path) -> Config:
    config = text(folder)
    config.data.packing = "padded"
    return config


def jsonl(folder: Path) -> Config:
    chance = random.Random(1)
    texts = [{"body": f"{n} " + " ".join(chance.choices(WORDS, k=chance.randrange(1, 40)))} for n in range(60)]
    write_lines(folder / "lines" / "a.jsonl", texts[:40])
    write_lines(folder / "lines" / "b.jsonl.gz", texts[40:])
    path = str(folder / "lines")
    return base(folder, target="stoker.data.text:open_source", name="lines", path=path, args={"text": "body"})


def chat(folder: Path) -> Config:
    write_lines(folder / "chats" / "a.jsonl", conversations(80))
    path = str(folder / "chats")
    return base(folder, 256, target="stoker.data.chat:open_source", name="chats", path=path, packing="best_fit")


def tokens(folder: Path) -> Config:
    chance = np.random.default_rng(0)
    (folder / "ids").mkdir(parents=True, exist_ok=True)
    for number in range(2):
        lengths = chance.integers(1, 40, 60)
        ids = np.concatenate([np.append(chance.integers(0, 256, length), 256) for length in lengths])
        ids.astype(np.uint16).tofile(folder / "ids" / f"{number}.u16")
    path, args = str(folder / "ids"), {"end_of_document": 256}
    return base(folder, target="stoker.data.token_files:open_source", name="ids", path=path, tokenizer=None, args=args)


def mixture(folder: Path) -> Config:
    """Three sources, one of which gives all it may, and weights that change at step 3."""
    jsonl(folder), tokens(folder)
    write_texts(folder / "few", 4, seed=5)
    sources = {
        "few": {"kind": "text", "path": str(folder / "few"), "weight": 2, "max_epochs": 2, "validation": 0.0},
        "lines": {"kind": "text", "path": str(folder / "lines"), "weight": 5, "args": {"text": "body"}},
        "ids": {"kind": "tokens", "path": str(folder / "ids"), "weight": 3, "args": {"end_of_document": 256}},
    }
    phases = [{"from_step": 3, "weights": {"few": 1, "lines": 1, "ids": 2}}]
    return base(folder, sources=sources, phases=phases)


def standard_library(folder: Path) -> Config:
    """Part of the standard library: real documents, short and long."""
    library = Path(sysconfig.get_path("stdlib"))
    (folder / "library").mkdir(parents=True, exist_ok=True)
    for path in sorted(library.glob("[a-f]*.py")):
        link = folder / "library" / path.name
        if not link.exists():
            link.symlink_to(path)
    return base(folder, 512, target="stoker.data.text:open_source", name="library", path=str(folder / "library"))


KINDS: dict[str, Make] = {
    make.__name__: make for make in (text, masked, best_fit, padded, jsonl, chat, tokens, mixture)
}


def changed(config: Config, **data: object) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))  # type: ignore[arg-type]
