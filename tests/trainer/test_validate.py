from __future__ import annotations

from pathlib import Path

import pytest
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
from stoker.trainer.validate import REFUSALS, table_markdown, validate
from tests.parallel.optimizers import OF_OPTIMIZERS
from tests.trainer.refused_alone import BEYOND
from tests.trainer.refused_rope import LLAMA3, OF_ROPE
from tests.trainer.refused_streaming import OF_STREAMS, STREAMS

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


DEEPSPEED = ["parallel.engine=deepspeed"]

# entry -> (overrides, world, gpus, a part of the message), each at the edge of what is refused
TOGETHER = {
    "axes": [
        (["parallel.tp=2"], 3, 0, "3 ranks do not divide into tp 2 x pp 1: launch.nproc=2 or 4 does"),
        (["parallel.tp=2", "parallel.pp=2"], 1, 0, "launch.nproc=4 does"),
        ([], 0, 0, "0 ranks: launch.nproc=1 is the least"),
    ],
    "replicas of ZeRO 0": [
        (["parallel.zero=0", "parallel.dp_replicate=2"], 4, 0, "ZeRO 0 keeps a replica on each of the 4"),
    ],
    "replicas": [
        (
            ["parallel.dp_replicate=3"],
            4,
            0,
            "parallel.dp_replicate=3 does not divide 4 data-parallel ranks: 2 or 4 does",
        ),
    ],
    "rows over ranks": [
        (["batch.size=10"], 4, 0, "batch.size=8 or 12 does, or launch.nproc=2 or 5"),
        (["batch.size=10", "parallel.tp=2"], 8, 0, "batch.size=8 or 12 does, or launch.nproc=4 or 10"),
        (["batch.size=2"], 3, 0, "batch.size=3 does, or launch.nproc=2"),
    ],
    "micro-batches": [
        (
            ["batch.micro_size=5"],
            2,
            0,
            "batch.micro_size=5 does not divide the 16 rows of a rank (batch.size=32 over 2): 4 or 8",
        ),
        (["batch.micro_size=33"], 1, 0, ": 32 does"),
    ],
    "tensor parallelism": [
        (
            ["parallel.tp=3", "seq_len=513"],
            3,
            0,
            "parallel.tp=3 does not go with model.num_attention_heads=8, model.intermediate_size=704: 2 or 4 does",
        ),
        (["parallel.tp=16", "batch.micro_size=8"], 16, 0, "does not go with model.num_attention_heads=8: 8 does"),
        (
            [
                "parallel.tp=4",
                "model.num_attention_heads=12",
                "model.num_key_value_heads=6",
                "model.hidden_size=384",
                "model.intermediate_size=720",
            ],
            4,
            0,
            "parallel.tp=4 does not go with model.num_key_value_heads=6: 3 or 6 does",
        ),
    ],
    "sequence parallelism": [
        (
            ["parallel.tp=8", "seq_len=250", "batch.micro_size=2"],
            8,
            0,
            "micro-batches of 2 x seq_len=250 tokens do not divide over parallel.tp=8: batch.micro_size=4 does, "
            "or seq_len=248 or 252, or parallel.sequence_parallel=false",
        ),
        (["parallel.tp=2", "seq_len=5", "batch.size=3"], 2, 0, "over parallel.tp=2: seq_len=4 or 6, or parallel.sequ"),
    ],
    "stages": [
        (
            ["parallel.pp=7", "batch.micro_size=1"],
            7,
            0,
            "are 7 stages for model.num_hidden_layers=6: at most 6 stages work",
        ),
        (
            ["parallel.pp=4", "parallel.stages_per_rank=2", "parallel.schedule=interleaved", "batch.micro_size=1"],
            4,
            0,
            "are 8 stages for model.num_hidden_layers=6",
        ),
    ],
    "interleaving": [
        (["parallel.pp=2", "parallel.stages_per_rank=2"], 2, 0, "need parallel.schedule=interleaved"),
        (["parallel.pp=2", "parallel.schedule=interleaved"], 2, 0, "needs parallel.stages_per_rank=2 or more"),
        (["parallel.schedule=interleaved", "parallel.stages_per_rank=2"], 1, 0, "needs parallel.pp=2 or more"),
    ],
    "zero bubble": [
        (["parallel.schedule=zbv", "parallel.pp=2"], 2, 0, "parallel.schedule=zbv: the split backward of zero-bubble"),
        (["parallel.schedule=zero_bubble"], 1, 0, "parallel.schedule=interleaved with parallel.stages_per_rank=2 or"),
    ],
    "full pipeline": [
        (
            ["parallel.pp=4", "batch.micro_size=16"],
            4,
            0,
            "2 micro-batches do not fill 4 pipeline stages: batch.micro_size=8",
        ),
        (["parallel.pp=4", "batch.size=3"], 4, 0, "1 micro-batches do not fill 4 pipeline stages: batch.size=12"),
    ],
    "interleaved rounds": [
        (
            [
                "parallel.pp=2",
                "parallel.stages_per_rank=2",
                "parallel.schedule=interleaved",
                "batch.size=30",
                "batch.micro_size=6",
            ],
            2,
            0,
            "5 micro-batches do not split into rounds over parallel.pp=2: batch.micro_size=10 or 5 does",
        ),
    ],
    "GPUs": [
        ([], 4, 1, "4 ranks on 1 GPU: launch.nproc=1 works, or launch.device=cpu"),
        (["launch.device=cuda"], 2, 0, "launch.device=cuda: there is no GPU here"),
    ],
    "several machines": [
        (["launch.nodes=2"], 2, 0, "launch.nodes=2 with launch=local"),
    ],
    "fp16 on CPUs": [
        (["precision=fp16"], 1, 0, "precision=fp16 on CPUs: precision=bf16 works"),
        (["precision=fp16", "launch.device=cpu"], 1, 1, "precision=fp16 on CPUs"),
    ],
    "query groups": [
        (
            ["model.num_key_value_heads=3"],
            1,
            0,
            "model.num_key_value_heads=3 does not divide model.num_attention_heads=8: 2 or 4 does",
        )
    ],
    "width of a head": [
        (["model.hidden_size=250"], 1, 0, "model.hidden_size=240 or 256 does, or set model.head_dim"),
        (["model.hidden_size=248"], 1, 0, "does not split into num_attention_heads=8 of an even width"),
    ],
    "warmup": [
        (["schedule.warmup_steps=201"], 1, 0, "do not fit into 200 steps: schedule.warmup_steps=200 does"),
        (["schedule.warmup_steps=51", "schedule.total_steps=50"], 1, 0, "do not fit into 50 steps"),
        (["schedule.name=wsd", "schedule.warmup_steps=161"], 1, 0, "and a decay of 40 steps do not fit"),
    ],
    "evaluation": [
        (
            ["eval.every=10", "eval.sequences=0"],
            1,
            0,
            "eval.every=10 with eval.sequences=0 evaluates nothing: set eval.sequences, such as 32",
        ),
        (["eval.sequences=8", "data.validation=0"], 1, 0, "no document is kept for validation"),
    ],
    "best checkpoints": [
        (["checkpoint.keep_best=1", "checkpoint.every=20"], 1, 0, "eval.every=20 measures every checkpoint"),
        (
            ["checkpoint.keep_best=1", "checkpoint.every=20", "eval.every=15", "eval.sequences=8"],
            1,
            0,
            "and eval.every=15",
        ),
    ],
    "traced steps": [
        (["profile.steps=[201,205]"], 1, 0, "no such step is taken; profile.steps=[196,200] works"),
        (["profile.steps=[9,99]", "steps=8"], 1, 0, "profile.steps=[1,8] works"),
    ],
    "faults": [
        (["faults=[{at: 7, do: kil}]"], 1, 0, "{at: 7, do: kil}: do must be one of kill, "),
        (["faults=[{at: 7, do: kill, rank: 2}]"], 2, 0, "is for rank 2 of 2: rank 0 to 1 work"),
        (["faults=[{at: 201, do: oom}]"], 1, 0, "is for step 201 of 200"),
    ],
    "DeepSpeed and pipelines": [
        ([*DEEPSPEED, "parallel.pp=2", "parallel.zero=2"], 2, 0, "parallel.zero=1 works, or parallel.engine=fsdp"),
    ],
    "DeepSpeed and fp32 modules": [
        ([*DEEPSPEED, "fp32_modules=[head]"], 2, 0, "parallel.engine=fsdp works, or precision=fp32"),
    ],
    "DeepSpeed ZeRO 3 and compile": [
        ([*DEEPSPEED, "parallel.zero=3", "compile=true"], 2, 0, "parallel.zero=2 works"),
    ],
    "DeepSpeed ZeRO 3 and selective checkpointing": [
        (
            [*DEEPSPEED, "parallel.zero=3", "activation_checkpointing=selective"],
            2,
            0,
            "activation_checkpointing=full works",
        ),
    ],
    "NVMe": [
        (["parallel.offload=nvme"], 2, 0, "with parallel.engine=fsdp: parallel.engine=deepspeed works, or"),
        ([*DEEPSPEED, "parallel.offload=nvme"], 2, 0, "needs parallel.nvme_path=DIRECTORY on a local disk"),
    ],
    "DeepSpeed settings": [
        (["parallel.deepspeed={a: 1}"], 2, 0, "these settings are for parallel.engine=deepspeed"),
        ([*DEEPSPEED, "parallel.deepspeed={train_batch_size: 8}"], 2, 0, "batch.size"),
    ],
    "credentials": [
        (
            ["model.args={from: 'https://me:hunter2@host/a'}"],
            1,
            0,
            "model.args.from=https://me:***@host/a: a credential",
        ),
        (["launch.setup='export WANDB_API_KEY=0123abc'"], 1, 0, "launch.setup=export WANDB_API_KEY=***"),
        (["model.args={token: abc}"], 1, 0, "model.args.token=***"),
    ],
    **OF_STREAMS,
    **OF_ROPE,
    **OF_OPTIMIZERS,
}


@pytest.mark.parametrize(
    ("name", "overrides", "world", "gpus", "words"),
    [(name, *case) for name, cases in TOGETHER.items() for case in cases],
)
def test_values_that_do_not_go_together_are_refused_by_their_entry(name, overrides, world, gpus, words):
    start = Start(with_values(*overrides), world, gpus)
    said = {entry.name: message for entry in REFUSALS if (message := entry.check(start))}
    assert list(said) == [name]
    assert words in said[name] and "\n" not in said[name]
    assert said[name] in refused(*overrides, world=world, gpus=gpus).splitlines()


def test_every_entry_is_tried():
    assert sorted(TOGETHER) == sorted(entry.name for entry in REFUSALS)


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


def test_every_choice_of_every_group_may_start():
    for group in GROUPS:
        assert choices(group)
        for name in choices(group):
            assert refusals_of(compose([f"{group}={name}"]), 1, 0) == ""


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
