"""Moments of AdamW to begin with: `optim.init_from` names a model folder in which `stoker import` has put them.

`FOLDER/optimizer` has one folder for each moment, with files like those of weights, and a count of updates, from which
the bias correction follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.models.hugging_face_config import read_json
from stoker.parallel.engine import Engine
from stoker.trainer.pretrained import Source, open_source, refuse_other_tensors, saved_entries

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"  # the count of updates, as torch's AdamW names it


def moments_folder(folder: Path) -> Path:
    """Where the moments of the model in `folder` are."""
    return folder / "optimizer"


def counts_file(folder: Path) -> Path:
    """The file in `moments_folder` with what is no tensor: `{"step": 1000}`."""
    return folder / "optimizer.json"


def refuse_unfitting_moments(config: Config) -> None:
    """Raises ConfigError for an `optim.init_from` without moments, or with those of another model."""
    try:
        for _ in _each(config):
            pass
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_moments(config: Config, engine: Engine) -> None:
    """Fill the moments of `engine` from `optim.init_from`, and go on counting updates where these ended.

    Raises ValueError naming tensors that are missing, too many or of another shape.
    """
    shards = engine.shards()
    for key, source in _each(config):
        source.fill([shard for shard in shards if shard.kind == f"optim.{key}"])
    engine.load_state({**engine.state(), STEP: float(_count(_folder(config)))})


def _each(config: Config) -> Iterator[tuple[str, Source]]:
    """The moments, each with its open files. Raises ValueError, naming a file, where they are not this model's."""
    try:
        folder = _folder(config)
        if not folder.is_dir():
            raise ValueError(f"there is no {folder}, which `stoker import` makes of a checkpoint with AdamW's moments")
        _count(folder)
        entries = {name: entry for name, entry in saved_entries(config.model).items() if not entry.buffer}
        for key in MOMENTS:
            with open_source(folder / key, config.model, list(entries)) as source:
                try:
                    refuse_other_tensors(config.model, entries, source.tensors)
                except ValueError as error:
                    raise ValueError(f"{key}: {error}") from error
                yield key, source
    except (OSError, ValueError) as error:
        raise ValueError(f"optim.init_from={config.optim.init_from}: {error}") from error


def _folder(config: Config) -> Path:
    assert config.optim.init_from is not None
    return moments_folder(Path(config.optim.init_from).expanduser())


def _count(folder: Path) -> int:
    count = read_json(counts_file(folder)).get(STEP)
    if type(count) is not int or not 1 <= count < 1 << 24:  # torch counts in float32
        raise ValueError(f"{counts_file(folder)}: {STEP} is {count!r:.80}, not a count of updates")
    return count
