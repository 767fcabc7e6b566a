"""The run directory: its names, its one-time resolution, and the config written in it."""

from __future__ import annotations

import dataclasses
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from stoker.conf.durable import write_durably
from stoker.conf.lasting import lasting
from stoker.conf.migrations import migrate
from stoker.conf.schema import Config, from_dict, to_dict
from stoker.conf.values import ConfigError


@dataclass(frozen=True)
class RunDirectory:
    """Paths in the directory of a run. Only names: nothing is created or read."""

    path: Path

    @property
    def config(self) -> Path:
        """The composed config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """A directory, or a link to `checkpoint.dir`."""
        return self.path / "checkpoints"

    @property
    def stop(self) -> Path:
        """A file whose existence requests the run to stop."""
        return self.path / "STOP"

    @property
    def save(self) -> Path:
        """A file whose existence requests a checkpoint. It is removed when the save begins."""
        return self.path / "SAVE"

    @property
    def requeue(self) -> Path:
        """A file whose existence requests the run to save, end and requeue."""
        return self.path / "REQUEUE"

    @property
    def identity(self) -> Path:
        """The identity of the run, as JSON (`stoker.conf.identity`)."""
        return self.path / "run.json"

    def earlier(self, number: int) -> Path:
        """Metrics and config of the run before `run.fresh=true` started over, counted from 1."""
        return self.path / "earlier" / str(number)

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def tokenizer(self) -> Path:
        """A folder with the tokenizer: it outlives the cache, the texts and the file it was loaded from."""
        return self.path / "tokenizer"

    @property
    def base_model(self) -> Path:
        """A folder with the files of `model.init_from` other than its weights, for a later export."""
        return self.path / "base_model"

    @property
    def base_weights(self) -> Path:
        """A folder with the weights of `model.init_from`, which serves in its place: `adapter.keep_base`."""
        return self.path / "base_weights"

    def struck(self, fault: str) -> Path:
        """A file that marks the fault of this name (`faults`) as injected, so that it is not repeated."""
        return self.path / "faults" / fault

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def slurm(self) -> Path:
        """Files of Slurm jobs: the script, their output, and the decisions at their end."""
        return self.path / "slurm"

    @property
    def script(self) -> Path:
        """The batch script that `stoker submit` wrote."""
        return self.slurm / "train.sbatch"

    def attempt(self, number: int) -> Path:
        """The directory of one start of the run's ranks, counted from 1."""
        return self.attempts / str(number)

    def log(self, number: int, rank: int) -> Path:
        """What the rank of this global number wrote to stdout and stderr in an attempt."""
        return self.attempt(number) / f"rank-{rank}.log"

    def launch(self, number: int) -> Path:
        """The id of the launch that made an attempt."""
        return self.attempt(number) / "launch"

    def beginning(self, number: int) -> Path:
        """The start conditions of an attempt, as JSON."""
        return self.attempt(number) / "start.json"

    def seconds(self, number: int) -> Path:
        """How the seconds of an attempt were spent, as JSON."""
        return self.attempt(number) / "seconds.json"

    def plan(self, number: int) -> Path:
        """What `stoker plan` predicts of an attempt, as JSON."""
        return self.attempt(number) / "plan.json"

    def messages(self, number: int) -> Path:
        """The messages of one step of an attempt, as JSON."""
        return self.attempt(number) / "messages.json"

    def stacks(self, number: int, rank: int) -> Path:
        """The stacks of all threads of a rank that made no progress."""
        return self.attempt(number) / f"rank-{rank}.stacks"

    def flight(self, number: int, rank: int) -> Path:
        """The last collectives of such a rank: torch's flight recorder, as JSON."""
        return self.attempt(number) / f"rank-{rank}.flight.json"

    def outcome(self, number: int) -> Path:
        """How an attempt ended, as JSON."""
        return self.attempt(number) / "outcome.json"

    def trace(self, number: int, rank: int) -> Path:
        """What the rank did in the steps of `profile.steps`, for Perfetto."""
        return self._profiles(number) / f"rank-{rank}.trace.json.gz"

    def memory_snapshot(self, number: int, rank: int) -> Path:
        """Its GPU's memory over the same steps, for pytorch.org/memory_viz."""
        return self._profiles(number) / f"rank-{rank}.memory.pickle"

    def _profiles(self, number: int) -> Path:
        return self.path / "profiles" / f"attempt-{number}"

    def traces(self) -> list[Path]:
        """The traces that exist, of all attempts and ranks."""
        return list(self.path.glob("profiles/attempt-*/rank-*.trace.json.gz"))

    def attempt_numbers(self) -> list[int]:
        """The attempts there are, oldest first."""
        if not self.attempts.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.attempts.iterdir() if entry.name.isdecimal())


def resolve(config: Config, now: datetime) -> Config:
    """`config` with `run.name` and absolute paths. Done once, before ranks start: a clock differs by rank.

    A run with a directory and no name gets the directory's name. Raises ConfigError for a name that cannot be a
    directory's.
    """
    name = config.run.name
    if name is None:
        name = _name_of(config.run.dir) if config.run.dir else f"{config.model.name}-{now:%Y%m%d-%H%M%S}"
    if not name or name in (".", "..") or "/" in name:
        raise ConfigError(f"run.name={name!r}: it names a directory, so it cannot be empty, '.', '..' or hold '/'")
    directory = Path(config.run.dir or Path("runs") / name).expanduser().absolute()
    tokenizer = config.data.tokenizer
    if tokenizer not in ("byte", "bpe"):
        tokenizer = _absolute(tokenizer)
    data = dataclasses.replace(
        config.data,
        path=_absolute(config.data.path),
        validation_path=_absolute(config.data.validation_path),
        urls=_absolute_each(config.data.urls),
        tokenizer=tokenizer,
        args=_absolute_template(config.data.args),
        sources={name: _absolute_source(source) for name, source in config.data.sources.items()},
    )
    parallel = dataclasses.replace(config.parallel, nvme_path=_absolute(config.parallel.nvme_path))
    model = dataclasses.replace(config.model, init_from=_absolute(config.model.init_from))
    optim = dataclasses.replace(config.optim, init_from=_absolute(config.optim.init_from))
    adapter = dataclasses.replace(config.adapter, init_from=_absolute(config.adapter.init_from))
    objective = dataclasses.replace(config.objective, teacher=_absolute(config.objective.teacher))
    checkpoint = dataclasses.replace(config.checkpoint, dir=_absolute(config.checkpoint.dir))
    evaluation = dataclasses.replace(config.eval, include=_absolute(config.eval.include))
    run = dataclasses.replace(config.run, name=name, dir=str(directory))
    return dataclasses.replace(
        config,
        data=data,
        model=model,
        adapter=adapter,
        optim=optim,
        objective=objective,
        parallel=parallel,
        checkpoint=checkpoint,
        eval=evaluation,
        run=run,
    )


def _name_of(directory: str) -> str:
    """The last part of the path, also of `.` and `..`."""
    return Path(directory).expanduser().resolve().name or "run"


def _absolute(path: str | None) -> str | None:
    """A run resumes from any working directory. Values with a scheme (`s3://...`, `pipe:...`) are no paths."""
    if path is None or "://" in path or path.startswith("pipe:"):
        return path
    return str(Path(path).expanduser().absolute())


def _absolute_each(paths: Any) -> Any:
    """One path, or a list of them; other values are refused elsewhere."""
    if isinstance(paths, list):
        return [_absolute_each(path) for path in paths]
    return _absolute(paths) if isinstance(paths, str) else paths


def _absolute_source(source: Any) -> Any:
    """A source of a mixture."""
    if not isinstance(source, dict):
        return source
    found = source | {key: _absolute_each(source[key]) for key in ("path", "validation_path", "urls") if key in source}
    return found | {"args": _absolute_template(source["args"])} if isinstance(source.get("args"), dict) else found


def _absolute_template(args: dict[str, Any]) -> dict[str, Any]:
    """`args.template` may be a chat template or the path of one."""
    given = args.get("template")
    if not isinstance(given, str) or "{" in given or not Path(given).expanduser().is_file():
        return args
    return args | {"template": _absolute(given)}


def run_directory(config: Config) -> RunDirectory:
    """The run directory of a resolved config."""
    assert config.run.dir is not None
    return RunDirectory(Path(config.run.dir))


def first_tier(config: Config) -> Path | None:
    """Where a resolved config keeps checkpoints, if not in the run directory."""
    return Path(config.checkpoint.dir) if config.checkpoint.dir is not None else None


def make_run_directory(run: RunDirectory, public: bool) -> None:
    """Make it where it is not there: `public` as the umask says, else for this user alone. One that exists is left."""
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        run.path.mkdir(mode=0o777 if public else 0o700)
    run.attempts.mkdir(exist_ok=True)


def next_attempt(run: RunDirectory) -> int:
    """Creates the directory of a new attempt and returns its number. Two callers never get the same one."""
    run.attempts.mkdir(parents=True, exist_ok=True)
    number = max(run.attempt_numbers(), default=0) + 1
    while True:
        try:
            run.attempt(number).mkdir()
            return number
        except FileExistsError:
            number += 1


def refuse_links(run: RunDirectory) -> None:
    """Raises ConfigError for a link where the run writes: it could lead into files of other users.

    `checkpoints` may be one: it is checked with the place that it leads to (`stoker.checkpoint.tier`).
    """
    written = (run.path, run.attempts, run.slurm, run.path / "faults", run.path / "earlier")
    for folder in written:
        for entry in _entries(folder):
            if entry.is_symlink() and entry.path != str(run.checkpoints):
                raise ConfigError(
                    f"{entry.path} is a link to {os.readlink(entry.path)}, and links inside a run directory are not "
                    "followed when it is written: remove it, or move its target here"
                )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def to_yaml(config: Config) -> str:
    """`config` as YAML, the keys in the order of the schema. `read_config` gives back an equal config."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def write_config(run: RunDirectory, config: Config) -> None:
    """Writes `config.yaml`, whole or not at all. Keys that are for one start (`PER_START`) are not kept."""
    run.path.mkdir(parents=True, exist_ok=True)
    write_durably(run.config, to_yaml(lasting(config)).encode())


def read_config(run: RunDirectory) -> Config:
    """The stored config. Raises ConfigError, of one line, when it is missing or invalid."""
    try:
        with open(run.config, "rb") as file:
            data = file.read(_MOST_CONFIG_BYTES + 1)
        if len(data) > _MOST_CONFIG_BYTES:
            raise ConfigError(f"{run.config} holds more than {_MOST_CONFIG_BYTES:,} bytes: it is no config of a run")
        values = parse_yaml(data.decode())
    except FileNotFoundError:
        raise ConfigError(f"{run.path} is not a run directory: it has no {run.config.name}") from None
    except ConfigError:
        raise
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:  # a date such as 2026-99-99 is a ValueError
        raise ConfigError(f"{run.config} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{run.config} holds no config")
    try:
        config = from_dict(migrate(values))
    except ConfigError as error:
        raise ConfigError(f"{run.config}: {error}") from None
    if run.base_weights.is_dir():  # which are found from here
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run.path.absolute())))
    return _with_kept_tokenizer(run, config)


def parse_yaml(text: str) -> Any:
    """The value in `text`. Raises ValueError, OverflowError and yaml.YAMLError: also for aliases and deep nesting."""
    return yaml.load(text, Loader=_Loader)


def _with_kept_tokenizer(run: RunDirectory, config: Config) -> Config:
    """A run keeps the files of its tokenizer: they serve where those that the config names are gone."""
    named = config.data.tokenizer
    if named in (None, "byte", "bpe") or Path(named).exists() or not run.tokenizer.is_dir():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(run.tokenizer)))


_MOST_CONFIG_BYTES = 16 << 20
_MOST_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """Reads `1e-3` as a number, as in YAML 1.2; PyYAML alone reads text.

    Aliases are refused, by which ten lines become a billion values, and so is what is nested too deeply.
    """

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name), and a config has none", self._mark())
        if self._depth > _MOST_DEPTH:
            problem = f"it is nested more than {_MOST_DEPTH} deep"
            raise yaml.composer.ComposerError(None, None, problem, self._mark())
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def _mark(self) -> Any:
        return self.peek_event().start_mark


class _Dumper(yaml.SafeDumper):
    """Writes text so that it is read back as the same text: `1e-3`, and Unicode's own line ends, need quotes."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if _LINE_ENDS & set(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_LINE_ENDS = set("\x85\u2028\u2029")
_FLOAT = re.compile(r"[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)\Z")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(str, _Dumper.represent_text)
