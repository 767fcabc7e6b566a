from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.conf.compose import compose
from stoker.conf.limits import LIMITS
from stoker.conf.overrides import choices, parse
from stoker.conf.schema import GROUPS, Config, kinds, lookup
from stoker.conf.values import ConfigError
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.start import Start
from stoker.parallel.suggestions import around, divisors, either, multiples_around
from stoker.trainer.validate import entries_for, table_markdown, validate
from tests.trainer.refused_alone import BEYOND
from tests.trainer.refused_rope import LLAMA3
from tests.trainer.refused_streaming import STREAMS
from tests.trainer.refused_together import TOGETHER

DOC = Path(__file__).resolve().parents[2] / "docs" / "refusals.md"


def with_values(*overrides: str) -> Config:
    config = Config()
    for override in map(parse, overrides):
        *sections, name = override.key.split(".")
        setattr(lookup(config, ".".join(sections)) if sections else config, name, override.value)
    return config


def refused(*overrides: str, world: int = 1, gpus: int = 0) -> str:
    with pytest.raises(ConfigError) as error:
        validate(with_values(*overrides), world, gpus)
    return str(error.value)


def refusals_of(config: Config, world: int, gpus: int) -> str:
    """What `config` is refused for, one line each; nothing if it may start."""
    try:
        validate(config, world, gpus)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "overrides", "world", "gpus", "words"),
    [(name, *case) for name, cases in TOGETHER.items() for case in cases],
)
def test_values_that_do_not_go_together_are_refused_by_their_entry(name, overrides, world, gpus, words, monkeypatch):
    if name == "pipelines on older torch":
        monkeypatch.setattr(torch, "__version__", "2.12.1")
    start = Start(with_values(*overrides), world, gpus)
    said = {entry.name: message for entry in entries_for(start.config) if (message := entry.check(start))}
    assert list(said) == [name]
    assert words in said[name] and "\n" not in said[name]
    assert said[name] in refused(*overrides, world=world, gpus=gpus).splitlines()


def test_every_entry_is_tried():
    assert sorted(TOGETHER) == sorted(entry.name for entry in entries_for(Config()))


@pytest.mark.parametrize(
    ("overrides", "world", "gpus"),
    [
        ([], 1, 0),
        ([], 4, 4),
        (["launch.device=cpu"], 4, 1),
        (["parallel.zero=0", "parallel.dp_replicate=4"], 4, 0),
        (["parallel.zero=3", "parallel.dp_replicate=2"], 4, 0),
        (["batch.size=12", "batch.micro_size=3"], 4, 0),
        (["model.num_key_value_heads=2"], 1, 0),
        (["parallel.tp=8", "model.num_key_value_heads=2", "model.hidden_size=272"], 8, 0),
        (["parallel.tp=2", "seq_len=5", "batch.size=3", "parallel.sequence_parallel=false"], 2, 0),
        (["parallel.tp=2", "seq_len=5", "batch.micro_size=2"], 2, 0),
        (["model.hidden_size=250", "model.head_dim=32"], 1, 0),
        (["model.target=mine:build", "model.hidden_size=7", "model.num_key_value_heads=3"], 1, 0),
        (["schedule.warmup_steps=200"], 1, 0),
        (["schedule.name=wsd", "schedule.warmup_steps=160"], 1, 0),
        (["eval.every=10", "eval.sequences=8"], 1, 0),
        (["data.validation=0"], 1, 0),
        ([*STREAMS, "data.streams=8"], 4, 0),
        (["grad_clip_norm=null", "activation_checkpointing=full", "compile=true", "optim.name=sgd"], 1, 0),
        (LLAMA3, 1, 0),
    ],
)
def test_what_works_is_not_refused(overrides, world, gpus):
    assert refusals_of(with_values(*overrides), world, gpus) == ""


def test_pipelines_and_tensor_parallelism_that_fit_are_not_refused():
    fitting = ["parallel.tp=2", "parallel.pp=2", "parallel.stages_per_rank=2", "parallel.schedule=interleaved"]
    assert refusals_of(with_values(*fitting, "batch.micro_size=4"), world=8, gpus=0) == ""


@pytest.mark.parametrize("override", BEYOND)
def test_a_value_beyond_its_limit_is_named_with_what_would_work(override):
    key, _, text = override.partition("=")
    said = refused(override, world=1)
    line = next(line for line in said.splitlines() if line.startswith(f"{key}="))
    assert "must be" in line or "choose from" in line
    assert text.strip("[]").split(",")[0] in line


def test_every_limit_is_tried():
    assert [override.partition("=")[0] for override in BEYOND] == [limit.key for limit in LIMITS]


@pytest.mark.parametrize("override", ["optim.lr=nan", "optim.lr=inf", "grad_clip_norm=nan", "optim.betas=[0.9]"])
def test_numbers_that_are_none_are_refused(override):
    assert override.partition("=")[0] in refused(override)


@pytest.mark.parametrize("steps", ["[]", "[3]", "[0,3]", "[4,3]", "[1,2,3]"])
def test_traced_steps_are_a_first_and_a_last_one(steps):
    assert "must be the first and the last step to trace, such as [10,13]" in refused(f"profile.steps={steps}")


def test_the_closest_choice_comes_first():
    assert "precision=bf61: choose from bf16, " in refused("precision=bf61")
    assert "schedule.name=cosin: choose from cosine, " in refused("schedule.name=cosin")


def test_all_refusals_are_reported_at_once_one_line_each():
    said = refused("steps=0", "batch.size=10", "optim.lr=-1", "model.num_key_value_heads=3", "parallel.tp=2", world=8)
    assert [line.split()[0].partition("=")[0] for line in said.splitlines()] == [
        "steps",
        "optim.lr",
        "batch.size",
        "parallel.tp",
        "model.num_key_value_heads",
    ]


SMALL = st.integers(-1, 9)


@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries(dict.fromkeys(("tp", "pp", "zero", "stages_per_rank"), SMALL)),
    st.none() | SMALL,
    st.none() | SMALL,
    SMALL,
    SMALL,
    SMALL,
    st.sampled_from(["1f1b", "interleaved"]),
)
def test_every_config_is_refused_with_a_message_or_has_a_layout_and_a_plan(
    parallel, replicas, micro, rows, world, gpus, schedule
):
    config = Config()
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    config.parallel.dp_replicate, config.batch.micro_size, config.batch.size = replicas, micro, rows
    config.parallel.schedule = schedule
    if refusals_of(config, world, gpus):
        return
    layout = layout_of(config, world)
    plan = batch_plan(config, layout)
    assert layout.world == world
    assert plan.micro_batches * plan.micro_rows * layout.dp == rows


@pytest.mark.long
def test_every_choice_of_every_group_may_start():
    for group in GROUPS:
        assert choices(group)
        for name in choices(group):
            needed = {
                "launch": ["launch.image=stoker", "launch.volume=runs"],
                "objective": ["adapter=lora", "data=chat"],  # which those of preferences need
            }.get(group, [])
            if name == "distill":
                needed = ["objective.teacher=lessons"]
            if name != "transformers":  # it needs a model.config
                assert refusals_of(compose([f"{group}={name}", *needed]), 1, 0) == ""


def test_every_number_is_limited():
    values = {key: lookup(Config(), key) for key in kinds()}
    numbers = {key for key, value in values.items() if type(value) in (int, float)}
    assert numbers - {limit.key for limit in LIMITS} == {"run.seed", "eval.seed"}


def test_the_printed_table_is_the_table():
    assert DOC.read_text() == table_markdown(), "run: python -m stoker.trainer.validate > docs/refusals.md"


@given(st.integers(1, 3000))
def test_divisors_are_all_the_divisors(number):
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_the_nearest_are_one_below_and_one_above():
    assert around(5, [1, 2, 4, 8]) == [4, 8]
    assert around(9, [1, 2, 4, 8]) == [8]
    assert multiples_around(10, 4) == [8, 12] and multiples_around(2, 3) == [3]
    assert either([8, 12]) == "8 or 12"
