"""The jobs of a newcomer's first hour, done by the commands that docs/coming_from.md prints."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stoker.checkpoint import newest, read_state
from stoker.conf.rundir import RunDirectory
from stoker.data import open_rows
from tests.data.test_token_formats import index
from tests.launch.newcomer import SHAPE, SMALL, Newcomer
from tests.launch.runs import write_text
from tests.launch.test_export_kept import write_chat_model
from tests.pages import ROOT, Block, blocks

PAGE = blocks(ROOT / "docs" / "coming_from.md")
TEMPLATE = (
    "{% for m in messages %}<begin>{{ m['role'] }}: {{ m['content'] }}<turn>{% endfor %}"
    "{% if add_generation_prompt %}<begin>assistant: {% endif %}"
)
STEPS = 12


def smaller(line: str, more: list[str]) -> list[str]:
    """Settings for a model of a few thousand parameters and a few steps; budgets other than `steps` stay budgets."""
    long = [f"steps={STEPS}"] if "steps=" in line else ["tokens=2000"] if "tokens=" in line else []
    long = [f"steps={STEPS + 2}"] if line.startswith("torchrun") else long
    shape = [] if "init_from=" in line or "--config" in line else SHAPE
    ids = ["model.vocab_size=128"] if "model.vocab_size=" in line else []
    ids += ["data.args.end_of_document=119"] if "data.args.end_of_document=" in line else []
    return [*SMALL, *long, *shape, *ids, *more]


def texts(path: Path) -> None:
    folder = write_text(path.parent / "texts")
    path.write_text("".join(file.read_text() for file in sorted(folder.iterdir())))


def ids(path: Path, first: int, count: int = 4000) -> None:
    rng = np.random.default_rng(first)
    (first + rng.integers(0, 20, count)).astype(np.uint16).tofile(path)


def given_texts(home: Path) -> None:
    write_text(home / "texts", 12)


def given_nanogpt(home: Path) -> None:
    texts(home / "input.txt")
    write_text(home / "poems")
    ids(home / "train.bin", 0)
    ids(home / "val.bin", 100)


def given_megatron(home: Path) -> None:
    for name, first in (("web", 0), ("code", 100)):
        ids(home / f"{name}_text_document.bin", first)
        sizes = [100] * 40
        content = index(8, sizes, range(0, 8000, 200), range(41))
        (home / f"{name}_text_document.idx").write_bytes(content)


def given_model(home: Path) -> None:
    write_chat_model(home / "base", dtype="float32")
    (home / "base" / "chat_template.jinja").write_text(TEMPLATE)
    lines = [json.dumps({"text": f"the sum of {n} and {n} is {2 * n}. " * 3}) for n in range(60)]
    (home / "books.jsonl").write_text("\n".join(lines))
    talks = [
        [{"role": "user", "content": f"Two times {n}?"}, {"role": "assistant", "content": f"It is {2 * n}."}]
        for n in range(60)
    ]
    (home / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))


def shows_nanogpt(newcomer: Newcomer, outputs: list[str]) -> None:
    first, last = newcomer.steps("runs/char")[0], newcomer.steps("runs/char")[-1]
    assert last["step"] == STEPS and last["loss"] < first["loss"] - 1
    assert math.isfinite(last["val_loss"]) and math.isfinite(last["train_loss"])
    assert outputs[1].startswith("ROMEO:") and len(outputs[1]) > 100
    bins = newcomer.steps("runs/bins")[-1]
    assert bins["val_loss"] > bins["train_loss"] + 1, "its ids are in val.bin only: no row of that was trained on"
    assert newcomer.steps("runs/poems")[0]["loss"] < first["loss"] - 1, "it begins where the first run ended"


def shows_litgpt(newcomer: Newcomer, outputs: list[str]) -> None:
    tokens, epochs = newcomer.config("runs/tokens"), newcomer.config("runs/epochs")
    assert tokens.steps == tokens.schedule.total_steps == math.ceil(2000 / (8 * 32))
    assert newcomer.steps("runs/tokens")[-1]["tokens"] >= 2000
    rows = open_rows(epochs, "train")
    assert rows.total_rows == 2 * rows.rows_per_epoch  # type: ignore[union-attr]
    assert epochs.steps == epochs.schedule.total_steps == len(newcomer.steps("runs/epochs")) == rows.total_rows // 8


def shows_transformers(newcomer: Newcomer, outputs: list[str]) -> None:
    assert "equal to transformers' LlamaForCausalLM" in outputs[0]
    assert newcomer.config("runs/tuned").data.tokenizer == str(newcomer.home / "base")
    program = next(block for block in PAGE if block.language == "python" and "AutoModel" in block.text)
    found: dict[str, object] = {}
    exec(program.text, found)
    assert found["tokenizer"].encode("a sum") == [int(byte) for byte in found_ids(newcomer.home / "base", "a sum")]  # type: ignore[attr-defined]
    base, out = newcomer.home / "base", newcomer.home / "out"
    assert (out / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()
    shutil.rmtree(base)  # the run has what it needs
    more = ["launch.nproc=1", f"steps={len(newcomer.steps('runs/tuned')) + 1}", "data.epochs=2", "run.change=true"]
    status, output = newcomer.types("stoker train run.dir=runs/tuned", *more)
    assert status == 0 and newcomer.steps("runs/tuned")[-1]["step"] == int(more[1].partition("=")[2]), output


def found_ids(folder: Path, text: str) -> list[int]:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder).encode(text)  # type: ignore[no-any-return]


def shows_accelerate(newcomer: Newcomer, outputs: list[str]) -> None:
    assert f"resumed from step {STEPS}\n" in outputs[1] and newcomer.steps("runs/net")[-1]["step"] == STEPS + 2
    assert newcomer.config("runs/net").precision == "bf16"


def shows_deepspeed(newcomer: Newcomer, outputs: list[str]) -> None:
    assert "zero_optimization.stage=3 is parallel.zero=3" in outputs[0]
    assert "zero_optimization.offload_optimizer.device=cpu and" in outputs[0]
    config = newcomer.config("runs/zero3")
    assert (config.parallel.engine, config.parallel.zero, config.parallel.offload) == ("deepspeed", 3, "cpu")
    assert (config.precision, config.grad_clip_norm, config.optim.lr) == ("bf16", 1.0, 3e-4)
    assert len(newcomer.steps("runs/zero3")) == STEPS


def shows_torchtitan(newcomer: Newcomer, outputs: list[str]) -> None:
    assert "dp_shard 2 x tp 2, ZeRO 3" in outputs[0] and outputs[0].count("\n") >= 4
    assert "#SBATCH --array=0-3\n" in outputs[1] and "'run.seed={task}'" in outputs[1]


def shows_megatron(newcomer: Newcomer, outputs: list[str]) -> None:
    state = read_state(newest(RunDirectory(newcomer.home / "runs/blend").checkpoints)[0])
    rows = {name: source["rows"] for name, source in state["data"]["sources"].items()}
    assert sum(rows.values()) == STEPS * 8 and abs(rows["web"] - 0.7 * STEPS * 8) <= 3
    assert {"val_loss.web", "val_loss.code"} <= set(newcomer.steps("runs/blend")[-1])


def shows_axolotl(newcomer: Newcomer, outputs: list[str]) -> None:
    config = newcomer.config("runs/chat")
    assert (config.optim.lr, config.optim.weight_decay, config.data.name) == (1e-5, 0.0, "chat")
    assert config.steps == len(newcomer.steps("runs/chat")) and config.data.tokenizer == str(newcomer.home / "base")


def shows_hydra(newcomer: Newcomer, outputs: list[str]) -> None:
    config = newcomer.config("runs/big")
    assert (config.model.name, config.schedule.name, config.optim.lr) == ("small", "wsd", 5e-4)
    assert [newcomer.config(f"sweeps/lr/{trial}").optim.lr for trial in (0, 1)] == [1e-3, 3e-4]
    assert all(len(newcomer.steps(f"sweeps/lr/{trial}")) == STEPS for trial in (0, 1))


Given, Shows = Callable[[Path], object], Callable[[Newcomer, list[str]], None]
TEXTS = ["data=text", "data.path=texts"]  # instead of the standard library, which takes seconds to tokenise
ONE, TWO = ["launch.nproc=1"], ["launch.nproc=2"]
JOBS: dict[str, tuple[Given, list[str], Shows]] = {
    "nanoGPT": (given_nanogpt, [*ONE, "optim.lr=1e-2"], shows_nanogpt),
    "litgpt": (given_texts, ONE, shows_litgpt),
    "transformers' Trainer": (given_model, [*ONE, "parallel.zero=0"], shows_transformers),
    "Accelerate": (given_texts, [*TWO, *TEXTS], shows_accelerate),
    "DeepSpeed": (given_texts, [*TWO, *TEXTS], shows_deepspeed),
    "torchtitan": (lambda home: None, [], shows_torchtitan),
    "Megatron-LM": (given_megatron, [*TWO, "optim.lr=1e-2", "data.validation=0.1"], shows_megatron),
    "axolotl": (given_model, ONE, shows_axolotl),
    "Hydra": (given_texts, [*ONE, *TEXTS, f"steps={STEPS}"], shows_hydra),
}


def section(heading: str) -> list[Block]:
    return [block for block in PAGE if block.heading == heading]


def test_every_section_is_a_job() -> None:
    assert list(dict.fromkeys(block.heading for block in PAGE))[1:] == list(JOBS)
    assert all(any(block.commands() for block in section(heading)) for heading in JOBS)


@pytest.mark.long
@pytest.mark.parametrize("heading", JOBS)
def test_its_commands_do_the_job(heading: str, newcomer: Newcomer) -> None:
    given, more, shows = JOBS[heading]
    given(newcomer.home)
    newcomer.write([*section(heading), *blocks(ROOT / "docs" / "own_model.md")])
    outputs = []
    for command in (command for block in section(heading) for command in block.commands()):
        status, output = newcomer.types(command.text, *smaller(command.text, more))
        assert status == (2 if command.output else 0), f"$ {command.text}\n{output}"  # what is refused is printed
        outputs.append(output)
    shows(newcomer, outputs)


@pytest.mark.long
def test_nanogpts_cpu_configuration_trains_and_a_plain_loop_finds_the_same(
    newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = blocks(ROOT / "docs" / "nanogpt.md")
    newcomer.write(page)
    steps = ["steps=40", "schedule.warmup_steps=5", "eval.every=40", "eval.sequences=100", "launch.threads=1"]
    for command in (command for block in page for command in block.commands() if "plain.py" not in command.text):
        status, output = newcomer.types(command.text, *steps)
        assert status == 0, output
    monkeypatch.setattr(sys, "path", [str(newcomer.home), *sys.path])
    [program] = [block.text for block in page if block.file == "plain.py"]
    exec(program, {"__name__": "plain"})
    plain = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    peer, native = (newcomer.steps(f"runs/{name}")[-1] for name in ("gpt", "decoder"))
    assert plain == pytest.approx([peer["val_loss"], peer["train_loss"]], abs=0.15)
    assert (
        peer["val_loss"] < newcomer.steps("runs/gpt")[0]["loss"] - 1.5 and native["val_loss"] < peer["val_loss"] + 0.3
    )
