"""Experts from a model that has none: each begins as a copy of its layer's MLP (Komatsuzaki et al. 2022).

Narrower experts begin as equal parts of its channels, in turn, and the experts of one copy share a row of the router's,
so that a token that uses one of them uses all (He et al. 2024, virtual groups). Then the first outputs are those of the
model without experts: weights of a token's experts add up to one, and parts of a copy to the whole. What the router
begins with, and the noise that is added to experts, are functions of the seed and the tensor's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stoker.conf.schema import ModelConfig
from stoker.models.family import Described
from stoker.models.feed_forward import expert_width, is_sparse
from stoker.parallel.initialize import initialize
from stoker.parallel.model import Constant, Normal
from stoker.parallel.shards import BUFFER, PARAMETER, Chunk, Shard, whole

Fill = Callable[[Sequence[Shard]], None]  # the values of shards, from where they are stored
_PROJECTIONS = ("gate", "up", "down")
_GATE_UP, _DOWN, _ROUTER, _BIAS = "experts.gate_up_proj", "experts.down_proj", "router.weight", "router.bias"


def without_experts(config: ModelConfig) -> ModelConfig | None:
    """The model whose MLPs the experts of `config` can begin as; None: it has no experts."""
    return dataclasses.replace(config, num_experts=0) if config.num_experts else None


def upcycling_problem(config: ModelConfig) -> str | None:
    """Why the first outputs of `config` could not be those of the model without experts, with what works."""
    width, dense = expert_width(config), config.intermediate_size
    if config.num_shared_experts:
        return f"model.num_shared_experts={config.num_shared_experts} has no MLP to begin as: 0 works"
    if not config.norm_topk_prob:
        return "model.norm_topk_prob=false: the weights of a token's experts have to add up to one: true works"
    if dense % width:
        near = next(size for size in range(min(width, dense), 0, -1) if dense % size == 0)
        return (
            f"model.moe_intermediate_size={width} does not divide the {dense} channels of the model's MLPs: "
            f"model.moe_intermediate_size={near} does"
        )
    parts = dense // width
    for key in ("num_experts", "num_experts_per_tok"):
        if (count := getattr(config, key)) % parts:
            return (
                f"model.{key}={count} is no multiple of {parts}, the experts of model.moe_intermediate_size={width} "
                f"that one MLP of {dense} channels makes: model.{key}={-(-count // parts) * parts} is"
            )
    if config.num_experts // config.n_group % parts:
        return f"model.n_group={config.n_group} divides experts that are parts of one MLP: model.n_group=1 does not"
    return None


@dataclass(frozen=True)
class _Made:
    """A tensor that is not stored."""

    shape: tuple[int, ...]
    dtype: str = "F32"


class Upcycled:
    """The tensors of the model `config`, made of those of a model without experts.

    `dense` are the stored ones by name and `fill` reads them; `initial` gives the initial distribution of a parameter.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        initial: Callable[[str], Normal | Constant],
        dense: Mapping[str, Described],
        fill: Fill,
    ) -> None:
        self._config, self._seed, self._initial = config, seed, initial
        self._dense, self._fill = dense, fill
        self._width = expert_width(config)
        self._parts = config.intermediate_size // self._width

    @staticmethod
    def begins_dense(config: ModelConfig, stored: Mapping[str, Described]) -> bool:
        """Whether the first layer with experts in `config` has one MLP in `stored`."""
        return f"layers.{config.first_dense_layers}.mlp.gate.weight" in stored

    def tensors(self) -> dict[str, Described]:
        """By the names of the model with experts. Those of other layers, and what no layer needs, stay as stored."""
        found = dict(self._dense)
        for layer in filter(lambda number: is_sparse(self._config, number), range(self._config.num_hidden_layers)):
            prefix, experts = f"layers.{layer}.mlp", self._config.num_experts
            mlp = [found.pop(f"{prefix}.{name}.weight", None) for name in _PROJECTIONS]
            if any(matrix is None for matrix in mlp):
                continue  # named by the caller, which compares all names
            gate, up, down = (matrix.shape for matrix in mlp if matrix is not None)
            dtypes = [matrix.dtype for matrix in mlp if matrix is not None]
            rows, columns = ((gate[0] + up[0]) // self._parts, gate[1]), (down[0], down[1] // self._parts)
            found[f"{prefix}.{_GATE_UP}"] = _Made((experts, *rows), dtypes[0])
            found[f"{prefix}.{_DOWN}"] = _Made((experts, *columns), dtypes[2])
            found[f"{prefix}.{_ROUTER}"] = _Made((experts, gate[1]))
            if self._config.router_bias:
                found[f"{prefix}.{_BIAS}"] = _Made((experts,))
        return found

    def fill(self, shards: Sequence[Shard]) -> None:
        """The values of `shards` of the model with experts."""
        self._fill([shard for shard in shards if shard.name in self._dense])
        with torch.no_grad():
            for shard in shards:
                if shard.name in self._dense or not shard.data.numel():
                    continue
                if shard.kind == BUFFER:
                    shard.data.zero_()
                elif shard.name.endswith(_ROUTER):
                    self._fill_router(shard)
                else:
                    self._fill_experts(shard)

    def _fill_router(self, shard: Shard) -> None:
        made = self._drawn(dataclasses.replace(shard, chunk=whole(shard.shape)))
        first, count = shard.chunk.offsets[0], shard.chunk.sizes[0]
        rows = torch.arange(first, first + count) // self._parts * self._parts  # that of the copy's first expert
        columns = Chunk((0, *shard.chunk.offsets[1:]), made.shape[:1] + shard.chunk.sizes[1:])
        shard.data.copy_(made[columns.within(whole(shard.shape))][rows])

    def _fill_experts(self, shard: Shard) -> None:
        first, count = shard.chunk.offsets[0], shard.chunk.sizes[0]
        inner = Chunk(shard.chunk.offsets[1:], shard.chunk.sizes[1:])
        numbers = [number % self._parts for number in range(first, first + count)]
        for part in dict.fromkeys(numbers):
            matrix = self._part(shard.name, part, inner)
            for place in (place for place, number in enumerate(numbers) if number == part):
                shard.data[place].copy_(matrix)
        if self._config.upcycle_noise:
            shard.data.add_(self._drawn(shard).to(shard.data), alpha=self._config.upcycle_noise)

    def _part(self, name: str, part: int, inner: Chunk) -> Tensor:
        """Of a part of the channels the values in `inner` of an expert's matrix: fp32."""
        prefix, _, kind = name.rpartition(".experts.")
        start = part * self._width
        if f"experts.{kind}" == _DOWN:
            factor = self._parts / self._config.routed_scaling_factor
            return self._read(f"{prefix}.down.weight", inner.moved((0, start))) * factor
        found = torch.empty(inner.sizes)
        for rows, matrix, moved in self._rows(prefix, inner):
            found[rows.within(inner)] = self._read(matrix, rows.moved((start - moved, 0)))
        return found

    def _rows(self, prefix: str, inner: Chunk) -> Iterator[tuple[Chunk, str, int]]:
        """The rows of `inner` that are gate's and up's; the matrix, and where its rows begin."""
        for number, projection in enumerate(("gate", "up")):
            own = Chunk((number * self._width, 0), (self._width, sum(inner.offsets[1:] + inner.sizes[1:])))
            if (rows := own.intersection(inner)) is not None:
                yield rows, f"{prefix}.{projection}.weight", number * self._width

    def _read(self, name: str, chunk: Chunk) -> Tensor:
        found = Shard(name, PARAMETER, self._dense[name].shape, chunk, torch.empty(chunk.sizes))
        self._fill([found])
        return found.data

    def _drawn(self, shard: Shard) -> Tensor:
        """What `shard` would begin with in a model from scratch: fp32 on the CPU."""
        drawn = dataclasses.replace(shard, data=torch.empty(shard.chunk.sizes))
        initialize([drawn], self._initial, self._seed)
        return drawn.data
