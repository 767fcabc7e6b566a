"""What ranks do for the tasks of lm-eval: rank 0 runs them, and all compute what the model predicts.

Rank 0 sends batches of tokens over the control group, every data-parallel rank predicts its rows, and the sums of what
they found come back. So a task sees one model, whatever the layout. `stoker eval` does nothing else; a run with
`eval.tasks` does it between steps, where it changes nothing of what the run computes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stoker.conf.durable import write_whole
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.conf.scratch import Scratch
from stoker.data import open_tokenizer
from stoker.data.hugging_face import tokenizer_files
from stoker.data.opening import NoTokenizer
from stoker.models.objectives.teaching import Teaching
from stoker.parallel.layout import batch_plan
from stoker.parallel.mesh import Mesh
from stoker.trainer.loop import Trainer
from stoker.trainer.predictions import GivenUpError, Predictions
from stoker.trainer.report.task_results import PREFIX, STEP
from stoker.trainer.runtime.outcome import Outcome

if TYPE_CHECKING:
    from stoker.trainer.harness import Asked

log = logging.getLogger(__name__)

FAILED = f"{PREFIX}failed"
_OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")


def run_tasks(trainer: Trainer) -> Outcome:
    """Runs instead of `Trainer.fit`; the objective is `stoker.models.objectives.teaching`, with one token a label."""
    config = trainer.config
    ranks = Predictions(trainer, config.batch.size)
    if trainer.mesh.rank:
        ranks.serve()
        return Outcome.STOPPED
    from stoker.trainer.harness import Asked, results_of  # with lm-eval, which rank 0 alone needs

    try:
        values = dict(config.objective.args)
        asked = Asked(values["tasks"], values["include"], values["fewshot"], values["limit"])
        found = results_of(asked, str(config.model.init_from), ranks, asked.open("--include"))
    finally:
        ranks.end()
    write_whole(Path(values["results"]), json.dumps(found, default=str).encode())
    return Outcome.STOPPED


def refuse_tasks(config: Config) -> None:
    """Raises ValueError where `eval.tasks` cannot be run: before any rank is there, or on the first one."""
    if not config.eval.tasks:
        return
    go_offline()
    from stoker.trainer import harness

    harness.refuse_tasks(_asked(config))


def go_offline() -> None:
    """Nothing is downloaded, unless the environment says otherwise. Before lm-eval's libraries are imported."""
    for name in _OFFLINE:
        os.environ.setdefault(name, "1")


def _asked(config: Config) -> Asked:
    from stoker.trainer.harness import Asked

    return Asked(list(config.eval.tasks), config.eval.include, config.eval.fewshot, config.eval.limit)


class TaskEvaluation:
    """The tasks of `eval.tasks`, between the steps of a run."""

    def __init__(self, config: Config, mesh: Mesh, run: RunDirectory) -> None:
        """A collective. Raises ValueError, on all ranks, for tasks that cannot be run."""
        self._config, self._mesh = config, mesh
        plan = batch_plan(config, mesh.layout)
        self._rows = mesh.layout.dp * plan.micro_rows * mesh.layout.pp
        self._scratch: Scratch | None = None
        problem = ""
        if mesh.rank == 0:
            try:
                refuse_tasks(config)
                self._scratch = _tokenizer_folder(config, run)
            except ValueError as error:
                problem = str(error)
        if problem := mesh.all_gather_text(problem)[0]:
            raise ValueError(problem)

    def metrics(self, trainer: Trainer, step: int, given_up: Callable[[], bool]) -> dict[str, float] | None:
        """The results by metric, on rank 0 (elsewhere none); None where a request to end came first. A collective.

        Weights, randomness and data are left as they are. An error of a task is reported, and the run goes on.
        """
        ranks = Predictions(trainer, self._rows, Teaching(1), step, given_up)
        if self._mesh.rank:
            return {} if ranks.serve() else None
        from stoker.trainer.harness import results_of

        asked = _asked(self._config)
        assert self._scratch is not None
        try:
            with _randomness_kept():
                found = results_of(asked, str(self._scratch.path), ranks, asked.open("eval.include"))
        except GivenUpError:
            return None
        except Exception as error:
            if ranks.waiting:  # the ranks failed, not a task
                raise
            ranks.end()
            log.exception("the tasks of step %d", step)
            assert trainer.observers is not None
            trainer.observers.message(f"warning: the tasks of step {step} failed: {type(error).__name__}: {error}")
            return {STEP: step, FAILED: 1}
        ranks.end()
        return {STEP: step, **metrics_of(found["results"])}


def metrics_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """lm-eval's results as metrics: `{"mine": {"acc,none": 0.5}}` as `{"tasks/mine/acc": 0.5}`."""
    found = {}
    for task, values in results.items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")  # after it the name of a filter: other names are no metrics
            if chosen and isinstance(value, int | float) and math.isfinite(value):
                metric = metric if chosen == "none" else f"{metric}.{chosen}"
                found[f"{PREFIX}{task}/{metric}"] = value
    return found


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """lm-eval seeds the generators of Python, NumPy and torch; afterwards they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _tokenizer_folder(config: Config, run: RunDirectory) -> Scratch:
    """The run's tokenizer, as transformers reads it. Raises ValueError where it has none of that kind."""
    try:
        files = tokenizer_files(open_tokenizer(config.data, run.tokenizer), config.seq_len)
    except NoTokenizer as error:
        raise ValueError(f"eval.tasks={config.eval.tasks} are texts, and the run has no tokenizer: {error}") from error
    if not files:
        raise ValueError(
            f"eval.tasks={config.eval.tasks} need a tokenizer that transformers has a class for, and "
            f"data.tokenizer={config.data.tokenizer} is none: `stoker eval` has the same limit"
        )
    folder = Scratch("stoker-tasks-")
    for name, content in files.items():
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_bytes(content)
    return folder
