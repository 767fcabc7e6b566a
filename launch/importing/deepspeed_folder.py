"""Folders that DeepSpeed's `save_checkpoint` writes at ZeRO 1, 2 and 3, put together by DeepSpeed's own code.

That code unpickles files whose pickles hold objects of DeepSpeed's and of the training script, so nothing is read
without the user's trust.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch

from stoker.conf.values import ConfigError
from stoker.launch.importing.hugging_face_bin import hugging_face_source
from stoker.launch.importing.pickled import refuse_strange
from stoker.launch.importing.source import Source, SourceTensor, config_of, of_tensor
from stoker.models.hugging_face_config import in_one_line

LATEST, STATES = "latest", "*_optim_states.pt"
_MOST_TAG_BYTES = 4096


def is_deepspeed(folder: Path) -> bool:
    """Whether `folder` is one of steps with a file `latest`, or of one step."""
    return any(folder.glob(STATES)) or ((folder / LATEST).is_file() and any(folder.glob(f"*/{STATES}")))


def open_deepspeed(folder: Path, config: str | None, trust: bool) -> Source:
    """The model in `folder`, in float32. Raises ValueError without `trust`, naming a file, and for what DeepSpeed
    cannot put together."""
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
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state = get_fp32_state_dict_from_zero_checkpoint(str(step.parent), tag=step.name)
    except OSError:
        raise
    except Exception as error:  # of many kinds, some of them DeepSpeed's own
        raise ValueError(f"{step}: DeepSpeed cannot put its files together: {in_one_line(error)}") from error
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in state.items():
        refuse_strange(step, name, tensor)
        tensors[name] = of_tensor(step, tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor)
    return hugging_face_source(f"{step.name} of DeepSpeed", values, tensors, ("optimizer state",))


def _tag(path: Path) -> str:
    """The name of the folder of the newest step. Raises ValueError for another place."""
    with path.open("rb") as file:
        tag = file.read(_MOST_TAG_BYTES).decode(errors="replace").strip()
    if not tag or Path(tag).name != tag or not (path.parent / tag).is_dir():
        raise ValueError(f"{path} names {tag[:80]!r}, which is no folder beside it")
    return tag
