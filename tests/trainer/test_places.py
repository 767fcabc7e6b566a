"""A place of checkpoints belongs to one run, copies are new runs, and links are not followed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from stoker.checkpoint import Checkpoints, NotOurs, Owner, Remote, claim, fence, newest, read_mark
from stoker.conf.durable import open_own, touch_own, write_durably
from stoker.conf.identity import read_identity
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.trainer.report.metrics import cut_back
from stoker.trainer.runtime.outcome import Ending, Outcome, write_ending
from tests.checkpoint.simulated import saved, small_model
from tests.launch.runs import steps_of, train_here
from tests.trainer.lives import ONE, settled, trained_run, twin, words_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def trained(home: Path) -> RunDirectory:
    return trained_run(home)


@pytest.fixture(scope="module")
def elsewhere(home: Path, trained: RunDirectory) -> tuple[RunDirectory, Path, str]:
    """A run with both tiers elsewhere: the run, its `checkpoint.dir`, its `checkpoint.remote`."""
    place, remote = home / "fast", f"file://{home}/remote"
    return (
        trained_run(home, "elsewhere", f"checkpoint.dir={place}", f"checkpoint.remote={remote}"),
        place,
        remote,
    )


def id_of(run: RunDirectory) -> str:
    identity = read_identity(run)
    assert identity is not None
    return identity.run


def test_every_place_of_a_run_carries_its_id(trained: RunDirectory, elsewhere: tuple[RunDirectory, Path, str]) -> None:
    run, place, remote = elsewhere
    marks = [read_mark(trained.checkpoints), read_mark(place), Remote(remote).owner()]
    assert [mark and mark.run for mark in marks] == [id_of(trained), id_of(run), id_of(run)]
    assert id_of(trained) != id_of(run)


@pytest.mark.parametrize("key", ["checkpoint.dir", "checkpoint.remote", "link"])
def test_a_place_of_another_run_is_refused_unless_it_is_adopted(
    home: Path, tmp_path: Path, elsewhere: tuple[RunDirectory, Path, str], key: str
) -> None:
    owner, place, remote = elsewhere
    words = words_of(tmp_path / "run", home / "text")
    if key == "link":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").symlink_to(place)
    else:
        words.append(f"{key}={place if key == 'checkpoint.dir' else remote}")
    with pytest.raises(ConfigError) as refused:
        settled(words)
    assert f"that of {owner.path}" in str(refused.value) and "run.adopt=true" in str(refused.value)
    assert len(newest(place)) == 2


def test_an_adopted_place_is_gone_on_from(
    home: Path, tmp_path: Path, elsewhere: tuple[RunDirectory, Path, str]
) -> None:
    """The advice of the refusal works, with the shortest command."""
    _, place, _ = elsewhere
    shutil.copytree(place, tmp_path / "place")
    run = RunDirectory(tmp_path / "run")
    words = [f"run.dir={run.path}", f"checkpoint.dir={tmp_path / 'place'}", "checkpoint.remote=null", "steps=5", *ONE]
    with pytest.raises(ConfigError, match=r"run\.adopt=true"):
        settled(words)
    train_here(home, [*words, "run.adopt=true"])
    assert [step[0] for step in steps_of(run.path)] == [5] and read_config(run).model.hidden_size == 32
    mark = read_mark(tmp_path / "place")
    assert mark is not None and mark.run == id_of(run)


def test_an_adopted_place_is_no_longer_its_old_owners(tmp_path: Path, home: Path) -> None:
    first, second = Owner("1" * 32, str(tmp_path / "a")), Owner("2" * 32, str(tmp_path / "b"))
    remote = Remote(f"file://{tmp_path}/remote")
    (tmp_path / "place").mkdir()
    for owner in (first, first):
        claim(tmp_path / "place", owner, adopt=False)
        remote.claim(owner)
    with pytest.raises(NotOurs, match=r"run\.adopt=true"):
        claim(tmp_path / "place", second, adopt=False)
    with pytest.raises(NotOurs, match=r"run\.adopt=true"):
        remote.claim(second)
    claim(tmp_path / "place", second, adopt=True)
    remote.claim(second, adopt=True)
    assert read_mark(tmp_path / "place") == second == remote.owner()
    with pytest.raises(NotOurs):
        remote.claim(first)  # as before each of its uploads
    words = words_of(tmp_path / "b", home / "text", f"checkpoint.dir={tmp_path / 'place'}", "run.adopt=true")
    assert settled(words).checkpoint.dir == str(tmp_path / "place")


def test_a_run_whose_place_was_taken_over_saves_there_no_more(tmp_path: Path) -> None:
    mine = Owner("1" * 32, str(tmp_path))
    claim(tmp_path, mine, adopt=False)
    fence(tmp_path, 1)
    saves = Checkpoints(tmp_path, rank=0, world=1, attempt=1, keep=1, mode="sync", owner=mine)
    saves.save(1, [], {})
    claim(tmp_path, Owner("2" * 32, "/elsewhere"), adopt=True)
    saves.save(2, [], {})
    first, second = saves.wait()
    assert first.error is None and second.error is not None and "another run, that of /elsewhere" in second.error
    assert [path.name for path in newest(tmp_path)] == ["step-00000001"]


def test_unmarked_places_of_older_versions_are_identified_by_their_newest_checkpoint(
    home: Path, tmp_path: Path, elsewhere: tuple[RunDirectory, Path, str]
) -> None:
    _, place, remote = elsewhere
    old = tmp_path / "old"
    shutil.copytree(place, old)
    (old / "OWNER").unlink()
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(old)
    with pytest.raises(ConfigError, match="holds the checkpoints of another run"):
        settled(words_of(run, home / "text", f"checkpoint.dir={old}"))
    shutil.copytree(remote.removeprefix("file://"), tmp_path / "remote")
    (tmp_path / "remote" / "OWNER").unlink()
    with pytest.raises(ConfigError, match="holds the checkpoints of another run"):
        settled(words_of(tmp_path / "third", home / "text", f"checkpoint.remote=file://{tmp_path}/remote"))


def test_a_copied_run_directory_is_a_new_run(home: Path, trained: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(tmp_path / "copy")
    shutil.copytree(trained.path, copy.path)
    told: list[str] = []
    settled([f"run.dir={copy.path}", "steps=5", *ONE], tell=told.append)
    assert any(f"is a copy of {trained.path}" in line for line in told), told
    train_here(home, [f"run.dir={copy.path}", "steps=5", *ONE])
    assert len(steps_of(copy.path)) == 5 and id_of(copy) != id_of(trained)
    marks = [read_mark(run.checkpoints) for run in (copy, trained)]
    assert [mark and mark.run for mark in marks] == [id_of(copy), id_of(trained)]
    told.clear()
    settled([f"run.dir={copy.path}", "steps=6", *ONE], tell=told.append)
    settled([f"run.dir={trained.path}", "steps=6", *ONE], tell=told.append)
    assert not told


def test_a_copy_does_not_share_its_originals_places(elsewhere: tuple[RunDirectory, Path, str], tmp_path: Path) -> None:
    run, place, _ = elsewhere
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy, symlinks=True)
    with pytest.raises(ConfigError, match=f"another run, that of {run.path}"):
        settled([f"run.dir={copy}", "steps=5", *ONE])
    (copy / "checkpoints").unlink()
    shutil.copytree(place, copy / "checkpoints")
    words = [f"run.dir={copy}", "steps=5", "checkpoint.dir=null", *ONE]
    with pytest.raises(ConfigError, match=r"checkpoint\.remote=file://.* another run"):
        settled(words)
    assert settled([*words, "checkpoint.remote=null"]).checkpoint.remote is None


def test_a_moved_run_directory_is_the_same_run(trained: RunDirectory, tmp_path: Path) -> None:
    twin(trained, tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    told: list[str] = []
    settled([f"run.dir={tmp_path / 'after'}", "steps=5", *ONE], tell=told.append)
    assert not told
    shutil.copytree(tmp_path / "after", tmp_path / "restored")
    shutil.rmtree(tmp_path / "after")
    settled([f"run.dir={tmp_path / 'restored'}", "steps=5", *ONE], tell=told.append)
    [line] = told
    assert "continues as the same run" in line and "run.json" in line and "run.adopt=true" in line
    (tmp_path / "restored" / "run.json").unlink()  # the advice for a copy
    settled([f"run.dir={tmp_path / 'restored'}", "steps=5", "run.adopt=true", *ONE], tell=told.append)


@pytest.mark.long
def test_a_run_directory_that_was_lost_gets_its_id_back_from_the_remote(
    home: Path, trained: RunDirectory, tmp_path: Path
) -> None:
    remote = f"checkpoint.remote=file://{tmp_path}/remote"
    run = trained_run(home, "lost", remote)
    before = id_of(run)
    shutil.rmtree(run.path)
    told: list[str] = []
    train_here(home, [f"run.dir={run.path}", remote, "steps=5", *ONE])
    assert id_of(run) == before and [step[0] for step in steps_of(run.path)] == [5]
    settled([f"run.dir={run.path}", "steps=6", *ONE], tell=told.append)
    assert told == [f"checkpoints are also kept in file://{tmp_path}/remote (from {run.config})"]
    told.clear()
    settled([f"run.dir={run.path}", "steps=6", remote, *ONE], tell=told.append)
    assert told == [], "the user has just given it"
    with pytest.raises(ConfigError, match="another run"):
        settled([f"run.dir={tmp_path / 'other'}", remote, *ONE])


def test_links_in_a_run_directory_are_not_written_through(
    home: Path, trained: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs = tmp_path / "theirs"
    names = ("metrics.jsonl", "config.yaml.tmp", "STOP", "loss.png", "run.json.tmp", "attempts", "slurm/jobs.jsonl")
    for name in names:
        run = RunDirectory(tmp_path / name.replace("/", "-") / "run")
        run.path.parent.mkdir()
        twin(trained, run.path)
        link = run.path / name
        if link.is_dir():
            shutil.rmtree(link)
        link.unlink(missing_ok=True)
        link.parent.mkdir(exist_ok=True)
        theirs.write_text("precious")
        link.symlink_to(theirs)
        assert main(["train", f"run.dir={run.path}", "steps=5", *ONE]) == 2
        said = capsys.readouterr().err
        assert str(link) in said and "is a link to" in said and theirs.read_text() == "precious"


def test_a_file_that_becomes_a_link_later_is_not_written_either(trained: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text('{"step": 1}\n')
    (tmp_path / "ours").symlink_to(tmp_path / "theirs")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "theirs")
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    for act in (
        lambda: touch_own(tmp_path / "ours"),
        lambda: open_own(tmp_path / "ours", os.O_WRONLY | os.O_APPEND),
        lambda: write_durably(tmp_path / "file", b"x"),
        lambda: cut_back(tmp_path / "ours", 0),
    ):
        with pytest.raises(OSError, match="links inside a run directory are not followed"):
            act()
    run = RunDirectory(tmp_path)
    (run.attempt(1) / f".outcome.json.{os.getpid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="links inside a run directory"):
        write_ending(run, 1, Ending(Outcome.FAILED, "x"))
    assert (tmp_path / "theirs").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("more", ["", "checkpoint.dir=ckpt"])
def test_a_relative_link_counts_from_its_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "c").mkdir(parents=True)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "runs" / "c" / "checkpoints").symlink_to("../../ckpt")
    words = words_of(Path("runs/c"), home / "text", *([more] if more else []))
    assert settled(words).checkpoint.dir == str(tmp_path / "ckpt")
    with pytest.raises(ConfigError) as refused:
        settled([*words, "checkpoint.dir=../../ckpt"])
    advice = f"checkpoint.dir={tmp_path / 'ckpt'}"
    assert f"keeps its checkpoints in {tmp_path / 'ckpt'}: {advice}," in str(refused.value)
    assert settled([*words, advice]).checkpoint.dir == str(tmp_path / "ckpt")


def test_a_link_to_unmarked_checkpoints_is_refused_with_advice_that_works(tmp_path: Path, home: Path) -> None:
    saved(tmp_path / "ckpt", small_model(), 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("../ckpt")
    with pytest.raises(ConfigError, match="holds no config"):
        settled(words_of(tmp_path / "run", home / "text"))


@pytest.mark.parametrize("directory", [".", "..", "../here"])
def test_a_run_directory_can_be_the_working_directory(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, directory: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = settled(words_of(Path(directory), home / "text", f"run.dir={directory}"))
    assert config.run.name == (tmp_path.name if directory == ".." else "here")
    assert os.path.samefile(str(config.run.dir), directory)


def test_a_run_in_the_working_directory_trains_and_resumes(
    trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = twin(trained, tmp_path / "run")
    monkeypatch.chdir(run.path)
    train_here(run.path, ["run.dir=.", "steps=5", *ONE])
    assert len(steps_of(run.path)) == 5 and read_config(run).run.name == "trained"
    assert main(["status", "."]) == 0


def test_an_id_that_cannot_be_read_is_named(trained: RunDirectory, tmp_path: Path) -> None:
    run = twin(trained, tmp_path / "run")
    for text in ("{", "[]", json.dumps({"run": "../../x", "directory": "/", "inode": 1})):
        run.identity.write_text(text)
        with pytest.raises(ConfigError, match=r"run\.json"):
            settled([f"run.dir={run.path}", *ONE])
