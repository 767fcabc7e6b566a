"""What every engine is compared with: one process, one model, plain torch, no line of an engine's code.

Initial values and weight decay are decided here once more, from names: with the product's own rules the reference
would repeat its faults.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stoker.conf.schema import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig
from stoker.conf.targets import import_target
from stoker.parallel.batch import IGNORE_INDEX, Batch
from stoker.parallel.model import whole_model
from stoker.parallel.normal import normal
from stoker.parallel.shards import PARAMETER, Shard, whole
from tests.parallel.rules.plain import Plain

VOCABULARY = 50


def small_config(**changes: Any) -> Config:
    """A toy model in fp32 whose odd sizes do not divide over ranks, with weights that ZeRO leaves ranks without."""
    model = ModelConfig(target="tests.toy:build", vocab_size=VOCABULARY, hidden_size=18, num_hidden_layers=2)
    config = Config(model=model, data=DataConfig(), batch=BatchConfig(size=8), seq_len=12, precision="fp32")
    config.optim = OptimConfig(name="adamw", lr=1e-2)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def global_rows(config: Config, step: int, seed: int = 0) -> Batch:
    """The rows of a global batch: documents of very unequal length, and not one valid token in every fourth row."""
    count, length = config.batch.size, config.seq_len
    generator = torch.Generator().manual_seed(1000 * seed + step)
    tokens = torch.randint(VOCABULARY, (count, length), generator=generator)
    labels = torch.randint(VOCABULARY, (count, length), generator=generator)
    for row in range(count):
        valid = 0 if row % 4 == 3 else int(torch.randint(1, length + 1, (1,), generator=generator))
        labels[row, valid:] = IGNORE_INDEX
    documents = (torch.rand(count, length, generator=generator) < 0.2).cumsum(1).int()
    positions = torch.arange(length).expand(count, length).contiguous()
    return Batch(tokens, labels, positions, documents)


@dataclass
class Trace:
    """What a run computed: per step loss, gradient norm and valid tokens; at the end every tensor, whole, by name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step's summed loss


def one_process(
    config: Config,
    steps: int,
    poison: int | None = None,
    plain: Plain | None = None,
    matrices_of: Callable[[str, Tensor], list[Tensor]] | None = None,
) -> Trace:
    """Train for `steps` steps in plain torch; at step `poison` the loss is infinite and the step is left out.

    `plain` updates instead of the rule of the config, `matrices_of` names the matrices that are fused in a parameter.
    """
    model: nn.Module = import_target(config.model.target)(config.model, whole_model(config.model.num_hidden_layers))
    named = list(model.named_parameters())
    for name, parameter in named:
        parameter.data.copy_(initial_value(config, name, tuple(parameter.shape)))
    decayed = [p for n, p in named if config.optim.decay_all or is_matrix(n)]
    others = [p for n, p in named if not (config.optim.decay_all or is_matrix(n))]
    groups = [
        {"params": decayed, "weight_decay": config.optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if plain is None and config.optim.name in ("lion", "lamb", "muon"):
        plain = Plain(config.optim, matrices_of=matrices_of)
    if config.optim.name == "sgd":
        bare = [{"params": decayed}, {"params": others}]  # the decay is ours: torch's goes through the velocity
        optimizer = torch.optim.SGD(bare, lr=config.optim.lr, momentum=config.optim.momentum)
    else:
        betas = (config.optim.betas[0], config.optim.betas[1])
        optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=betas, eps=config.optim.eps, foreach=False)
    trace = Trace()
    for step in range(1, steps + 1):
        rows = global_rows(config, step)
        documents = rows.documents if config.data.document_mask else None
        total = model(rows.tokens, rows.positions, documents, rows.labels)
        valid = int(rows.valid_tokens())
        loss = total / valid
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            trace.gradients = {name: p.grad * valid for name, p in named if p.grad is not None}
        limit = config.grad_clip_norm if config.grad_clip_norm is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        trace.tokens.append(valid)
        trace.skipped.append(step == poison)
        if step == poison:
            trace.losses.append(float("inf"))
            trace.norms.append(float("inf"))
            continue
        trace.losses.append(loss.item())
        trace.norms.append(norm.item())
        if config.optim.name == "sgd":
            with torch.no_grad():
                torch._foreach_mul_(decayed, 1.0 - config.optim.lr * config.optim.weight_decay)
        if plain is not None:
            plain.step(named, config.optim.lr)
        else:
            optimizer.step()
    trace.parameters = {name: parameter.detach().clone() for name, parameter in named}
    return trace


def is_matrix(name: str) -> bool:
    """Whether weight decay applies by default: norms, biases and embeddings have none."""
    return not name.endswith(("norm.weight", ".bias", "embedding.weight"))


def initial_value(config: Config, name: str, shape: tuple[int, ...]) -> Tensor:
    """The value that the parameter `name` of the decoder or of `tests.toy` starts from."""
    if name.endswith("norm.weight"):
        return torch.zeros(shape) if config.model.zero_centered_norm else torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    of_toys = config.model.target.startswith(("tests.toy:", "tests.parallel.odd_models:"))
    std = 0.05 if of_toys else config.model.initializer_range
    if name.endswith(("attention.o.weight", "mlp.down.weight", "shared.down.weight", "experts.down_proj")):
        std /= math.sqrt(2 * config.model.num_hidden_layers)
    rows = max(1, 2**18 // math.prod(shape[1:]))  # of a block: each has a separate generator
    blocks = []
    for number, start in enumerate(range(0, shape[0], rows)):
        key = hashlib.blake2b(f"{config.run.seed}/{name}/{number}".encode(), digest_size=16).digest()
        size = (min(rows, shape[0] - start), *shape[1:])
        blocks.append(normal(math.prod(size), int.from_bytes(key, "little")).view(size) * std)
    return torch.cat(blocks)


def assemble(ranks: list[list[Shard]], kind: str = PARAMETER) -> dict[str, Tensor]:
    """Whole tensors from the shards of all ranks. Asserts that replicas are equal and that nothing is missing."""
    found: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for shards in ranks:
        for shard in shards:
            if shard.kind != kind:
                continue
            tensor = found.setdefault(shard.name, torch.zeros(shard.shape, dtype=shard.data.dtype))
            count = seen.setdefault(shard.name, torch.zeros(shard.shape))
            index = shard.chunk.within(whole(shard.shape))
            if count[index].any():
                assert torch.equal(tensor[index], shard.data), f"replicas of {shard.name} differ"
            tensor[index] = shard.data
            count[index] += 1.0 / shard.replicas
    for name, count in seen.items():
        assert torch.allclose(count, torch.ones_like(count)), f"{name} is not tiled by its shards"
    return found


def normwise(a: Tensor, b: Tensor) -> float:
    """Relative difference |a - b| / |b| in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
