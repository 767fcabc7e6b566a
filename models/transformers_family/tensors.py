"""Tensor parallelism of transformers' models: each style of their plans as a layer of `stoker.parallel.tensor`.

A module is given a class that is both its own and one of ours; so it keeps its parameters, their names and what else
it holds. Until it is cut it computes as before. Every column-parallel layer enters its region itself, and every
row-parallel one leaves it: transformers' modules have no common way in.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from stoker.models.embedding import lookup
from stoker.models.transformers_family.conv1d import ColumnConv1D, FusedHeads, RowConv1D
from stoker.models.transformers_family.packed import packed_entry
from stoker.models.transformers_family.plans import own_plan
from stoker.parallel.experts import Experts
from stoker.parallel.model import Role
from stoker.parallel.registry import Entry, Piece
from stoker.parallel.shards import whole
from stoker.parallel.tensor.axis import TensorAxis, sharded_entry
from stoker.parallel.tensor.layers import (
    ColumnLinear,
    ReplicatedInTensorParallel,
    RowLinear,
    TensorLayer,
    VocabularyLayer,
)
from stoker.parallel.tensor.regions import enter, enter_last_channels, gather_channels, leave, split_channels

_KV = ("k_proj", "v_proj", "k_b_proj", "v_b_proj")
_ATTENTION = re.compile(r"\b(self_)?attn\b|\b(self_)?attention\b")


def plan_of(config: Any) -> Mapping[str, str]:
    """The styles by names of modules or parameters within the body (`*` for numbers), without embedding and head.

    Empty where neither transformers nor Stoker has a plan for the model.
    """
    text = config.get_text_config()
    plan = {**(getattr(text, "base_model_tp_plan", None) or {}), **own_plan(text)}
    return {pattern: style for pattern, style in plan.items() if style and not style.startswith("embedding_")}


def unknown_styles(plan: Mapping[str, str]) -> list[str]:
    return sorted({style for style in plan.values() if style not in (*_STYLES, *_OF_PARAMETERS)})


def prepare(causal: Any, base: str) -> None:
    """Make the layers that the model's plan names, and its embedding, such that tensor parallelism can cut them."""
    embedding = causal.get_input_embeddings()
    _mix_in(embedding, TokenEmbedding)
    config = causal.config.get_text_config()
    plan = plan_of(causal.config)
    for pattern, style in plan.items():
        matching = re.compile(re.escape(f"{base}.{pattern}").replace(r"\*", r"\d+"))
        for name, module in list(causal.named_modules()):
            if matching.fullmatch(name) and style in _STYLES:
                own = {
                    parameter: other
                    for path, other in plan.items()
                    if path.startswith(f"{pattern}.") and (parameter := path.rpartition(".")[2])
                }
                _STYLES[style](module, name, config, own)


def _mix_in(module: nn.Module, ours: type[TensorLayer]) -> None:
    """Give `module` a class that is both `ours` and its own, ours first where both have a method."""
    module.__class__ = _mixed(ours, type(module))  # type: ignore[arg-type]


@functools.cache
def _mixed(ours: Any, theirs: Any) -> type[nn.Module]:
    bases = (theirs, ours) if ours is TokenEmbedding and theirs is not nn.Embedding else (ours, theirs)
    return ours if issubclass(ours, theirs) else type(theirs.__name__, bases, {})


class TokenEmbedding(VocabularyLayer, nn.Embedding):  # type: ignore[misc]
    """transformers' embedding; one that scales its result calls this one by `super()`."""

    role = Role.EMBEDDING

    def forward(self, input: Tensor) -> Tensor:
        found = lookup(input.flatten(), self.weight, self.vocabulary)
        return found.view(*input.shape, self.weight.shape[1])


class _Column(ColumnLinear):
    """`colwise`."""

    takes_adapters = True
    axis: TensorAxis | None = None

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.axis = axis
        return super().cut(axis)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.axis is None else enter(x, self.axis))


class _GatheredColumn(_Column):
    """`colwise_gather_output`: all channels on all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.axis is None else gather_channels(out, self.axis)


class _SplitRow(RowLinear):
    """`rowwise_split_input`: the input has all channels on all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.axis is None else split_channels(x, self.axis))


class _PackedColumn(_Column):
    """`packed_colwise`: several projections of the same size, one after the other in one weight."""

    packed = 2

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.axis = axis
        names = ("weight", "bias") if self.bias is not None else ("weight",)
        entries = [packed_entry(name, self.get_parameter(name), 0, self.packed, axis, self.unit) for name in names]
        self.out_features //= axis.size
        return entries


class _SharedByHeads(TensorLayer, nn.Linear):
    """`mla_kv_a_proj`: its last channels, which are rotated, go to the attention of all heads without a projection."""

    axis: TensorAxis | None = None
    rotated: int

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.axis = axis
        return []

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.axis is None:
            return out
        return enter_last_channels(out, self.rotated, self.axis)


class _Experts(TensorLayer):
    """`moe_tp_experts`: every rank has a share of the channels of every expert."""

    axis: TensorAxis | None = None
    styles: Mapping[str, str]  # of the parameters

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.axis = axis
        entries = []
        for name, parameter in self.named_parameters(recurse=False):
            style = self.styles.get(name)
            if style not in _OF_PARAMETERS:
                raise ValueError(f"the plan has no style for the experts' {name}")
            entries.append(_OF_PARAMETERS[style](name, parameter, axis))
        return entries

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor, *others: Any, **named: Any) -> Tensor:
        if self.axis is None:
            return super().forward(hidden, index, weights, *others, **named)
        out = super().forward(enter(hidden, self.axis), index, enter(weights, self.axis), *others, **named)
        return leave(out, self.axis)


class _GroupedExperts(Experts):
    """`moe_tp_experts` of experts that compute what Stoker's do, which expert parallelism can divide too."""

    def cut(self, axis: TensorAxis) -> list[Entry]:
        return super().cut(dataclasses.replace(axis, experts=True))


def _are_grouped(module: Any) -> bool:
    """Whether experts of transformers' are SwiGLU networks without biases, whose matrices are stacked as Stoker's."""
    flags = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
    flags["has_post_expert_norm"] = False
    names = {name for name, _ in module.named_parameters()}
    gate = getattr(type(module), "_apply_gate", None)
    return (
        all(getattr(module, flag, None) is value for flag, value in flags.items())
        and names == {"gate_up_proj", "down_proj"}
        and type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        and getattr(gate, "__name__", "") == "_default_apply_gate"
    )


class _CountedHeads(TensorLayer):
    """An attention that shapes its projections by a number of heads: on a rank, by that of the rank."""

    num_heads: int
    num_key_value_heads: int

    def cut(self, axis: TensorAxis) -> list[Entry]:
        self.num_heads //= axis.size
        self.num_key_value_heads = max(1, self.num_key_value_heads // axis.size)
        return []


def _last_dim_entry(name: str, parameter: Tensor, axis: TensorAxis) -> Entry:
    shape = tuple(parameter.shape)
    return sharded_entry(name, shape, len(shape) - 1, axis.equal_share(shape[-1]))


def _kept_entry(name: str, parameter: Tensor, axis: TensorAxis) -> Entry:
    box = whole(tuple(parameter.shape))
    return Entry(name, box.sizes, (Piece(box, box),), axis.rank, axis.size, partial=("tp",))


_OF_PARAMETERS: dict[str, Callable[[str, Tensor, TensorAxis], Entry]] = {
    "packed_colwise": lambda name, parameter, axis: packed_entry(name, parameter, parameter.dim() - 2, 2, axis),
    "colwise": lambda name, parameter, axis: sharded_entry(
        name, tuple(parameter.shape), parameter.dim() - 2, axis.equal_share(parameter.shape[-2])
    ),
    "rowwise": _last_dim_entry,
    "replicated_with_grad_allreduce": _kept_entry,
}


def _linear(ours: type[TensorLayer], module: nn.Module, name: str, unit: int) -> None:
    if type(module) is not nn.Linear:
        raise ValueError(f"tensor parallelism: {name} is {type(module).__name__}, not a linear layer")
    _mix_in(module, ours)
    module.unit = unit  # type: ignore[assignment]


def _column(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _linear(_Column, module, name, _unit(name, getattr(module, "out_features", 0), config))


def _row(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _linear(RowLinear, module, name, _unit(name, getattr(module, "in_features", 0), config))


def _packed(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _linear(_PackedColumn, module, name, 1)
    module.fused = {"weight": (0, (module.out_features // module.packed,) * module.packed)}


def _gathered(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _linear(_GatheredColumn, module, name, 1)
    sizes = _fused_sizes(name, config)
    if sum(sizes) == module.out_features:
        module.fused = {"weight": (0, sizes)}


def _split(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _linear(_SplitRow, module, name, 1)


def _inside(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _mix_in(module, ReplicatedInTensorParallel)


def _latent(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    if type(module) is not nn.Linear:
        raise ValueError(f"tensor parallelism: {name} is {type(module).__name__}, not a linear layer")
    _mix_in(module, _SharedByHeads)
    module.rotated = config.qk_rope_head_dim


def _experts(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    if _are_grouped(module):
        _mix_in(module, _GroupedExperts)
        module.describe(*module.down_proj.shape)
        return
    _mix_in(module, _Experts)
    module.styles = dict(own)


def _column_conv1d(module: Any, name: str, config: Any, own: Mapping[str, str], packed: int = 1) -> None:
    unit = _unit(name, module.nf // packed, config)
    _mix_in(module, ColumnConv1D)
    module.unit, module.packed = unit, packed
    if packed > 1:
        module.fused = {"weight": (1, (module.nf // packed,) * packed)}


def _fused_conv1d(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _column_conv1d(module, name, config, own, packed=3)


def _row_conv1d(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    unit = _unit(name, module.weight.shape[0], config)
    _mix_in(module, RowConv1D)
    module.unit = unit


def _counted_heads(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _mix_in(module, _CountedHeads)


def _fused_heads(module: Any, name: str, config: Any, own: Mapping[str, str]) -> None:
    _mix_in(module, FusedHeads)


_STYLES: dict[str, Callable[[Any, str, Any, Mapping[str, str]], None]] = {
    "colwise": _column,
    "rowwise": _row,
    "packed_colwise": _packed,
    "colwise_gather_output": _gathered,
    "colwise_rep": _gathered,
    "rowwise_split_input": _split,
    "rowwise_rep": _split,
    "replicated_with_grad_allreduce": _inside,
    "mla_kv_a_proj": _latent,
    "moe_tp_experts": _experts,
    # Of Stoker's own plans
    "conv1d_colwise": _column_conv1d,
    "conv1d_qkv": _fused_conv1d,
    "conv1d_rowwise": _row_conv1d,
    "counted_heads": _counted_heads,
    "fused_heads": _fused_heads,
}


def _fused_sizes(name: str, config: Any) -> tuple[int, ...]:
    """The output features of each projection in a fused one that a model splits itself; none if it is not known."""
    if name.endswith(".gate_up_proj"):
        return (config.intermediate_size, config.intermediate_size)
    if name.endswith(".qkv_proj"):
        heads, width = config.num_attention_heads, config.hidden_size
        head = getattr(config, "head_dim", None) or width // heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        return (heads * head, kv * head, kv * head)
    return ()


def _unit(name: str, features: int, config: Any) -> int:
    """Features that are never divided: a head, in attention."""
    if not _ATTENTION.search(name):
        return 1
    heads = config.num_attention_heads
    if name.rpartition(".")[2] in _KV:
        heads = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or features % heads:
        raise ValueError(f"tensor parallelism: {name} has {features} features, which are not {heads} heads")
    return features // heads
