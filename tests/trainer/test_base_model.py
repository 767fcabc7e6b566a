"""The tokenizer that goes out with a model is the one that its run was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stoker.conf.compose import compose
from stoker.conf.rundir import RunDirectory
from stoker.data import keep_tokenizer
from stoker.trainer.base_model import BaseFacts, base_facts, keep_base, kept_tokenizer_files
from tests.launch.test_export_kept import write_chat_model, write_tokenizer

SETTINGS = "tokenizer_config.json"


def begun(path: Path, *words: str) -> RunDirectory:
    """A run directory with what a start keeps."""
    run = RunDirectory(path)
    run.checkpoints.mkdir(parents=True)
    config = compose(list(words))
    keep_tokenizer(config.data, run.tokenizer)
    keep_base(config, run)
    return run


def longest(run: RunDirectory) -> int:
    """`model_max_length` of the tokenizer that an export writes, which is also the run's own."""
    exported = kept_tokenizer_files(run)[SETTINGS]
    if run.tokenizer.is_dir():
        assert exported == (run.tokenizer / SETTINGS).read_bytes()
    return json.loads(exported)["model_max_length"]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    write_chat_model(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_a_tokenizer_of_the_same_ids_goes_out_as_it_was_given(theirs: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "edited", model_max_length=77)
    first = begun(tmp_path / "1", f"model.init_from={theirs}", f"data.tokenizer={tmp_path / 'edited'}")
    assert longest(first) == 77 and base_facts(first) == BaseFacts("bf16", True)
    second = begun(tmp_path / "2", f"model.init_from={first.path}", f"data.tokenizer={theirs}")
    assert longest(second) == 4096 and base_facts(second) == BaseFacts("bf16", True)
    ends = [f"data.tokenizer={theirs}", "data.end_of_document=<turn>"]
    assert base_facts(begun(tmp_path / "3", f"model.init_from={first.path}", *ends)) == BaseFacts("bf16", True)


def test_other_ids_than_the_base_run_s_are_not_those_of_its_model(theirs: Path, tmp_path: Path) -> None:
    first = begun(tmp_path / "1", f"model.init_from={theirs}", f"data.tokenizer={theirs}")
    second = begun(tmp_path / "2", f"model.init_from={first.path}", "data.tokenizer=byte")
    assert base_facts(second) == BaseFacts("bf16", False) and not kept_tokenizer_files(second)
    third = begun(tmp_path / "3", f"model.init_from={second.path}", f"data.tokenizer={theirs}")
    assert longest(third) == 4096 and base_facts(third) == BaseFacts("bf16", False)


def test_tokens_without_a_tokenizer_leave_the_base_model_s(theirs: Path, tmp_path: Path) -> None:
    tokens = ["data=tokens", f"data.path={tmp_path}", "data.tokenizer=null"]
    first = begun(tmp_path / "1", f"model.init_from={theirs}", *tokens)
    second = begun(tmp_path / "2", f"model.init_from={first.path}", *tokens)
    for run in (first, second):
        assert longest(run) == 4096 and base_facts(run) == BaseFacts("bf16", True)
