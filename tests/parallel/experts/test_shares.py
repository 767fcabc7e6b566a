"""What a rank holds of the experts, what it sends for them, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from stoker.checkpoint.plan import pieces_to_write, plan_file
from stoker.checkpoint.tiling import PRIME
from stoker.conf.schema import Config
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import Shard
from stoker.trainer.parallelize import cut
from stoker.trainer.rehearsal import rehearse
from stoker.trainer.rehearsal.collectives import Collectives
from tests import world
from tests.parallel.experts.sparse import CHOICES, EXPERTS, HIDDEN
from tests.parallel.experts.test_parity import Sparse
from tests.parallel.parity import Case
from tests.parallel.reference import assemble, global_rows
from tests.parallel.watching import Syncs

LAYERS, WIDTH, MICRO, LENGTH = 4, 32, 2, 12


def held(config: Config) -> list[Shard]:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    return [shard for shard in cut(config, mesh, batch_plan(config, layout)).shards() if "optim" not in shard.kind]


@pytest.mark.parametrize(
    ("layout", "expert_tp"),
    [
        (Layout(2, ep=2), False),
        (Layout(1, 2, zero=3, ep=2), False),
        pytest.param(Layout(1, 4, zero=1, ep=4), False, marks=pytest.mark.long),
        pytest.param(Layout(1, 4, zero=3, ep=2), False, marks=pytest.mark.long),
        pytest.param(Layout(2, 2, zero=2, ep=2), False, marks=pytest.mark.long),
        pytest.param(Layout(1, 2, 2, zero=3, ep=2), True, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_rank_holds_its_part_and_a_missing_expert_is_found(layout: Layout, expert_tp: bool) -> None:
    config = Sparse(Case(MICRO), expert_tp=expert_tp).config(layout)
    ranks = world.run(held, layout.world, config)
    alone = assemble(world.run(held, 1, Sparse(Case(MICRO)).config(Layout())))
    for name, value in assemble(ranks).items():
        assert torch.equal(value, alone[name]), f"{name} starts as in one process"
    of_experts = LAYERS * EXPERTS * 3 * WIDTH * HIDDEN
    divided = layout.shards * (layout.tp if expert_tp else 1) if layout.zero else layout.ep
    for shards in ranks:
        own = sum(shard.data.numel() for shard in shards if ".experts." in shard.name)
        assert own * divided == of_experts
    plans = [plan_file(shards) for shards in ranks]
    assert sum(plan.cover for plan in plans) % PRIME == 0
    lost = next(n for n, shard in enumerate(ranks[1]) if ".experts." in shard.name and pieces_to_write(shard))
    left = plan_file([shard for number, shard in enumerate(ranks[1]) if number != lost])
    assert (sum(plan.cover for plan in plans) - plans[1].cover + left.cover) % PRIME


def seen(configs: list[Config]) -> list[tuple[list[str], dict]]:
    """On a rank: of each config what would wait for a device in a step, and its messages."""
    found = []
    for config in configs:
        layout = layout_of(config, dist.get_world_size())
        mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
        engine = cut(config, mesh, batch_plan(config, layout))
        rows = global_rows(config, 1)[mesh.dp_rank :: layout.dp]
        with Syncs() as syncs:
            engine.forward_backward(rows)
            engine.update(1e-3)
        with Collectives(mesh) as collectives:
            engine.forward_backward(rows)
            engine.update(1e-3)
        found.append((syncs.found, collectives.found))
    return found


@pytest.mark.long
def test_messages_are_those_of_the_tokens_choices_and_only_counts_are_waited_for() -> None:
    layout = Layout(2, 2, zero=1, ep=2)
    configs = [Sparse(Case(MICRO), dispatcher).config(layout) for dispatcher in ("alltoall", "allgather")]
    ranks = world.run(seen, layout.world, configs)
    passes, tokens = LAYERS * 2, MICRO * LENGTH  # of 16 rows each of 4 ranks has two micro-batches
    exchanged = [rank[0][1]["reduce_scatter", "ep"] for rank in ranks]
    for rank in ranks:
        syncs, _ = rank[0]
        assert len(syncs) == passes and all("dispatch" in place for place in syncs)
    assert {traffic.count for traffic in exchanged} == {5 * passes}  # counts; tokens and results, there and back
    rows = 4 * tokens * CHOICES * WIDTH * 4 * passes
    assert sum(traffic.bytes for traffic in exchanged) == layout.world * (rows + passes * EXPERTS * 8)
    of_experts = 4 * LAYERS * EXPERTS * 3 * WIDTH * HIDDEN // layout.ep
    for _, messages in (rank[0] for rank in ranks):
        dense = messages["reduce_scatter", "dp_shard"].bytes // layout.shards
        found = messages["all_reduce", "dp_replicate"].bytes
        assert found == dense + of_experts, "replicas of an expert sum its gradient, no others"
    for rank in ranks:
        syncs, messages = rank[1]
        assert syncs == [], "gathered tokens need no counts"
        gathered, summed = messages["all_gather", "ep"], messages["reduce_scatter", "ep"]
        assert (gathered.count, summed.count) == (4 * passes, 3 * passes)
        choices = CHOICES * (8 + 4)  # numbers of experts, and weights
        assert gathered.bytes == passes * 2 * tokens * (2 * WIDTH * 4 + choices)
        assert summed.bytes == passes * 2 * tokens * (2 * WIDTH * 4 + CHOICES * 4)
    for number, config in enumerate(configs):
        rehearsed = rehearse(config, layout, 0)
        messages = rehearsed.passes.plus(rehearsed.update).messages
        real = ranks[0][number][1]
        assert messages.keys() == real.keys()
        assert all(messages[key].count == real[key].count for key in real)
        assert number == 0 or messages == real
    total = rehearse(configs[0], layout, 0).passes.messages["reduce_scatter", "ep"].bytes
    assert layout.world * total == sum(traffic.bytes for traffic in exchanged), "as much as the ranks send on average"


def refused(config: Config) -> str:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    with pytest.raises(ValueError) as error:
        cut(config, mesh, batch_plan(config, layout))
    return str(error.value)


def test_a_model_whose_experts_do_not_divide_is_refused() -> None:
    layout = Layout(3, ep=3)
    config = Sparse(Case(1)).config(layout)
    config.batch.size = 12
    assert "layers.0.mlp.experts: 8 experts do not divide over parallel.ep=3" in world.run(refused, 3, config)[0]
    dense = Case(1).config(Layout(2))
    dense.parallel.ep = 2
    assert "Decoder has no experts to share over 2 ranks" in world.run(refused, 2, dense)[0]
