"""Every refusal's advice, taken, is accepted: of each entry of the table, of each limit, and of configs at random."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.conf.limits import LIMITS
from stoker.conf.overrides import parse
from stoker.conf.schema import GROUPS, Config, kinds, lookup
from stoker.parallel.start import Start
from stoker.trainer.validate import entries_for
from tests.trainer.refused_alone import BEYOND
from tests.trainer.refused_together import TOGETHER
from tests.trainer.test_validate import refusals_of, with_values

KEYS = "|".join(map(re.escape, sorted([*kinds(), *GROUPS], key=len, reverse=True)))
LIST = r"\[(?:[^\[\]]|\[[^\]]*\])*\]"
SETTING = re.compile(rf"(?<![\w.])({KEYS})=({LIST}|(?:[^\s,;:)`]|:(?=\w))+)(?: or (\d+))?(?![\w.])")
JOINED = re.compile(r"(?: and| with)? ?")  # between settings that are one piece of advice
# Advice in words: what is then typed.
WORDS = {
    "leave it out": "parallel.dp_replicate=null",
    "leave optim.needs out": "optim.needs=null",
    "declare it by optim.needs=...": "optim.needs=elementwise",
    "or set model.head_dim": "model.head_dim=32",
    "do must be one of kill": "faults=[{at: 7, do: kill}]",
    "rank 0 to 1 work": "faults=[{at: 7, do: kill, rank: 1}]",
    "use batch.size": "parallel.deepspeed={}",
    "these settings are for parallel.engine=deepspeed": "parallel.engine=deepspeed",
    "name a variable in an http(s) address ($STOKER_SECRET_NAME)": "model.args={from: 'https://$STOKER_SECRET_ME@h/a'}",
    "shell of pipe: and launch.setup read one ($NAME)": "launch.setup='export WANDB_API_KEY=$KEY'",
    "choose from role, pattern, name": "optim.groups=[{role: matrix, lr: 1e-4}]",
    "needs either role (one of": "optim.groups=[{role: matrix, lr: 1e-4}]",
    "role=heads: choose from matrix": "optim.groups=[{role: matrix, lr: 1e-4}]",
    "name=adam: choose from adamw": "optim.groups=[{role: matrix, name: adamw}]",
    "muon orthogonalises matrices": "optim.groups=[{role: embedding, name: adamw}]",
    "betas are two numbers": "optim.groups=[{role: matrix, betas: [0.9, 0.99]}]",
    "where its library looks (~/.netrc, AWS_ACCESS_KEY_ID, ...)": "model.args={}",
}


def advised(message: str, config: Config, world: int) -> list[list[str]]:
    """The alternatives that a message offers, each of settings to take together.

    Settings that only repeat what was refused are no advice.
    """
    found: list[list[str]] = []
    end = None  # of the advice that the next setting may belong to
    for match in SETTING.finditer(message):
        key, value, other = match.groups()
        if value == "...":  # which WORDS has
            continue
        joined = end is not None and JOINED.fullmatch(message[end : match.start()])
        if not _is_now(config, key, value, world):
            if joined:
                found[-1].append(f"{key}={value}")
            else:
                found.append([f"{key}={value}"])
            if other:
                found.append([*found[-1][:-1], f"{key}={other}"])
            end = None if other else match.end()
        elif joined:
            end = match.end()
    return found


def _is_now(config: Config, key: str, value: str, world: int) -> bool:
    if key == "launch.nproc":
        return int(value) == world
    if key in GROUPS:
        return lookup(config, f"{key}.name") == value
    return lookup(config, key) == parse(f"{key}={value}").value


def taken(overrides: list[str], advice: list[str], world: int, folder: Path) -> tuple[Config, int]:
    """The config and the ranks of a start that follows `advice`."""
    given = {"DIRECTORY": folder, "PATH": folder, "IMAGE": "stoker", "VOLUME": "runs", "URL": "s3://bucket/run"}
    words = [f"{key}={given.get(value, value)}" for key, _, value in (word.partition("=") for word in advice)]
    words = [re.sub(rf"^({'|'.join(GROUPS)})=", r"\1.name=", word) for word in words]
    ranks = [int(word.partition("=")[2]) for word in words if word.startswith("launch.nproc=")]
    return with_values(*overrides, *words), ranks[0] if ranks else world


CASES = [(name, *case) for name, cases in TOGETHER.items() for case in cases]


@pytest.mark.parametrize(("name", "overrides", "world", "gpus", "words"), CASES)
def test_what_a_refusal_advises_is_accepted(name, overrides, world, gpus, words, tmp_path, monkeypatch):
    if name == "pipelines on older torch":
        monkeypatch.setattr(torch, "__version__", "2.12.1")
    config = with_values(*overrides)
    [message] = refusals_of(config, world, gpus).splitlines()
    ways = [[setting] for phrase, setting in WORDS.items() if phrase in message]
    if name == "credentials":  # each of the three is for another kind of value
        ways = [way for way in ways if way[0].partition("=")[0] == overrides[0].partition("=")[0]]
    ways += advised(message, config, world)
    assert ways, f"no advice in: {message}"
    for way in ways:
        assert refusals_of(*taken(overrides, way, world, tmp_path), gpus) == "", f"{way} after: {message}"


RULES = {
    "pairs of a first and a last step, rising, such as": "[[100,120],[300,300]]",
    "pairs of sequences per step and of tokens until which, rising, such as": "[[8,1e6],[16,4e6]]",
    "above 0 and below 1": "0.999",
    "numbers above 0, such as": "[1.0,1.05]",
    "two numbers from 0 up to but not including 1": "[0,0.999]",
    "an even number above 0": "2",
    "0, 1, 2 or 3": "3",
    "above 0 and at most 1": "1.0",
    "0, or from 0.00002 to 0.99998": "0.1",
    "ranks of at least 1 by name or pattern, such as": "{q_proj: 16}",
    "MINUTES, HH:MM:SS, D-HH or D-HH:MM:SS": "1-12:30:00",
    "task numbers such as": "1,5,7",
    "the first and the last step to trace, such as": "[10,13]",
    "a time such as": "2026-12-24T18:00",
    "different names of wandb, tensorboard, mlflow and csv, such as": "[wandb,csv]",
    "names of hang, rollback, failure and end, such as": "[failure,end]",
    "an absolute path other than": "/runs",
}


@pytest.mark.parametrize("override", BEYOND)
def test_what_a_limit_asks_for_is_within_it(override):
    key = override.partition("=")[0]
    [limit] = [limit for limit in LIMITS if limit.key == key]
    message = limit.broken(with_values(override))
    rule = re.search(r"must be (.*), because|choose from (\w+)", message)
    assert rule is not None, message
    [value] = {
        *(value for phrase, value in RULES.items() if (rule[1] or "").startswith(phrase)),
        *re.findall(r"^at least (\S+)$", rule[1] or ""),
        *re.findall(r"^from (\S+) (?:to \S+|up to but not including 1)$", rule[1] or ""),
        *(["0.5"] if rule[1] == "above 0" else []),
        *([rule[2]] if rule[2] else []),
    }
    assert limit.broken(with_values(f"{key}={value}")) is None, f"{value} after: {message}"
    for phrase, example in RULES.items():
        if "such as" in phrase and (rule[1] or "").startswith(phrase):
            assert example in rule[1]


SMALL = st.integers(1, 9)
CHOICES = {
    "parallel.tp": SMALL,
    "parallel.pp": SMALL,
    "parallel.zero": st.integers(0, 3),
    "parallel.stages_per_rank": st.integers(1, 4),
    "parallel.schedule": st.sampled_from(["1f1b", "gpipe", "interleaved", "zbv"]),
    "parallel.dp_replicate": st.none() | SMALL,
    "parallel.engine": st.sampled_from(["fsdp", "deepspeed"]),
    "batch.size": st.integers(1, 40),
    "batch.micro_size": st.none() | SMALL,
    "seq_len": st.integers(2, 20),
    "model.num_hidden_layers": SMALL,
    "model.num_attention_heads": SMALL,
    "model.num_key_value_heads": st.none() | SMALL,
    "model.hidden_size": st.integers(1, 60),
    "data.mode": st.sampled_from(["indexed", "streaming"]),
    "data.streams": SMALL,
    "schedule.warmup_steps": st.integers(0, 300),
    "schedule.name": st.sampled_from(["cosine", "wsd"]),
    "compile": st.booleans(),
}


@pytest.mark.long
@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=CHOICES), st.integers(1, 16), st.integers(0, 4))
def test_each_way_that_a_refusal_names_removes_it(tmp_path_factory, values, world, gpus):
    """Others may be left, or come: values that do not go together may need several changes."""
    folder = tmp_path_factory.getbasetemp()
    overrides = [f"{key}={'null' if value is None else str(value).lower()}" for key, value in values.items()]
    config = with_values(*overrides)
    for refusal in entries_for(config):
        message = refusal.check(Start(config, world, gpus))
        if message is None:
            continue
        ways = advised(message, config, world)
        assert ways, f"no advice in: {message}"
        for way in ways:
            after, ranks = taken(overrides, way, world, folder)
            assert refusal.check(Start(after, ranks, gpus)) is None, f"{way} after: {message}"
