"""From a config to the stream of rows under data.planner=lanes."""

from __future__ import annotations

from conf.schema import Config, DataConfig
from conf.targets import import_target
from data.lanes.exchange import Ranks
from data.lanes.mixing import LaneMixture
from data.lanes.packed import Packing
from data.lanes.rows import Shape
from data.lanes.sources import open_store
from data.lanes.stream import LaneStream
from data.lanes.units import Units
from data.lanes.windows import Windows
from data.sources import specs_of, wanted_weights
from data.tokenizer import Tokenizer
from parallel.mesh import Mesh


def open_windows(data: DataConfig, seed: int, tokenizer: Tokenizer, epochs: int | None) -> Windows:
    """The windows of the training documents of one source. Raises ValueError for data that cannot be used."""
    if data.units is None:
        raise ValueError(f"data.planner=lanes cannot read {data.name}: it has no units")
    units: Units = import_target(data.units)(data)
    if not len(units):
        raise ValueError(f"{data.name} holds no unit to read")
    return Windows(
        name=data.name,
        units=units,
        units_per_window=data.window,
        seed=seed,
        tokenizer=tokenizer,
        validation=data.validation,
        skipping=data.on_damage == "skip",
        epochs=epochs,
    )


def open_sources(config: Config, tokenizer: Tokenizer) -> tuple[list[Windows], LaneMixture | None]:
    """The windows of every source, and how their rows are mixed.

    Raises ValueError for data that cannot be used, and in a mixture for a source without a weight or with an end.
    """
    data, seed = config.data, config.run.seed
    specs = specs_of(data)
    if not data.sources:
        return [open_windows(data, seed, tokenizer, data.epochs)], None
    for spec in specs:
        if spec.epochs is not None:
            raise ValueError(
                f"data.sources.{spec.name} ends after {spec.epochs} epochs: under planner=lanes a mixture has no end"
            )
        if spec.weight is None and not data.weights:
            raise ValueError(f"data.sources.{spec.name} needs a weight: with data.planner=lanes nobody knows its size")
    windows = [open_windows(spec.config, seed, tokenizer, None) for spec in specs]
    wanted = wanted_weights(data, specs, [1] * len(specs))
    return windows, LaneMixture(len(specs), wanted, config.batch.rows)


def open_lanes(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> LaneStream:
    """The rows that this rank trains on. A collective. Raises ValueError for data that cannot be used."""
    data = config.data
    windows, mixture = open_sources(config, tokenizer)
    return LaneStream(
        windows,
        Shape(data.lanes, data.deal_every, Packing(data.packing, config.seq_len)),
        config.batch.rows,
        mesh.dp_rank,
        mesh.layout.dp,
        document_mask=data.packing == "best_fit" if data.document_mask is None else data.document_mask,
        store=open_store(data),
        mixture=mixture,
        exchange=Ranks(mesh),
        workers=data.workers,
        prefetch=data.prefetch,
        pin=mesh.device.type == "cuda",
    )
