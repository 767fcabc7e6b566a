"""A run with an adapter: what its checkpoints hold, how it resumes, and what it gives to others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stoker
from stoker.checkpoint import open_checkpoint, read_state, read_tensors
from stoker.conf.rundir import RunDirectory, read_config
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.launch.generate import load_model
from stoker.models.peft_folder import WEIGHTS
from stoker.parallel.tensor.nf4 import rounded
from stoker.trainer.facts import with_vocabulary
from tests.adapted import adapter_run, adapter_words, checkpoint_of
from tests.launch.runs import assert_same_state, steps_of
from tests.models.families import write_family

STEPS = 4
DROPOUTS = {
    "theirs": [],
    "recomputed": ["activation_checkpointing=full", "batch.micro_size=2"],
    "none": ["adapter.dropout=0"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and a run of an adapter for it: `run`."""
    home = tmp_path_factory.mktemp("adapted")
    write_family(home / "base", "tied qwen2")
    adapter_run(home, "run", home / "base")
    return home


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Of any model of transformers', or of peft's around one."""
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def exported(home: Path, name: str, *more: str) -> Path:
    """The folder that `stoker export` makes of `run`, once."""
    if not (home / name).exists():
        assert main(["export", str(home / "run"), str(home / name), *more]) == 0
    return home / name


def test_a_checkpoint_holds_what_is_trained_and_digests_of_the_base(home: Path) -> None:
    checkpoint = checkpoint_of(RunDirectory(home / "run"))
    tensors = open_checkpoint(checkpoint).tensors
    trained = {name for kind, name in tensors if kind == "param"}
    assert trained == {
        f"layers.{n}.{module}.lora.{matrix}"
        for n in range(3)
        for module in ("attention.q", "mlp.down")
        for matrix in "AB"
    }
    assert {(kind, name) for kind, name in tensors if kind != "param"} == {
        (f"optim.{moment}", name) for moment in ("exp_avg", "exp_avg_sq") for name in trained
    }
    base = read_state(checkpoint)["base"]
    assert len(base) == 3 * 12 + 2 and not trained & base.keys()
    assert all(len(digest) == 16 for digest in base.values()) and len(set(base.values())) == len(base)


def test_it_resumes_to_the_last_bit(home: Path) -> None:
    adapter_run(home, "resumed", home / "base", "steps=2")
    adapter_run(home, "resumed", home / "base", f"steps={STEPS}")
    assert steps_of(home / "resumed") == steps_of(home / "run")
    assert_same_state(home / "resumed", home / "run")


def test_another_base_is_refused_and_the_first_tensor_that_differs_is_named(home: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(home / "base", base)
    adapter_run(tmp_path, "run", base, "steps=2")
    weights = load_file(base / "model.safetensors")
    for changed in ("model.layers.2.self_attn.o_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        weights[changed].view(-1)[7] += 1e-6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    said = (
        r"not the base that the adapter was trained on: layers\.1\.mlp\.up\.weight differs \(and 1 more of 38 tensors\)"
    )
    with pytest.raises(ValueError, match=said):
        stoker.run(adapter_words(tmp_path, "run", base))
    assert main(["generate", str(tmp_path / "run"), "--prompt", "a"]) == 1
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merge"]) == 1
    assert not (tmp_path / "out").exists()
    shutil.copyfile(home / "base" / "model.safetensors", base / "model.safetensors")  # what the message advises
    adapter_run(tmp_path, "run", base, "steps=3")


def test_a_run_that_keeps_its_base_does_without_the_folder(home: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(home / "base", base)
    adapter_run(tmp_path, "run", base, "steps=2", "adapter.keep_base=true")
    kept, file = tmp_path / "run" / "base_weights", "model.safetensors"
    assert [path.name for path in kept.iterdir()] == [file] and (kept / file).samefile(base / file)
    shutil.rmtree(base)
    adapter_run(tmp_path, "run", base, f"steps={STEPS}")
    assert steps_of(tmp_path / "run") == steps_of(home / "run")
    (tmp_path / "run").rename(run)
    assert main(["generate", str(run), "--ids", "1,5", "--tokens", "2", "--greedy"]) == 0
    assert main(["export", str(run), str(tmp_path / "out"), "--merge"]) == 0
    out = exported(home, "merged", "--merge")
    assert (tmp_path / "out" / file).read_bytes() == (out / file).read_bytes()


def test_peft_loads_the_exported_folder_and_computes_the_same(home: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    out = exported(home, "adapter")
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["base_model_name_or_path"] == str(
        home / "base"
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    base = logits_of(plain)
    adapted = peft.PeftModel.from_pretrained(plain, out)
    held = peft.get_peft_model_state_dict(adapted)
    file = load_file(out / "adapter_model.safetensors")
    assert held.keys() == file.keys() and all(torch.equal(held[name], value) for name, value in file.items())

    run = RunDirectory(home / "run")
    ours = load_model(with_vocabulary(read_config(run), run.tokenizer), checkpoint_of(run))
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = ours(tokens, torch.arange(40).expand(2, -1), None).view(2, 40, -1)
    theirs = logits_of(adapted)
    assert (theirs - base).norm() / base.norm() > 1e-2  # it has learned
    assert (found - theirs).norm() / theirs.norm() < 1e-5


def test_a_merged_model_is_a_model_folder_with_the_same_logits(home: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = exported(home, "merged", "--merge")
    before, after = (load_file(folder / "model.safetensors") for folder in (home / "base", out))
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{n}.{m}.weight" for n in range(3) for m in ("self_attn.q_proj", "mlp.down_proj")}
    stored = dict(read_tensors(checkpoint_of(RunDirectory(home / "run"))))
    a, b = (stored[f"layers.1.mlp.down.lora.{matrix}"] for matrix in "AB")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.allclose(after[name], before[name] + 4.0 * b @ a, atol=1e-6, rtol=0)  # alpha 16 / rank 4
    run = RunDirectory(home / "run")
    ours = load_model(with_vocabulary(read_config(run), run.tokenizer), checkpoint_of(run))
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = ours(tokens, torch.arange(40).expand(2, -1), None).view(2, 40, -1)
    found = logits_of(transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    assert (found - expected).abs().max() < 5e-5


def test_an_exported_adapter_comes_in_again_to_the_last_bit(home: Path, tmp_path: Path) -> None:
    out = exported(home, "adapter")
    words = ["adapter=-", "adapter.rank=-", "adapter.target_modules=-", f"adapter.init_from={out}", "steps=1"]
    still = ["optim=sgd", "optim.lr=1e-30", "optim.momentum=0.0"]
    run = adapter_run(tmp_path, "again", home / "base", *words, *still)
    assert read_config(run).adapter.target_modules == ["down_proj", "q_proj"]
    assert main(["export", str(run.path), str(tmp_path / "out")]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.long
def test_an_adapter_trained_with_dropout_goes_on_with_it(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    shutil.copytree(exported(home, "adapter"), out)
    config = json.loads((out / "adapter_config.json").read_text()) | {"lora_dropout": 0.25}
    (out / "adapter_config.json").write_text(json.dumps(config))
    words = ["adapter=-", "adapter.rank=-", "adapter.target_modules=-", f"adapter.init_from={out}", "steps=2"]
    runs = {name: adapter_run(tmp_path, name, home / "base", *words, *more) for name, more in DROPOUTS.items()}
    assert [read_config(run).adapter.dropout for run in runs.values()] == [0.25, 0.25, 0.0]
    losses = [[step[2] for step in steps_of(run.path)] for run in runs.values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] != pytest.approx(losses[0], rel=1e-4)
    assert main(["export", str(runs["theirs"].path), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_dropout"] == 0.25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bias": "all"}, "bias='all': adapters with this are not read"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA': only LORA is read"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"r": 2, "rank_pattern": {}, "alpha_pattern": {"q_proj": 3}}, "alpha_pattern="),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused(
    home: Path, tmp_path: Path, change: dict, said: str
) -> None:
    out = tmp_path / "adapter"
    shutil.copytree(exported(home, "adapter"), out)
    config = json.loads((out / "adapter_config.json").read_text()) | change
    (out / "adapter_config.json").write_text(json.dumps(config))
    words = ["adapter=-", "adapter.rank=-", "adapter.target_modules=-", f"adapter.init_from={out}"]
    with pytest.raises(ConfigError, match=said):
        stoker.run(adapter_words(tmp_path, "run", home / "base", *words))


def test_it_generates_with_its_adapter(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for folder in (home / "run",):
        assert main(["generate", str(folder), "--ids", "1,5,3", "--tokens", "12", "--greedy"]) == 0
        answers.append(capsys.readouterr().out)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(home, "merged", "--merge"), dtype=torch.float32)
    expected = model.generate(torch.tensor([[1, 5, 3]]), max_new_tokens=12, do_sample=False)[0].tolist()
    assert answers[0].strip() == ",".join(map(str, expected))


def test_a_run_of_an_adapter_is_no_base(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained an adapter, and its checkpoints do not hold its base"):
        stoker.run(adapter_words(tmp_path, "run", home / "run"))
    with pytest.raises(ConfigError, match=r"holds an adapter: set adapter\.init_from to it"):
        stoker.run(adapter_words(tmp_path, "run", exported(home, "adapter")))


@pytest.fixture(scope="module")
def lengths(home: Path) -> Path:
    """A run with the lengths of rows trained apart, exported: `dora adapter`, and merged: `dora merged`."""
    run = adapter_run(home, "dora", home / "base", "adapter=dora")
    for name, more in (("dora adapter", []), ("dora merged", ["--merge"])):
        assert main(["export", str(run.path), str(home / name), *more]) == 0
    return home


def test_lengths_begin_as_those_of_the_base_and_are_trained(lengths: Path) -> None:
    base, file = (load_file(p) for p in (lengths / "base" / "model.safetensors", lengths / "dora adapter" / WEIGHTS))
    name = "model.layers.1.mlp.down_proj"
    before, after = base[f"{name}.weight"].norm(dim=1), file[f"base_model.model.{name}.lora_magnitude_vector"]
    assert after.shape == before.shape and 1e-4 < (after / before - 1).abs().max() < 0.2
    first = adapter_run(lengths, "dora still", lengths / "base", "adapter=dora", "steps=1", "optim.lr=1e-30")
    held = dict(read_tensors(checkpoint_of(first)))["layers.1.mlp.down.lora.magnitude.weight"]
    assert torch.allclose(held, before, rtol=1e-6, atol=0)


def test_peft_computes_what_a_merged_model_of_trained_lengths_does(lengths: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(lengths / "base", dtype=torch.float32)
    base = logits_of(plain)
    theirs = logits_of(peft.PeftModel.from_pretrained(plain, lengths / "dora adapter"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(lengths / "dora merged", dtype=torch.float32)
    assert (theirs - base).norm() / base.norm() > 1e-2
    assert (logits_of(merged) - theirs).abs().max() < 5e-5


def test_lengths_come_in_again_to_the_last_bit(lengths: Path, tmp_path: Path) -> None:
    out = lengths / "dora adapter"
    words = ["adapter=-", "adapter.rank=-", "adapter.target_modules=-", f"adapter.init_from={out}", "steps=1"]
    run = adapter_run(tmp_path, "again", lengths / "base", *words, "optim=sgd", "optim.lr=1e-30", "optim.momentum=0.0")
    assert read_config(run).adapter.name == "dora"
    assert main(["export", str(run.path), str(tmp_path / "out")]) == 0
    for name in ("adapter_config.json", WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.long
def test_a_packed_base_is_unpacked_where_it_is_merged(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_family(tmp_path / "base", "qwen2", hidden_size=64, intermediate_size=128)
    run = adapter_run(tmp_path, "run", tmp_path / "base", "adapter.base=nf4")
    adapter_run(tmp_path, "resumed", tmp_path / "base", "adapter.base=nf4", "steps=2")
    adapter_run(tmp_path, "resumed", tmp_path / "base", "adapter.base=nf4")
    assert steps_of(tmp_path / "resumed") == steps_of(run.path)
    assert main(["export", str(run.path), str(tmp_path / "merged"), "--merge"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    stored = dict(read_tensors(checkpoint_of(run)))
    a, b = (stored[f"layers.1.mlp.down.lora.{matrix}"] for matrix in "AB")
    base = rounded(before["model.layers.1.mlp.down_proj.weight"])
    assert torch.allclose(after["model.layers.1.mlp.down_proj.weight"], base + 4.0 * b @ a, atol=1e-6, rtol=0)
    name = "model.layers.1.mlp.up_proj.weight"  # without an adapter
    assert torch.equal(after[name], rounded(before[name])) and not torch.equal(after[name], before[name])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    ours = load_model(with_vocabulary(read_config(run), run.tokenizer), checkpoint_of(run))
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = ours(tokens, torch.arange(40).expand(2, -1), None).view(2, 40, -1)
    found = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert (found - expected).abs().max() < 5e-5
