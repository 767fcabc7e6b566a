"""`stoker probe`: the ranks of a start measure, machine.json goes into a plan, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stoker.conf.devices import device_named
from stoker.conf.schema import Config
from stoker.launch.cli import main
from stoker.launch.probe.machine import Report, bottleneck, machine_of
from stoker.launch.probe.show import print_report
from stoker.trainer.plan.times import MESSAGE_SECONDS, PRODUCTS, rates_of
from stoker.trainer.probe.facts import AxisLink, Facts, FolderRate, Line
from stoker.trainer.probe.judge import judge
from stoker.trainer.probe.links import KINDS
from stoker.trainer.probe.needs import needs_of
from stoker.trainer.probe.passes import Passes
from tests.launch.runs import command, finish
from tests.trainer.probe.fabricated import FAIR, ranks

SMALL = ["model.hidden_size=64", "model.intermediate_size=64", "model.num_hidden_layers=1", "seq_len=64"]
AXIS = AxisLink("dp_shard", "all_gather", [0, 1], Line(1e-4, 2e9), 1 << 24)


def measured(machines: int = 1) -> list[Facts]:
    return ranks(machines, peaks={"bf16": 2e11, "fp32": 1e11}, own=1.5e11, memory=2e10, axes=[AXIS])


def small() -> Config:
    config = Config(seq_len=64)
    config.model.hidden_size, config.model.intermediate_size, config.model.num_hidden_layers = 64, 64, 1
    config.model.vocab_size, config.model.num_attention_heads = 256, 2
    return config


@pytest.mark.long
def test_a_probe_writes_what_a_plan_takes(tmp_path: Path) -> None:
    words = [*SMALL, "launch.nproc=2", "parallel.tp=2"]
    status, output = finish(tmp_path, command("probe", *words, "--quick"))
    assert status == 0, output
    assert "2 ranks on 1 machine, all at once" in output and "\nbottleneck: " in output
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["kind"] == "cpu" and found["measured"]["products_tflops"] > 0
    assert [(link["axis"], link["kind"]) for link in found["probe"]["ranks"][0]["axes"]] == [
        ("tp", kind) for kind in KINDS
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["machine.json"]
    status, output = finish(tmp_path, command("plan", *words, "--gpu", "machine.json", "--json"))
    assert status == 0 and json.loads(output.splitlines()[-1])["times"]["step"]["products"] > 0, output


def test_a_start_that_is_refused_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "launch.nproc=3", "parallel.tp=2"]) == 2
    assert "3 ranks" in capsys.readouterr().err


def test_what_the_first_rank_prints_is_printed_and_a_failed_rank_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "rank"
    monkeypatch.setattr("stoker.launch.probe.start.sys.executable", str(program))
    for script, expected in (
        ('echo "$@" of $RANK', (0, "-P -m stoker.launch.probe --quick --out a.json of 0\n", "")),
        ("[ $RANK = 0 ] && exec sleep 60; exit 3", (1, "", "stoker: rank 1 ended with status 3\n")),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        status = main(["probe", "launch.nproc=2", "launch.device=cpu", "--quick", "--out", "a.json"])
        seen = capsys.readouterr()
        assert (status, seen.out.splitlines()[:1], seen.err) == (expected[0], expected[1].splitlines()[:1], expected[2])


def test_machine_json_is_a_device_with_measured_rates(tmp_path: Path) -> None:
    facts, config = measured(), small()
    sentence, times = bottleneck(facts, config, [], machine_of(facts, config))
    report = Report(config, facts, judge(facts, config), None, machine_of(facts, config), sentence, times)
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(report.values(), allow_nan=False))
    device = device_named(str(file))
    assert device.kind == "cpu" and device.memory_gib == 16.0 and device.tflops == {"bf16": 0.2, "fp32": 0.1}
    rates = rates_of(device, "bf16")
    assert rates is not None
    assert (rates.products, rates.memory, rates.link, rates.link_seconds) == (1.5e11, 2e10, 2e9, 1e-4)
    assert (rates.machine, rates.network) == (2, None)
    other = rates_of(device, "fp32")
    assert other is not None and other.products == 1e11 * PRODUCTS and other.link_seconds == MESSAGE_SECONDS
    assert times is not None and sentence.startswith("bottleneck: ") and " of an estimated step are " in sentence


def test_passes_of_the_slowest_rank_are_compared_with_what_the_rates_add_up_to() -> None:
    passes = [Passes(flops=15 * 10**9, moved=10**9, calls=1000, seconds=seconds) for seconds in (0.2, 0.3)]
    facts = [Facts(**{**vars(each), "call": 5e-5, "passes": own}) for each, own in zip(measured(), passes, strict=True)]
    found = machine_of(facts, small()).measured
    assert found is not None and found.call_seconds == 5e-5
    assert found.passes == pytest.approx(0.3 / (0.1 + 0.05 + 0.05), rel=1e-3)
    assert found.link_kinds == {"all_gather": [2.0, 1e-4]} and found.network_kinds == {}


def test_a_slow_machine_is_the_bottleneck_before_any_part_of_a_step() -> None:
    config = small()
    facts = [Facts(**{**vars(each), "windows": [3e9] * 5}) if each.host == "n1" else each for each in measured(3)]
    findings = judge(facts, config)
    sentence, _ = bottleneck(facts, config, findings, machine_of(facts, config))
    assert sentence.startswith("bottleneck: n1: all of its ranks multiply matrices at 30%")


def test_tables_have_all_that_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    config = small()
    folders = [
        FolderRate("data", "/d", "read", None, 0, "it came from the page cache"),
        FolderRate("cache", "/c", "write", 5e8, 1 << 20),
    ]
    facts = ranks(2, peaks={"bf16": 2e11}, own=1.5e11, memory=2e10, axes=[AXIS], folders=folders)
    needs = needs_of(config, 6e11)
    assert needs.step_seconds > 0 and needs.data > 0 and needs.checkpoints > 0
    print_report(
        Report(config, facts, judge(facts, config), needs, machine_of(facts, config), "bottleneck: none", None)
    )
    out = capsys.readouterr().out
    for words in (
        "4 ranks on 2 machines, all at once: a CPU", "products bf16, best", "200.0", "the model's", "dp_shard",
        "n1    n0", f"{FAIR.rate / 1e9:.3f} GB/s", "it came from the page cache", "0.50 GB/s", "bottleneck: none",
        "nothing unusual",
    ):  # fmt: skip
        assert words in out, out
