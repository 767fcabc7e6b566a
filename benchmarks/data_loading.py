"""Rows per second after the first batches and over a whole epoch, time to the first batch, time to resume at 90% of an
epoch, and memory of `data.mode=streaming`, each over those of public loaders on the same texts, tokenizer and packing.

    pip install --no-deps torchdata mosaicml-streaming litdata lightning-utilities obstore tifffile catalogue
    pip install --no-deps zstd brotli python-snappy cramjam
    python benchmarks/data_loading.py [--megabytes 24] [--workers 1 2] [--repeats 3] [--loaders webdataset ...]

(`--no-deps`: their dependencies include cloud clients and another torch.) Every loader runs as a separate process:
the texts are the standard library's sources over and over, in tar shards and JSON lines; the tokenizer is a byte-level
BPE trained on a part of them, given texts in batches, on one core in each worker; documents are laid end to end and
cut. Loaders that are not installed are left out with a line. A ratio above 1: Stoker is faster, or uses less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from stoker.conf.schema import BatchConfig, Config, DataConfig
from stoker.data.stdlib import open_source
from stoker.data.streaming.loader import StreamingLoader
from stoker.data.streaming.opening import open_sources
from stoker.data.streaming.packed import Packing
from stoker.data.streaming.stream_rows import Shape
from stoker.data.tokenizer import JsonTokenizer

SEQ_LEN, BATCH, STREAMS, SHARDS = 1024, 16, 16, 16
AT_ONCE = 64  # texts given to the tokenizer
BATCHES_AT_FIRST = 5  # left out of the speed: pipes fill
SAVE_EVERY = 20  # batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=24)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loaders", nargs="*", default=list(LOADERS), choices=list(LOADERS), help="beside stoker")
    parser.add_argument("--loader", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loader:
        print(json.dumps(measure(options.loader, options.folder, options.workers[0])))
        return
    loaders = [name for name in LOADERS if name in ("stoker", *options.loaders)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder, options.megabytes << 20)
        speed = bare(folder)
        print(f"bare tokenizer on one core: {speed:,.0f} tokens/s", flush=True)
        for workers in options.workers:
            runs: dict[str, list[dict[str, float]]] = {}
            for repeat in range(options.repeats):
                for loader in loaders if repeat % 2 == 0 else loaders[::-1]:
                    if (found := run(loader, folder, workers)) is not None:
                        runs.setdefault(loader, []).append(found)
            report(runs, workers, speed)


def report(runs: dict[str, list[dict[str, float]]], workers: int, speed: float) -> None:
    middle = {
        loader: {key: statistics.median(found[key] for found in several) for key in several[0]}
        for loader, several in runs.items()
    }
    ours = middle["stoker"]
    share, whole = (ours[key] * SEQ_LEN / speed / workers for key in ("rows_per_second", "epoch_rows_per_second"))
    print(
        f"{workers} worker{'s' * (workers > 1)}: {share:.2f} of the bare tokenizer's speed on as many cores, "
        f"{whole:.2f} over the whole epoch, from the start of the loader"
    )
    for loader, found in middle.items():
        print(f"  {loader}: " + ", ".join(f"{key} {value:,.4g}" for key, value in found.items()))
    for loader, theirs in middle.items():
        if loader != "stoker":
            ratios = {key: theirs[key] / ours[key] for key in ours}
            ratios |= {key: ours[key] / theirs[key] for key in ours if key.endswith("rows_per_second")}
            print(f"  over {loader}: " + ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items()), flush=True)


def run(loader: str, folder: Path, workers: int) -> dict[str, float] | None:
    command = [sys.executable, __file__, "--loader", loader, "--folder", str(folder), "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        print(f"  {loader} left out: {last[:150]}", flush=True)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(loader: str, folder: Path, workers: int) -> dict[str, float]:
    """Run one epoch, then resume at 90% of it, in this process."""
    begin = LOADERS[loader]
    began = time.perf_counter()
    batches, save, close = begin(folder, workers, None)
    stamps, states = [], {}
    for _ in batches:
        stamps.append(time.perf_counter())
        if len(stamps) % SAVE_EVERY == 0:
            states[len(stamps)] = save()
    close()
    place = max(at for at in states if at <= 0.9 * len(stamps))
    resumed = time.perf_counter()
    batches, _, close = begin(folder, workers, states[place] if states[place] is not None else place)
    next(iter(batches))
    seconds = time.perf_counter() - resumed
    close()
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return {
        "rows_per_second": (len(stamps) - BATCHES_AT_FIRST) * BATCH / (stamps[-1] - stamps[BATCHES_AT_FIRST - 1]),
        "epoch_rows_per_second": len(stamps) * BATCH / (stamps[-1] - began),
        "first_batch_seconds": stamps[0] - began,
        "resume_seconds": seconds,
        "memory_mb": sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024,
    }


def write_texts(folder: Path, size: int) -> None:
    from webdataset import TarWriter

    texts = [document.read() for document in open_source(DataConfig(target="stoker.data.stdlib:open_source"))]
    encoder = JsonTokenizer.train(iter(texts[:80]), 8192)
    (folder / "bpe.json").write_text(encoder.json)
    tars = [TarWriter(open(folder / f"{shard:02}.tar", "wb"), encoder=False) for shard in range(SHARDS)]  # noqa: SIM115
    lines = [open(folder / f"{shard:02}.jsonl", "w") for shard in range(SHARDS)]  # noqa: SIM115
    written = number = 0
    while written < size:
        text = texts[number % len(texts)]
        written += tars[number % SHARDS].write({"__key__": f"{number:08}", "txt": text.encode()})
        lines[number % SHARDS].write(json.dumps({"text": text}) + "\n")
        number += 1
    for file in (*tars, *(tar.stream for tar in tars), *lines):
        file.close()


def tokenizer(folder: Path) -> JsonTokenizer:
    return JsonTokenizer((folder / "bpe.json").read_text(), vocab_size=8192)


def bare(folder: Path) -> float:
    """Tokens per second of only the tokenizer, the best of three."""
    encoder = tokenizer(folder)
    texts = [text for number, text in enumerate(all_texts(folder)) if number < 1000]
    found = []
    for _ in range(3):
        began = time.perf_counter()
        tokens = sum(len(ids) for batch in batched(iter(texts)) for ids in encoder.encode_batch(batch))
        found.append(tokens / (time.perf_counter() - began))
    return max(found)


def batched(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, AT_ONCE)):
        yield batch


Begun = tuple[Iterator[Any], Callable[[], Any], Callable[[], None]]  # batches, state after the last one, end


def stoker(folder: Path, workers: int, state: Any) -> Begun:
    data = DataConfig(
        splits="stoker.data.streaming.webdataset:open_webdataset", name="tars",
        urls=[f"{folder}/{{00..{SHARDS - 1:02}}}.tar"],
        cache=str(folder / "cache"), validation=0.0, mode="streaming", streams=STREAMS, epochs=1,
    )  # fmt: skip
    config = Config(data=data, seq_len=SEQ_LEN, batch=BatchConfig(size=BATCH))
    windows, _ = open_sources(config, tokenizer(folder))
    shape = Shape(STREAMS, data.assign_every, Packing("concatenated", SEQ_LEN))
    stream = StreamingLoader(windows, shape, BATCH, workers=workers)
    if state is not None:
        stream.load_state(state)

    def batches() -> Iterator[Any]:
        while not stream.exhausted:
            yield stream.next()

    return batches(), stream.state, stream.close


def packed(texts: Iterator[str], folder: Path) -> Iterator[np.ndarray]:
    """Rows of documents laid end to end: what each of the others is given to do."""
    encoder, held = tokenizer(folder), np.empty(0, np.int64)
    end = np.array([encoder.end_of_document])
    for batch in batched(texts):
        held = np.concatenate([held, *(part for ids in encoder.encode_batch(batch) for part in (ids, end))])
        while len(held) > SEQ_LEN:
            yield held[: SEQ_LEN + 1]
            held = held[SEQ_LEN:]


def webdataset(folder: Path, workers: int, state: Any) -> Begun:
    import webdataset as wds

    def rows(samples: Iterator[dict]) -> Iterator[np.ndarray]:
        return packed((sample["txt"].decode() for sample in samples), folder)

    urls = f"{folder}/{{00..{SHARDS - 1:02}}}.tar"
    dataset = wds.WebDataset(urls, shardshuffle=SHARDS, seed=0).shuffle(100).compose(rows)
    found = iter(wds.WebLoader(dataset, batch_size=BATCH, num_workers=workers, prefetch_factor=4))
    for _ in range(state or 0):  # it has no state: what was read is read again
        next(found)
    return found, lambda: None, lambda: None


def datasets_streaming(folder: Path, workers: int, state: Any) -> Begun:
    import datasets
    from torchdata.stateful_dataloader import StatefulDataLoader

    files = [str(path) for path in sorted(folder.glob("*.jsonl"))]
    stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True)

    def pack(batch: dict) -> dict:
        return {"row": [row.tolist() for row in packed(iter(batch["text"]), folder)]}

    mapped = stream.map(pack, batched=True, batch_size=200, remove_columns=["text"])
    loader = StatefulDataLoader(mapped.with_format("numpy"), batch_size=BATCH, num_workers=workers, prefetch_factor=4)
    if state is not None:
        loader.load_state_dict(state)
    return iter(loader), loader.state_dict, lambda: None


def mosaic(folder: Path, workers: int, state: Any) -> Begun:
    stand_in_for_torchvision()
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    if not (folder / "mds").exists():
        with MDSWriter(out=str(folder / "mds"), columns={"row": "bytes"}) as writer:
            for row in packed(all_texts(folder), folder):
                writer.write({"row": row.astype(np.int32).tobytes()})
    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, prefetch_factor=4)
    if state is not None:
        loader.load_state_dict(state)
    return iter(loader), loader.state_dict, lambda: None


def stand_in_for_torchvision() -> None:
    """`streaming` imports it for image classes; there may be no version that fits this torch."""
    from importlib.machinery import ModuleSpec
    from importlib.util import find_spec
    from types import ModuleType

    if find_spec("torchvision") is None:
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = ModuleType(f"torchvision{name}")
            module.__spec__ = ModuleSpec(module.__name__, None)
            sys.modules[module.__name__] = module
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]


def litdata(folder: Path, workers: int, state: Any) -> Begun:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.cache import Cache

    if not (folder / "lit").exists():
        cache = Cache(str(folder / "lit"), chunk_bytes=1 << 24)
        for number, row in enumerate(packed(all_texts(folder), folder)):
            cache[number] = {"row": row}
        cache.done()
        cache.merge()
    dataset = StreamingDataset(str(folder / "lit"), shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, prefetch_factor=4)
    if state is not None:
        loader.load_state_dict(state)
    return iter(loader), loader.state_dict, lambda: None


def all_texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl")):
        yield from (json.loads(line)["text"] for line in path.read_text().splitlines())


# The last two cannot tokenise while they read: they read rows that were made before, and only that is timed.
LOADERS: dict[str, Callable[[Path, int, Any], Begun]] = {
    "stoker": stoker,
    "webdataset": webdataset,
    "datasets": datasets_streaming,
    "mosaic": mosaic,
    "litdata": litdata,
}


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is a core
    main()
