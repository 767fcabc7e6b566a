"""torchtitan's names and layout of the decoders of Llama and Qwen3, in and out.

Llama's rotary embedding turns neighbours there (channels 2i and 2i + 1 of a head), and halves in Hugging Face's model
(channels i and i + dim / 2): the rows of its queries and keys are permuted within each head. Qwen3 turns halves
in both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from stoker.launch.importing.reference import logits, rotate_halves, rotate_neighbours
from stoker.launch.importing.source import Source, SourceTensor, refuse_unknown, without_tables

EMBEDDING = "tok_embeddings.weight"
PERMUTED = {"llama": True, "qwen3": False}  # of each model_type that torchtitan has: whether rows are permuted
_OUTER = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_NEWER = {"lm_head.weight": "output.weight"}  # names of newer versions
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_THEIR_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def permuted_heads(config: Mapping[str, Any], name: str) -> int | None:
    """How many heads of the tensor `name` (Hugging Face's) have other rows in torchtitan; None where it is equal.

    Raises ValueError for a config.json of a model that torchtitan has in another layout, or not at all.
    """
    kind = config.get("model_type")
    if kind not in PERMUTED:
        known = " and ".join(PERMUTED)
        raise ValueError(f"model_type={kind!r}: torchtitan's names are known for {known}")
    if not PERMUTED[kind]:
        return None
    heads = config.get("num_attention_heads")
    key_heads = config.get("num_key_value_heads") or heads
    found = {"q_proj.weight": heads, "k_proj.weight": key_heads}.get(name.rpartition("self_attn.")[2])
    if found is not None and (type(found) is not int or found < 1):
        raise ValueError(f"config.json: {found!s:.80} is not a number of heads")
    return found


def to_neighbours(value: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys from Hugging Face's order to torchtitan's."""
    return value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_halves(value: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys from torchtitan's order to Hugging Face's."""
    return value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def torchtitan_name(name: str) -> str:
    """torchtitan's name of a tensor of Hugging Face's. Raises ValueError for one that it does not have."""
    for ours, theirs in _OUTER.items():
        if theirs == name:
            return ours
    match = _THEIR_LAYER.fullmatch(name)
    own = {theirs: ours for ours, theirs in _INNER.items()}.get(match[2]) if match else None
    if match is None or own is None:
        raise ValueError(f"torchtitan has no name for {name}")
    return f"layers.{match[1]}.{own}"


def torchtitan_source(
    what: str, config: dict[str, Any], given: Mapping[str, SourceTensor], left_out: tuple[str, ...] = ()
) -> Source:
    """A source of torchtitan's names. Raises ValueError for names, and for a config.json, that torchtitan lacks."""
    found = {
        _NEWER.get(name, name).replace("attention.qkv_linear.w", "attention.w"): tensor
        for name, tensor in without_tables(given).items()
    }
    unknown = [name for name in found if _hugging_face_name(name) is None]
    refuse_unknown("a model of torchtitan's of Llama's kind", unknown)
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in found.items():
        theirs = _hugging_face_name(name)
        assert theirs is not None
        heads = permuted_heads(config, theirs)
        if heads is not None:
            if not tensor.shape or tensor.shape[0] % (2 * heads):
                raise ValueError(f"{name} has shape {tensor.shape}: its rows are no pairs in {heads} heads")
            tensor = tensor.made(tensor.shape, lambda value, heads=heads: to_halves(value, heads))  # type: ignore[misc]
        tensors[theirs] = tensor
    rotate = rotate_neighbours if PERMUTED[config["model_type"]] else rotate_halves

    def reference(parsed: Any, tokens: Tensor) -> Tensor:
        return logits(parsed, tokens, lambda role: _outer(found, role), lambda n: _Layer(found, n, parsed), rotate)

    return Source(what, config, tensors, torchtitan_name, reference, left_out=left_out)


_ROLES = {  # of `reference.Layer.weight`
    "attention_norm": "attention_norm",
    "mlp_norm": "ffn_norm",
    "o": "attention.wo",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}


class _Layer:
    """A layer in torchtitan's own layout (see `stoker.launch.importing.reference.Layer`)."""

    def __init__(self, found: Mapping[str, SourceTensor], number: int, parsed: Any) -> None:
        self._found, self._prefix = found, f"layers.{number}"
        self._heads = (parsed.num_attention_heads, parsed.num_key_value_heads, parsed.num_key_value_heads)

    def weight(self, role: str) -> Tensor:
        return self._found[f"{self._prefix}.{_ROLES[role]}.weight"].load()

    def head_norm(self, kind: str) -> Tensor | None:
        tensor = self._found.get(f"{self._prefix}.attention.{kind}_norm.weight")
        return None if tensor is None else tensor.load()

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            F.linear(x, self._found[f"{self._prefix}.attention.w{letter}.weight"].load().float()).unflatten(
                1, (count, -1)
            )
            for letter, count in zip("qkv", self._heads, strict=True)
        )
        return q, k, v


def _outer(found: Mapping[str, SourceTensor], role: str) -> Tensor:
    name = {"embedding": EMBEDDING, "norm": "norm.weight", "head": "output.weight"}[role]
    return found[name if name in found else EMBEDDING].load()  # a tied head is not stored


def _hugging_face_name(name: str) -> str | None:
    if name in _OUTER:
        return _OUTER[name]
    match = _LAYER.fullmatch(name)
    inner = _INNER.get(match[2]) if match else None
    return None if match is None or inner is None else f"model.layers.{match[1]}.{inner}"
