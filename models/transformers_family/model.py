"""A causal language model of transformers, whole or the part of it that a pipeline stage holds.

The forward pass is that of transformers' own body: it makes masks and rotary tables, and calls its layers. What a part
does not hold is replaced so that this code runs as it is. Layers of other stages become ones without parameters, at
their places: the last of them before this part gives the activations that were received, the first of them after it
keeps what it is given, which is the part's result. What the body computes around its layers on such a stage is
discarded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stoker.conf.schema import ModelConfig
from stoker.models.cache import Cache
from stoker.models.gathered_attention import places_of
from stoker.models.loss import Head, Rule
from stoker.models.transformers_family.anatomy import Anatomy, anatomy, causal_model
from stoker.models.transformers_family.attention import AXIS, masks_of_documents
from stoker.models.transformers_family.initial import buffers_only, copy_buffers
from stoker.models.transformers_family.tensors import prepare
from stoker.parallel.model import Constant, Normal, Part, whole_model
from stoker.parallel.sequence import SequenceLayer


class TransformersModel(SequenceLayer):
    """A `stoker.parallel.model.ParallelizableModel` whose parameters have transformers' names.

    Its tokens meet in the attention that is registered with transformers: `refusals` leaves no other layer to them.
    """

    def __init__(self, config: ModelConfig, part: Part, values: dict[str, Any]) -> None:
        super().__init__()
        self.part, self.anatomy = part, anatomy(values)
        if self.anatomy.indivisible and part != whole_model(self.anatomy.count):
            raise ValueError(f"a pipeline cannot cut this model: {self.anatomy.indivisible}")
        self._values = values
        causal = causal_model(values)
        prepare(causal, self.anatomy.base)
        head = causal.get_output_embeddings()
        tied = head.weight is causal.get_input_embeddings().weight
        self._config = causal.config
        layers = causal.get_submodule(self.anatomy.layers)
        before, after = max(part.layers.start - 1, 0), min(part.layers.stop, self.anatomy.count - 1)
        self._received = _Received(layers[before], self.anatomy.layer_returns_tuple)
        self._result = _Result(layers[after], self.anatomy.layer_returns_tuple)
        for name, child in causal.named_children():
            self.add_module(name, child)
        if part.head:
            rule = _rule(causal, self.anatomy)
            self.set_submodule(self.anatomy.head, Head(head.weight, config.loss_chunk, head.bias, rule))
        else:
            self.set_submodule(self.anatomy.head, nn.Identity())
        self._tied = tied and part.head
        self._remove_other_stages()

    def _remove_other_stages(self) -> None:
        part, found = self.part, self.anatomy
        layers = self.get_submodule(found.layers)
        assert isinstance(layers, nn.ModuleList)
        for number in range(found.count):
            if number == part.layers.start - 1:
                layers[number] = self._received
            elif number == part.layers.stop:
                layers[number] = self._result
            elif number not in part.layers:
                layers[number] = _Absent(layers[number], found.layer_returns_tuple)
        gone = (frozenset() if part.embedding else found.before) | (frozenset() if part.head else found.after)
        for name in gone:
            if name != found.embedding:
                module = self.get_submodule(name)
                kind = (
                    _NoEmbedding(module.embedding_dim) if isinstance(module, nn.Embedding) else _Absent(module, False)
                )
                self.set_submodule(name, kind)
        if not part.embedding and not self._tied:
            self.set_submodule(found.embedding, nn.Identity())

    def forward(self, x: Tensor, positions: Tensor, documents: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """See `ParallelizableModel`. The part with the head returns fp32 logits `[tokens, vocab]` without labels."""
        given: dict[str, Any] = {"position_ids": positions} if self.anatomy.positions else {}
        if self.part.embedding:
            given["input_ids"] = x
        else:
            given["inputs_embeds"] = self._received.value = x.view(*positions.shape, -1)
        axis = self.sequence
        places = None if axis is None else places_of(positions, documents, axis)
        for module in self.modules() if axis is not None else ():
            setattr(module, AXIS, axis)  # where the registered attention finds it, in backward too
        try:
            with masks_of_documents(documents, places=places):
                out = self.get_submodule(self.anatomy.base)(use_cache=False, **given)[0]
            if not self.part.head:
                out = self._result.value
        finally:
            self._received.value = self._result.value = None
        assert out is not None
        flat = out.flatten(0, 1)
        return self.get_submodule(self.anatomy.head)(flat, labels) if self.part.head else flat

    def next_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """As `stoker.models.decoder.Decoder.next_logits`, with transformers' own cache of keys and values."""
        from transformers import DynamicCache

        if cache.own is None:
            cache.own = DynamicCache(config=self._config)
        start, new = cache.length, tokens.shape[1]
        given: dict[str, Any] = {}
        if self.anatomy.positions:
            given["position_ids"] = torch.arange(start, start + new, device=tokens.device).expand(len(tokens), new)
        with masks_of_documents(None):
            body = self.get_submodule(self.anatomy.base)
            out = body(input_ids=tokens, cache=cache.own, use_cache=True, **given)[0]
        cache.length += new
        return self.get_submodule(self.anatomy.head)(out[:, -1])

    def blocks(self) -> dict[str, nn.Module]:
        layers = self.get_submodule(self.anatomy.layers)
        return {str(number): layers[number] for number in self.part.layers}  # type: ignore[index]

    def initial(self, name: str) -> Normal | Constant:
        """transformers' own distribution. Where there is none, zeros: `refusals` asks for `model.init_from` then."""
        rule = self.anatomy.initial[name]
        return Constant(0.0) if isinstance(rule, str) else rule

    def rebuild_buffers(self) -> None:
        """Buffers as transformers' classes make them on the CPU, from the config alone; ties what is tied."""
        with torch.device("cpu"), buffers_only():
            fresh = causal_model(self._values)
        copy_buffers(fresh, self)
        if self._tied:
            self.get_submodule(self.anatomy.head).weight = self.get_submodule(self.anatomy.embedding).weight


class _Absent(nn.Module):
    """A layer or a module of another stage. It has the settings of the layer, which bodies read, and no parameters."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self._settings = {
            key: value
            for key, value in vars(layer).items()
            if not key.startswith("_") and not isinstance(value, (Tensor, nn.Module)) and key != "training"
        }
        self._returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("_settings", {})
        return settings[name] if name in settings else super().__getattr__(name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden,) if self._returns_tuple else hidden


class _Received(_Absent):
    """Gives the activations of the stage before."""

    value: Tensor | None = None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        assert self.value is not None
        return super().forward(self.value)


class _Result(_Absent):
    """Keeps the activations for the next stage."""

    value: Tensor | None = None

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        self.value = hidden
        return super().forward(hidden)


class _NoEmbedding(nn.Module):
    """A table of another stage (of learned positions), whose result is discarded on this one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, numbers: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(1, 1, self._width, device=numbers.device)


class _Given(nn.Module):
    """In the place of a body: its output is what it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return _Output(inputs_embeds)

    @property
    def decoder(self) -> _Given:
        """Some heads call the body's decoder."""
        return self


class _Output:
    """The output of a body: its activations, and None for whatever else a head passes on."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, number: int) -> Tensor:
        assert number == 0
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class _Seen(nn.Identity):
    """In the place of a head: keeps what it is given."""

    value: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        self.value = input
        return input


def _rule(causal: Any, found: Anatomy) -> Rule | None:
    """What the model does to its logits, None for nothing: its own forward without body and head.

    Raises ValueError where it changes activations before the head, and unless every logit is a function of itself
    alone, which chunks and shares of a vocabulary need.
    """
    shell, head = copy.copy(causal), _Seen()
    shell._modules = {**dict.fromkeys(causal._modules), found.base: _Given(), found.head: head}

    def rule(logits: Tensor) -> Tensor:
        return shell(inputs_embeds=logits[None], use_cache=False).logits[0]

    with torch.device("cpu"):
        probe = torch.linspace(-40.0, 40.0, 24).view(2, 12)
        result = rule(probe)
        if head.value is None or not torch.equal(head.value[0], probe):
            raise ValueError(f"{type(shell).__name__} changes activations between its body and its head")
        if torch.equal(result, probe):
            return None
        single = torch.cat([rule(column) for column in probe.split(1, -1)], -1)
    if not torch.equal(result, single):
        raise ValueError(f"{type(shell).__name__} computes logits from several others: Stoker's loss takes each alone")
    return rule
