"""Runs on pairs of answers: what they show, how they resume, and which are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import nn

import stoker
from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import ModelConfig
from stoker.parallel.model import Part
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import Outcome
from tests import toy
from tests.data.counted import write_lines
from tests.models.families import write_family

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


def test_a_run_shows_rewards_and_resumes_to_the_bit(home: Path) -> None:
    dpo = (PAIRS, "objective=dpo", "adapter=lora", "adapter.rank=4")
    assert stoker.run(words(home, "whole", *dpo)).outcome is Outcome.COMPLETED
    steps = read(RunDirectory(home / "whole").metrics)
    first, last = steps[0], steps[-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the adapter begins at zero
    assert first["rewards/margins"] == first["rewards/accuracies"] == 0.0
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["rewards/margins"] > 0 and last["rewards/accuracies"] == 1.0 and last["loss"] < first["loss"]
    assert last["val_rewards/accuracies"] == 1.0 and last["val_loss"] < math.log(2)

    for steps_done in (2, 4):
        ending = stoker.run(words(home, "parts", *dpo, f"steps={steps_done}", "schedule.total_steps=4"))
        assert ending.outcome is Outcome.COMPLETED
    shown = ("loss", "grad_norm", "tokens", "rewards/chosen", "rewards/rejected")
    resumed = read(RunDirectory(home / "parts").metrics)
    assert [[step[key] for key in shown] for step in resumed] == [[step[key] for key in shown] for step in steps]


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


def test_conversations_are_no_pairs(home: Path) -> None:
    write_lines(home / "talks" / "a.jsonl", [{"prompt": f"Name {n}", "completion": "yes"} for n in range(40)])
    with pytest.raises(ValueError, match="objective=orpo takes pairs of answers, and the data have none"):
        stoker.run(
            words(home, "talks", "objective=orpo", f"data.path={home / 'talks'}", "run.dir=" + str(home / "run"))
        )


def test_weights_need_a_head_that_knows_them(home: Path) -> None:
    talks = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]] * 9
    lines = [{"messages": [{"role": "system", "content": str(n)}, *talk]} for n, talk in enumerate(talks)]
    write_lines(home / "weighed" / "a.jsonl", lines)
    toy = [*OWN_LOSS, "eval.sequences=0", "data.validation=0"]
    with pytest.raises(ValueError, match="the weight of a message needs the log-probability of each token"):
        stoker.run(words(home, "weights", *toy, f"data.path={home / 'weighed'}", "seq_len=64", "batch.size=1"))
