"""From a config to the stream of rows under data.mode=streaming."""

from __future__ import annotations

from typing import Any

from stoker.conf.schema import Config, DataConfig
from stoker.conf.targets import import_target
from stoker.data.cache import cache_root
from stoker.data.sources import Spec, specs_of, wanted_weights
from stoker.data.streaming.exchange import Ranks
from stoker.data.streaming.held_out import held_out
from stoker.data.streaming.loader import StreamingLoader
from stoker.data.streaming.mixing import StreamMixture
from stoker.data.streaming.packed import Packing
from stoker.data.streaming.shuffle_windows import ShuffleWindows
from stoker.data.streaming.sources import open_store
from stoker.data.streaming.splits import Splits
from stoker.data.streaming.stream_rows import Shape
from stoker.data.tokenizer import Tokenizer
from stoker.data.tokens import Tokens
from stoker.parallel.mesh import Mesh


def open_windows(data: DataConfig, seed: int, tokenizer: Tokenizer, epochs: int | None) -> ShuffleWindows:
    """The windows of the training documents of one source. Raises ValueError for data that cannot be used."""
    if data.splits is None:
        raise ValueError(f"data.mode=streaming cannot read {data.name}: it has no splits")
    splits: Splits = import_target(data.splits)(data)
    if not len(splits):
        raise ValueError(f"{data.name} holds no split to read")
    return ShuffleWindows(
        name=data.name,
        splits=splits,
        splits_per_window=data.shuffle_window,
        seed=seed,
        tokenizer=tokenizer,
        validation=data.validation,
        skipping=data.on_damage == "skip",
        epochs=epochs,
    )


def open_sources(config: Config, tokenizer: Tokenizer) -> tuple[list[ShuffleWindows], StreamMixture | None]:
    """The windows of every source, and how their rows are mixed.

    Raises ValueError for data that cannot be used, and in a mixture for a source without a weight.
    """
    data, seed = config.data, config.run.seed
    specs = specs_of(data)
    if not data.sources:
        return [open_windows(data, seed, tokenizer, data.epochs)], None
    for spec in specs:
        if spec.weight is None and not data.weights:
            raise ValueError(f"data.sources.{spec.name} needs a weight: with data.mode=streaming its size is not known")
    windows = [open_windows(spec.config, seed, tokenizer, spec.epochs) for spec in specs]
    wanted = wanted_weights(data, specs, [1] * len(specs))
    return windows, StreamMixture(wanted, config.batch.size)


def open_streams(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> StreamingLoader:
    """The rows that this rank trains on. A collective. Raises ValueError for data that cannot be used."""
    return _stream(
        config,
        *open_sources(config, tokenizer),
        dp_rank=mesh.dp_rank,
        dp=mesh.layout.dp,
        exchange=Ranks(mesh),
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        pin=mesh.device.type == "cuda",
    )


def open_all_streams(config: Config, tokenizer: Tokenizer) -> tuple[StreamingLoader, StreamMixture | None]:
    """The rows of all ranks in one process, batch by batch, for display; and how its sources are mixed.

    Raises ValueError for data that cannot be used.
    """
    windows, mixture = open_sources(config, tokenizer)
    return _stream(config, windows, mixture, workers=config.data.workers, prefetch=1), mixture


def _stream(
    config: Config, windows: list[ShuffleWindows], mixture: StreamMixture | None, **options: Any
) -> StreamingLoader:
    data = config.data
    return StreamingLoader(
        windows,
        Shape(data.streams, data.assign_every, Packing(data.packing, config.seq_len)),
        config.batch.size,
        document_mask=data.packing == "best_fit" if data.document_mask is None else data.document_mask,
        store=open_store(data),
        mixture=mixture,
        skip_limit=data.skip_limit,
        change=config.run.change,
        **options,
    )


def open_held_out(config: Config, spec: Spec, tokenizer: Tokenizer, rows: int) -> tuple[str, Tokens]:
    """Fingerprint and tokens of the documents of a source that `rows` rows of evaluation are made of.

    Raises ValueError for data that cannot be used.
    """
    windows = open_windows(spec.config, config.run.seed, tokenizer, spec.epochs)
    packing = Packing(config.data.packing, config.seq_len)
    return held_out(cache_root(config.data), windows, packing, rows, open_store(spec.config))
