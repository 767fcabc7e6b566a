"""How many tokens of a micro-batch have logits at one time, where `model.loss_chunk` leaves it open.

Each chunk reads and writes the whole gradient of the head's weight, so that large chunks are fast and small ones need
little memory. Another chunk is another order of the sums over tokens, as another micro-batch or layout is: a run's
losses stay within what layouts promise. The same layout is to be bitwise equal, and tensor-parallel ranks exchange
messages chunk by chunk, so that the number may not be taken from memory that happens to be free: it is a function of
the config, the layout, and the size of the smallest GPU of the run, which all ranks agree on and a repetition finds
again. CPUs take `stoker.models.loss.CHUNK`.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import nn

from stoker.conf.schema import Config, ModelConfig
from stoker.models.loss import CHUNK
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.layout import Layout
from stoker.parallel.mesh import Mesh
from stoker.trainer.need import MARGIN, need_of

log = logging.getLogger(__name__)

MOST = 8192  # tokens: the sums of the weight's gradient are 1% of a step then, see docs/performance_gpus.md
OF_FREE = 0.5  # share of the memory estimated to be free that the logits may take
OF_UNKNOWN = 1 / 16  # share of all memory that they may take where the model's shape is not in the config


def chunk_that_fits(free: float, vocabulary: int, dtype: torch.dtype) -> int:
    """Tokens, a power of two from CHUNK to MOST, whose logits and their gradient fit into `free` bytes.

    `vocabulary` is a rank's share of it; `dtype` that of activations. The softmax is fp32, the other two in `dtype`.
    """
    each = vocabulary * (2 * dtype.itemsize + 4)
    chunk = MOST
    while chunk > CHUNK and chunk * each > free:
        chunk //= 2
    return chunk


def free_bytes(config: Config, layout: Layout, memory: float, parameters: int, frozen: int) -> float:
    """What logits may take of a GPU with so many bytes of `memory`: estimated, see above for why not measured."""
    if config.model.target != ModelConfig().target:
        return OF_UNKNOWN * memory
    return OF_FREE * max(0.0, MARGIN * memory - need_of(config, layout, parameters, frozen).total)


def on_gpus(config: Config, layout: Layout, memory: float, parameters: int, frozen: int) -> Config:
    """`config` with the chunk of a run on GPUs, the smallest of so many bytes of `memory`.

    `parameters` of the whole model, `frozen` of them not trained; `model.vocab_size` must be set.
    """
    if config.model.loss_chunk is not None:
        return config
    free = free_bytes(config, layout, memory, parameters, frozen)
    vocabulary = -(-(config.model.vocab_size or 0) // layout.tp)
    chunk = chunk_that_fits(free, vocabulary, PRECISIONS[config.precision])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, loss_chunk=chunk))


def loss_chunk(config: Config, mesh: Mesh, whole: nn.Module) -> int | None:
    """Tokens that the head of the `whole` model takes at a time; None for what it was built with.

    All ranks call it together. `model.vocab_size` must be set.
    """
    if config.model.loss_chunk is not None or mesh.device.type != "cuda":
        return None
    own = torch.cuda.get_device_properties(mesh.device).total_memory
    memory = min(map(int, mesh.all_gather_text(str(own))))
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    frozen = sum(parameter.numel() for parameter in whole.parameters() if not parameter.requires_grad)
    chunk = on_gpus(config, mesh.layout, memory, parameters, frozen).model.loss_chunk
    log.info("loss: %s tokens at a time", f"{chunk:,}")
    return chunk
