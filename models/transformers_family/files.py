"""Weights of transformers' models in their folders: renamed, merged and split by transformers' own conversion tables.

A tensor of a folder may be one of several that become one parameter (the matrices of experts), or the other way round.
Shapes are found by converting on the meta device; values are read and converted when they are asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stoker.models.family import Exported
from stoker.models.hugging_face_config import in_one_line
from stoker.models.hugging_face_weights import StoredTensor
from stoker.parallel.dtypes import DTYPES
from stoker.parallel.shards import Chunk, whole


@dataclass
class _Group:
    """Tensors of a folder that a conversion takes together."""

    converter: Any
    target: str  # the name by which the conversion goes
    sources: list[tuple[str, str, StoredTensor]]  # pattern, name, tensor

    def convert(self, read: Any, causal: Any) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        for pattern, name, tensor in self.sources:
            converter.add_tensor(self.target, name, pattern, read(tensor))
        try:
            found = converter.convert(self.target, model=causal, config=causal.config)
        except Exception as error:  # of many kinds, some of them transformers' own
            raise ValueError(f"transformers cannot convert {self.sources[0][1]}: {in_one_line(error)}") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class _Converted:
    """A parameter that is made of tensors of the folder."""

    def __init__(self, group: _Group, name: str, shape: tuple[int, ...], dtype: str, causal: Any) -> None:
        self.shape, self.dtype = shape, dtype
        self._group, self._name, self._causal = group, name, causal

    def read(self, chunk: Chunk) -> Tensor:
        value = self._group.convert(lambda tensor: tensor.read(whole(tensor.shape)), self._causal)[self._name]
        return value[chunk.within(whole(self.shape))]


def stored_tensors(causal: Any, found: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The tensors of a folder by the names of `causal`'s parameters (on the meta device), `Readable`.

    Those that belong to no parameter keep their names. Raises ValueError for what transformers cannot convert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(causal)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    expected = causal.state_dict()
    tensors: dict[str, Any] = {}
    groups: dict[str, _Group] = {}
    for name in sorted(found, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, causal.base_model_prefix, expected)
        if pattern is None:
            if target in tensors:
                raise ValueError(f"several tensors are {target}, among them {name}")
            tensors[target] = found[name]
        else:
            group = groups.setdefault(target, _Group(by_pattern[pattern], target, []))
            group.sources.append((pattern, name, found[name]))
    for group in groups.values():
        dtype = group.sources[0][2].dtype
        for name, value in group.convert(_on_meta, causal).items():
            tensors[name] = _Converted(group, name, tuple(value.shape), dtype, causal)
    return tensors


def _on_meta(tensor: StoredTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype, torch.float32), device="meta")


def exported_tensors(causal: Any, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Exported]:
    """How tensors of these `shapes`, by the names of `causal`, become those of a folder."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, apply_converters, revert_weight_conversion

    rules = get_model_conversion_mapping(causal, add_legacy=False)[::-1]
    converters = [rule for rule in (rule.reverse_transform() for rule in rules) if isinstance(rule, WeightConverter)]
    together: dict[str, list[str]] = {}
    for name in shapes:
        target, pattern = apply_converters(name, converters)
        together.setdefault(name if pattern is None else f"{target} by {pattern}", []).append(name)
    for names in together.values():

        def convert(values: list[Tensor], names: list[str] = names) -> dict[str, Tensor]:
            return revert_weight_conversion(causal, dict(zip(names, values, strict=True)))

        on_meta = convert([torch.empty(shapes[name], device="meta") for name in names])
        yield Exported(tuple(names), {name: tuple(value.shape) for name, value in on_meta.items()}, convert)


def untied(causal: Any, found: Iterable[str]) -> bool:
    """Whether the folder holds a head beside the embedding of a tied model."""
    tied = getattr(causal, "all_tied_weights_keys", {}) or {}
    return any(name in set(found) for name in tied)
