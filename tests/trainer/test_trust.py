"""Code that a stored config names runs only for the user who started the run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.identity import read_identity
from stoker.conf.rundir import RunDirectory, read_config, write_config
from stoker.conf.schema import Config, EvalConfig, from_dict, to_dict
from stoker.conf.targets import import_target
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.launch.slurm.batch import main as batch
from stoker.trainer.trust import code_of, is_remembered_script, refuse_foreign_code, remember, remember_script
from tests.launch.runs import train_here
from tests.trainer.lives import ONE, settled, trained_run, twin, words_of

EVIL = """
from pathlib import Path
Path("@mark").touch()
def build(*_, **__): raise ValueError("code of a stranger")
open_source = build
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trust")


@pytest.fixture(scope="module")
def trained(home: Path) -> RunDirectory:
    return trained_run(home)


@dataclasses.dataclass
class Stranger:
    """A run directory from another user; `mark` exists once its code has run."""

    run: RunDirectory
    mark: Path

    def store(self, **changes: Any) -> None:
        """`model__target="..."`: a value in its config.yaml."""
        values = to_dict(read_config(self.run))
        for key, value in changes.items():
            *path, name = key.split("__")
            node = values
            for part in path:
                node = node[part]
            node[name] = value
        write_config(self.run, from_dict(values))


@pytest.fixture
def stranger(trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mark = tmp_path / "it ran"
    project = tmp_path / "project"
    project.mkdir()
    (project / "evil_stranger.py").write_text(EVIL.replace("@mark", str(mark)))
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("evil_stranger", None)
    return Stranger(twin(trained, tmp_path / "stranger"), mark)


STORED: dict[str, dict[str, Any]] = {
    "model.target=evil_stranger:build": {"model__target": "evil_stranger:build"},
    "data.target=evil_stranger:open_source": {"data__target": "evil_stranger:open_source"},
    "data.args.map=evil_stranger:build": {"data__args": {"map": "evil_stranger:build"}},
    "data.urls=pipe:touch": {"data__urls": "pipe:touch @mark"},
    "data.urls=p{ipe:touch": {"data__urls": "p{ipe:touch @mark,}"},
    "data.sources.web.urls": {"data__sources": {"web": {"kind": "hf", "urls": ["pipe:touch @mark"], "weight": 1}}},
    "data.sources.web.target=evil_stranger:open_source": {
        "data__sources": {"web": {"target": "evil_stranger:open_source"}}
    },
    "data.splits=evil_stranger:open_source": {"data__splits": "evil_stranger:open_source"},
    "objective.target=evil_stranger:build": {"objective__target": "evil_stranger:build"},
    "optim.target=evil_stranger:build": {"optim__target": "evil_stranger:build"},
    "parallel.deepspeed": {"parallel__deepspeed": {"compile": {"backend": "evil_stranger.build"}}},
}
USES = {
    "train": ("model.", "data.", "objective.", "optim.", "parallel."),
    "submit": ("model.", "data.", "objective.", "optim.", "parallel.", "launch."),
    "replay": ("model.", "data.", "objective.", "optim.", "parallel."),
    "generate": ("model.", "data."),
    "export": ("model.", "data."),
    "peek": ("data.",),
}


def commands(run: RunDirectory) -> dict[str, list[str]]:
    return {
        "train": ["train", f"run.dir={run.path}", "steps=5", *ONE],
        "submit": ["submit", "--dry-run", f"run.dir={run.path}", "launch=slurm"],
        "replay": ["replay", str(run.path), "--step", "3"],
        "generate": ["generate", str(run.path), "--prompt", "a"],
        "export": ["export", str(run.path), str(run.path.parent / "out")],
        "peek": ["data", "peek", str(run.path), "--step", "1"],
    }


def filled(value: Any, mark: Path) -> Any:
    """The path of `mark` in the place of `@mark`."""
    return json.loads(json.dumps(value).replace("@mark", str(mark)))


@pytest.mark.long
@pytest.mark.parametrize("said", list(STORED))
def test_every_command_refuses_what_a_stored_config_would_run(
    stranger: Stranger, said: str, capsys: pytest.CaptureFixture
) -> None:
    changes = {key: filled(value, stranger.mark) for key, value in STORED[said].items()}
    stranger.store(**changes)
    for name, words in commands(stranger.run).items():
        if not said.startswith(USES[name]):
            continue
        assert main(words) == 2, f"{name} did not refuse {said}"
        told = capsys.readouterr().err
        assert said in told and str(stranger.run.config) in told and "run.trust=true" in told, told
    assert not stranger.mark.exists()


def test_submit_refuses_stored_shell(stranger: Stranger, capsys: pytest.CaptureFixture) -> None:
    stranger.store(launch__setup="touch x", launch__name="slurm", launch__sbatch_args=["--wrap=y"])
    assert main(["submit", "--dry-run", f"run.dir={stranger.run.path}"]) == 2
    told = capsys.readouterr().err
    assert "launch.setup=touch x" in told and 'launch.sbatch_args=["--wrap=y"]' in told
    assert main(["submit", "--dry-run", "--trust", f"run.dir={stranger.run.path}"]) == 0
    output = capsys.readouterr()
    assert "touch x" in output.out and "runs code of its config: launch.setup=touch x" in output.err


def test_a_jobs_own_process_refuses_stored_arguments_of_srun(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stranger.store(launch__srun_args=["--prolog=x"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert batch([f"run.dir={stranger.run.path}"]) == 2
    assert 'launch.srun_args=["--prolog=x"]' in capsys.readouterr().err


def test_trust_given_in_one_of_three_ways_allows_it_with_a_line(
    stranger: Stranger, capsys: pytest.CaptureFixture
) -> None:
    stranger.store(optim__target="evil_stranger:build")
    words = [f"run.dir={stranger.run.path}", "steps=5", *ONE]
    told: list[str] = []
    line = ["runs code of its config: optim.target=evil_stranger:build"]
    assert settled([*words, "run.trust=true"], tell=told.append).optim.target == "evil_stranger:build"
    assert told == line and settled([*words, "run.trust=true"]).run.trust is not False
    told.clear()
    settled([*words, "optim.target=evil_stranger:build"], tell=told.append)
    assert told == line
    told.clear()
    identity = read_identity(stranger.run)
    assert identity is not None
    remember(identity.run, read_config(stranger.run))
    settled(words, tell=told.append)
    assert told == line
    assert main(["generate", str(stranger.run.path), "--prompt", "a", "--tokens", "1"]) == 0, "it uses no optimizer"


def test_the_record_is_of_this_run_and_of_these_values(stranger: Stranger, tmp_path: Path) -> None:
    stranger.store(optim__target="evil_stranger:build")
    config, identity = read_config(stranger.run), read_identity(stranger.run)
    assert identity is not None
    remember(identity.run, config)
    where: dict[str, Any] = {"trust": False, "uses": ("optim.",)}
    refuse_foreign_code(config, "here", identity.run, **where)
    with pytest.raises(ConfigError):
        refuse_foreign_code(config, "here", "0" * 32, **where)
    with pytest.raises(ConfigError):
        refuse_foreign_code(config, "here", None, **where)
    stranger.store(optim__args={"command": "rm"})
    with pytest.raises(ConfigError, match="command"):
        refuse_foreign_code(read_config(stranger.run), "here", identity.run, **where)
    [record] = (tmp_path / "cache" / "stoker" / "started").iterdir()
    assert record.stat().st_mode & 0o777 == 0o600


def test_only_the_user_who_started_a_run_can_resume_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The record is beside the user's caches, wherever the config puts its own."""
    run = tmp_path / "run"
    words = words_of(run, home / "text", "model.target=tests.trainer.tamed:build", f"data.cache={tmp_path / 'theirs'}")
    train_here(home, words)
    generate = ["generate", str(run), "--prompt", "a", "--tokens", "1"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert main(generate) == 0
    assert "runs code of its config: model.target=tests.trainer.tamed:build" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another user"))
    assert main(generate) == 2
    assert "model.target=tests.trainer.tamed:build" in capsys.readouterr().err
    assert main([*generate, "--trust"]) == 0


def test_weights_of_an_untrusted_run_run_no_code(stranger: Stranger, home: Path, tmp_path: Path) -> None:
    stranger.store(model__target="evil_stranger:build")
    words = [word for word in words_of(tmp_path / "new", home / "text") if not word.startswith("model.")]
    words.append(f"model.init_from={stranger.run.path}")
    with pytest.raises(ConfigError, match=r"model\.target=evil_stranger:build"):
        settled(words)
    assert settled([*words, "model.target=stoker.models.decoder:build"]).model.hidden_size == 32
    assert not stranger.mark.exists()
    assert settled([*words, "run.trust=true"]).model.target == "evil_stranger:build"


def test_a_config_from_a_remote_is_untrusted_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote, run = f"checkpoint.remote=file://{tmp_path}/remote", tmp_path / "run"
    train_here(home, words_of(run, home / "text", remote, "model.target=tests.trainer.tamed:build"))
    shutil.rmtree(run)
    words = [f"run.dir={run}", remote, "steps=5", *ONE]
    with pytest.raises(ConfigError, match=f"file://{tmp_path}/remote names code to run"):
        settled(words)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert settled(words).model.target == "tests.trainer.tamed:build"


def test_stokers_targets_are_trusted_only_for_their_keys() -> None:
    def code(change: Callable[[Config], None]) -> list[str]:
        config = Config()
        change(config)
        return list(code_of(config))

    assert code(lambda config: None) == []
    assert code(lambda config: setattr(config.model, "target", "stoker.models.decoder:build")) == []
    assert code(lambda config: setattr(config.data, "splits", "stoker.data.streaming.sources:open_text")) == []
    for section, key in (("model", "target"), ("data", "target"), ("optim", "target")):
        change = lambda config, s=section, k=key: setattr(getattr(config, s), k, "stoker.launch.cli:main")  # noqa: E731
        assert code(change) == [f"{section}.{key}"]
    assert code(lambda config: setattr(config.data, "args", {"map": "stoker.launch.cli:main"})) == ["data.args.map"]
    tasks = EvalConfig(tasks=["mine"], include="tasks")  # whose files may name functions
    assert code(lambda config: setattr(config, "eval", tasks)) == ["eval.include"]


def test_an_address_that_would_send_a_secret_of_the_environment_is_trusted_like_code() -> None:
    address, config = "https://theirs/a.tar?$STOKER_SECRET_SAS", Config()
    config.data.urls = ["https://theirs/b.tar", address]
    config.data.sources = {"web": {"path": address}}
    assert list(code_of(config)) == ["data.urls", "data.sources.web.path"]


def test_a_script_that_this_user_has_not_submitted_is_not_requeued(
    stranger: Stranger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    submitted: list[str] = []
    monkeypatch.setattr("stoker.launch.slurm.submit.submit_script", lambda run, chain: submitted.append("it") or ["7"])
    stranger.run.slurm.mkdir()
    stranger.run.script.write_text("#!/bin/bash\ntouch x\n")
    assert main(["requeue", str(stranger.run.path)]) == 2
    told = capsys.readouterr().err
    assert str(stranger.run.script) in told and "--trust" in told and not submitted
    identity = read_identity(stranger.run)
    assert identity is not None
    remember_script(identity.run, "#!/bin/bash\ntouch y\n")
    assert main(["requeue", str(stranger.run.path)]) == 2
    assert main(["requeue", "--trust", str(stranger.run.path)]) == 0 and submitted == ["it"]
    assert is_remembered_script(stranger.run, stranger.run.script.read_text())
    assert main(["requeue", str(stranger.run.path)]) == 0


@pytest.mark.parametrize("target", ["planted:build", "planted_pkg.planted:build", "runs.theirs.planted:build"])
def test_modules_are_never_taken_from_inside_a_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Not even those that the user names: another user could have put one where the user's is searched."""
    run = tmp_path / "runs" / "theirs"
    (run / "attempts").mkdir(parents=True)
    (run / "config.yaml").touch()
    (run / "planted_pkg").mkdir()
    for path in (run / "planted.py", run / "planted_pkg" / "planted.py", run / "planted_pkg" / "__init__.py"):
        path.write_text(EVIL.replace("@mark", str(tmp_path / "it ran")))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path if target.startswith("runs.") else run)
    with pytest.raises(ValueError, match=f"inside the run directory {run}"):
        import_target(target)
    assert not (tmp_path / "it ran").exists()
    for name in ("planted", "planted_pkg", "planted_pkg.planted", "runs", "runs.theirs"):
        sys.modules.pop(name, None)


def test_what_is_imported_is_logged_with_its_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logged_module.py").write_text("def build(): pass\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    for _ in range(2):
        import_target("logged_module:build")
    import_target("stoker.models.decoder:build")
    assert [record.message for record in caplog.records] == [
        f"imported logged_module:build from {os.path.realpath(tmp_path / 'logged_module.py')}"
    ]


def test_values_are_shown_without_control_characters(stranger: Stranger, capsys: pytest.CaptureFixture) -> None:
    stranger.store(data__urls="pipe:echo \x1b[2J" + "x" * 500)
    assert main(commands(stranger.run)["peek"]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\\x1b[2J" in told and "x" * 200 not in told
