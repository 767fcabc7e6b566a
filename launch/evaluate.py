"""`stoker eval`: the tasks of lm-eval on a model folder or a run, on one process or any layout."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory
from stoker.conf.scratch import Scratch
from stoker.conf.values import ConfigError
from stoker.data import prepare
from stoker.launch.check import settle, together
from stoker.launch.export import export
from stoker.launch.inspect import run_at
from stoker.launch.local import launch
from stoker.launch.teach import refuse_given
from stoker.launch.train import ranks_for, say
from stoker.models.objectives.teaching import TARGET
from stoker.parallel.layout import layout_of
from stoker.trainer.trust import DATA, MODEL, trusted_config

CONFIG = "config.json"
MOST_TOKENS = 2048  # of a row, where the model allows more and seq_len is not given


def evaluate(options: argparse.Namespace) -> int:
    """Print the table of results. Raises ConfigError for what cannot be used."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("stoker eval runs the tasks of lm-eval, which is not installed: pip install 'stoker[eval]'")
    for section in ("data", "objective", "adapter", "model"):
        refuse_given(options.overrides, section, "tasks bring their texts, and the folder its model")
    scratch = Scratch("stoker-eval-")
    given, folder = list(options.overrides), Path(options.model)
    if not (folder / CONFIG).is_file():
        given = [*_of_run(options, scratch.path / "model", given)]
        folder = scratch.path / "model"
    results = scratch.path / "results.json"
    words = together(_defaults(folder, given, scratch.path), _ours(folder, scratch.path))
    config = settle(words, scratch.path / "run", 1)
    config.objective.args = {
        "top_k": 1,
        "tasks": options.tasks.split(","),
        "include": None if options.include is None else str(options.include.absolute()),
        "fewshot": options.fewshot,
        "limit": options.limit,
        "results": str(results),
    }
    if config.parallel.cp > 1:
        raise ConfigError(f"parallel.cp={config.parallel.cp}: ranks would share a text; parallel.cp=1 works")
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"} if not options.online else {}
    prepare(config)
    ranks = ranks_for(config)
    say(f"{options.tasks} on {options.model}: {layout_of(config, ranks)}")
    RunDirectory(Path(str(config.run.dir))).attempts.mkdir(parents=True)
    status = launch(config, ranks, say, "--tasks")
    if status:
        say(f"that failed; its files are in {scratch.keep() / 'run'}")
        return status
    found = json.loads(results.read_text())
    print(found.pop("table"))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _of_run(options: argparse.Namespace, folder: Path, given: Sequence[str]) -> list[str]:
    """Export a run to `folder`; the settings `given`, with the run's precision and length of rows if they say none."""
    run = run_at(options.model)
    config = trusted_config(run, options.trust, (MODEL, DATA), say)
    merge = config.adapter.name != "none"
    asked = {"run": options.model, "out": str(folder), "step": options.step, "trust": options.trust, "merge": merge}
    export(argparse.Namespace(**asked, ema=False, format="hf", dtype=None, shard_size="5GB"))
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{options.model}: a model of your own, which lm-eval's tasks need as a folder of Hugging Face's"
        )
    return together([f"seq_len={config.seq_len}", f"precision={config.precision}"], given)


def _defaults(folder: Path, given: Sequence[str], scratch: Path) -> list[str]:
    """`given`, with rows as long as the model allows, and a text of no meaning: ranks that start open some data."""
    text = scratch / "text.txt"
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
    length = min(MOST_TOKENS, int(values.get("max_position_embeddings") or MOST_TOKENS))
    ours = [f"seq_len={length}", "batch.size=16"]
    length = next((int(parse(word).value) for word in given if parse(word).key == "seq_len"), length)
    text.write_text("a word and another one, " * length * 8)
    return together(ours, given)


def _ours(folder: Path, scratch: Path) -> list[str]:
    return [
        "objective=next_token",
        f"objective.target={TARGET}",
        f"model.init_from={folder.absolute()}",
        "model.freeze=['*']",
        "optim=sgd",
        "adapter=none",
        "data=text",
        f"data.path={scratch / 'text.txt'}",
        f"data.cache={scratch / 'cache'}",
        "data.validation=0",
        "data.workers=0",
        "data.packing=best_fit",
        "data.document_mask=true",
        "launch.max_restarts=0",
    ]
