"""`stoker generate`: text from a run's newest valid checkpoint, streamed to the terminal."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from stoker.checkpoint import CheckpointMismatch, DamagedCheckpoint, Summary, read_tensors
from stoker.conf.printable import printable
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.data import open_tokenizer
from stoker.data.chat import chat_prompt
from stoker.data.opening import NoTokenizer
from stoker.data.tokenizer import Tokenizer
from stoker.launch.inspect import checkpoints_of, run_at
from stoker.launch.train import say
from stoker.models.family import build_on_meta
from stoker.models.generate import generate
from stoker.parallel.buffers import fill_buffers
from stoker.parallel.model import whole_model
from stoker.parallel.registry import whole_registry
from stoker.parallel.sharding import materialise
from stoker.parallel.shards import BUFFER
from stoker.trainer.facts import with_vocabulary
from stoker.trainer.trust import DATA, MODEL, trusted_config


def generate_text(options: argparse.Namespace) -> int:
    """Print the prompt and its continuation; for a chat, only the reply.

    Raises ConfigError for values that cannot be used, and ValueError for damage.
    """
    run = run_at(options.run)
    checkpoints = checkpoints_of(run, options.step)
    config = with_vocabulary(trusted_config(run, options.trust, (MODEL, DATA), say), run.tokenizer)
    tokenizer = None if options.ids is not None else _tokenizer(config, run)
    stop: frozenset[int] = frozenset()
    if options.system is not None and not options.chat:
        raise ConfigError("--system is a message of a chat: add --chat")
    if tokenizer is None:
        if options.chat:
            raise ConfigError("--chat needs a text: give --prompt instead of --ids")
        prompt = _ids(options.ids, config)
    elif options.chat:
        try:
            prompt, stop = chat_prompt(config.data, tokenizer, options.prompt, options.system)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    else:
        prompt, stop = tokenizer.encode_template(options.prompt)[0], frozenset({tokenizer.end_of_document})
    if not prompt:
        raise ConfigError("the prompt is empty: a model continues at least one token")
    tokens = generate(
        _newest_model(config, checkpoints),
        prompt,
        limit=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        greedy=options.greedy,
        seed=options.seed,
        stop=stop,
        context=config.seq_len,
    )
    if tokenizer is None:
        print(*prompt, *tokens, sep=",")
        return 0
    if not options.chat:
        sys.stdout.write(printable(options.prompt))
    for text in _as_text(tokenizer, tokens):
        sys.stdout.write(printable(text))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _tokenizer(config: Config, run: RunDirectory) -> Tokenizer:
    try:
        return open_tokenizer(config.data, run.tokenizer)
    except NoTokenizer:
        raise ConfigError(f"{run.path} was trained on tokens without a tokenizer: --ids 1,5,3 continues ids") from None


def _ids(text: str, config: Config) -> list[int]:
    """Token ids such as `1,5,3`. Raises ConfigError for ids that the model does not have."""
    words = text.replace(",", " ").split()
    most = config.model.vocab_size
    assert most is not None
    wrong = [word for word in words if not word.isdecimal() or int(word) >= most]
    if wrong:
        raise ConfigError(f"--ids: {wrong[0]!r} is no token id: 0 to {most - 1} are, separated by commas")
    return [int(word) for word in words]


def load_model(config: Config, checkpoint: Path) -> nn.Module:
    """The whole model of a checkpoint, float32 on the CPU. `config.model.vocab_size` is known.

    Raises DamagedCheckpoint, and CheckpointMismatch naming a tensor that the config's model does not have so.
    """
    model = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    materialise(model, torch.device("cpu"))
    fill_buffers(model, whole_registry(model))
    saved = model.state_dict(keep_vars=True)
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    with torch.no_grad():
        for name, value in itertools.chain(read_tensors(checkpoint), read_tensors(checkpoint, BUFFER)):
            parameter = tensors.pop(name, None)
            if parameter is None or parameter.shape != value.shape:
                ours = "has no such tensor" if parameter is None else f"has {tuple(parameter.shape)}"
                problem = f"{name} has shape {tuple(value.shape)}, the model of the run's config {ours}"
                raise CheckpointMismatch(f"{checkpoint} is not a checkpoint of this model: {problem}")
            parameter.copy_(value)
    if tensors:
        missing = ", ".join(f"{name} of shape {tuple(value.shape)}" for name, value in tensors.items())
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
            print(printable(f"stoker: damaged checkpoint passed over: {error}"), file=sys.stderr)
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
