"""A name of the hub where a path is expected is answered with the command that downloads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.conf.hub_names import download_advice
from stoker.conf.schema import DataConfig
from stoker.conf.values import ConfigError
from stoker.data.opening import open_tokenizer
from stoker.data.text import open_source
from stoker.trainer.settle import settle_config


@pytest.mark.parametrize(
    ("path", "what", "command"),
    [
        ("roneneldan/TinyStories", "dataset", "hf download roneneldan/TinyStories --repo-type dataset --local-dir"),
        ("Qwen/Qwen3-0.6B", "model", "hf download Qwen/Qwen3-0.6B --local-dir Qwen/Qwen3-0.6B"),
        ("gpt2", "model", "hf download gpt2 --local-dir gpt2"),
        ("books", "dataset", ""),
        ("/data/books", "dataset", ""),
        ("a/b/c", "model", ""),
        ("../x/y", "model", ""),
    ],
)
def test_only_what_may_be_a_name_gets_the_command(path: str, what: str, command: str) -> None:
    for typed in (Path(path), Path.cwd() / path):
        found = download_advice(typed, what)
        assert command in found and bool(found) == bool(command)


def test_data_tokenizers_and_models_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"does not exist; a name .* `hf download me/texts --repo-type dataset"):
        open_source(DataConfig(path=str(tmp_path / "me" / "texts")))
    with pytest.raises(ValueError, match="`hf download me/tok --local-dir me/tok` first"):
        open_tokenizer(DataConfig(tokenizer=str(tmp_path / "me" / "tok")))
    with pytest.raises(ConfigError, match=r"no such directory; a name .* `hf download me/model --local-dir me/model`"):
        settle_config(["model.init_from=me/model", "run.dir=run"], lambda _: (1, 0))
