"""`stoker check --against transformers`: does the decoder compute what transformers' own class computes?

A model imported by `model.init_from` takes one step on the run's data, on any layout; transformers' model of the
same folder takes the same sequences in this process, float32 on the CPU, one sequence at a time. What is compared: the
loss, the logits of the first sequences, the norm of all gradients together and each gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stoker.checkpoint import newest, read_state, read_tensors
from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.scratch import Scratch
from stoker.conf.values import ConfigError
from stoker.data import prepare
from stoker.launch.check import settle, together
from stoker.launch.differences import LIMITS, SMALL_GRADIENT, Difference, show, worst, worst_number, worst_tensor
from stoker.launch.local import launch
from stoker.launch.train import ranks_for, say
from stoker.models import hugging_face_config as theirs
from stoker.models.family import build_on_meta, family_of
from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.layout import layout_of
from stoker.parallel.model import whole_model
from stoker.parallel.shards import GRADIENT
from stoker.trainer.checking import GRADIENTS, LOGITS
from stoker.trainer.import_check import load_theirs, relative
from stoker.trainer.memory import available_bytes
from stoker.trainer.pretrained import imported, init_folder, is_run

_BYTES = 8  # of a parameter and its gradient


def check_transformers(overrides: Sequence[str]) -> int:
    """Print the table; status 0 if both compute the same. Raises ConfigError for a start that is refused."""
    scratch = Scratch("stoker-check-")
    folder = scratch.path
    spoken = {parse(override).key for override in overrides}
    asked = overrides if "precision" in spoken else together(overrides, ["precision=fp32"])
    config = settle(asked, folder / "asked", 1)
    _refuse_what_is_not_theirs(config)
    prepare(config)
    ranks = ranks_for(config)
    say(f"one step: {layout_of(config, ranks)}")
    run = RunDirectory(Path(str(config.run.dir)))
    run.attempts.mkdir(parents=True)
    status = launch(config, ranks, say, "--measure-logits")
    if status != 0:
        say(f"that run failed; its files are in {scratch.keep() / Path(str(config.run.dir)).name}")
        return status
    found, layout = _compared(config, run)
    show(f"transformers {_version()}, one process, fp32", layout, config.precision, found)
    return 0 if all(difference.sound for difference in found) else 1


def _refuse_what_is_not_theirs(config: Config) -> None:
    model = config.model
    if model.init_from is None or not family_of(model).is_transformers or is_run(init_folder(config)):
        raise ConfigError("--against transformers: model.init_from=DIR names a model folder that transformers can load")
    as_it_is = vars(imported(config).model) | {"init_only": []}
    changed = [f"model.{key}={value}" for key, value in vars(model).items() if value != as_it_is[key]]
    if changed:
        raise ConfigError(f"--against transformers: {', '.join(changed)} makes another model than {model.init_from}")
    if config.adapter.name != "none":
        raise ConfigError(
            f"--against transformers compares the model itself, without adapter={config.adapter.name}: adapter=none "
            "works, and `stoker check` without --against compares an adapter's run with one process"
        )
    if config.parallel.cp > 1:
        raise ConfigError(
            f"--against transformers compares logits of whole sequences, which parallel.cp={config.parallel.cp} "
            "divides: parallel.cp=1 works, and `stoker check` without --against compares with one process"
        )
    objective = config.objective
    if objective.target is not None or objective.name != "next_token":
        raise ConfigError(
            f"--against transformers compares the loss of the next token, which objective="
            f"{objective.target or objective.name} is not: objective=next_token works, and `stoker check` without "
            "--against compares any objective with one process"
        )


def _compared(config: Config, run: RunDirectory) -> tuple[list[Difference], str]:
    state = read_state(newest(run.checkpoints)[0])
    batch = dict(read_tensors(newest(run.path / LOGITS)[0], LOGITS))
    gradients = dict(read_tensors(newest(run.path / GRADIENTS)[0], GRADIENT))
    logits = batch.pop(LOGITS)
    folder = init_folder(config)
    needed, available = _BYTES * sum(gradient.numel() for gradient in gradients.values()), available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"--against transformers: its weights and gradients take {needed / 2**30:.1f} GiB of memory, and "
            f"{available / 2**30:.1f} are free"
        )
    try:
        model = load_theirs(folder, theirs.parsed(folder))
    except ValueError as error:
        raise ConfigError(f"model.init_from={folder}: {error}") from error
    model.get_input_embeddings().padding_idx = None  # Stoker's embedding trains the row of pad_token_id too
    limits = LIMITS[config.precision]
    mask = bool(state["document_mask"])
    loss, of_logits = 0.0, []
    for number in range(len(batch["tokens"])):
        own = {name: value[number : number + 1] for name, value in batch.items()}
        expected = _their_logits(model, own, mask)
        sum_of_losses = F.cross_entropy(
            expected.double(), own["labels"].flatten(), reduction="sum", ignore_index=IGNORE_INDEX
        )
        sum_of_losses.backward()
        loss += sum_of_losses.item()
        if number < len(logits):
            ours, reference = logits[number], expected.detach()
            where = f"sequence {number + 1} of the batch"
            norms = float(reference.norm()), float(ours.norm())
            of_logits.append(Difference("logits", where, *norms, relative(ours, reference), limits.gradient))
    valid = max(1, int((batch["labels"] != IGNORE_INDEX).sum()))
    gradients = _put_together(gradients, config, model)
    reference_gradients = _gradients_of(model, gradients, family_of(config.model).reference_name)
    norm = math.sqrt(sum(float(gradient.double().norm()) ** 2 for gradient in reference_gradients.values())) / valid
    return [
        worst_number("loss", [loss / valid], state["losses"], limits.loss),
        worst(of_logits),
        worst_number("gradient norm", [norm], state["norms"], limits.grad_norm),
        worst_tensor("gradient", reference_gradients, gradients, limits.gradient, SMALL_GRADIENT),
    ], state["layout"]


def _their_logits(model: Any, batch: dict[str, Tensor], mask: bool) -> Tensor:
    """fp32 `[tokens, vocab]` of one sequence; with `mask` attention stays inside its documents."""
    length = batch["tokens"].shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if mask:
        allowed &= batch["documents"][0][:, None] == batch["documents"][0][None, :]
    # A mask for every pair of tokens is taken as it is: nothing is inferred from the positions.
    bias = torch.zeros(1, 1, length, length).masked_fill_(~allowed, torch.finfo(torch.float32).min)
    return model(batch["tokens"], attention_mask=bias, position_ids=batch["positions"]).logits[0]


def _put_together(ours: dict[str, Tensor], config: Config, model: Any) -> dict[str, Tensor]:
    """`ours` with those of parameters that are one in transformers' `model` as one, by its name there."""
    whole = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
    theirs, found = {name for name, _ in model.named_parameters()}, dict(ours)
    for group in family_of(config.model).exported(config.model, shapes):
        fused = len(group.names) > 1 and len(group.files) == 1 and theirs.issuperset(group.files)
        if fused and all(name in found for name in group.names):
            found |= group.convert([found.pop(name) for name in group.names])
    return found


def _gradients_of(model: Any, ours: dict[str, Tensor], theirs_of: Callable[[str], str]) -> dict[str, Tensor]:
    """transformers' gradients by our names; one without a counterpart keeps its name, and is reported."""
    by_theirs = {theirs_of(name): name for name in ours}
    named = model.named_parameters()  # tied ones once
    return {by_theirs.get(name, name): parameter.grad for name, parameter in named if parameter.grad is not None}


def _version() -> str:
    import transformers

    return transformers.__version__
