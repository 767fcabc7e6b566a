"""Projections that are one matrix in Hugging Face's files and several parameters here: Phi-3's qkv and gate_up.

They are split on the way in and put together on the way out. Values are not changed, only where they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stoker.conf.schema import ModelConfig
from stoker.models.attention import head_dim_of
from stoker.models.family import Exported
from stoker.models.hugging_face_weights import StoredTensor
from stoker.parallel.shards import Chunk

_PARTS = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


@dataclass(frozen=True)
class Rows:
    """Some rows of a stored matrix, `Readable`."""

    whole: StoredTensor
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.whole.shape[1:])

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    def read(self, chunk: Chunk) -> Tensor:
        """Only the bytes of `chunk`, as far as rows go, in the file's dtype."""
        return self.whole.read(chunk.moved((self.first, *(0 for _ in chunk.sizes[1:]))))


def split(found: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, Any]:
    """`found`, the tensors of a folder, with fused ones apart under the names of the projections.

    Raises ValueError, naming it, for one that has other rows than the projections of `config` together.
    """
    head_dim, key_heads = head_dim_of(config), config.num_key_value_heads or config.num_attention_heads
    of_keys = key_heads * head_dim
    rows = {
        "self_attn.qkv_proj.weight": (config.num_attention_heads * head_dim, of_keys, of_keys),
        "mlp.gate_up_proj.weight": (config.intermediate_size, config.intermediate_size),
    }
    tensors: dict[str, Any] = {}
    for name, tensor in found.items():
        fused = next((end for end in _PARTS if name.endswith(f".{end}")), None)
        if fused is None:
            tensors[name] = tensor
            continue
        if tensor.shape[:1] != (sum(rows[fused]),):
            counts = " + ".join(map(str, rows[fused]))
            raise ValueError(f"{name} has shape {tensor.shape}, the model's has {counts} rows")
        first, prefix = 0, name.removesuffix(fused)
        for part, count in zip(_PARTS[fused], rows[fused], strict=True):
            tensors[f"{prefix}{part}"] = Rows(tensor, first, count)
            first += count
    return tensors


def put_together(named: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[Exported | str]:
    """How parameters become fused tensors; of those that are in none, the name.

    `named` are Hugging Face's names and shapes by ours.
    """
    ours = {theirs: name for name, (theirs, _) in named.items()}
    last = {parts[-1]: (fused, parts) for fused, parts in _PARTS.items()}
    inner = {part for parts in _PARTS.values() for part in parts}
    for name, (theirs, _) in named.items():
        end = ".".join(theirs.split(".")[-3:])
        if end not in inner:
            yield name
        elif end in last:
            fused, parts = last[end]
            prefix = theirs.removesuffix(end)
            names = tuple(ours[f"{prefix}{part}"] for part in parts)
            shapes = [named[part][1] for part in names]
            shape = (sum(rows for rows, _ in shapes), shapes[0][1])
            yield Exported(names, {f"{prefix}{fused}": shape}, _joined(f"{prefix}{fused}"))


def _joined(file: str) -> Any:
    return lambda values: {file: torch.cat(values)}
