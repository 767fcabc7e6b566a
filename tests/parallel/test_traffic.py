"""No step waits for the device, and its messages are those that its layout needs: number, bytes and group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import Config
from stoker.models.family import build_on_meta
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.model import whole_model
from stoker.parallel.replicated import BUCKET_NUMEL
from stoker.trainer.parallelize import cut
from stoker.trainer.rehearsal import Traffic, rehearse
from stoker.trainer.rehearsal.collectives import Collectives
from tests import world
from tests.extent import some
from tests.parallel.parity import Case
from tests.parallel.reference import global_rows
from tests.parallel.watching import Syncs

MICRO, LAYERS = 2, 4  # micro-batches' rows, blocks


@dataclass(frozen=True)
class Seen:
    syncs: list[str]
    traffic: dict[tuple[str, str], Traffic]


def watched(config: Config) -> Seen:
    """On a rank: a step after the first, in which torch's pipeline asks its stages how they exchange."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    rows = global_rows(config, 1)[mesh.dp_rank :: layout.dp]
    engine.forward_backward(rows)
    engine.update(1e-3)
    with Syncs() as syncs:
        engine.forward_backward(rows)
        engine.update(1e-3)
    with Collectives(mesh) as collectives:
        engine.forward_backward(rows)
        engine.update(1e-3)
    return Seen(syncs.found, collectives.found)


def config_of(layout: Layout, schedule: str = "1f1b", precision: str = "bf16", **changes: object) -> Config:
    config = Case(MICRO, schedule, tied=False).config(layout, LAYERS if schedule != "interleaved" else 4)
    config.precision = precision
    return replace(config, **changes)  # type: ignore[arg-type]


pytestmark = pytest.mark.long

STRATEGIES = {
    "replicated": config_of(Layout(2)),
    "ZeRO 1": config_of(Layout(1, 2, zero=1)),
    "ZeRO 2": config_of(Layout(1, 2, zero=2)),
    "ZeRO 3": config_of(Layout(1, 2, zero=3)),
    "tp": config_of(Layout(tp=2)),
    "1f1b": config_of(Layout(pp=2)),
    "interleaved": config_of(Layout(pp=2), "interleaved"),
    "gpipe": config_of(Layout(pp=2), "gpipe"),
    "fp16": config_of(Layout(1, 2, zero=3), precision="fp16"),
    "full recomputation": config_of(Layout(1, 2, zero=3), activation_checkpointing="full"),
    "selective recomputation": config_of(Layout(tp=2), activation_checkpointing="selective"),
    "no clipping": config_of(Layout(2), grad_clip_norm=None),
}


def all_watched(configs: list[Config]) -> list[Seen]:
    return [watched(config) for config in configs]


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Seen]]:
    """Of each strategy, what its two ranks saw."""
    first, second = world.run(all_watched, 2, list(STRATEGIES.values()), timeout=240.0)
    return {name: list(ranks) for name, ranks in zip(STRATEGIES, zip(first, second, strict=True), strict=True)}


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_step_waits_for_the_device(name: str, seen: dict[str, list[Seen]]) -> None:
    for rank in seen[name]:
        assert rank.syncs == []


def test_what_waits_is_seen() -> None:
    x = torch.ones(3)
    waits = [
        lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: float(x[0]), lambda: x.tolist(), lambda: x.cpu(),
        lambda: x.numpy(), lambda: x.nonzero(), lambda: x[x > 0], lambda: torch.equal(x, x), lambda: int(x[1]),
    ]  # fmt: skip
    for wait in waits:
        with Syncs() as syncs:
            wait()
        assert len(syncs.found) == 1, syncs.found
    with Syncs() as syncs:
        torch.where(x > 0, x, 0.0).sum()
    assert syncs.found == []


@pytest.mark.parametrize("name", some(list(STRATEGIES), 3))
def test_a_rehearsal_counts_the_messages_of_a_real_step(name: str, seen: dict[str, list[Seen]]) -> None:
    config = STRATEGIES[name]
    for rank, real in enumerate(seen[name]):
        rehearsed = rehearse(config, layout_of(config, 2), rank)
        assert rehearsed.passes.plus(rehearsed.update).messages == real.traffic


def sizes(config: Config) -> dict[str, int]:
    """Numbers in each parameter of the whole model."""
    model = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    return {name: math.prod(parameter.shape) for name, parameter in model.named_parameters()}


def of_units(config: Config, ranks: int) -> dict[str, int]:
    """Numbers in each unit as `fully_shard` gathers it: dim 0 filled up to a multiple of the ranks."""
    model = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    units: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        unit = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        rows = -(-parameter.shape[0] // ranks) * ranks
        units[unit] = units.get(unit, 0) + rows * math.prod(parameter.shape[1:])
    return units


def without_message(rank: Seen) -> dict[tuple[str, str], Traffic]:
    """All but the step's one message, a float64 for each of a few numbers."""
    found = dict(rank.traffic)
    message = found.pop(("all_reduce", "world"))
    assert message.count == 1 and message.bytes < 200
    return found


def test_replicas_reduce_each_gradient_once_a_step(seen) -> None:
    config = STRATEGIES["replicated"]
    total = sum(-(-size // 16) * 16 for size in sizes(config).values())
    buckets = 1  # smaller than one
    assert total < BUCKET_NUMEL["cpu"]
    for rank in seen["replicated"]:
        found = dict(rank.traffic)
        assert found.keys() == {("all_reduce", "world")}, "the group of replicas is the world"
        reduced = found["all_reduce", "world"]
        assert reduced.count == buckets + 1 and 0 < reduced.bytes - 4 * total < 200


@pytest.mark.parametrize(("name", "gathers", "scatters"), [("ZeRO 1", 1, 1), ("ZeRO 2", 1, 4), ("ZeRO 3", None, 4)])
def test_shards_are_gathered_and_gradients_scattered_as_often_as_the_stage_says(name, gathers, scatters, seen) -> None:
    """Four micro-batches. Gathers are of bf16, gradients are reduced in fp32; ZeRO 3 gathers blocks and the embedding
    for forward and for backward (the embedding's backward needs none), the head and the last norm once."""
    config, micro_batches = STRATEGIES[name], 4
    units = of_units(config, 2)
    assert set(units) == {"embedding", "layers.0", "layers.1", "layers.2", "layers.3", "norm", "head"}
    blocks = [size for unit, size in units.items() if unit.startswith("layers")]
    for rank in seen[name]:
        found = dict(rank.traffic)
        gathered, scattered = found["all_gather", "world"], found["reduce_scatter", "world"]
        assert scattered.count == scatters * len(units)
        assert scattered.bytes == scatters * 4 * sum(units.values())
        if gathers is not None:
            assert (gathered.count, gathered.bytes) == (len(units), 2 * sum(units.values()))
        else:
            again = micro_batches * (len(blocks) + EMBEDDING_AGAIN)
            more = micro_batches * (sum(blocks) + EMBEDDING_AGAIN * units["embedding"])
            assert gathered.count == micro_batches * len(units) + again
            assert gathered.bytes == 2 * (micro_batches * sum(units.values()) + more)


EMBEDDING_AGAIN = 1


TOKENS, WIDTH, MICRO_BATCHES = MICRO * 12, 32, 8  # of a micro-batch; a single data-parallel rank has 16 rows
ACTIVATION = TOKENS * WIDTH * 2  # bytes in bf16


def test_tensor_parallel_ranks_exchange_activations_four_times_a_block_and_direction(seen) -> None:
    """With sequence parallelism: two gathers and two scatters for a block forward and as many backward, one each for
    the embedding and the head; the loss gathers two fp64 numbers a token; norms' gradients are summed once a step."""
    for rank in seen["tp"]:
        found = dict(rank.traffic)
        gathered, scattered = found["all_gather", "world"], found["reduce_scatter", "world"]
        assert scattered.count == MICRO_BATCHES * (4 * LAYERS + 2)
        assert scattered.bytes == scattered.count * ACTIVATION
        assert gathered.count == MICRO_BATCHES * (4 * LAYERS + 3)
        of_loss = MICRO_BATCHES * TOKENS * 2 * 8 * 2
        assert gathered.bytes == MICRO_BATCHES * (4 * LAYERS + 2) * ACTIVATION + of_loss
        reduced = found["all_reduce", "world"]
        norms = 4 * WIDTH * (2 * LAYERS + 1)
        assert reduced.count == 2 and 0 < reduced.bytes - norms < 200
        assert found.keys() == {("all_gather", "world"), ("reduce_scatter", "world"), ("all_reduce", "world")}


@pytest.mark.parametrize(("name", "transfers"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 3)])
def test_stages_send_an_activation_forward_and_a_gradient_back_and_nothing_else(name, transfers, seen) -> None:
    """Of three borders between four interleaved stages each rank sends over all three, one way or the other."""
    for rank in seen[name]:
        found = without_message(rank)
        count = MICRO_BATCHES * transfers
        assert found == {
            ("send", "world"): Traffic(count, count * ACTIVATION),
            ("receive", "world"): Traffic(count, count * ACTIVATION),
        }
