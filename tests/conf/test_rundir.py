from __future__ import annotations

import dataclasses
import os
import threading
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stoker.conf.compose import compose
from stoker.conf.rundir import (
    RunDirectory,
    make_run_directory,
    next_attempt,
    read_config,
    resolve,
    to_yaml,
    write_config,
)
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError

NOON = datetime(2026, 3, 4, 12, 0, 5)


def test_the_names_in_a_run_directory_are_the_contract():
    run = RunDirectory(Path("/r"))
    names = (run.config, run.metrics, run.checkpoints, run.stop, run.loss_plot, run.attempts)
    assert [str(name) for name in names] == [
        "/r/config.yaml",
        "/r/metrics.jsonl",
        "/r/checkpoints",
        "/r/STOP",
        "/r/loss.png",
        "/r/attempts",
    ]
    assert str(run.log(2, 13)) == "/r/attempts/2/rank-13.log"
    assert str(run.outcome(2)) == "/r/attempts/2/outcome.json"
    assert str(run.trace(2, 13)) == "/r/profiles/attempt-2/rank-13.trace.json.gz"
    assert str(run.memory_snapshot(2, 13)) == "/r/profiles/attempt-2/rank-13.memory.pickle"


def test_a_run_without_a_name_is_named_after_its_model_and_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(compose(), NOON)
    assert config.run.name == "tiny-20260304-120005"
    assert config.run.dir == str(tmp_path / "runs" / "tiny-20260304-120005")


def test_resolving_again_elsewhere_and_later_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(compose(["run.name=mine"]), NOON)
    monkeypatch.chdir("/")
    assert resolve(config, NOON.replace(year=2027)) == config
    assert config.run.dir == str(tmp_path / "runs" / "mine")


def test_paths_of_a_disk_and_of_lessons_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config()
    config.parallel.nvme_path, config.objective.teacher = "disk", "lessons"
    resolved = resolve(config, NOON)
    assert resolved.parallel.nvme_path == str(tmp_path / "disk")
    assert resolved.objective.teacher == str(tmp_path / "lessons")


def test_a_given_directory_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert resolve(compose(["run.dir=here"]), NOON).run.dir == str(tmp_path / "here")
    assert resolve(compose(["run.dir=~/here"]), NOON).run.dir == "/home/somebody/here"


def test_paths_of_data_are_made_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data.tokenizer=tok", "data.sources={a:{kind:text,path:x},b:{kind:text,path:'s3://b/x'},c:{kind:stdlib}}"]
    data = resolve(compose(words), NOON).data
    assert data.tokenizer == str(tmp_path / "tok")
    assert [source.get("path") for source in data.sources.values()] == [str(tmp_path / "x"), "s3://b/x", None]
    assert [resolve(compose([f"data.tokenizer={name}"]), NOON).data.tokenizer for name in ("byte", "bpe", "null")] == [
        "byte",
        "bpe",
        None,
    ]


@pytest.mark.parametrize("name", ["", "a/b", "..", "."])
def test_a_name_that_is_no_directory_is_refused(name):
    with pytest.raises(ConfigError, match=r"run\.name="):
        resolve(compose([f"run.name={name}"]), NOON)


@settings(deadline=None)  # the disk may be slow
@given(
    st.text(),
    st.floats(allow_nan=False),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
)
@example("1e-3", 1e-5, "24:00:00")
@example("2e5", 1e16, "1.5e3")
@example("null", -0.0, "yes")
@example("a\nb: c", 1e300, "- x")
@example("müller", 1.0, "\x85 \u2028\u2029\ufeff\x00")
def test_what_is_written_is_what_is_read(tmp_path_factory, name, lr, extra):
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    config = Config()
    config.run.name, config.optim.lr, config.model.args = name, lr, {"extra": extra}
    write_config(run, config)
    assert read_config(run) == config


def test_a_stored_config_holds_nothing_of_one_start(tmp_path):
    write_config(RunDirectory(tmp_path), compose(["run.fresh=true", "run.change=true"]))
    run = read_config(RunDirectory(tmp_path)).run
    assert (run.fresh, run.change) == (False, False)


def test_letters_of_every_script_stay_readable():
    config = Config()
    config.run.dir = "/müller/火夫"
    assert "dir: /müller/火夫\n" in to_yaml(config)


def test_the_keys_are_in_the_order_of_the_schema():
    text = to_yaml(Config())
    assert list(yaml.safe_load(text)) == [field.name for field in dataclasses.fields(Config)]
    assert text == to_yaml(Config())


def test_writing_leaves_one_file_and_never_half_of_one(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "new")
    write_config(run, Config())
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_config(run, dataclasses.replace(Config(), steps=3))
    assert read_config(run).steps == 200
    monkeypatch.undo()
    write_config(run, dataclasses.replace(Config(), steps=3))
    assert read_config(run).steps == 3
    assert [entry.name for entry in run.path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [1\n", "cannot be read"),
        ("steps: many\n", "steps='many': expected a whole number"),
        ("parallel:\n  zeros: 3\n", "unknown key 'parallel.zeros'"),
        ("", "holds no config"),
        ("- 3\n", "holds no config"),
        ("!!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_a_broken_config_is_answered_in_one_line_that_names_the_file(tmp_path, text, words):
    run = RunDirectory(tmp_path)
    run.config.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config(run)
    assert words in str(error.value) and str(run.config) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_edited_by_hand_may_write_numbers_as_people_do(tmp_path):
    run = RunDirectory(tmp_path)
    run.config.write_text("optim:\n  lr: 3e-4\n  betas: [0.9, 1e-1]\nclip_norm: 1\n")
    config = read_config(run)
    assert (config.optim.lr, config.optim.betas, config.grad_clip_norm) == (3e-4, [0.9, 0.1], 1.0)


def test_a_directory_without_a_config_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run directory: it has no config\.yaml"):
        read_config(RunDirectory(tmp_path))


def test_attempts_are_counted_from_one_past_every_older_one(tmp_path):
    run = RunDirectory(tmp_path / "new")
    assert run.attempt_numbers() == []
    assert [next_attempt(run), next_attempt(run)] == [1, 2]
    run.attempt(10).mkdir()
    (run.attempts / "notes").mkdir()
    assert next_attempt(run) == 11
    assert run.attempt_numbers() == [1, 2, 10, 11]


def test_no_two_starts_get_the_same_attempt(tmp_path):
    run = RunDirectory(tmp_path)
    gate = threading.Barrier(8)
    numbers: list[int] = []

    def start() -> None:
        gate.wait()
        numbers.extend(next_attempt(run) for _ in range(20))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 161))


def test_a_file_with_a_chat_template_is_found_again_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    found = str(tmp_path / "chat.jinja")
    assert resolve(compose(["data=chat", "data.args.template=chat.jinja"]), NOON).data.args["template"] == found
    given = compose(["data=chat"])
    for template in ("{{ messages }}", "not-there"):
        given.data.args = {"template": template}
        assert resolve(given, NOON).data.args == given.data.args
    given.data.sources = {"a": {"kind": "chat", "args": {"template": "chat.jinja", "messages": "talk"}}}
    assert resolve(given, NOON).data.sources["a"]["args"] == {"template": found, "messages": "talk"}


def test_addresses_of_shards_are_made_absolute_where_they_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config()
    config.data.urls = ["shards/s-{000..009}.tar", "s3://bucket/x.tar", "pipe:cat x.tar"]
    config.data.sources = {"books": {"kind": "webdataset", "urls": "b.tar"}}
    data = resolve(config, NOON).data
    assert data.urls == [f"{tmp_path}/shards/s-{{000..009}}.tar", "s3://bucket/x.tar", "pipe:cat x.tar"]
    assert data.sources == {"books": {"kind": "webdataset", "urls": f"{tmp_path}/b.tar"}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "an alias"),
        ("{a: " * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ("[" * 20_000, "nested more than 50 deep"),
        ("steps: 2026-99-99\n", "month must be in"),
        ("a: " + "x" * (17 << 20), "holds more than 16,777,216 bytes"),
        ("\xff", "cannot be read"),
    ],
    ids=["aliases", "deep", "very deep", "date", "large", "bytes"],
)
def test_a_config_that_a_run_cannot_have_written_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=said) as error:
        read_config(RunDirectory(tmp_path))
    assert "config.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("public", "mode"), [(False, 0o700), (True, 0o750)])
def test_a_run_directory_is_its_users_alone_unless_it_is_to_be_public(tmp_path: Path, public: bool, mode: int) -> None:
    before = os.umask(0o027)
    try:
        run = RunDirectory(tmp_path / "runs" / "a")
        make_run_directory(run, public)
        assert run.path.stat().st_mode & 0o777 == mode and run.attempts.is_dir()
        run.path.chmod(0o770)
        make_run_directory(run, public)
        assert run.path.stat().st_mode & 0o777 == 0o770, "one that exists is left as it is"
    finally:
        os.umask(before)
