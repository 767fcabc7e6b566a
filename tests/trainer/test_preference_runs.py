"""Runs on pairs of answers: what they show, how they resume, and which are refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import stoker
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import ModelConfig
from stoker.launch.teach import teach
from stoker.parallel.model import Part
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import Outcome
from tests import toy
from tests.data.counted import write_lines
from tests.models.families import write_family
from tests.pages import ROOT

WORDS = [
    "seq_len=192",
    "batch.size=4",
    "steps=4",
    "launch.device=cpu",
    "launch.threads=1",
    "launch.nproc=1",
    "precision=fp32",
    "optim.lr=1e-2",
    "data=chat",
    "data.workers=0",
    "data.validation=0.2",
    "log.progress=none",
]
PAIRS = "data.args.shape=preference"
OWN_LOSS = ("model.target=tests.trainer.test_preference_runs:with_own_loss", "model.init_from=null")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and pairs whose chosen answers are of another kind than the rejected ones."""
    home = tmp_path_factory.mktemp("preferences")
    write_family(home / "base", "llama")
    answers = [{"prompt": f"Name {n}", "chosen": f"yes {n}", "rejected": "no" * (1 + n % 5)} for n in range(40)]
    write_lines(home / "pairs" / "a.jsonl", answers)
    return home


def with_own_loss(config: ModelConfig, part: Part) -> nn.Module:
    """A model whose head does not know what `Targets` are."""
    model = toy.build(config, part)
    for module in model.modules():
        module.takes_targets = False  # type: ignore[assignment]
    return model


def words(home: Path, name: str, *more: str) -> list[str]:
    places = [f"run.dir={home / name}", f"data.path={home / 'pairs'}", f"data.cache={home / 'cache'}"]
    chosen = {word.partition("=")[0]: word for word in (*WORDS, f"model.init_from={home / 'base'}", *places, *more)}
    return list(chosen.values())


def on_the_page(number: int = 0) -> list[str]:
    """The settings of a command in docs/preferences.md, without its places."""
    text = (ROOT / "docs" / "preferences.md").read_text().replace("\\\n", "")
    command = re.findall(r"^    stoker train (.*)$", text, re.MULTILINE)[number]
    places = ("run.dir=", "model.init_from=", "data.path=", "optim.")
    return [word for word in command.split() if not word.startswith(places)]


def test_a_run_as_on_the_page_shows_its_rewards(home: Path) -> None:
    assert stoker.run(words(home, "whole", *on_the_page())).outcome is Outcome.COMPLETED
    steps = read(RunDirectory(home / "whole").metrics)
    first, last = steps[0], steps[-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the adapter begins at zero
    assert first["rewards/margins"] == first["rewards/accuracies"] == 0.0
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["rewards/margins"] > 0 and last["rewards/accuracies"] == 1.0 and last["loss"] < first["loss"]
    assert last["val_rewards/accuracies"] == 1.0 and last["val_loss"] < math.log(2)


@pytest.mark.long
def test_a_run_resumes_to_the_bit(home: Path) -> None:
    for name, stops in (("at once", (4,)), ("parts", (2, 4))):
        for steps in stops:
            ending = stoker.run(words(home, name, *on_the_page(), f"steps={steps}", "schedule.total_steps=4"))
            assert ending.outcome is Outcome.COMPLETED
    shown = ("step", "loss", "grad_norm", "tokens", "rewards/chosen", "rewards/rejected")
    whole, parts = (read(RunDirectory(home / name).metrics) for name in ("at once", "parts"))
    assert [[step[key] for key in shown] for step in parts] == [[step[key] for key in shown] for step in whole]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ((PAIRS,), "the data are pairs of answers .*, which objective=next_token does not take"),
        (
            (
                "objective=simpo",
                PAIRS,
                *OWN_LOSS,
            ),
            "objective=simpo needs the log-probability of each token, and model.target=tests.trainer",
        ),
    ],
)
def test_objective_data_and_model_have_to_go_together(more: tuple[str, ...], reason: str, home: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        stoker.run(words(home, "refused", "run.fresh=true", *more))


RATED = "data.args.shape=unpaired_preference"
KTO = ("objective=kto", "adapter=lora", "data=chat", RATED)


def rated(home: Path) -> str:
    """Where answers are rated one by one, desirable ones of another kind than the others."""
    folder = home / "rated"
    if not folder.is_dir():
        lines = [
            {"prompt": f"Name {n}", "completion": f"yes {n}" if n % 2 else "no" * (1 + n % 5), "label": n % 2 > 0}
            for n in range(60)
        ]
        write_lines(folder / "a.jsonl", lines)
    return f"data.path={folder}"


SIDES = {"rewards/chosen", "rewards/rejected", "rewards/margins", "kl"}


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    for one, other in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "val_loss", *SIDES, *(f"val_{name}" for name in SIDES)):
            assert (key in one) == (key in other)
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=rel, abs=1e-7), key


def test_a_run_on_rated_answers_shows_rewards_and_divergence(home: Path) -> None:
    assert set(on_the_page(1)) == set(KTO)
    more = (*KTO, rated(home), "objective.undesirable_weight=2", "steps=6")
    assert stoker.run(words(home, "kto", *more)).outcome is Outcome.COMPLETED
    steps = read(RunDirectory(home / "kto").metrics)
    first, last = steps[0], steps[-1]
    weight = 0.5 * (first["desirable"] + 2 * (1 - first["desirable"]))  # s(0) = 1/2
    assert first["loss"] == pytest.approx(weight, rel=1e-6) and first["kl"] == 0
    assert set(SIDES) < {key for step in steps for key in step}
    assert {f"val_{name}" for name in SIDES} < set(last)
    assert any(step["kl"] > 0 for step in steps)
    shown = [step["val_loss"] for step in steps if step.get("val_loss") is not None]
    assert shown and last["val_rewards/margins"] > 0

    # Neither the micro-batch nor the rows of one evaluation pass change the divergence, or anything that follows.
    assert stoker.run(words(home, "kto 1", *more, "batch.micro_size=1")).outcome is Outcome.COMPLETED
    assert_alike(steps, read(RunDirectory(home / "kto 1").metrics), 1e-5)


def test_answers_of_pairs_train_without_a_divergence(home: Path) -> None:
    more = ("objective=apo_zero_unpaired", "adapter=lora", RATED)
    assert stoker.run(words(home, "apo", *more)).outcome is Outcome.COMPLETED
    last = read(RunDirectory(home / "apo").metrics)[-1]
    assert last["rewards/margins"] > 0 and "kl" not in last


@pytest.mark.long
def test_a_stored_reference_is_the_model_with_its_adapter_off(home: Path, tmp_path: Path) -> None:
    more = (*KTO, rated(home), "run.fresh=true")
    assert stoker.run(words(home, "online", *more)).outcome is Outcome.COMPLETED
    kept = ("data", "seq_len=", "batch.size=", "model.", "precision=", "launch.device", "launch.threads", "launch.np")
    taught = [word for word in words(home, "teacher", *more) if word.startswith(kept)]
    assert teach(tmp_path / "lessons", taught, None) == 0
    more = (*more, f"objective.teacher={tmp_path / 'lessons'}")
    assert stoker.run(words(home, "stored", *more)).outcome is Outcome.COMPLETED
    online, stored = (read(RunDirectory(home / name).metrics) for name in ("online", "stored"))
    assert_alike(online, stored, 1e-6)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("objective=kto", PAIRS), "objective=kto takes answers that are rated one by one, and the data have none"),
        (("objective=dpo", RATED), "answers that are rated one by one .*, which objective=dpo does not take"),
        (("objective=next_token", RATED), "rated one by one .*, which objective=next_token does not take"),
    ],
)
def test_pairs_are_not_rated_answers(more: tuple[str, ...], reason: str, home: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        stoker.run(words(home, "refused", "run.fresh=true", "adapter=lora", *more))


def test_conversations_are_no_pairs(home: Path) -> None:
    write_lines(home / "talks" / "a.jsonl", [{"prompt": f"Name {n}", "completion": "yes"} for n in range(40)])
    with pytest.raises(ValueError, match="objective=orpo takes pairs of answers, and the data have none"):
        stoker.run(
            words(home, "talks", "objective=orpo", f"data.path={home / 'talks'}", "run.dir=" + str(home / "run"))
        )


def test_weights_need_a_head_that_knows_them(home: Path) -> None:
    reply = {"role": "assistant", "content": "b", "weight": 0.5}
    lines = [{"messages": [{"role": "user", "content": str(n)}, reply]} for n in range(9)]
    write_lines(home / "weighed" / "a.jsonl", lines)
    small = ("eval.sequences=0", "data.validation=0", "seq_len=64", "batch.size=1", "run.fresh=true")
    with pytest.raises(ValueError, match="the weight of a message needs the log-probability of each token"):
        stoker.run(words(home, "weights", f"data.path={home / 'weighed'}", *small, *OWN_LOSS))
