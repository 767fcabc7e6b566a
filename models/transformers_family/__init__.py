"""Any causal language model of transformers, in transformers' own modules, on any layout.

`anatomy`    what a model is made of, found by running it once on the meta device
`attention`  one attention function for all of them; masks from documents and each model's own rule
`initial`    initial distributions and buffers, by transformers' own code
`model`      the model, whole or a part of it
`tensors`    the styles of tensor-parallel plans as layers of `stoker.parallel.tensor`
`plans`      plans where transformers has none
`files`      weights in model folders, by transformers' own conversion tables
`refusals`, `rope_refusals`  what cannot be trained exactly, each with its reason

`model.config` holds the values of config.json, `model.args` changes of single ones. Parameters have transformers'
names. Stoker owns what a layout touches: the embedding, the head with its loss, attention, and the linear layers that
a plan divides. All else is transformers' code, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stoker.conf.schema import ModelConfig
from stoker.models import hugging_face_config as theirs
from stoker.models.family import Exported, Family
from stoker.models.hugging_face import DTYPES
from stoker.models.hugging_face_weights import StoredTensor, is_copy, open_weights
from stoker.models.transformers_family.anatomy import anatomy, causal_model, parsed_config
from stoker.models.transformers_family.files import exported_tensors, stored_tensors
from stoker.models.transformers_family.model import TransformersModel
from stoker.models.transformers_family.rope_refusals import REFUSALS
from stoker.models.transformers_family.values import values_of
from stoker.parallel.model import Part


class TransformersFamily(Family):
    refusals = REFUSALS
    is_transformers = True

    def __call__(self, config: ModelConfig, part: Part) -> nn.Module:
        return TransformersModel(config, part, values_of(config))

    def settled(self, config: ModelConfig) -> dict[str, Any]:
        text = parsed_config(values_of(config)).get_text_config()
        return {"vocab_size": text.vocab_size, "num_hidden_layers": text.num_hidden_layers}

    def layer_cost(self, config: ModelConfig, block: nn.Module) -> float:
        """Parameters of experts count by the share of tokens that an expert gets."""
        text = parsed_config(values_of(config)).get_text_config()
        cost = 0.0
        for module in block.modules():
            experts = (
                getattr(module, "num_experts", None) if any(p.dim() == 3 for p in module.parameters(False)) else None
            )
            share = (getattr(text, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
            cost += share * sum(parameter.numel() for parameter in module.parameters(recurse=False))
        return cost

    def flops_per_token(self, config: ModelConfig, seq_len: int, parameters: int) -> int:
        """As `stoker.models.flops` counts them; of experts only those that a token goes to.

        Layers without scores (convolutions, linear attention) count by their parameters alone.
        """
        with torch.device("meta"):
            causal = causal_model(values_of(config))
        found = anatomy(values_of(config))
        text = causal.config.get_text_config()
        layers = list(causal.get_submodule(found.layers))
        used = sum(self.layer_cost(config, layer) for layer in layers)
        held = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        looked_up = 0 if text.tie_word_embeddings else causal.get_input_embeddings().weight.numel()
        heads = getattr(text, "num_attention_heads", 1)
        channels = getattr(text, "head_dim", None) or text.hidden_size // heads
        if getattr(text, "kv_lora_rank", None):  # latent attention: those of queries and of values
            channels = (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim) / 2
        keys = sum(_keys(text, layer, seq_len) for layer in range(len(layers)))
        return round(6 * (parameters - looked_up - held + used) + 12 * heads * channels * keys)

    def shape(self, folder: Path, seq_len: int) -> dict[str, Any]:
        values = theirs.own_values(folder)
        parsed = parsed_config(values)
        with torch.device("meta"):
            causal = causal_model(values)
        with open_weights(folder) as found:
            tensors = stored_tensors(causal, found)
            for head, embedding in _tied(causal).items():
                if head in tensors and embedding in tensors and not is_copy(tensors[head], tensors[embedding]):
                    theirs.warn_untied(folder, head)
                    values["tie_word_embeddings"] = False
        text = parsed.get_text_config()
        return {
            "target": "stoker.models.transformers_family:build",
            "family": None,
            "config": values,
            "vocab_size": text.vocab_size,
            "num_hidden_layers": text.num_hidden_layers,
        }

    def stored(self, config: ModelConfig, found: Mapping[str, StoredTensor], names: Iterable[str]) -> Mapping[str, Any]:
        with torch.device("meta"):
            causal = causal_model(values_of(config))
        copies = _tied(causal)
        return {name: tensor for name, tensor in stored_tensors(causal, found).items() if name not in copies}

    def exported(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Exported]:
        with torch.device("meta"):
            causal = causal_model(values_of(config))
        return exported_tensors(causal, shapes)

    def config_json(self, config: ModelConfig, dtype: str, context: int, end: int | None) -> dict[str, Any]:
        with torch.device("meta"):
            architecture = type(causal_model(values_of(config))).__name__
        own = {"architectures": [architecture], "dtype": DTYPES[dtype], "eos_token_id": end}
        return {**values_of(config), **own}

    def changed_config_json(
        self, folder: Path, config: ModelConfig, dtype: str, same_dtype: bool, seq_len: int
    ) -> dict[str, Any]:
        values = {**theirs.read_json(folder / theirs.CONFIG), **config.args}
        untied = values_of(config).get("tie_word_embeddings") is False
        if untied and parsed_config(values).get_text_config().tie_word_embeddings:
            values["tie_word_embeddings"] = False
        if not same_dtype:
            for key in [key for key in ("dtype", "torch_dtype") if key in values] or ["dtype"]:
                values[key] = DTYPES[dtype]
        return values


def _keys(text: Any, layer: int, seq_len: int) -> int:
    """To how many keys a token attends in a layer of this text config of transformers, as if not causal."""
    window = getattr(text, "sliding_window", None) or seq_len
    kinds = getattr(text, "layer_types", None)
    of_kinds = {
        "full_attention": seq_len,
        "sliding_attention": window,
        "chunked_attention": getattr(text, "attention_chunk_size", None) or seq_len,
        "linear_attention": 0,
        "conv": 0,
    }
    return min(seq_len, of_kinds.get(kinds[layer], seq_len) if kinds else window)


def _tied(causal: Any) -> dict[str, str]:
    """Names that are another name of a parameter, with that other one."""
    return dict(getattr(causal, "all_tied_weights_keys", None) or {})


build = TransformersFamily()
