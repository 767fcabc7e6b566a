"""What a model came in with goes out with it: only what training changed is changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save

from stoker.launch.cli import main
from tests import world
from tests.launch.runs import overrides, write_text
from tests.models.families import SCALED, write_family
from tests.trainer.test_python_api import trained

SHAPE = (
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.intermediate_size",
)
BEGIN, END, TURN, PAD = 257, 258, 259, 256
OWN = """
import time
import torch
from stoker.models.decoder import build as decoder

def build(config, part):
    model = decoder(config, part)
    assert config.args == {"note": "mine"}
    model.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    model.register_buffer("seen", torch.zeros(3))
    rebuild = model.rebuild_buffers

    def rebuild_all():
        rebuild()
        model.calls.fill_(time.time_ns() % 2**40)  # other values in each run that does not read them
        model.seen.fill_(0)

    model.rebuild_buffers = rebuild_all
    model.register_forward_pre_hook(count)
    return model

def count(model, _):
    if model.calls < 2**40:
        model.calls += 2**40
        model.seen += model.calls / 3
"""


def write_tokenizer(folder: Path, **more: Any) -> None:
    """Bytes, and special tokens after them, with a chat template. Classes of some families add another one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoder = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    specials = ("<pad>", "<begin>", "<end>", "<turn>")
    encoder.add_special_tokens([AddedToken(token, special=True) for token in specials])
    values = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>", "model_max_length": 4096}
    template = "{% for m in messages %}<begin>{{ m['role'] }}: {{ m['content'] }}<turn>{% endfor %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=encoder, chat_template=template, **(values | more)
    ).save_pretrained(folder)


def write_chat_model(folder: Path, case: str = "llama", dtype: str = "bfloat16", **changes: Any) -> None:
    """A model with its tokenizer, several ends, settings for sampling, and keys that only others understand."""
    ids = {"bos_token_id": BEGIN, "eos_token_id": [END, TURN], "pad_token_id": PAD}
    model = write_family(folder, case, dtype, vocab_size=264, max_position_embeddings=4096, **ids, **changes)
    model.generation_config = transformers.GenerationConfig(**ids, temperature=0.6, top_p=0.9, do_sample=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "theirs/model", "made_by": "them"}))


def run_from(tmp_path: Path, *more: str, run: str = "run") -> Path:
    words = overrides(
        tmp_path / run, write_text(tmp_path / "text"), f"data.cache={tmp_path / 'cache'}", "steps=1",
        "batch.micro_size=4", *more,
    )  # fmt: skip
    kept = [word for word in words if "model.init_from=" not in " ".join(more) or not word.startswith(SHAPE)]
    assert world.run(trained, 1, kept, fresh=True) == [("completed", 1)]
    return tmp_path / run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", ["llama with scaled rotary", "tied qwen2"])
def test_a_model_that_is_trained_goes_out_with_all_files_it_came_with_and_other_weights(
    case: str, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    write_chat_model(theirs, case)
    (theirs / "modeling_theirs.py").write_text("raise SystemExit('code of a stranger')")
    (theirs / "model_ema.safetensors").write_bytes(b"another file")
    run = run_from(tmp_path, f"model.init_from={theirs}", f"data.tokenizer={theirs}", "optim.lr=1e-2")
    before = contents(theirs)
    shutil.rmtree(theirs)  # a run needs it at its start only
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    after = contents(tmp_path / "out")
    weights = "model.safetensors"
    expected = {name: data for name, data in before.items() if name not in (weights, "modeling_theirs.py")}
    del expected["model_ema.safetensors"]
    assert {name: data for name, data in after.items() if name != weights} == expected
    assert after[weights] != before[weights] and len(after[weights]) == len(before[weights])

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.eos_token_id == [END, TURN]
    assert model.generation_config.temperature == 0.6
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<begin>user: hi<turn>" and tokenizer.model_max_length == 4096


def test_what_a_run_changes_of_a_model_is_changed_in_its_config_and_nothing_else(tmp_path: Path) -> None:
    theirs, scaled = tmp_path / "theirs", [f"model.rope_parameters.{key}={value}" for key, value in SCALED.items()]
    write_chat_model(theirs, max_window_layers=2)
    run = run_from(
        tmp_path, f"model.init_from={theirs}", f"data.tokenizer={theirs}", "data.end_of_document=<pad>", *scaled
    )
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "fp16"]) == 0
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "out"))
    changed = {key: value for key, value in after.items() if value != before.get(key)}
    ends = [END, TURN, PAD]  # those it had, and the one that documents ended with in training
    assert changed == {"dtype": "float16", "rope_parameters": SCALED, "eos_token_id": ends}
    assert before.keys() == after.keys()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ends and generation["temperature"] == 0.6


def test_ids_of_another_tokenizer_do_not_go_out_with_the_model(tmp_path: Path) -> None:
    theirs, other = tmp_path / "theirs", tmp_path / "other"
    write_chat_model(theirs)
    write_tokenizer(other, bos_token=None, eos_token="<turn>", pad_token=None)
    run = run_from(tmp_path, f"model.init_from={theirs}", f"data.tokenizer={other}")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "out" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (None, TURN, None)
    before, after = contents(other), contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before


def test_a_run_on_a_run_s_weights_keeps_what_that_run_came_with(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    write_chat_model(theirs)
    first = run_from(tmp_path, f"model.init_from={theirs}", f"data.tokenizer={theirs}", run="first")
    second = run_from(tmp_path, f"model.init_from={first}", f"data.tokenizer={theirs}", run="second")
    assert main(["export", str(second), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").read_bytes() == (theirs / "config.json").read_bytes()


def token_files(tmp_path: Path, largest: int) -> list[str]:
    folder = tmp_path / "ids"
    folder.mkdir()
    np.save(folder / "a.npy", np.random.default_rng(0).integers(0, largest, 4000).astype(np.uint16))
    return ["data=tokens", f"data.path={folder}", "data.tokenizer=null", "data.validation=0"]


def test_a_run_on_tokens_without_a_tokenizer_goes_out_and_samples_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_from(tmp_path, *token_files(tmp_path, 100), "model.vocab_size=100")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id is None and model.config.max_position_embeddings == 32
    assert sorted(contents(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]
    capsys.readouterr()
    assert main(["generate", str(run), "--ids", "5,7,11", "--tokens", "6", "--greedy"]) == 0
    found = [int(word) for word in capsys.readouterr().out.split(",")]
    expected = model.generate(torch.tensor([[5, 7, 11]]), max_new_tokens=6, do_sample=False)[0].tolist()
    assert found == expected and len(found) == 9
    for ids, reason in (("5,100", "'100' is no token id: 0 to 99 are"), ("a", "'a' is no token id"), ("", "empty")):
        assert main(["generate", str(run), "--ids", ids]) == 2
        assert reason in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt", "x"]) == 2
    assert "--ids" in capsys.readouterr().err


def test_a_model_on_tokens_without_a_tokenizer_keeps_the_one_it_came_with(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    write_chat_model(theirs)
    run = run_from(tmp_path, *token_files(tmp_path, 255), f"model.init_from={theirs}", "optim=sgd", "optim.lr=1e-30")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out") == contents(theirs)


def test_a_users_model_is_exported_with_its_config_and_imported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    own = ["model.target=own_model:build", "model.args={note: mine}", "optim=sgd", "optim.lr=1e-30"]
    run = run_from(tmp_path, *own)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "layers.0.attention.q.weight" in tensors  # by the model's own names
    assert tensors["calls"].dtype == torch.int64 and tensors["seen"].dtype == torch.float32
    assert tensors["calls"] > 2**40 and (tensors["seen"] > 2**38).all()  # as the step left them
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == save(tensors, {"format": "pt"})
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == "stoker" and values["model"]["args"] == {"note": "mine"}
    again = run_from(tmp_path, f"model.init_from={tmp_path / 'out'}", *own[::2], "optim.lr=1e-30", run="again")
    assert main(["export", str(again), str(tmp_path / "third")]) == 0
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    capsys.readouterr()
    assert main(["config", f"model.init_from={tmp_path / 'out'}"]) == 2  # whose code is not imported unasked
    assert "model.target=own_model:build builds it here too" in capsys.readouterr().err
