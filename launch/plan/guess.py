"""A layout's step and memory by closed form: good enough to say which layouts are worth a rehearsal, and no more."""

from __future__ import annotations

from stoker.conf.devices import Device
from stoker.conf.schema import Config
from stoker.parallel.layout import BatchPlan, Layout, batch_plan
from stoker.trainer.need import kept_per_token
from stoker.trainer.plan.times import Counts, step_time
from stoker.trainer.rehearsal import Traffic, Work
from stoker.trainer.utilisation import step_flops

REPEATED = {"none": 1.0, "selective": 7 / 6, "full": 4 / 3}  # of all products, forward and backward being 1
PASSES = 3  # times that a kept byte passes through memory
OF_TP = 8  # messages of a layer over tensor-parallel ranks, each of a micro-batch's activations


def guessed_seconds(config: Config, layout: Layout, device: Device, parameters: int) -> float:
    """Of a step; infinity where the device's rates are not known."""
    step = step_time(config, layout, _counts(config, layout, parameters), device, batch_plan(config, layout))
    return float("inf") if step is None else step.total


def _counts(config: Config, layout: Layout, parameters: int) -> Counts:
    batch = batch_plan(config, layout)
    model, compute = config.model, 4 if config.precision == "fp32" else 2
    layers = model.num_hidden_layers / layout.pp
    tokens = batch.micro_rows * config.seq_len // layout.cp
    flops = step_flops(config, parameters) / layout.world * REPEATED[config.activation_checkpointing]
    kept = kept_per_token(config, model, compute, layout.tp, "none") * tokens * layers * batch.micro_batches
    own = parameters / (layout.tp * layout.pp)
    messages, update = _of_data(own, layout, batch, compute), Work(0, round(30 * own / layout.shards))
    if layout.tp > 1:
        count = round(OF_TP * layers * batch.micro_batches)
        messages["all_gather", "tp"] = Traffic(count, count * tokens * model.hidden_size * compute)
    moved = round(PASSES * kept * REPEATED[config.activation_checkpointing])
    groups = {
        "tp": layout.groups("tp")[0],
        "shards": layout.groups(*layout.sharding)[0],
        "replicas": layout.groups(*layout.replication)[0],
    }
    return Counts(Work(round(flops), moved, messages=messages), update, groups)


def _of_data(own: float, layout: Layout, batch: BatchPlan, compute: int) -> dict[tuple[str, str], Traffic]:
    """Messages of parameters and gradients, `own` in number on this rank."""
    found = {}
    if layout.shards > 1:
        gathers = 2 * batch.micro_batches if layout.zero == 3 and layout.pp == 1 else 1
        reductions = batch.micro_batches if layout.zero >= 2 else 1
        found["all_gather", "shards"] = Traffic(gathers, round(gathers * own * compute))
        found["reduce_scatter", "shards"] = Traffic(reductions, round(reductions * own * 4))
    if layout.replicas > 1:
        found["all_reduce", "replicas"] = Traffic(1, round(own * 4 / layout.shards))
    return found
