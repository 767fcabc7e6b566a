"""`stoker generate --chat`: a reply to a prompt, by the chat template of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from stoker.conf.rundir import RunDirectory, read_config
from stoker.launch.cli import main
from stoker.launch.generate import load_model
from stoker.launch.inspect import checkpoints_of
from stoker.models.generate import generate
from stoker.trainer.facts import with_vocabulary
from tests import world
from tests.data.chat_styles import template
from tests.data.counted import conversations, write_lines
from tests.data.hub_folders import hub_folder
from tests.launch.runs import overrides
from tests.trainer.test_python_api import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_lines(folder / "chats" / "a.jsonl", conversations(60))
    hub_folder(folder / "hub", template("qwen-2.5", marked=True), eos_token="<|im_end|>")
    words = overrides(
        folder / "run", folder / "chats", "data=chat", f"data.tokenizer={folder / 'hub'}", "steps=8",
        "batch.micro_size=8", "optim.lr=3e-2", "seq_len=256", f"data.cache={folder / 'cache'}",
    )  # fmt: skip
    assert world.run(trained, 1, words) == [("completed", 8)]
    (folder / "hub" / "tokenizer.json").unlink()  # a run keeps its own
    return folder / "run"


@pytest.mark.parametrize(("more", "messages"), [
    ([], [{"role": "user", "content": "the furnace"}]),
    (["--system", "be brief"], [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the furnace"}]),
])  # fmt: skip
def test_a_chat_is_answered_after_the_opening_of_a_reply_up_to_the_end_that_was_learned(run, more, messages, capsys):
    assert main(["generate", str(run), "--chat", "--prompt", "the furnace", "--tokens", "60", "--greedy", *more]) == 0
    written = capsys.readouterr().out
    hub = transformers.AutoTokenizer.from_pretrained(run / "tokenizer", local_files_only=True)
    prompt = hub.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    directory = RunDirectory(run)
    config = with_vocabulary(read_config(directory), directory.tokenizer)
    model = load_model(config, checkpoints_of(directory, None)[-1].path)
    stop = hub.convert_tokens_to_ids("<|im_end|>")
    tokens = list(generate(model, prompt, limit=60, greedy=True, context=256, stop=[stop]))
    assert written == hub.decode(tokens, skip_special_tokens=True) + "\n"
    assert list(generate(model, prompt, limit=60, greedy=True, context=256))[len(tokens) :][:1] in ([stop], [])


def test_messages_may_be_given_whole_and_a_system_message_needs_a_chat(run, capsys):
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the furnace"}]
    words = ["generate", str(run), "--tokens", "5", "--greedy"]
    assert main([*words, "--chat", "--prompt", json.dumps(talk)]) == 0
    given = capsys.readouterr().out
    assert main([*words, "--chat", "--prompt", "the furnace", "--system", "be brief"]) == 0
    assert capsys.readouterr().out == given
    assert main([*words, "--prompt", "x", "--system", "be brief"]) == 2
    assert "--system is a message of a chat: add --chat" in capsys.readouterr().err
    assert main([*words, "--chat", "--prompt", '[{"role": "tool", "content": [1]}]']) == 2
    assert "the chat template refuses the prompt: " in capsys.readouterr().err


def test_the_tokenizer_goes_out_as_it_came_in(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "tokenizer" / name).read_bytes()
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert hub.chat_template == template("qwen-2.5", marked=True) and hub.eos_token == "<|im_end|>"
