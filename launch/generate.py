"""`stoker generate`: text from a run's newest valid checkpoint, streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from stoker.checkpoint import CheckpointMismatch, DamagedCheckpoint, Summary, read_tensors
from stoker.conf.rundir import read_config
from stoker.conf.schema import Config
from stoker.data import open_tokenizer
from stoker.data.tokenizer import Tokenizer
from stoker.launch.inspect import checkpoints_of, run_at
from stoker.models.generate import generate
from stoker.parallel.model import whole_model
from stoker.parallel.sharding import materialise
from stoker.trainer.assemble import with_vocabulary
from stoker.trainer.parallelize import build_on_meta


def generate_text(options: argparse.Namespace) -> int:
    """Print the prompt and what the model makes of it. Raises ValueError for a run or values that cannot be used."""
    run = run_at(options.run)
    checkpoints = checkpoints_of(run, options.step)
    config = with_vocabulary(read_config(run), run.tokenizer)
    tokenizer = open_tokenizer(config.data, run.tokenizer)
    tokens = generate(
        _newest_model(config, checkpoints),
        tokenizer.encode_template(options.prompt)[0],
        limit=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        greedy=options.greedy,
        seed=options.seed,
        stop=tokenizer.end_of_document,
        context=config.seq_len,
    )
    sys.stdout.write(options.prompt)
    for text in _as_text(tokenizer, tokens):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def load_model(config: Config, checkpoint: Path) -> nn.Module:
    """The whole model of a checkpoint, float32 on the CPU. `config.model.vocab_size` is known.

    Raises DamagedCheckpoint, and CheckpointMismatch naming a tensor that the config's model does not have so.
    """
    model = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    materialise(model, torch.device("cpu"))
    model.rebuild_buffers()  # type: ignore[operator]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in read_tensors(checkpoint):
            parameter = parameters.pop(name, None)
            if parameter is None or parameter.shape != value.shape:
                ours = "has no such tensor" if parameter is None else f"has {tuple(parameter.shape)}"
                problem = f"{name} has shape {tuple(value.shape)}, the model of the run's config {ours}"
                raise CheckpointMismatch(f"{checkpoint} is not a checkpoint of this model: {problem}")
            parameter.copy_(value)
    if parameters:
        missing = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in parameters.items())
        raise CheckpointMismatch(f"{checkpoint} is not a checkpoint of this model: it lacks {missing}")
    return model.eval()


def _newest_model(config: Config, checkpoints: list[Summary]) -> nn.Module:
    """The model of the newest checkpoint that is sound; damaged ones before it are named."""
    for summary in reversed(checkpoints):
        try:
            if summary.problem is not None:
                raise DamagedCheckpoint(f"{summary.path}: {summary.problem}")
            return load_model(config, summary.path)
        except DamagedCheckpoint as error:
            print(f"stoker: damaged checkpoint passed over: {error}", file=sys.stderr)
    raise ValueError("no sound checkpoint to generate from")


def _as_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of a stream of tokens, as soon as its characters are whole."""
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        if text and (not text.endswith("\ufffd") or len(pending) > 8):
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending)
