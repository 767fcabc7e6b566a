"""`stoker plan`: the memory of a start, whether it fits, and the refusals of `stoker train`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.launch.cli import main
from stoker.trainer.plan.times import STORAGE, TO_HOST, failures

Printed = Callable[..., tuple[int, str, str]]
SMALL = ["model.hidden_size=64", "model.intermediate_size=64", "model.num_hidden_layers=2", "seq_len=64"]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Printed:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def run(*words: str) -> tuple[int, str, str]:
        status = main([*words])
        seen = capsys.readouterr()
        return status, seen.out, seen.err

    return run


def test_a_plan_has_a_line_for_the_ranks_of_each_stage_and_spawns_nothing(printed: Printed, tmp_path: Path) -> None:
    status, out, _ = printed("plan", *SMALL, "launch.nproc=4", "parallel.pp=2", "parallel.zero=1")
    lines = out.splitlines()
    assert status == 0
    assert "on 4 CPUs" in lines[0] and "pp 2 x dp_shard 2, ZeRO 1" in lines[1]
    memory, messages, verdict = out.split("\n\n")[1:]
    classes = [line.split()[0] for line in memory.splitlines()[2:]]
    assert len(classes) == 2 and classes[0].endswith("*") and not classes[1].endswith("*"), "the worst is marked"
    assert re.search(r"all_gather +dp_shard +2 ", messages) and re.search(r"send +pp +2 ", messages)
    assert ": fits, " in verdict
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_an_adapter_counts_its_base_in_the_compute_dtype(printed: Printed) -> None:
    status, out, _ = printed("plan", *SMALL, "launch.nproc=1", "precision=bf16", "adapter=lora")
    assert status == 0 and "18 bytes a parameter that is trained, 2 a frozen one" in out
    columns = re.split(r"  +", out.split("\n\n")[1].splitlines()[1])
    assert columns[1:4] == ["fp32 parameters", "frozen", "optimizer state"]


def test_a_plan_for_gpus_says_whether_they_have_the_memory(printed: Printed, tmp_path: Path) -> None:
    status, out, _ = printed("plan", *SMALL, "--gpu", "H100", "--gpus", "2", "--json")
    plan = json.loads(out)
    (ranks,) = plan["classes"]
    assert status == 0 and plan["fits"] and plan["kind"] == "cuda" and plan["device"] == "H100"
    assert plan["capacity_bytes"] == 80 * 2**30 and ranks["ranks"] == [0, 1]
    assert ranks["peak"]["bytes"] == max(ranks[span]["bytes"] for span in ("build", "step", "evaluation"))
    assert sum(ranks["peak"]["categories"].values()) == ranks["peak"]["bytes"] < plan["needed_bytes"]

    small = tmp_path / "small.json"
    small.write_text(json.dumps({"memory_gib": (plan["needed_bytes"] - 1) / 2**30}))
    status, out, _ = printed("plan", *SMALL, "--gpu", str(small), "--gpus", "2")
    assert status == 1 and "of one small: does not fit" in out


def test_a_plan_counts_the_chunk_of_the_loss_that_a_run_on_such_gpus_takes(printed: Printed) -> None:
    large = [*SMALL, "model.vocab_size=200000", "seq_len=8192", "batch.micro_size=2", "batch.size=2", "--gpus", "1"]
    of_each = ["--gpu", "H100"], ["--gpu", "H100", "model.loss_chunk=1024"]
    largest, smallest = (json.loads(printed("plan", *large, *words, "--json")[1]) for words in of_each)
    assert largest["loss_chunk"] == 8192 and smallest["loss_chunk"] == 1024
    logits = (8192 - 1024) * 200_000 * 4
    assert largest["classes"][0]["peak"]["bytes"] > smallest["classes"][0]["peak"]["bytes"] + logits


def test_a_plan_gives_the_time_of_a_run_its_cost_and_how_often_to_save(printed: Printed, tmp_path: Path) -> None:
    asked = ["--gpus", "2", "--tokens", "1e9", "--price", "2.5", "--mtbf", "100", "--json"]
    plan = json.loads(printed("plan", *SMALL, "--gpu", "H100", *asked)[1])
    times, failures = plan["times"], plan["failures"]
    assert times["step"]["total"] == pytest.approx(sum(s for part, s in times["step"].items() if part != "total"))
    assert times["seconds"] == pytest.approx(1e9 / times["tokens_per_second"])
    assert plan["cost"] == pytest.approx(2 * 2.5 * times["seconds"] / 3600 / failures["goodput"])
    assert 0 < times["mfu"] < 0.75 and 0.9 < failures["goodput"] < 1

    unknown = tmp_path / "unknown.json"
    unknown.write_text('{"memory_gib": 80}')
    plan = json.loads(printed("plan", *SMALL, "--gpu", str(unknown), *asked)[1])
    assert plan["times"] is None and plan["cost"] is None and plan["flops"] > 0, "no other device's rates"


@pytest.mark.long
def test_a_plan_of_a_ramp_looks_at_steps_of_every_size(printed: Printed) -> None:
    """Memory, messages and operations are those of the largest; a run's time adds up all."""

    h100 = ["--gpu", "H100", "--gpus", "2", "batch.micro_size=4"]

    def planned(*words: str) -> dict:
        status, out, err = printed("plan", *SMALL, *h100, *words, "--json")
        assert status == 0, err
        return json.loads(out)

    alone = {size: planned(f"batch.size={size}") for size in (8, 16, 32)}
    tokens = [f"--tokens={64 * rows}" for rows in (8 * 10, 8 * 10 + 32 * 5 + 16 * 3)]
    ramp = "batch.ramp=[[8,5120],[32,15360]]"  # ten steps, then five, then of 16
    first, whole = (planned(ramp, "batch.size=16", each) for each in tokens)
    seconds = {size: plan["times"]["step"]["total"] for size, plan in alone.items()}
    assert [(each["first"], each["rows"], each["micro_batches"]) for each in whole["sizes"]] == [
        (1, 8, 1),
        (11, 32, 4),
        (16, 16, 2),
    ]
    for each in whole["sizes"]:
        assert each["step_seconds"] == pytest.approx(seconds[each["rows"]])
    assert first["times"]["seconds"] == pytest.approx(10 * seconds[8])
    assert whole["times"]["seconds"] == pytest.approx(10 * seconds[8] + 5 * seconds[32] + 3 * seconds[16])
    assert whole["classes"] == alone[32]["classes"] and whole["flops"] == alone[32]["flops"]
    assert planned(ramp, "batch.size=16", "steps=18")["times"]["tokens"] == 64 * (80 + 160 + 48)
    said = printed("plan", *SMALL, ramp, "batch.size=16", "launch.nproc=2", "batch.micro_size=4")[1].splitlines()[2]
    assert said.startswith("batch.ramp: 8 sequences from step 1 (1 micro-batch), 32 sequences from step 11 (4 micro-b")


def test_saves_are_as_often_as_young_has_it_but_no_faster_than_they_are_written() -> None:
    rare, often = failures(mtbf=1e6, staged=1e10), failures(mtbf=1e4, staged=1e10)
    assert rare.interval == pytest.approx(math.sqrt(2 * 1e10 / TO_HOST * 1e6))
    assert often.goodput < rare.goodput < 1
    assert failures(mtbf=1e4, staged=1e13).interval == 1e13 / STORAGE
    assert failures(mtbf=10.0, staged=1e10).goodput == 0, "it never gets to the next save"


@pytest.mark.parametrize(
    "words",
    [
        ["launch.nproc=3", "parallel.tp=2"],
        ["launch.nproc=2", "batch.size=7", "precision=fp16"],
        ["model.num_key_value_heads=3", "steps=0"],
        ["parallel.pp=2", "launch.nproc=2", "parallel.schedule=interleaved"],
        ["modle=small"],
    ],
    ids=" ".join,
)
def test_what_train_refuses_plan_refuses_in_the_same_words(printed: Printed, words: list[str]) -> None:
    refused = printed("train", *words)
    assert refused[0] == 2 and printed("plan", *words) == refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "H101"], "--gpu H101: no such device is known; known are GB200, B200"),
        (["--gpu", "none.json"], "--gpu none.json: "),
        (["--price", "0"], "--price 0: a number above 0 works"),
        (["--gpus", "0"], "--gpus 0: at least one rank"),
        (["--gpu", "H100", "launch.device=cpu"], "launch.device=cpu with --gpu H100: leave one of them out"),
        (
            [*SMALL, "optim.target=torch.optim:Adamax", "optim.needs=elementwise"],
            "this start cannot be rehearsed: its step depends on the value of a tensor (aten._local_scalar_dense",
        ),
        (["parallel.engine=deepspeed"], "parallel.engine=deepspeed cannot be rehearsed: parallel.engine=fsdp can"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_cannot_be_planned_is_one_line(printed: Printed, words: list[str], said: str) -> None:
    status, _, err = printed("plan", *words)
    assert status == 2 and err.startswith(f"stoker: {said}") and err.count("\n") == 1


def test_a_description_of_a_device_names_its_file_and_what_is_wrong(printed: Printed, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    for text, said in (
        ("{}", "expected an object with memory_gib"),
        ('{"memory_gib": "80"}', "memory_gib='80'"),
        ('{"memory_gib": 80, "memory": 1}', "unknown key 'memory'"),
    ):
        file.write_text(text)
        status, _, err = printed("plan", "--gpu", str(file))
        assert status == 2 and str(file) in err and said in err
