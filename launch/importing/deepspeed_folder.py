"""Folders that DeepSpeed's `save_checkpoint` writes at ZeRO 1, 2 and 3, put together by DeepSpeed's own code.

That code unpickles files whose pickles hold objects of DeepSpeed's and of the training script, so nothing is read
without the user's trust.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stoker.conf.values import ConfigError
from stoker.launch.importing.hugging_face_bin import hugging_face_source
from stoker.launch.importing.pickled import held_in, refuse_strange
from stoker.launch.importing.source import (
    Moments,
    Source,
    SourceTensor,
    config_of,
    of_tensor,
    reading_moments,
    with_moments,
)
from stoker.models.hugging_face_config import in_one_line
from stoker.trainer.pretrained_moments import MOMENTS, STEP

_NO_RECORDS = re.compile(r"(?!)")
LATEST, STATES = "latest", "*_optim_states.pt"
_MOST_TAG_BYTES = 4096


def is_deepspeed(folder: Path) -> bool:
    """Whether `folder` is one of steps with a file `latest`, or of one step."""
    return any(folder.glob(STATES)) or ((folder / LATEST).is_file() and any(folder.glob(f"*/{STATES}")))


def open_deepspeed(folder: Path, config: str | None, trust: bool, wanted: bool = True) -> Source:
    """The model in `folder`, in float32, and its moments if they are `wanted`.

    Raises ConfigError without `trust`, naming a file, and ValueError for what DeepSpeed cannot put together.
    """
    step = folder if any(folder.glob(STATES)) else folder / _tag(folder / LATEST)
    states = sorted(step.glob(STATES))
    if not states:
        raise ValueError(f"{folder / LATEST} names {step.name}, which has no {STATES}")
    if not trust:
        raise ConfigError(
            f"{states[0]} holds pickled objects of DeepSpeed and of its training script, beside tensors, and "
            "unpickling that can run any code: --trust unpickles it"
        )
    values = config_of(folder if config is None and not (step / "config.json").is_file() else step, config)
    what = f"{step.name} of DeepSpeed"
    with _told(step):
        tensors = _put_together(step)
    with reading_moments(), _told(step):
        moments = _moments(step) if wanted else None
    source = hugging_face_source(what, values, tensors, ("optimizer state",) if moments is None else ())
    return with_moments(source, moments, functools.partial(hugging_face_source, what, values))


@contextlib.contextmanager
def _told(step: Path) -> Iterator[None]:
    """Raises ValueError for whatever DeepSpeed raises inside, and shows nothing of what it prints."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except OSError:
        raise
    except Exception as error:  # of many kinds, some of them DeepSpeed's own
        raise ValueError(f"{step}: DeepSpeed cannot put its files together: {in_one_line(error)}") from error


def _put_together(step: Path, trained_only: bool = False) -> dict[str, SourceTensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(step.parent), step.name, trained_only)
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in state.items():
        refuse_strange(step, name, tensor)
        tensors[name] = of_tensor(step, tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor)
    return tensors


def _moments(step: Path) -> Moments | None:
    """AdamW's state, put together by the code that does it for weights. None for an optimizer with another state."""
    from deepspeed.utils import zero_to_fp32

    states = [_of_optimizer(Path(path)) for path in zero_to_fp32.get_optim_files(str(step))]
    if any(state is None for state in states):
        return None
    counts = {count for state in states if state is not None for count in state.counts}
    if len(counts) != 1:
        return None
    parse = zero_to_fp32.parse_optim_states

    @functools.lru_cache(maxsize=1)  # one moment of a model is in memory at a time
    def whole(key: str) -> dict[str, SourceTensor]:
        def in_place_of_weights(*files: Any) -> tuple[Any, ...]:
            stage, ranks, weights, *others = parse(*files)
            own = [
                [group[key].flatten()[: len(part)] for group, part in zip(state.groups, parts, strict=True)]  # padded
                for state, parts in zip(states, weights, strict=True)
                if state is not None
            ]
            return stage, ranks, own, *others

        zero_to_fp32.parse_optim_states = in_place_of_weights
        try:
            return _put_together(step, trained_only=True)
        finally:
            zero_to_fp32.parse_optim_states = parse

    def read(key: str, name: str) -> Tensor:
        with _told(step):
            return whole(key)[name].load()

    return Moments(
        counts.pop(),
        {
            key: {
                name: SourceTensor(step, tensor.shape, tensor.dtype, functools.partial(read, key, name))
                for name, tensor in whole(key).items()
            }
            for key in MOMENTS
        },
    )


@dataclass(frozen=True)
class _OfOptimizer:
    """A rank's state of an AdamW: of each group of parameters, and the counts of updates in it."""

    groups: list[dict[str, Tensor]]
    counts: set[int]


def _of_optimizer(path: Path) -> _OfOptimizer | None:
    """None for another optimizer, or another form."""
    held = held_in(path, True, _NO_RECORDS)["optimizer_state_dict"]
    held = held.get("base_optimizer_state", held.get("optimizer_state_dict"))  # ZeRO 1 and 2, and 3
    if not isinstance(held, dict) or not isinstance(held.get("state"), dict):
        return None
    groups = [state for _, state in sorted(held["state"].items())]
    if not groups or any(not isinstance(state, dict) or state.keys() - {STEP} != {*MOMENTS} for state in groups):
        return None
    holders = [*groups, *held.get("param_groups", [])]  # DeepSpeed's own Adam counts in the latter
    counts = {int(holder[STEP]) for holder in holders if STEP in holder}
    return _OfOptimizer(groups, counts)


def _tag(path: Path) -> str:
    """The name of the folder of the newest step. Raises ValueError for another place."""
    with path.open("rb") as file:
        tag = file.read(_MOST_TAG_BYTES).decode(errors="replace").strip()
    if not tag or Path(tag).name != tag or not (path.parent / tag).is_dir():
        raise ValueError(f"{path} names {tag[:80]!r}, which is no folder beside it")
    return tag
