"""From facts to findings: what is named, what is refused, and that equal machines have none."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from stoker.conf.schema import Config
from stoker.trainer.probe.facts import AxisLink, Facts, FolderRate, Gpu, Interface, Line, Link, facts_of
from stoker.trainer.probe.judge import REFUSE, WARN, Finding, judge, slow_ranks
from stoker.trainer.probe.needs import Needs
from tests.trainer.probe.fabricated import FAIR, MACHINE, ranks


def found(facts: list[Facts], config: Config | None = None, needs: Needs | None = None) -> list[Finding]:
    return judge(facts, config or Config(), needs)


def texts(facts: list[Facts], subject: str, needs: Needs | None = None) -> list[str]:
    findings = found(facts, needs=needs)
    assert all(finding.subject == subject for finding in findings), findings
    return [finding.text for finding in findings]


@pytest.mark.parametrize("machines", [1, 2, 3, 16])
def test_equal_machines_have_no_findings(machines: int) -> None:
    assert found(ranks(machines)) == []
    assert found(ranks(machines, each=1)) == []


def test_facts_survive_their_way_between_ranks() -> None:
    gpu, port = Gpu("H100", "GPU-1", 3, slowed=["heat"]), Interface("ib0", "infiniband", True, 400.0)
    host = replace(MACHINE, gpus=[gpu], interfaces=[port])
    axis, folder = AxisLink("tp", "all_reduce", [0, 1], FAIR, 1 << 20), FolderRate("data", "/d", "read", None, 0, "why")
    facts = replace(ranks(2)[0], machine=host, axes=[axis], folders=[folder], peaks={"fp32": 1.5})
    assert facts_of(facts.text()) == facts


def test_a_slow_rank_is_named_and_one_of_two_as_well() -> None:
    facts = ranks(1, each=8)
    facts[3] = replace(facts[3], windows=[3e9] * 5)
    (line,) = texts(facts, "slow")
    assert line.startswith("rank 3 (n0) multiplies matrices at 30% of the others'")
    pair = ranks(1)
    pair[0] = replace(pair[0], windows=[3e9] * 5)
    assert slow_ranks(pair) == {0: pytest.approx(0.3)}


def test_a_rank_that_loses_single_windows_is_not_slow() -> None:
    facts = ranks(1, each=4)
    facts[2] = replace(facts[2], windows=[1e9, 1e10, 1e9, 1e10, 1e10])
    assert found(facts) == []


def test_a_machine_whose_ranks_are_all_slow_is_named_once() -> None:
    facts = [replace(each, windows=[5e9] * 5) if each.host == "n2" else each for each in ranks(4)]
    (line,) = texts(facts, "slow")
    assert line.startswith("n2: all of its ranks") and "50%" in line


def test_devices_of_another_kind_are_no_slow_ranks() -> None:
    facts = [replace(each, device="another", windows=[1e9] * 5) if each.rank < 2 else each for each in ranks(2)]
    assert slow_ranks(facts) == {}


def slower(facts: list[Facts], line: Line, *ways: tuple[int, int]) -> list[Facts]:
    return [
        replace(each, links=[Link(at.to, line) if (each.rank, at.to) in ways else at for at in each.links])
        for each in facts
    ]


SLOW, FAR = Line(50e-6, 1e9), Line(20e-3, 10e9)


def test_a_machine_with_slow_links_is_named_once_and_a_slow_way_by_both_ends() -> None:
    around = [(4, 0), (4, 2), (0, 4), (2, 4)]
    (line,) = texts(slower(ranks(3), SLOW, *around), "link")
    assert line.startswith("messages to and from n2 go at 10% of the better links' rate")
    (line,) = texts(slower(ranks(4), SLOW, (4, 0), (4, 2), (4, 6)), "link")
    assert line.startswith("messages from n2 go at 10%")
    (line,) = texts(slower(ranks(3), SLOW, (4, 2)), "link")
    assert line.startswith("messages from n2 to n1 go at 10%")
    (line,) = texts(slower(ranks(2), SLOW, (2, 0)), "link")
    assert line.startswith("messages from n1 to n0 go at 10%"), "of two machines by direction"


def test_links_that_answer_late_are_named_of_two_machines_too() -> None:
    (line,) = texts(slower(ranks(3), FAR, (4, 0), (4, 2), (0, 4), (2, 4)), "link")
    assert line.startswith("messages to and from n2 take 20.0 ms")
    assert len(texts(slower(ranks(2), FAR, (0, 2), (2, 0)), "link")) == 2


def test_a_slow_group_of_an_axis_is_named() -> None:
    facts = ranks(1, each=6)
    for rank, each in enumerate(facts):
        own = [rank // 2 * 2, rank // 2 * 2 + 1]
        line = SLOW if own[0] == 2 else FAIR
        facts[rank] = replace(each, axes=[AxisLink("tp", "all_reduce", own, line, 1 << 20)])
    (text,) = texts(facts, "group")
    assert text.startswith("the tp group of ranks 2, 3 exchanges at 10% of the others'")


def test_a_clock_that_is_off_is_named_by_machine_or_by_rank() -> None:
    facts = [replace(each, clock=-2.0) if each.host == "n1" else each for each in ranks(2)]
    (line,) = texts(facts, "clock")
    assert line.startswith("the clock of n1 is 2.0 s behind")
    facts = [replace(each, clock=2.0) if each.rank == 1 else each for each in ranks(2)]
    assert texts(facts, "clock")[0].startswith("the clock of rank 1 (n0) is 2.0 s ahead of")


def test_other_versions_are_refused_and_those_of_the_fewer_are_named() -> None:
    facts = [replace(each, versions={"torch": "2.12.1"}) if each.host == "n1" else each for each in ranks(3)]
    (finding,) = found(facts)
    assert finding.severity == REFUSE
    assert finding.text.startswith("torch is 2.12.1 on n1 (ranks 2, 3) and 2.13.0 on the others")
    facts = [replace(each, versions={}) if each.rank == 3 else each for each in ranks(2)]
    assert found(facts)[0].text.startswith("torch is absent on n1 (ranks 3)")


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        ({"shm_bytes": 64 << 20}, "shm", "/dev/shm of n1 has 64 MiB, less than 256 MiB for 2 ranks"),
        ({"open_files": 64}, "files", "a rank of n1 may open 64 files"),
        ({"cores": 1}, "cores", "n1 has 1 cores for 2 ranks"),
        ({"memlock": 64 << 10, "interfaces": [Interface("mlx5_0:1", "infiniband", True)]}, "memlock", "n1 may lock"),
        ({"interfaces": [Interface("mlx5_0:1", "infiniband", False)]}, "interface", "port mlx5_0:1 is not active"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_machine_lacks_is_named_with_the_machine(change: dict, subject: str, words: str) -> None:
    facts = ranks(2)
    facts[2] = replace(facts[2], machine=replace(MACHINE, **change))
    (line,) = texts(facts, subject)
    assert words in line and "n1" in line


def test_a_machine_with_slower_interfaces_than_the_others_is_named() -> None:
    facts = ranks(2)
    for rank, speed in ((0, 400.0), (2, 200.0)):
        ports = [Interface("mlx5_0:1", "infiniband", True, speed), Interface("eth0", "ethernet", True, 10.0)]
        facts[rank] = replace(facts[rank], machine=replace(MACHINE, interfaces=ports))
    assert texts(facts, "interface") == ["n1 has 200 Gbit/s of active interfaces, others 400"]


def test_gpus_that_are_ill_slowed_or_missing_are_named_and_one_is_refused() -> None:
    facts = ranks(2, cuda=True)
    ill = [Gpu("H100", "GPU-a", 2, True, True, ["heat"]), Gpu("H100", "GPU-b")]
    facts[2] = replace(facts[2], machine=replace(MACHINE, gpus=ill, visible=2))
    facts[0] = replace(facts[0], machine=replace(MACHINE, gpus=[Gpu("H100", "GPU-c")] * 4, visible=4))
    findings = found(facts)
    assert [finding.severity for finding in findings] == [REFUSE, WARN, WARN, WARN, WARN]
    said = " ".join(finding.text for finding in findings)
    for words in ("could not be replaced", "at the next reset", "2 uncorrected", "lowered by heat"):
        assert f"GPU-a on n1: {words}" in said or words in said
    assert "n1 has 2 GPUs where the others have 4" in said


def test_storage_is_compared_with_what_the_run_needs() -> None:
    facts = ranks(2)
    for rank, rate in ((0, 2e8), (2, 1e8)):
        facts[rank] = replace(facts[rank], folders=[FolderRate("checkpoints", "/c", "write", rate, 1 << 28)])
    assert texts(facts, "storage", Needs(1.0, 1e9, 1e8)) == []
    (line,) = texts(facts, "storage", Needs(1.0, 1e9, 1e9))
    assert line == "checkpoints: /c gives 0.1 GB/s on n1, and the run needs up to 0.5 GB/s there"
    unknown = [replace(each, folders=[replace(f, rate=None) for f in each.folders]) for each in facts]
    assert texts(unknown, "storage", Needs(1.0, 1e9, 1e9)) == [], "what was not measured is not judged"


def test_every_field_of_facts_has_an_honest_default() -> None:
    """What a rank did not measure is None or empty, and nothing is concluded from it."""
    names = {field.name for field in dataclasses.fields(Facts) if field.default is dataclasses.MISSING}
    bare = [Facts(rank, "n", 0, "a CPU", False, 1.0) for rank in range(2)]
    assert names >= {"rank", "host", "first"} and found(bare) == []
