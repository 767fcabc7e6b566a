"""What a rank needs of its device, estimated by counting bytes in the shape of the built-in decoder.

An estimate is off by a fifth either way, so what is to fit has MARGIN to spare.
"""

from __future__ import annotations

from dataclasses import dataclass

from stoker.conf.schema import Config, ModelConfig
from stoker.models.attention import query_channels, value_channels
from stoker.models.loss import CHUNK
from stoker.parallel.layout import Layout, batch_plan
from stoker.parallel.tensor.nf4 import BLOCK

MARGIN = 0.85  # share of the memory that an estimate may take
PACKED_BYTES = 0.5 + 4 / BLOCK  # of an element in four bits, with its share of a scale


@dataclass(frozen=True)
class Need:
    """Bytes of one rank, estimated."""

    held: float  # parameters, compute copies, gradients, optimizer state: all the time
    activations: float  # at the peak of a step, the loss included

    @property
    def total(self) -> float:
        return self.held + self.activations


def need_of(config: Config, layout: Layout, parameters: int, frozen: int = 0) -> Need:
    """What a rank of `layout` needs of its device for so many parameters, in the shape of the built-in decoder.

    `frozen` of them are not trained.
    """
    model, plan = config.model, batch_plan(config, layout)
    own = parameters / (layout.tp * layout.pp)  # of this rank's stages and shares of layers
    still = frozen / (layout.tp * layout.pp)
    trained = own - still
    shards = layout.shards if layout.zero else 1
    compute = 4 if config.precision == "fp32" else 2
    state = 8 if config.optim.name in ("adamw", "lamb") else 4
    state += 4 if config.optim.ema is not None else 0
    block = own / max(1, model.num_hidden_layers // layout.pp)
    masters = 0.0 if config.parallel.offload != "none" else trained / shards * (4 + state)
    stored = still * PACKED_BYTES if config.adapter.base == "nf4" else still / shards * compute
    gathered = trained if shards == 1 or config.adapter.base == "nf4" else own
    copies = gathered * compute if layout.zero < 3 else 2 * block * compute  # under ZeRO 3 two blocks at a time
    gradients = trained * 4 / (shards if layout.zero >= 2 or layout.shards == 1 else 1)
    tokens = plan.micro_rows * config.seq_len // layout.cp
    in_flight = min(plan.micro_batches, layout.pp) if layout.pp > 1 else 1
    per_token = kept_per_token(config, model, compute, layout.tp, config.activation_checkpointing)
    layers = max(1, model.num_hidden_layers // layout.pp)
    whole = kept_per_token(config, model, compute, layout.tp, "none")
    recomputed = 0.0 if config.activation_checkpointing == "none" else whole * tokens  # of one block at a time
    vocabulary = (model.vocab_size or 0) / layout.tp
    chunk = CHUNK if model.loss_chunk is None else model.loss_chunk
    loss = min(chunk, tokens) * vocabulary * (8 + compute) + vocabulary * model.hidden_size * 4
    held = masters + stored + copies + gradients
    return Need(held, per_token * tokens * layers * in_flight + recomputed + loss)


def kept_per_token(config: Config, model: ModelConfig, compute: int, tp: int, mode: str) -> float:
    """Bytes that one block keeps of a token for the backward pass, with activation checkpointing in this `mode`."""
    width, heads = model.hidden_size, model.num_attention_heads
    channels = query_channels(model), value_channels(model)
    queries, keys = heads * channels[0] / tp, (model.num_key_value_heads or heads) * sum(channels) / 2 / tp
    stream = width / (tp if config.parallel.sequence_parallel else 1)  # residuals and norms
    if mode == "full":
        return compute * stream
    products = queries * 2 + keys * 2 + stream * 2 + 2 * model.intermediate_size / tp
    if mode == "selective":
        return compute * (products + stream)
    return compute * (products + 3 * stream + queries + keys + 2 * model.intermediate_size / tp)
