"""Checkpoints of Megatron-LM (Megatron core's names), for models of Llama's kind.

    ROOT/latest_checkpointed_iteration.txt
    ROOT/iter_0001000/mp_rank_00_000/model_optim_rng.pt    tensor rank 0 of stage 0; mp_rank_00 where it is the only one
    ROOT/iter_0001000/.metadata, common.pt, *.distcp       or all ranks' tensors whole (torch_dist)

Queries, keys and values are one matrix, group by group: the queries of a group before its key and its value. Gate and
up are one matrix too: in each tensor rank's part its rows of gate come before its rows of up. The vocabulary is filled
up with rows that no token has. A stage numbers its layers from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stoker.launch.importing.megatron_arguments import Described, described
from stoker.launch.importing.pickled import held_in, refuse_strange
from stoker.launch.importing.reference import logits, rotate_halves
from stoker.launch.importing.source import Source, SourceTensor, floating, of_tensor, refuse_unknown
from stoker.models.hugging_face import DTYPES

FILE, LATEST = "model_optim_rng.pt", "latest_checkpointed_iteration.txt"
# What the pickles hold beside tensors and containers: read as records, whose classes are not imported.
RECORDS = re.compile(
    r"argparse\.Namespace|signal\.Signals|pathlib\.\w+|_?io\.BytesIO|types\.SimpleNamespace|numpy(\.\w+)*\.\w+|"
    r"megatron\.core\.(enums|transformer\.\w+|optimizer\.\w+|optimizer_param_scheduler|rerun_state_machine)\.\w+"
)
EMBEDDING, HEAD, NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)
_OUTER = {EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight", NORM: "model.norm.weight"}
QKV, GATE_UP = "self_attention.linear_qkv", "mlp.linear_fc1"
_INNER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
_PARTS = {QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), GATE_UP: ("mlp.gate_proj", "mlp.up_proj")}
# The dim that tensor ranks divide, by the end of a name; others are the same on every rank.
_DIVIDED = {
    EMBEDDING: 0,
    HEAD: 0,
    f"{QKV}.weight": 0,
    f"{QKV}.bias": 0,
    "self_attention.linear_proj.weight": 1,
    f"{GATE_UP}.weight": 0,
    "mlp.linear_fc2.weight": 1,
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_RANK = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")

Shards = Mapping[str, Sequence[SourceTensor]]  # of each tensor the parts of all tensor ranks, by its name


def is_megatron(folder: Path) -> bool:
    """Whether `folder` holds iterations, or is one."""
    return (folder / LATEST).is_file() or any(folder.glob(f"mp_rank_*/{FILE}"))


def iteration_in(folder: Path) -> Path:
    """The folder of the newest iteration, or `folder` itself. Raises ValueError for a file that names no folder."""
    path = folder / LATEST
    if not path.is_file():
        return folder
    word = path.read_bytes()[:100].decode(errors="replace").strip()
    is_number = word.isascii() and word.isdecimal()
    step = folder / (f"iter_{int(word):07d}" if is_number else "release")
    if not (is_number or word == "release") or not step.is_dir():
        raise ValueError(f"{path} names {word!r}, which is no iteration beside it")
    return step


def open_megatron(folder: Path, config: str | None, trust: bool) -> Source:
    """The model in `folder`, of the files of all ranks. Raises ValueError, naming a file, for what is not one model."""
    step = iteration_in(folder)
    ranks = _ranks(step)
    held = {rank: _held(path, trust) for rank, path in ranks.items()}
    first = held[0, 0]
    model = described(ranks[0, 0], first["args"], config)
    _refuse_missing(step, ranks, model)
    for rank, values in held.items():
        other = described(ranks[rank], values["args"], config)
        if other != model or values.get("iteration") != first.get("iteration"):
            raise ValueError(f"{ranks[rank]} is of another model or iteration than {ranks[0, 0]}")
    shards: dict[str, list[SourceTensor]] = {}
    for stage in range(model.stages):
        before = model.layers_before(stage)
        for tensor in range(model.ranks):
            for name, value in _tensors(ranks[tensor, stage], held[tensor, stage]["model"]).items():
                shards.setdefault(_numbered(name, before), []).append(value)
    _refuse_unequal(shards, model)
    beside = tuple(sorted({key for values in held.values() for key in values} & set(_BESIDE)))
    return megatron_source(f"{step.name} of Megatron", model, shards, beside)


_BESIDE = ("optimizer", "opt_param_scheduler", "rng_state", "rerun_state_machine")


def _ranks(step: Path) -> dict[tuple[int, int], Path]:
    """The files of an iteration by tensor rank and stage."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(step.glob(f"mp_rank_*/{FILE}")):
        match = _RANK.fullmatch(path.parent.name)
        if match is None:
            raise ValueError(f"{path}: mp_rank_TENSOR_STAGE is read, not {path.parent.name}: experts are not imported")
        found[int(match[1]), int(match[2] or 0)] = path
    if (0, 0) not in found:
        raise ValueError(f"{step} has no mp_rank_00/{FILE} and no mp_rank_00_000/{FILE}")
    return found


def _held(path: Path, trust: bool) -> dict[str, Any]:
    held = held_in(path, trust, RECORDS)
    if not isinstance(held, dict) or "args" not in held:
        raise ValueError(f"{path} holds no args: it is no file of Megatron's")
    virtual = [key for key in held if isinstance(key, str) and re.fullmatch(r"model\d+", key)]
    if virtual:
        raise ValueError(f"{path} holds {virtual[0]}: checkpoints of interleaved pipelines are not imported")
    version = held.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 3:
        raise ValueError(f"{path}: checkpoint_version={version!s:.20}: 3.0 is read; queries had another order before")
    if not isinstance(held.get("model"), dict):
        raise ValueError(f"{path} holds no model")
    return held


def _tensors(path: Path, held: Mapping[Any, Any]) -> dict[str, SourceTensor]:
    found: dict[str, SourceTensor] = {}
    for name, value in held.items():
        if str(name).endswith("._extra_state"):
            continue  # of Transformer Engine's float8
        if str(name) == "language_model":
            raise ValueError(f"{path} has the names of Megatron before its core: --use-mcore-models writes those read")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!s:.80} is {type(value).__name__}, not a tensor")
        refuse_strange(path, str(name), value)
        found[str(name)] = of_tensor(path, value)
    return found


def _refuse_missing(step: Path, ranks: Mapping[tuple[int, int], Path], model: Described) -> None:
    expected = {(tensor, stage) for tensor in range(model.ranks) for stage in range(model.stages)}
    for tensor, stage in sorted(expected - set(ranks)):
        name = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if model.stages > 1 else "")
        grid = f"{model.ranks} tensor ranks x {model.stages} stages"
        raise ValueError(f"{step} has no {name}/{FILE}: its args have {grid}")
    for rank in sorted(set(ranks) - expected):
        raise ValueError(f"{ranks[rank]}: its args have {model.ranks} tensor ranks and {model.stages} stages only")


def _numbered(name: str, before: int) -> str:
    """The name in the whole model of a stage's tensor."""
    match = _LAYER.fullmatch(name)
    return name if match is None else f"decoder.layers.{int(match[1]) + before}.{match[2]}"


def _divided(name: str) -> int | None:
    match = _LAYER.fullmatch(name)
    return _DIVIDED.get(match[2] if match else name)


def _refuse_unequal(shards: dict[str, list[SourceTensor]], model: Described) -> None:
    """Raises ValueError for tensors that not every rank has, and for copies that differ. Leaves one of each copy."""
    for name, parts in shards.items():
        if len(parts) != model.ranks:
            raise ValueError(f"{parts[0].file}: {name} is held by {len(parts)} of {model.ranks} tensor ranks")
        for other in parts[1:]:
            if (other.shape, other.dtype) != (parts[0].shape, parts[0].dtype):
                raise ValueError(f"{other.file}: {name} is {other.dtype} {other.shape}, and on rank 0 {parts[0].shape}")
        for other in parts[1:] if _divided(name) is None else ():
            if not torch.equal(parts[0].load(), other.load()):
                raise ValueError(f"{other.file}: {name} differs from that of {parts[0].file}, which is its copy")
    if model.tied and HEAD in shards and EMBEDDING in shards:  # the last stage's copy of the embedding
        for ours, copy in zip(shards[EMBEDDING], shards.pop(HEAD), strict=True):
            if not torch.equal(ours.load(), copy.load()):
                raise ValueError(f"{copy.file}: {HEAD} differs from the embedding, to which args tie it")


def megatron_source(what: str, model: Described, shards: Shards, left_out: tuple[str, ...]) -> Source:
    """A source of these parts. Raises ValueError for names that a model of Llama's kind does not have."""
    refuse_unknown("a model of Megatron of Llama's kind", [name for name in shards if not _known(name)])
    tensors: dict[str, SourceTensor] = {}
    for name, parts in shards.items():
        match = _LAYER.fullmatch(name)
        module, _, kind = (match[2] if match else name).rpartition(".")
        if match and module in _PARTS and kind in ("weight", "bias"):
            prefix = f"model.layers.{match[1]}"
            for number, theirs in enumerate(_PARTS[module]):
                tensors[f"{prefix}.{theirs}.{kind}"] = _apart(name, parts, model, number)
        elif match:
            tensors[f"model.layers.{match[1]}.{_INNER[match[2]]}"] = _whole(name, parts)
        else:
            made = _whole(name, parts)
            tensors[_OUTER[name]] = made if name == NORM else _cut(name, made, model)
    dtypes = {name: ours for ours, name in DTYPES.items()}
    config = model.config_json(dtypes.get(floating(tensors) or "", "fp32"))

    def reference(parsed: Any, tokens: Tensor) -> Tensor:
        return logits(
            parsed, tokens, lambda role: _outer(shards, model, role), lambda n: _Layer(shards, model, n), rotate_halves
        )

    return Source(what, config, tensors, _name_of, reference, left_out=left_out)


def _known(name: str) -> bool:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name in _OUTER
    return match[2] in _INNER or match[2] in (f"{QKV}.weight", f"{QKV}.bias", f"{GATE_UP}.weight")


def _whole(name: str, parts: Sequence[SourceTensor]) -> SourceTensor:
    dim = _divided(name)
    if dim is None or len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    if len(shape) <= dim:
        raise ValueError(f"{parts[0].file}: {name} has shape {parts[0].shape}")
    shape[dim] *= len(parts)
    return SourceTensor(parts[0].file, tuple(shape), parts[0].dtype, lambda: torch.cat([p.load() for p in parts], dim))


def _apart(name: str, parts: Sequence[SourceTensor], model: Described, number: int) -> SourceTensor:
    """Queries, keys or values, or gate or up: the projection of this `number` of a fused matrix or bias."""
    fused_qkv = name.rpartition(".")[0].endswith(QKV)
    rows = model.rows_of_qkv if fused_qkv else (model.intermediate_size,) * 2
    for part in parts:
        if not part.shape or part.shape[0] * len(parts) != sum(rows):
            wanted = sum(rows) // len(parts)
            raise ValueError(f"{part.file}: {name} has shape {part.shape}; args make {wanted} rows of it")

    def load() -> Tensor:
        return torch.cat([_projection(part.load(), model, fused_qkv, number) for part in parts])

    return SourceTensor(parts[0].file, (rows[number], *parts[0].shape[1:]), parts[0].dtype, load)


def _projection(value: Tensor, model: Described, fused_qkv: bool, number: int) -> Tensor:
    if not fused_qkv:
        return value.chunk(2)[number]
    own = model.heads // model.groups
    return value.unflatten(0, (-1, own + 2, model.head_dim)).split((own, 1, 1), 1)[number].flatten(0, 2)


def _cut(name: str, made: SourceTensor, model: Described) -> SourceTensor:
    """Without the rows that fill the vocabulary up."""
    if len(made.shape) != 2 or made.shape[0] < model.vocab_size:
        raise ValueError(f"{made.file}: {name} has shape {made.shape}, and the vocabulary {model.vocab_size} tokens")
    shape = (model.vocab_size, made.shape[1])
    return made.made(shape, lambda value: value[: model.vocab_size].contiguous())


_ROLES = {  # of `reference.Layer.weight`
    "attention_norm": ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    "mlp_norm": ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
}


@dataclass(frozen=True)
class _Layer:
    """A layer in Megatron's own layout, tensor rank by tensor rank (see `stoker.launch.importing.reference.Layer`)."""

    shards: Shards
    model: Described
    number: int

    def _parts(self, *names: str) -> list[Tensor]:
        found = next(
            parts for name in names if (parts := self.shards.get(f"decoder.layers.{self.number}.{name}")) is not None
        )
        return [part.load() for part in found]

    def weight(self, role: str) -> Tensor:
        if role in _ROLES:
            return self._parts(*_ROLES[role])[0]
        if role in ("gate", "up"):  # of each rank its half
            halves = (part.view(2, -1, part.shape[1]) for part in self._parts(f"{GATE_UP}.weight"))
            return torch.cat([half[("gate", "up").index(role)] for half in halves])
        rows = {"o": "self_attention.linear_proj.weight", "down": "mlp.linear_fc2.weight"}
        return torch.cat(self._parts(rows[role]), 1)

    def head_norm(self, kind: str) -> Tensor | None:
        name = f"self_attention.{kind}_layernorm.weight"
        return self._parts(name)[0] if f"decoder.layers.{self.number}.{name}" in self.shards else None

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each rank's attention makes of its product with the fused matrix, one rank's heads after another's."""
        weights = self._parts(f"{QKV}.weight")
        has_bias = f"decoder.layers.{self.number}.{QKV}.bias" in self.shards
        biases: Sequence[Tensor | None] = self._parts(f"{QKV}.bias") if has_bias else [None] * len(weights)
        groups, own = self.model.groups // len(weights), self.model.heads // self.model.groups
        q, k, v = [], [], []
        for weight, bias in zip(weights, biases, strict=True):
            product = F.linear(x, weight.float(), None if bias is None else bias.float())
            each = product.view(len(x), groups, own + 2, self.model.head_dim)
            q.append(each[:, :, :own].reshape(len(x), groups * own, -1))
            k.append(each[:, :, own])
            v.append(each[:, :, own + 1])
        return torch.cat(q, 1), torch.cat(k, 1), torch.cat(v, 1)


def _outer(shards: Shards, model: Described, role: str) -> Tensor:
    names = {"embedding": EMBEDDING, "norm": NORM, "head": EMBEDDING if model.tied else HEAD}
    parts = [part.load() for part in shards[names[role]]]
    return parts[0] if role == "norm" else torch.cat(parts)[: model.vocab_size]


def _name_of(name: str) -> str:
    """Megatron's name of a tensor of Hugging Face's."""
    outer = {theirs: ours for ours, theirs in _OUTER.items()}
    if name in outer:
        return outer[name]
    number, _, inner = name.removeprefix("model.layers.").partition(".")
    module, _, kind = inner.rpartition(".")
    for fused, parts in _PARTS.items():
        if module in parts:
            return f"decoder.layers.{number}.{fused}.{kind}"
    own = next((ours for ours, theirs in _INNER.items() if theirs == inner), inner)
    return f"decoder.layers.{number}.{own}"
