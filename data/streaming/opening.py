"""From a config to the stream of rows under data.mode=streaming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stoker.conf.ramp import unit_rows
from stoker.conf.schema import Config, DataConfig
from stoker.conf.targets import import_target
from stoker.data.cache import cache_root
from stoker.data.sources import Spec, specs_of, validation_spec, wanted_weights
from stoker.data.splitting import by_position
from stoker.data.streaming.exchange import Ranks
from stoker.data.streaming.files import Files
from stoker.data.streaming.held_out import sampled
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

_SPREAD = 8  # rows that are read for one that is evaluated, where documents are many


def open_windows(data: DataConfig, seed: int, tokenizer: Tokenizer, epochs: int | None) -> ShuffleWindows:
    """The windows of the training documents of one source, as `specs_of` gives it.

    Raises ValueError for data that cannot be used.
    """
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
        by_position=by_position(data, 1 if isinstance(splits, Files) and len(splits.shards) == 1 else 0, False),
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
    return windows, StreamMixture(wanted, unit_rows(config))


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
        pin=mesh.device if mesh.device.type == "cuda" else None,
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
        unit_rows(config),
        document_mask=data.packing == "best_fit" if data.document_mask is None else data.document_mask,
        store=open_store(data),
        mixture=mixture,
        skip_limit=data.skip_limit,
        change=config.run.change,
        **options,
    )


def open_sampled(config: Config, spec: Spec, tokenizer: Tokenizer, rows: int, split: str) -> tuple[str, Tokens]:
    """Fingerprint and tokens of documents of a source for `rows` rows of evaluation, of `train` or `validation`.

    Documents that are few, as those kept for validation are, come from many windows. Of others so many are read that
    `rows` can be taken from here and there. Raises ValueError for data that cannot be used.
    """
    apart = validation_spec(spec) if split == "validation" else None
    windows = open_windows((apart or spec).config, config.run.seed, tokenizer, spec.epochs)
    packing = Packing(config.data.packing, config.seq_len)
    if split == "train" or apart is not None:
        rows *= _SPREAD
    kept = replace(windows, seed=0, epochs=1, held_out=split == "validation")
    return sampled(cache_root(config.data), kept, packing, rows, open_store(spec.config))
