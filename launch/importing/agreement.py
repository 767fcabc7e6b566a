"""What is imported is the model that the source holds: the same tensors, and the same logits."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stoker.launch.importing.source import Moments, Source, SourceTensor
from stoker.models import hugging_face_config as theirs
from stoker.models.transformers_family.anatomy import causal_model
from stoker.models.transformers_family.files import stored_tensors
from stoker.trainer.import_check import LIMIT, TOKENS, load_theirs, relative
from stoker.trainer.memory import available_bytes

_NAMED = 5  # tensors that a message names
_SHARE_OF_MEMORY = 0.7


def fitting(source: Source, folder: Path) -> dict[str, SourceTensor]:
    """The source's tensors, less those that transformers ignores.

    Raises ValueError, by the source's own names, for tensors that the model of its config.json lacks, has beside these
    or has in another shape. `folder` holds the config.json.
    """
    theirs.parsed(folder)  # its keys are refused here, before a model of them is built
    with torch.device("meta"):
        causal = causal_model(source.config)
    ignored = [re.compile(pattern) for pattern in causal._keys_to_ignore_on_load_unexpected or ()]
    tensors = {
        name: tensor for name, tensor in source.tensors.items() if not any(known.search(name) for known in ignored)
    }
    expected = {name: tuple(value.shape) for name, value in causal.state_dict().items()}
    found = stored_tensors(causal, tensors)  # type: ignore[arg-type]
    tied = getattr(causal, "all_tied_weights_keys", None) or {}
    missing = [name for name in expected if name not in found and name not in tied]
    problems = [f"{source.name_of(name)} is missing" for name in missing]
    problems += [f"{source.name_of(name)} is not in this model" for name in found if name not in expected]
    problems += [
        f"{source.name_of(name)} has shape {found[name].shape}, the model's has {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        problems = list(dict.fromkeys(problems))  # parts of a fused tensor have one name
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{'; '.join(problems[:_NAMED])}{more}")
    return tensors


def moments_fitting(config: dict[str, Any], moments: Moments) -> Moments | str:
    """`moments` of the parameters of `config`'s model, tied ones by their first name; or which one does not fit."""
    with torch.device("meta"):
        causal = causal_model(config)
    tied = getattr(causal, "all_tied_weights_keys", None) or {}
    shapes = {name: tuple(value.shape) for name, value in causal.named_parameters() if name not in tied}
    buffers = dict(causal.named_buffers())  # for which an optimizer has no state, though DeepSpeed's code lists them
    kept = {}
    for key, given in moments.tensors.items():
        named = {first: given[name] for name, first in tied.items() if name in given} | dict(given)
        kept[key] = {name: value for name, value in named.items() if name not in tied and name not in buffers}
        found = {name: tuple(value.shape) for name, value in stored_tensors(causal, kept[key]).items()}  # type: ignore[arg-type]
        if found != shapes:
            return f"{min(found.items() ^ shapes.items())[0]} of {key} is missing, too much or of another shape"
    return dataclasses.replace(moments, tensors=kept)


def compare_logits(source: Source, folder: Path, available: Callable[[], int | None] = available_bytes) -> str:
    """Compare the logits of the written `folder` with those the source's own rules give. Returns what was compared.

    Both compute in float32 on the CPU from the same random tokens, one after the other. Raises ValueError where they
    differ by more than the limit of `model.init_from`.
    """
    parsed: Any = theirs.parsed(folder)
    numbers = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    needed, free = 4 * numbers * max(1, source.copies), available()
    if free is not None and needed > _SHARE_OF_MEMORY * free:
        return f"logits not compared: that takes {needed / 2**30:.1f} GiB of free memory"
    tokens = torch.randint(0, parsed.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = source.logits(parsed, tokens)
        found = load_theirs(folder, parsed)(tokens).logits.flatten(0, 1)
    difference = relative(found, expected)
    if not difference <= LIMIT:
        what = f"differ by {difference:.1e}" if difference == difference else "are not finite"
        raise ValueError(f"its logits by {source.what} and as imported {what} (limit {LIMIT:.0e})")
    return f"logits equal to the source's within {difference:.0e} ({TOKENS} tokens)"
