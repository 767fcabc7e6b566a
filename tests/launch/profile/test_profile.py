"""The command, and the traces that it reads: hand-made ones, one that was really recorded, and damaged ones."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import record_function

from stoker.conf.rundir import RunDirectory
from stoker.conf.schema import ModelConfig, ProfileConfig
from stoker.launch.cli import main
from stoker.launch.profile.trace import read_trace
from stoker.models.decoder import Decoder
from stoker.parallel.model import whole_model
from stoker.trainer.report.module_ranges import modules_to_mark
from stoker.trainer.report.profile import Profiler
from tests.extent import FULL
from tests.launch.profile.fabricated import GLOO, a_run, event, flat, kernel, marked, steps, write
from tests.launch.runs import overrides, train_here, write_text


def shown(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    assert main(["profile", str(run), *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    assert main(["profile", str(run), *words]) == 2
    return capsys.readouterr().err


def rank_of(capsys: pytest.CaptureFixture[str], run: Path) -> dict[str, Any]:
    return json.loads(shown(capsys, run, "--json"))["ranks"][0]


def test_the_seconds_of_a_step_are_its_phases_and_what_lies_between_them(tmp_path, capsys):
    rank = rank_of(capsys, a_run(tmp_path / "run", steps(waits=40, saves=5, slow=3)).path)
    assert rank["steps"] == [10, 11, 12]
    assert rank["step_seconds"] == pytest.approx(0.111)
    assert rank["phases"] == pytest.approx({"data": 0.001, "forward": 0.030, "backward": 0.030, "update": 0.0021})
    assert rank["exposed_seconds"] == pytest.approx(0.0399)
    assert rank["checkpoint_seconds"] == pytest.approx(0.005)
    assert rank["work_seconds"] == pytest.approx(0.111 - 0.0399 - 0.005 - 0.001)
    [reduced] = rank["collectives"]
    assert (reduced["kind"], reduced["count"]) == ("all_reduce", 1)
    assert reduced["exposed_seconds"] == pytest.approx(0.0399)
    assert rank["top"][0] == {"name": "aten::mm", "calls": 6, "seconds": pytest.approx(0.060)}


def test_copies_collectives_by_group_and_memory_of_a_gpu(tmp_path, capsys):
    nccl = {"Process Group Name": "3", "Group size": 4}
    events = flat(
        marked("ProfilerStep#1", 0, 100), marked("stoker.forward", 0, 100),
        kernel("gemm", 1, 1, 50),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(args)", 2, 40, 60, **nccl),
        kernel("ncclDevKernel_SendRecv(args)", 3, 60, 61, **nccl, **{"Collective name": "send"}),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 70, 72, 7, bytes=1000),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 73, 74, 7, bytes=500),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 75, 76, 7, bytes=8),
    )  # fmt: skip
    memory = {"fp32 parameters": 1_000_000, "optimizer state": 2_000_000, "peak": 9_000_000}
    run = a_run(tmp_path / "run", events, **{"stoker.memory": memory})
    rank = rank_of(capsys, run.path)
    assert rank["copies"] == {
        "HtoD": {"count": 2, "seconds": pytest.approx(0.003), "bytes": 1500},
        "DtoH": {"count": 1, "seconds": pytest.approx(0.001), "bytes": 8},
    }
    reduced, sent = rank["collectives"]
    assert (reduced["kind"], reduced["group"], reduced["ranks"]) == ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "3", 4)
    assert (reduced["seconds"], reduced["exposed_seconds"]) == pytest.approx((0.020, 0.010))
    assert (sent["kind"], sent["exposed_seconds"]) == ("send", pytest.approx(0.001))
    assert rank["memory"]["activations, gradients, and all else"] == 6_000_000
    text = shown(capsys, run.path)
    assert "at the peak" in text and "host to device" in text and "9.0 MB" in text


def test_the_text_has_the_advice_the_ranks_and_the_details_of_the_one_that_works_longest(tmp_path, capsys):
    run = a_run(tmp_path / "run", steps(waits=70), steps(slow=70, modules=(10, 10, 40)))
    text = shown(capsys, run.path)
    assert text.splitlines()[0] == f"{run.path}: steps 10 to 12 of attempt 1, 2 ranks on CPUs"
    assert text.splitlines()[2].startswith("a slow rank: rank 1 on node-1")
    assert "Operators of rank 1" in text and "layers.*.mlp" in text and "layers.2.mlp" in text
    assert "Operators of rank 0" in shown(capsys, run.path, "--rank", "0")


def test_the_newest_attempt_with_traces_is_shown_and_others_on_request(tmp_path, capsys):
    run = a_run(tmp_path / "run", steps(1))
    write(run.trace(3, 5), steps(2))
    assert "steps 10 to 11 of attempt 3, 1 rank" in shown(capsys, run.path)
    assert "step 10 of attempt 1, 1 rank" in shown(capsys, run.path, "--attempt", "1")
    assert "attempts 1, 3 have" in refused(capsys, run.path, "--attempt", "2")
    assert "ranks 5 have" in refused(capsys, run.path, "--rank", "0")


def test_without_traces_the_setting_that_makes_them_is_named(tmp_path, capsys):
    run = a_run(tmp_path / "run")
    assert "has no traces: profile.steps=[10,13]" in refused(capsys, run.path)
    assert "is not a run directory" in refused(capsys, tmp_path)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-60])


def cut_off_amid_an_event(file: Path) -> None:
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-300]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_off, "the file is cut off or damaged"),
        (cut_off_amid_an_event, "its events end amid one"),
        (lambda file: file.write_bytes(b"\0" * 100), "ot a gzipped file"),
        (lambda file: file.write_bytes(gzip.compress(b"{}")), "it has no traceEvents"),
        (lambda file: write(file, []), "no step is traced"),
        (lambda file: write(file, [*steps(1), {**marked("x", 1, 2), "ts": "now"}]), "is none of a trace"),
        (lambda file: write(file, [*steps(1), {**marked("x", 1, 2), "ts": float("inf")}]), "is none of a trace"),
        (lambda file: write(file, [*steps(1), 7]), "is none of a trace: 7"),
    ],
)
def test_a_damaged_trace_is_refused_with_its_file(tmp_path, capsys, damage, told):
    run = a_run(tmp_path / "run", steps(1))
    damage(run.trace(1, 0))
    message = refused(capsys, run.path)
    assert told in message and str(run.trace(1, 0)) in message and "remove the file" in message


def test_names_of_a_trace_are_shown_as_text(tmp_path, capsys):
    events = steps(1)
    for one in events:
        one["name"] = one["name"].replace("aten::mm", "[red]\x1b[31maten::mm")
    text = shown(capsys, a_run(tmp_path / "run", events).path)
    assert "[red]" in text and "\x1b" not in text


@pytest.mark.parametrize("indent", [None, 1], ids=["one-line", "a-line-for-each-field"])
def test_a_trace_is_read_piece_by_piece_however_it_is_written(tmp_path, monkeypatch, indent):
    events = steps(20)
    write(tmp_path / "whole", events, indent)
    whole = read_trace(tmp_path / "whole")
    monkeypatch.setattr("stoker.launch.profile.trace._CHARACTERS", 97)
    assert read_trace(tmp_path / "whole") == whole
    assert len(whole.columns.kind) == len(events)
    assert whole.header["host_name"] == "node-1"


def test_an_event_takes_tens_of_bytes(tmp_path):
    events = steps(40) * 20
    write(tmp_path / "many", events)
    tracemalloc.start()
    try:
        trace = read_trace(tmp_path / "many")
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(trace.columns.kind) == len(events) > 10_000
    assert held < 80 * len(events)
    assert most < 100 * len(events) + 12 * (1 << 20), "pieces of the file, and columns that grow"


def test_operations_of_other_threads_are_not_the_step_s(tmp_path, capsys):
    events = [*steps(1), event("cpu_op", "aten::copy_", 3, 20, GLOO)]
    assert "aten::copy_" not in {top["name"] for top in rank_of(capsys, a_run(tmp_path / "r", events).path)["top"]}


def recorded(folder: Path, sleeps: float, data: float = 0.0) -> RunDirectory:
    """A run directory with a trace of a decoder, of three steps, one layer of which sleeps in its MLP."""
    run = a_run(folder)
    shape = ModelConfig(vocab_size=16, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    model = Decoder(shape, whole_model(4))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    mlp = model.layers["2"].mlp
    forward = mlp.forward

    def slow(x: Tensor) -> Tensor:
        time.sleep(sleeps)
        return forward(x)

    mlp.forward = slow
    file = run.trace(1, 0)
    profiler = Profiler(
        ProfileConfig([2, 4]), torch.device("cpu"), file, file, lambda _: None, modules_to_mark([model], opaque=False)
    )
    tokens = torch.arange(8).expand(2, 8)
    for step in range(1, 6):
        with profiler.step(step):
            with record_function("stoker.data"):
                time.sleep(data)
            with record_function("stoker.forward"):
                loss = model(tokens, tokens, None, tokens)
            with record_function("stoker.backward"):
                loss.backward()
    return run


def test_a_module_that_is_slow_in_a_recorded_trace_is_named_first(tmp_path, capsys):
    found = json.loads(shown(capsys, recorded(tmp_path / "run", sleeps=0.2).path, "--json"))
    assert found["findings"][0]["cause"] == "a slow module", found["findings"]
    assert "layers.2.mlp takes" in found["advice"]
    modules = found["ranks"][0]["modules"]
    assert modules["layers.2.mlp"]["forward"] >= 0.2
    assert modules["layers.1.mlp.down"]["backward"] > 0, "a node belongs to the module whose forward made it"


def test_late_rows_of_a_recorded_trace_are_named_first(tmp_path, capsys):
    found = json.loads(shown(capsys, recorded(tmp_path / "run", sleeps=0.0, data=0.4).path, "--json"))
    assert found["findings"][0]["cause"] == "data", found["findings"]
    assert found["findings"][0]["seconds"] >= 0.4


PLANTED = {
    "data": ["model.target=tests.launch.profile.planted:late"],
    "a slow rank": ["faults=[{at: 2, rank: 1, do: slow, seconds: 1.0, steps: 5}]"],
    "a slow module": ["model.target=tests.launch.profile.planted:build", "model.num_hidden_layers=4"],
    "checkpoints": ["checkpoint.every=1", "observers=[tests.launch.profile.planted:Slow]"],
}  # fmt: skip
LAYOUTS = {
    "one rank": ["launch.nproc=1"],
    "ZeRO 0": ["parallel.zero=0"],
    "ZeRO 3": ["parallel.zero=3"],
    "tp": ["parallel.tp=2", "parallel.zero=0"],
    "pp": ["parallel.pp=2", "parallel.zero=0"],
}
# A rank that is alone, or a stage of a pipeline, has none to compare it with.
RUNS = [(c, w) for c in PLANTED for w in LAYOUTS if c != "a slow rank" or w not in ("one rank", "pp")]


@pytest.mark.long
@pytest.mark.parametrize(("cause", "layout"), RUNS if FULL else [(c, "ZeRO 3") for c in PLANTED])
def test_what_slows_a_run_is_named_first(tmp_path, capsys, cause, layout):
    run, words = tmp_path / "run", ["steps=6", "profile.steps=[3,5]", *LAYOUTS[layout], *PLANTED[cause]]
    train_here(tmp_path, overrides(run, write_text(tmp_path / "text"), *words))
    found = json.loads(shown(capsys, run, "--json"))
    assert found["findings"][0]["cause"] == cause, found["findings"]
    for rank in found["ranks"]:
        assert any(".mlp" in name for name in rank["modules"]) and rank["memory"]["fp32 parameters"] > 0
    if cause == "a slow module":
        assert "layers.3.mlp takes" in found["advice"]
    elif cause == "a slow rank":
        assert found["slowest_rank"] == 1
        assert found["ranks"][0]["exposed_seconds"] > 0.5 > found["ranks"][1]["exposed_seconds"]
