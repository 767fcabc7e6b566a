"""`stoker teach`: what is stored is transformers' own forward, from any layout; and runs that learn from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import Config
from stoker.data.taught import open_lessons
from stoker.launch import teach as teaching
from stoker.launch.cli import main
from stoker.trainer.report.metrics import read
from tests.data.counted import write_lines
from tests.launch.runs import launch_forked, train_forked
from tests.models.families import write_family

SEQ_LEN, TOP_K = 64, 6
COMMON = [
    f"seq_len={SEQ_LEN}",
    "batch.size=4",
    "launch.device=cpu",
    "launch.threads=1",
    "precision=fp32",
    "data.workers=0",
    "data.validation=0.2",
    "log.progress=none",
]
TEXTS = ["data=text", "data.packing=best_fit"]
PAIRS = ["data=chat", "data.args.shape=preference", "data.packing=padded", "seq_len=192"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and a student of another seed, texts, and pairs of answers."""
    home = tmp_path_factory.mktemp("teach")
    write_family(home / "base", "llama")
    (home / "text").mkdir()
    for n in range(12):
        (home / "text" / f"{n}.txt").write_text(f"document {n}: " + "words and more words " * (n % 4))
    answers = [{"prompt": f"Name {n}", "chosen": f"yes {n}", "rejected": "no" * (1 + n % 5)} for n in range(12)]
    write_lines(home / "pairs" / "a.jsonl", answers)
    return home


def words(home: Path, data: list[str], *more: str) -> list[str]:
    places = [f"data.path={home / ('pairs' if data is PAIRS else 'text')}", f"data.cache={home / 'cache'}"]
    chosen = [*COMMON, *data, *places, f"model.init_from={home / 'base'}", *more]
    return list({word.partition("=")[0]: word for word in chosen}.values())


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Ranks of `stoker teach` are forked."""

    def launch(config: Config, ranks: int, _: object, *arguments: str) -> int:
        status, output = launch_forked(home, config, ranks, *arguments)
        assert status == 0, output
        return status

    monkeypatch.setattr(teaching, "launch", launch)


def stored(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of all rows, `[rows, k, seq_len]`."""
    k, rows = open_lessons(folder).k, np.fromfile(folder / f"{split}-0.rows", np.int32)
    planes = torch.from_numpy(rows).view(-1, 2 * k or 1, SEQ_LEN)
    return planes[:, :k], planes[:, k:].view(torch.float32)


def learn(home: Path, name: str, given: list[str]) -> list[float]:
    status, output = train_forked(home, [f"run.dir={home / name}", "steps=3", "optim.lr=1e-2", *given])
    assert status == 0, output
    return [step[key] for step in read(RunDirectory(home / name).metrics) for key in ("loss", "grad_norm")]


@pytest.mark.usefixtures("forked")
def test_predictions_are_those_of_transformers_and_a_copy_of_the_teacher_learns_nothing(home: Path) -> None:
    from transformers import AutoModelForCausalLM

    from stoker.conf.compose import compose
    from stoker.data import read_rows
    from stoker.data.opening import open_keyed_plans

    vocabulary = AutoModelForCausalLM.from_pretrained(home / "base").config.vocab_size
    given = words(home, TEXTS, "launch.nproc=2", "parallel.tp=2")
    assert main(["teach", str(home / "whole"), *given, "--top-k", str(vocabulary)]) == 0
    tokens, logs = stored(home / "whole", "train")
    model = AutoModelForCausalLM.from_pretrained(home / "base").double()
    ((plan, _),) = open_keyed_plans(compose(given), "train")
    rows = read_rows(plan, range(plan.rows_per_epoch))
    assert len(rows) == len(tokens) > 2
    for row, labels in enumerate(rows.labels):
        for document in rows.documents[row].unique():
            span = (rows.documents[row] == document) & (labels != -100)
            if not span.any():
                continue
            with torch.no_grad():
                expected = model(rows.tokens[row, span][None]).logits[0].log_softmax(-1)
            found = torch.zeros_like(expected).scatter_(
                -1, tokens[row][:, span].T.long(), logs[row][:, span].T.double()
            )
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    taught = ["objective=distill", f"objective.teacher={home / 'whole'}", "eval.sequences=1"]
    learned = words(home, TEXTS, *taught, "launch.nproc=1")
    assert learn(home, "itself", learned)[0] == pytest.approx(0.0, abs=1e-5)
    validation = read(RunDirectory(home / "itself").metrics)[-1]
    assert 0 < validation["val_loss"] < 0.5  # a distance too, and the student has moved


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_any_layout_stores_the_same_and_any_layout_learns_the_same(home: Path) -> None:
    folders = []
    pipeline = ["launch.nproc=2", "parallel.pp=2", "batch.micro_size=2"]
    layouts = ["launch.nproc=1"], ["launch.nproc=2", "parallel.zero=3"], pipeline
    for n, layout in enumerate(layouts):
        folders.append(home / f"lessons-{n}")
        assert main(["teach", str(folders[-1]), *words(home, TEXTS, *layout), "--top-k", str(TOP_K)]) == 0
    for split in ("train", "validation"):
        (tokens, logs), *others = (stored(folder, split) for folder in folders)
        for other_tokens, other_logs in others:
            assert torch.equal(tokens, other_tokens)
            torch.testing.assert_close(logs, other_logs, rtol=1e-5, atol=1e-5)
    taught = ["objective=distill", f"objective.teacher={folders[0]}", "objective.temperature=2", "objective.mix=0.5"]
    student = [*words(home, TEXTS, *taught), "run.seed=7"]
    student = [word for word in student if not word.startswith("model.init_from")]
    student += ["model=tiny", "model.num_hidden_layers=2"]
    one, *others = (
        learn(home, f"student-{n}", [*student, *layout])
        for n, layout in enumerate(
            (
                ["launch.nproc=1"],
                ["launch.nproc=2", "parallel.tp=2", "batch.micro_size=2"],
                pipeline,
                ["launch.nproc=2", "parallel.cp=2"],
            )
        )
    )
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_a_stored_reference_is_that_of_the_adapter_switched_off(home: Path) -> None:
    given = words(home, PAIRS, "launch.nproc=1")
    assert main(["teach", str(home / "reference"), *given, "--labels"]) == 0
    run = [*given, "objective=dpo", "adapter=lora"]
    online = learn(home, "online", run)
    assert learn(home, "stored", [*run, f"objective.teacher={home / 'reference'}"]) == pytest.approx(online, rel=1e-6)


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_other_rows_damage_and_other_kinds_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = home / "few"
    given = words(home, TEXTS, "launch.nproc=1")
    assert main(["teach", str(folder), *given, "--top-k", "3"]) == 0
    assert main(["teach", str(folder), *given]) == 2
    assert "holds the predictions of a teacher already" in capsys.readouterr().err
    for more, problem in (
        (["--top-k", "0"], "--top-k=0: at least one token, or --labels"),
        (["--top-k", "100000"], "--top-k=100000 of "),
        (["objective.temperature=2"], "objective.temperature=2: a teacher predicts, and learns nothing"),
        (["adapter=lora"], "adapter=lora: merge it into a teacher first"),
        (["parallel.cp=2", "launch.nproc=2"], "parallel.cp=1 works"),
    ):
        assert main(["teach", str(home / "another"), *given[:-1], *more]) == 2
        assert problem in capsys.readouterr().err

    def refused(*more: str) -> str:
        words = {word.partition("=")[0]: word for word in (*given, f"objective.teacher={folder}", *more)}
        status, output = train_forked(home, [f"run.dir={home / 'refused'}", "steps=1", *words.values()])
        assert status != 0
        return output

    assert "was made for other rows: seq_len differ" in refused("objective=distill", "seq_len=32")
    assert main(["teach", str(home / "labels"), *given, "--labels"]) == 0
    of_labels = refused("objective=distill", f"objective.teacher={home / 'labels'}")
    assert "holds the log-probabilities of labels alone, and objective=distill needs the most probable" in of_labels
    assert "holds no teacher.json" in refused("objective=distill", f"objective.teacher={home / 'none'}")
    path = folder / "train-0.rows"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "is damaged, or was never written" in refused("objective=distill", "steps=40")
    path.write_bytes(data[:-4])
    assert f"{path}: {len(data) - 4} bytes, and" in refused("objective=distill")
