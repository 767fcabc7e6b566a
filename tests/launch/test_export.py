"""A model comes in from transformers' own files and goes out as the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from stoker.conf.rundir import RunDirectory, read_config
from stoker.data import open_tokenizer
from stoker.data.tokenizer import ByteTokenizer
from stoker.launch.cli import main
from stoker.launch.generate import load_model
from stoker.models.generate import generate
from stoker.trainer.facts import with_vocabulary
from tests import world
from tests.launch.runs import overrides, write_text
from tests.models.families import FAMILIES, write_family
from tests.trainer.test_python_api import trained

SHAPE = (
    "optim.lr=1e-2",
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.intermediate_size",
)


def unchanged_run(tmp_path: Path, theirs: Path, *more: str) -> Path:
    """A run that begins with `theirs` and takes one step that changes nothing."""
    run = tmp_path / "run"
    words = [
        *overrides(run, write_text(tmp_path / "text"), f"data.cache={tmp_path / 'cache'}"),
        *(f"model.init_from={theirs}", "steps=1", "optim=sgd", "optim.lr=1e-30", "batch.micro_size=4", *more),
    ]
    kept = [word for word in words if not word.startswith(SHAPE)]
    assert world.run(trained, 1, kept, fresh=True) == [("completed", 1)]
    return run


@pytest.mark.long
@pytest.mark.parametrize("case", FAMILIES)
def test_what_came_in_goes_out_byte_for_byte_and_computes_the_same(case: str, tmp_path: Path) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    write_family(theirs, case)
    still = ["model.router_bias_rate=0"] if case.startswith("deepseek") else []  # a step moves a router's biases
    run = unchanged_run(tmp_path, theirs, *still)
    assert main(["export", str(run), str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()

    config = with_vocabulary(read_config(RunDirectory(run)))
    ours = load_model(config, run / "checkpoints" / "step-00000001")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == f"{FAMILIES[case][0]}ForCausalLM"
    length = config.model.rope_parameters.original_max_position_embeddings if "factors" in case else 150
    tokens = torch.randint(0, 320, (2, length or 0), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits.flatten(0, 1)
        found = ours(tokens, torch.arange(tokens.shape[1]).expand(2, -1), None)
    assert (found - expected).norm() / expected.norm() < 1e-5

    prompt = tokens[0, :20].tolist()
    spoken = list(generate(ours, prompt, limit=40, greedy=True, context=512, stop=[ByteTokenizer.end_of_document]))
    answer = model.generate(tokens[:1, :20], max_new_tokens=40, do_sample=False)[0, 20:].tolist()
    assert spoken == [token for token in answer if token != ByteTokenizer.end_of_document]


def test_bf16_comes_in_and_goes_out_byte_for_byte(tmp_path: Path) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    write_family(theirs, "qwen3", "bfloat16")
    assert main(["export", str(unchanged_run(tmp_path, theirs)), str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_go_out_in_several_files_with_an_index(tmp_path: Path) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    reference = write_family(theirs, "llama", max_position_embeddings=64)
    run = unchanged_run(tmp_path, theirs)
    assert main(["export", str(run), str(out), "--shard-size", "50KB"]) == 0
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 50_000 + 2_000 for file in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    again = tmp_path / "again"
    again.mkdir()
    assert main(["export", str(unchanged_run(again, out)), str(again / "out")]) == 0
    assert (again / "out" / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_the_average_of_the_weights_goes_out_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After two updates it is an eleventh of the first weights and the rest of the second."""
    run = tmp_path / "run"
    words = overrides(
        run, write_text(tmp_path / "text"), f"data.cache={tmp_path / 'cache'}", "steps=2", "batch.micro_size=8",
        "checkpoint.every=1", "optim.ema=0.9",
    )  # fmt: skip
    assert world.run(trained, 1, words, fresh=True) == [("completed", 2)]
    found = []
    for name, more in (("first", ["--step", "1"]), ("second", []), ("average", ["--ema"])):
        assert main(["export", str(run), str(tmp_path / name), *more]) == 0
        found.append(load_file(tmp_path / name / "model.safetensors"))
    first, second, average = found
    assert average.keys() == second.keys() and not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    for name, value in average.items():
        torch.testing.assert_close(value, first[name] / 11 + second[name] * 10 / 11)
    (tmp_path / "without").mkdir()
    without = unchanged_run(tmp_path / "without", tmp_path / "average")
    assert main(["export", str(without), str(tmp_path / "out"), "--ema"]) == 2
    assert "keeps no average (optim.ema): leave --ema out" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_the_tokenizer_goes_with_the_model(tokenizer: str, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    words = overrides(
        run, write_text(tmp_path / "text"), f"data.cache={tmp_path / 'cache'}", "steps=1", "batch.micro_size=8",
        f"data.tokenizer={tokenizer}", "data.bpe_vocab=384",
    )  # fmt: skip
    assert world.run(trained, 1, words, fresh=True) == [("completed", 1)]
    assert main(["export", str(run), str(out)]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    ours = open_tokenizer(read_config(RunDirectory(run)).data, RunDirectory(run).tokenizer)
    text = "def f(x):\n\treturn  'é → 漢字 🙂' # document 3\r\n"
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.end_of_document


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs"
    write_family(theirs, "llama")
    run = unchanged_run(tmp_path, theirs)
    assert main(["export", str(run), str(theirs)]) == 2
    assert "is not an empty directory" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out"), "--shard-size", "many"]) == 2
    assert "--shard-size=many" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out"), "--step", "7"]) == 2
    assert "no checkpoint of step 7" in capsys.readouterr().err
    data = next((run / "checkpoints" / "step-00000001").glob("*.safetensors"))
    damaged = bytearray(data.read_bytes())
    damaged[-1] ^= 1
    data.write_bytes(damaged)
    assert main(["export", str(run), str(tmp_path / "out")]) == 1
    assert "has changed since it was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "run", "text", "theirs"]
