"""`stoker train`: settle the config, then start the ranks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stoker.conf.printable import printable
from stoker.conf.reasons import with_cause
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.parallel.start import Ranks


def ranks_for(config: Config) -> int:
    """How many ranks `stoker train` starts: `launch.nproc`, else one per GPU, else 2."""
    return config.launch.nproc or gpus(config) or 2


def gpus(config: Config) -> int:
    """CUDA devices that the ranks may use; none with `launch.device=cpu`."""
    if config.launch.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def where(config: Config) -> Ranks:
    """The ranks that `stoker train` starts, all on this machine."""
    return Ranks(ranks_for(config), gpus(config))


def train(overrides: Sequence[str]) -> int:
    """Train, or resume, on this machine; the exit status. Raises ConfigError before a rank is spawned."""
    gc.disable()  # see trainer/__main__.py
    from stoker.conf.rundir import make_run_directory, run_directory
    from stoker.data import prepare
    from stoker.trainer.settle import settle_config

    gc.freeze()
    gc.enable()
    config, changes = settle_config(overrides, where, tell=say, check_import=True)
    with refusing():
        prepare(config)
        if config.eval.tasks:
            from stoker.trainer.tasks import refuse_tasks  # with torch, and lm-eval

            refuse_tasks(config)
    make_run_directory(run_directory(config), config.run.public)
    say(f"run directory {config.run.dir}")
    for change in changes:
        say(f"changed since the last start: {change}")
    from stoker.launch.local import launch

    return launch(config, ranks_for(config), say)


@contextmanager
def refusing() -> Iterator[None]:
    """What is wrong with data is a refusal while no rank has been spawned. Raises ConfigError for ValueError."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(with_cause(error)) from error


def say(line: str) -> None:
    """Print one line for the user."""
    print(printable(f"stoker: {line}"), file=sys.stderr, flush=True)
