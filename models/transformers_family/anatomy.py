"""What a causal language model of transformers is made of, found by running it once on the meta device.

A body holds a list of layers between an embedding and a head. Modules with parameters that run before the first layer
go to the first stage of a pipeline, those that run after the last layer to the last one. Whatever does not fit this
picture is a reason why the model cannot be cut; nothing is guessed from names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stoker.models.hugging_face_config import in_one_line, quiet_transformers, refuse_leading_away
from stoker.models.transformers_family.attention import ATTENTION, EXPERTS, masks_of_documents, registered
from stoker.models.transformers_family.initial import Rules, initial_rules

_TRIAL = (2, 8)  # rows and tokens of the run on the meta device


@dataclass(frozen=True)
class Anatomy:
    """Names are global: those of parameters and modules in transformers' causal model."""

    base: str  # the body, all of the model but its head
    layers: str  # the list of its layers
    count: int
    embedding: str
    head: str
    before: frozenset[str] = frozenset()  # modules with parameters of their own that run before the layers
    after: frozenset[str] = frozenset()  # and after them
    layer_returns_tuple: bool = False
    positions: bool = True  # whether the body takes position_ids
    attends: bool = True  # whether every layer computes attention, by the registered function, and nothing else mixes
    mixers: str = ""  # where not: the modules that mix tokens by something else
    indivisible: str = ""  # why no pipeline can cut it
    initial: Rules = field(default_factory=dict)


def parsed_config(values: dict[str, Any]) -> Any:
    """transformers' config object of the values of a config.json, with attention through `attention.ATTENTION`.

    Raises ValueError for a model that transformers does not build as a causal language model.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    refuse_leading_away(values)
    kind = values.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model_type={kind!r} has no causal language model in this version of transformers")
    ours = _without_implementations(values)
    with quiet_transformers():
        try:
            return CONFIG_MAPPING[str(kind)].from_dict(ours)
        except Exception as error:  # of many kinds, some of them transformers' own
            raise ValueError(f"transformers cannot read the config: {in_one_line(error)}") from error


def _without_implementations(values: Any) -> Any:
    """Kernels that a file names are never loaded."""
    if not isinstance(values, dict):
        return values
    return {
        key: _without_implementations(value)
        for key, value in values.items()
        if not key.startswith("_") and "_implementation" not in key
    }


def causal_model(values: dict[str, Any]) -> Any:
    """transformers' model of these values, on torch's default device, in float32.

    Attention goes through the registered function where the class takes one, else through the class's own code, with
    masks of ours.
    """
    from transformers import AutoModelForCausalLM

    registered()
    failed: Exception | None = None
    for attention in (ATTENTION, "eager"):
        config = parsed_config(values)
        try:
            with quiet_transformers():
                return AutoModelForCausalLM.from_config(
                    config, dtype=torch.float32, attn_implementation=attention, experts_implementation=EXPERTS
                )
        except KeyError as error:  # a class that looks its attention up in a table of its own
            failed = error
        except Exception as error:  # of many kinds, some of them transformers' own
            raise ValueError(f"transformers cannot build it: {in_one_line(error)}") from error
    raise ValueError(f"transformers cannot build it: {in_one_line(failed or KeyError())}")


def anatomy(values: dict[str, Any]) -> Anatomy:
    """The anatomy of the model of a config.json. Raises ValueError with the reason why Stoker cannot train it."""
    return _anatomy(json.dumps(values, sort_keys=True))


@functools.lru_cache(maxsize=64)
def _anatomy(text: str) -> Anatomy:
    with torch.device("meta"):
        causal = causal_model(json.loads(text))
    found = _structure(causal)
    rules = initial_rules(causal)
    return dataclasses.replace(_traced(causal, found), initial=rules)


def _structure(causal: Any) -> Anatomy:
    base = causal.base_model
    if base is causal:
        raise ValueError(f"{type(causal).__name__} has no body under its head")
    names = {id(module): name for name, module in causal.named_modules()}
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        raise ValueError(f"{type(causal).__name__}: its embedding or its head is of a kind of its own")
    count = causal.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.count(".") <= 1
    ]
    if not lists:
        raise ValueError(f"{type(causal).__name__}: no list of {count} layers in its body")
    prefix = names[id(base)]
    layers = f"{prefix}.{lists[0][0]}"
    outside = [
        name
        for name, module in causal.named_children()
        if name not in (prefix, names[id(head)]) and any(True for _ in module.parameters())
    ]
    if outside:
        raise ValueError(f"{type(causal).__name__}: {', '.join(outside)} beside its body and its head")
    parameters = inspect.signature(base.forward).parameters
    return Anatomy(
        base=prefix,
        layers=layers,
        count=count,
        embedding=names[id(embedding)],
        head=names[id(head)],
        positions="position_ids" in parameters,
    )


class _Trace:
    """What happens in one forward pass of the body, in order."""

    def __init__(self, causal: Any, found: Anatomy) -> None:
        self.layer: int | None = None  # the one that runs now
        self.done = 0  # layers that have run
        self.calls: dict[str, set[str]] = {}  # phases in which each module with parameters outside the layers ran
        self.attended: dict[int, int] = {}
        self.tuples: set[bool] = set()
        self.shapes: set[tuple[int, ...]] = set()
        self.handed: list[dict[str, Any]] = []  # arguments of each layer
        self._causal, self._found = causal, found

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        layers = self._causal.get_submodule(self._found.layers)
        hooks = []
        for number, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(functools.partial(self._enter, number), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._leave))
        for name, module in self._causal.named_modules():
            if not name.startswith(f"{self._found.layers}.") and any(True for _ in module.parameters(recurse=False)):
                self.calls[name] = set()
                hooks.append(module.register_forward_pre_hook(functools.partial(self._call, name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def attention_called(self) -> None:
        if self.layer is not None:
            self.attended[self.layer] = self.attended.get(self.layer, 0) + 1

    def _enter(self, number: int, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.layer = number
        self.handed.append({**{f"argument {n}": value for n, value in enumerate(arguments[1:], 2)}, **named})

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.layer = None
        self.done += 1
        self.tuples.add(isinstance(output, tuple))
        value = output[0] if isinstance(output, tuple) else output
        self.shapes.add(tuple(value.shape) if isinstance(value, Tensor) else ())

    def _call(self, name: str, module: nn.Module, arguments: Any) -> None:
        if self.layer is not None:
            phase = "within layers"
        else:
            phase = "before" if not self.done else "after" if self.done == self._found.count else "between layers"
        self.calls[name].add(phase)


def _traced(causal: Any, found: Anatomy) -> Anatomy:
    trace = _Trace(causal, found)
    rows, tokens = _TRIAL
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    body = causal.get_submodule(found.base)
    extra = {"position_ids": ids} if found.positions else {}
    try:
        with trace.hooks(), masks_of_documents(ids.int(), trace.attention_called):
            body(input_ids=ids, use_cache=False, **extra)
    except Exception as error:
        raise ValueError(f"{type(body).__name__} does not run on the meta device: {in_one_line(error)}") from error
    width = causal.config.get_text_config().hidden_size
    silent = [number for number in range(found.count) if not trace.attended.get(number)]
    mixers = sorted({type(m).__name__ for m in body.modules() if isinstance(m, nn.Conv1d)})
    if silent:
        mixers.insert(0, f"layer {silent[0]} ({type(causal.get_submodule(found.layers)[silent[0]]).__name__})")
    before = frozenset(name for name, phases in trace.calls.items() if phases == {"before"})
    after = frozenset(name for name, phases in trace.calls.items() if phases <= {"after"} and name != found.head)
    return dataclasses.replace(
        found,
        before=before,
        after=after - {found.head},
        layer_returns_tuple=trace.tuples == {True},
        attends=not mixers,
        mixers=", ".join(mixers),
        indivisible=_indivisible(trace, causal, found, (rows, tokens, width)),
    )


def _indivisible(trace: _Trace, causal: Any, found: Anatomy, shape: tuple[int, ...]) -> str:
    if trace.done != found.count or len(trace.tuples) != 1:
        return "its layers do not run one after the other"
    if trace.shapes != {shape}:
        return f"its layers give {sorted(trace.shapes)[0]}, not one activation of {shape[-1]} channels for each token"
    for name, phases in trace.calls.items():
        if name != found.head and len(phases) != 1:
            return f"{name} runs {' and '.join(sorted(phases)) or 'never'}"
        if phases & {"within layers", "between layers"}:
            return f"{name} runs {', '.join(phases)}"
    for number, given in enumerate(trace.handed):
        for key, value in given.items():
            for tensor in _tensors(value):
                if tensor.requires_grad:
                    return f"layer {number} is handed {key}, which depends on parameters of another stage"
    return ""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
