"""`pytorch_model.bin`: what transformers wrote before safetensors, in one file or in several with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.launch.importing.pickled import tensors_of
from stoker.launch.importing.source import Source, SourceTensor, config_of, of_tensor, without_tables
from stoker.models.hugging_face_config import in_one_line, quiet_transformers
from stoker.models.hugging_face_weights import compare_with_index, indexed_files

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_bin(folder: Path, config: str | None, trust: bool) -> Source:
    """The model in `folder`. Raises ValueError for files that are missing, damaged or hold more than tensors."""
    values = config_of(folder, config)
    index = None if (folder / SINGLE).is_file() else indexed_files(folder, INDEX, ".bin")
    found: dict[str, SourceTensor] = {}
    for path in [folder / SINGLE] if index is None else sorted(set(index.values())):
        tensors, _ = tensors_of(path, trust)
        for name, tensor in tensors.items():
            if name in found:
                raise ValueError(f"{path.name} and {found[name].file.name} both hold {name}")
            found[name] = of_tensor(path, tensor)
    if index is not None:
        compare_with_index(INDEX, index, found)
    return hugging_face_source(SINGLE, values, found)


def hugging_face_source(
    what: str, values: dict[str, Any], found: Mapping[str, SourceTensor], left_out: tuple[str, ...] = ()
) -> Source:
    """A source whose tensors have Hugging Face's names and layouts."""
    tensors = without_tables(found)

    def logits(parsed: Any, tokens: Tensor) -> Tensor:
        return _their_logits(parsed, {name: tensor.load() for name, tensor in tensors.items()}, tokens)

    return Source(what, values, tensors, lambda name: name, logits, copies=1, left_out=left_out)


def _their_logits(parsed: Any, state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Those of transformers' class, into which transformers itself loads `state`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with quiet_transformers():
        try:
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
            model = kind.from_pretrained(None, config=parsed, state_dict=state, dtype=torch.float32)
        except Exception as error:  # of many kinds, some of them transformers' own
            raise ValueError(f"transformers cannot load it: {in_one_line(error)}") from error
    return model.eval()(tokens).logits.flatten(0, 1)
