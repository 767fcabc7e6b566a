"""Checks an imported model: its logits against those of transformers' class.

Both compute in float32 on the CPU, one after the other, from the same random tokens. What is compared is what goes into
the first layer (the embedding, scaled where a model scales it), and what comes out of each layer and of the head: the
first that differs is where the mapping of config.json, or of the names of tensors, went wrong.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stoker.conf.schema import Config, ModelConfig
from stoker.conf.values import ConfigError
from stoker.models import hugging_face_config as theirs
from stoker.models.family import build_on_meta, family_of
from stoker.models.hugging_face import OWN_MODEL
from stoker.models.hugging_face_weights import open_weights
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.sharding import materialise
from stoker.parallel.shards import BUFFER, PARAMETER, Shard, whole
from stoker.trainer.memory import available_bytes
from stoker.trainer.pretrained import imported, init_folder, is_run, load_pretrained

LIMIT = 1e-5  # of |ours - theirs| / |theirs|: what different kernels in float32 may differ by
TOKENS = 64
_SHARE_OF_MEMORY = 0.7  # for the weights; the rest is for activations and for what else the machine does
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")  # in names of Hugging Face's


def compare_import(config: Config, available: Callable[[], int | None] = available_bytes) -> str | None:
    """Compare the model in `model.init_from` with transformers'. Returns a text: what was compared, or why nothing was.

    As many layers are compared as fit into the `available` bytes of memory. None where there is nothing to compare: no
    `model.init_from`, a run directory, or a user's model. Raises ConfigError naming the first layer that
    differs, or with transformers' error when it cannot load the model.
    """
    if config.model.init_from is None or not family_of(config.model).is_transformers:
        return None
    folder = init_folder(config)
    if is_run(folder) or theirs.read_json(folder / theirs.CONFIG).get("model_type") == OWN_MODEL:
        return None
    model = dataclasses.replace(imported(config).model, init_only=[])
    layers, needed = _layers_that_fit(folder, available())
    parsed = theirs.parsed(folder)
    if layers < model.num_hidden_layers and model.target != ModelConfig().target:
        layers = 0  # a config with fewer layers may be another model: lists of it go by layer
    if not layers:
        unknown = theirs.unknown_keys(folder, parsed)
        if unknown:
            raise ConfigError(
                f"model.init_from={folder}: {theirs.CONFIG} holds {', '.join(unknown)}, which transformers' "
                f"{type(parsed).__name__} does not declare. Comparing logits would show whether they matter, but takes "
                f"{needed / 2**30:.1f} GiB of free memory: remove them, or start where there is more"
            )
        return f"not compared with transformers' logits: one layer takes {needed / 2**30:.1f} GiB of free memory"
    tokens = torch.randint(0, model.vocab_size or 1, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = _their_outputs(folder, parsed, layers, tokens)
        found = _our_outputs(
            dataclasses.replace(config, model=dataclasses.replace(model, num_hidden_layers=layers)), tokens
        )
    _compare(folder, parsed, expected, found)
    of = f"all {layers}" if layers == model.num_hidden_layers else f"the first {layers} of {model.num_hidden_layers}"
    worst = max(relative(found[name], expected[name]) for name in expected)
    return f"equal to transformers' {architecture(parsed)} within {worst:.0e} ({of} layers, {TOKENS} tokens)"


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64; nan where one of them is not finite."""
    difference = float((found.double() - expected.double()).norm())
    return difference / max(float(expected.double().norm()), math.ulp(0.0)) if difference else 0.0


def load_theirs(folder: Path, parsed: Any) -> Any:
    """transformers' model of `folder`, float32 on the CPU. Raises ValueError for what it cannot load whole."""
    from transformers import AutoModelForCausalLM

    with theirs.quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=parsed,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # of many kinds, some of them transformers' own
            raise ValueError(f"transformers cannot load it: {theirs.in_one_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"transformers finds no {', '.join(missing[:3])} in its files and would initialise them at random"
        )
    return model.eval()


def _layers_that_fit(folder: Path, available: int | None) -> tuple[int, int]:
    """How many layers fit into memory in float32, together with all other modules; and the bytes of one layer."""
    sizes: dict[int, int] = {}
    rest = 0
    with open_weights(folder) as tensors:
        for name, tensor in tensors.items():
            layer_of = _LAYER.search(name)
            bytes_ = 4 * math.prod(tensor.shape)
            if layer_of:
                sizes[int(layer_of[1])] = sizes.get(int(layer_of[1]), 0) + bytes_
            else:
                rest += bytes_
    layer = max(sizes.values(), default=0)
    if available is None:
        return len(sizes), rest + layer
    return min(len(sizes), max(0, int((available * _SHARE_OF_MEMORY - rest) // max(1, layer)))), rest + layer


def _their_outputs(folder: Path, parsed: Any, layers: int, tokens: Tensor) -> dict[str, Tensor]:
    parsed.num_hidden_layers = layers
    if getattr(parsed, "layer_types", None):
        parsed.layer_types = parsed.layer_types[:layers]
    try:
        model = load_theirs(folder, parsed)
    except ValueError as error:
        raise ConfigError(f"model.init_from={folder}: {error}") from error
    with _recorded(dict(enumerate(_layers_of(model, layers)))) as outputs:
        try:
            logits = model(tokens).logits
        except Exception as error:  # a value that fails only in the forward pass
            reason = f"transformers cannot compute its logits: {theirs.in_one_line(error)}"
            raise ConfigError(f"model.init_from={folder}: {reason}") from error
    return {**outputs, "logits": logits.flatten(0, 1)}


def _our_outputs(config: Config, tokens: Tensor) -> dict[str, Tensor]:
    model = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    materialise(model, torch.device("cpu"))
    model.rebuild_buffers()  # type: ignore[operator]
    shards = [
        Shard(name, BUFFER, entry.shape, whole(entry.shape), model.get_buffer(name))
        if entry.buffer
        else Shard(name, PARAMETER, entry.shape, whole(entry.shape), model.get_parameter(name).detach())
        for name, entry in whole_registry(model).entries.items()
        if entry.saved
    ]
    load_pretrained(dataclasses.replace(config, model=dataclasses.replace(config.model, init_only=["*"])), shards)
    blocks: dict[Any, nn.Module] = model.blocks()  # type: ignore[operator]
    with _recorded({int(number): block for number, block in blocks.items()}) as outputs:
        logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return {**outputs, "logits": logits}


def architecture(parsed: Any) -> str:
    """The name of transformers' causal class of a parsed config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[parsed.model_type]


def _layers_of(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of layers of transformers' model."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


@contextmanager
def _recorded(layers: dict[int, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What goes into layer 0, as `embedding`, and what comes out of each of `layers`: `[tokens, width]`."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        outputs[name] = value.reshape(-1, value.shape[-1])

    def into(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep("embedding", arguments or named["hidden_states"])

    hooks = [layers[0].register_forward_pre_hook(into, with_kwargs=True)]
    for number, layer in layers.items():
        hooks.append(layer.register_forward_hook(lambda *given, name=f"layers.{number}": keep(name, given[-1])))
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _compare(folder: Path, parsed: Any, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        difference = relative(found[name], value)
        if difference <= LIMIT:
            continue
        where = name if name == "logits" else f"model.{name}" if name != "embedding" else "the embedding"
        what = f"differs by {difference:.1e}" if difference == difference else "is not finite"
        unknown = theirs.unknown_keys(folder, parsed)
        hint = f"; {theirs.CONFIG} holds keys that its class does not declare: {', '.join(unknown)}" if unknown else ""
        raise ConfigError(
            f"model.init_from={folder}: the decoder does not compute what transformers' "
            f"{architecture(parsed)} computes: {where} is the first that {what} "
            f"(limit {LIMIT:.0e}){hint}"
        )
