"""`stoker teach`: a teacher's predictions for all rows of the data, stored once, from any layout.

They are what `objective=distill` learns from, or, of the labels alone, the reference of `objective=dpo`, `ipo` and
`kto`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stoker.conf.overrides import parse
from stoker.conf.rundir import RunDirectory
from stoker.conf.scratch import Scratch
from stoker.conf.values import ConfigError
from stoker.data import prepare
from stoker.data.taught import FILE
from stoker.launch.check import settle, together
from stoker.launch.local import launch
from stoker.launch.train import ranks_for, say
from stoker.models.objectives.teaching import TARGET
from stoker.parallel.layout import layout_of
from stoker.trainer.facts import with_vocabulary


def refuse_given(overrides: Sequence[str], section: str, why: str) -> None:
    """Raises ConfigError where `overrides` set something of a section that the command sets itself."""
    for override in overrides:
        key = parse(override).key
        if key.partition(".")[0] == section:
            raise ConfigError(f"{override}: {why}: leave it out")


def teach(folder: Path, overrides: Sequence[str], top_k: int | None) -> int:
    """Write `folder`; status 0 if it is whole. `top_k` tokens for each label; None: the label's log-probability alone.

    Raises ConfigError for a start that is refused.
    """
    folder = folder.absolute()
    if top_k is not None and top_k < 1:
        raise ConfigError(f"--top-k={top_k}: at least one token, or --labels")
    if (folder / FILE).exists():
        raise ConfigError(f"{folder} holds the predictions of a teacher already: give another folder, or remove it")
    refuse_given(overrides, "objective", "a teacher predicts, and learns nothing")
    refuse_given(overrides, "adapter", "merge it into a teacher first (stoker export RUN OUT --merge)")
    ours = ["objective=next_token", f"objective.target={TARGET}", "adapter=none"]
    ours += ["model.freeze=['*']", "optim=sgd", "optim.ema=null", "launch.max_restarts=0"]
    scratch = Scratch("stoker-teach-")
    config = settle(together(overrides, ours), scratch.path / "run", 1)
    config.objective.args = {"top_k": top_k or 0, "folder": str(folder)}
    if config.parallel.cp > 1:
        raise ConfigError(
            f"parallel.cp={config.parallel.cp}: predictions are stored by whole rows, which ranks would share: "
            "parallel.cp=1 works"
        )
    if config.data.mode == "streaming":
        raise ConfigError("data.mode=streaming has no numbers of rows by which to store predictions: indexed does")
    prepare(config)
    limit = with_vocabulary(config).model.vocab_size or 0
    if top_k is not None and top_k > limit:
        raise ConfigError(f"--top-k={top_k} of {limit} tokens: {limit} at most")
    ranks = ranks_for(config)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"what {config.model.init_from or 'a model of initial weights'} predicts: {layout_of(config, ranks)}")
    run = RunDirectory(Path(str(config.run.dir)))
    run.attempts.mkdir(parents=True)
    status = launch(config, ranks, say, "--teach")
    if status:
        say(f"that failed; its files are in {scratch.keep() / run.path.name}")
        return status
    size = sum(file.stat().st_size for file in folder.iterdir())
    say(f"{folder}: {size / 1e6:.1f} MB; objective.teacher={folder}")
    return 0
