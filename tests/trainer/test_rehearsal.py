"""A rehearsal on fake tensors needs what a run needs: the memory of every rank, while building and at the peak."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import BatchConfig, Config
from stoker.models.flops import flops_per_token
from stoker.parallel.layout import layout_of
from stoker.trainer.parallelize import parameters_of, trained_and_frozen
from stoker.trainer.rehearsal import Category, rehearse
from stoker.trainer.rehearsal.fake_ranks import fake_tensors
from stoker.trainer.rehearsal.memory import MemoryLog
from tests import world
from tests.extent import FULL
from tests.trainer.rehearsed import config_of, growth

MIB = 1 << 20
SHARE, MORE = 0.05, 40 * MIB  # of the rehearsed bytes, and beyond that


def off(config: Config, ranks: int) -> list[str]:
    """The ranks whose real growth is not the rehearsed one."""
    real = world.run(growth, ranks, config, fresh=True, timeout=200.0)
    found = []
    for rank, (built, most) in enumerate(real):
        rehearsed = rehearse(config, layout_of(config, ranks), rank)
        for name, seen, bytes_ in (("built", built, rehearsed.build.bytes), ("peak", most, rehearsed.peak.bytes)):
            if abs(seen - bytes_) > SHARE * bytes_ + MORE:
                found.append(f"rank {rank} {name}: {seen / MIB:.1f} MiB, rehearsed {bytes_ / MIB:.1f}")
        assert rehearsed.peak.bytes > 2 * MORE, "too small to tell"
    return found


def with_adapter(config: Config) -> Config:
    config.adapter.name, config.adapter.rank = "lora", 16
    return config


def of_weights(config: Config) -> Config:
    """With more memory for weights than for activations."""
    config.model.hidden_size, config.model.intermediate_size = 1024, 2816
    config.batch = BatchConfig(2, 1)
    return config


def of_a_user(config: Config) -> Config:
    config.model.target = "tests.toy:build"
    return config


LAYOUTS = {
    "one rank": (1, config_of(zero=0)),
    "ZeRO 0": (2, config_of(zero=0)),
    "ZeRO 1": (2, config_of(zero=1)),
    "ZeRO 2": (2, config_of(zero=2)),
    "ZeRO 3": (2, config_of(zero=3)),
    "hybrid": (4, config_of(zero=3, dp_replicate=2)),
    "tp": (2, config_of(tp=2, zero=0, layers=4)),
    "tp whole": (2, config_of(tp=2, zero=0, sequence_parallel=False, layers=4)),
    "tp x ZeRO 1": (4, config_of(tp=2, zero=1, layers=4)),
    "1f1b": (2, config_of(pp=2, zero=0, layers=4)),
    "gpipe": (2, config_of(pp=2, zero=0, schedule="gpipe")),
    "interleaved": (2, config_of(pp=2, zero=0, schedule="interleaved", stages_per_rank=2, layers=4)),
    "offload": (1, config_of(zero=0, offload="cpu")),
    "full": (2, config_of(zero=3, activation_checkpointing="full", layers=12)),
    "selective": (2, config_of(zero=1, activation_checkpointing="selective", layers=3)),
    "bf16": (1, config_of("bf16", zero=0, layers=3)),
    "documents": (1, config_of(zero=0, document_mask=True)),
    "LoRA": (2, with_adapter(config_of(zero=2, layers=8))),
    "LoRA, bf16": (1, with_adapter(of_weights(config_of("bf16", 16, zero=0, layers=4)))),
    "LoRA, bf16, ZeRO 3": (2, with_adapter(of_weights(config_of("bf16", 16, zero=3, layers=8)))),
    "a user's model": (2, of_a_user(config_of(zero=3, layers=6))),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS if FULL else ["ZeRO 1", "ZeRO 3", "LoRA, bf16"])
def test_every_ranks_memory_grows_as_rehearsed_in_every_layout(name: str) -> None:
    ranks, config = LAYOUTS[name]
    assert off(config, ranks) == []


def test_storages_are_followed_from_their_first_operation_to_their_end() -> None:
    with fake_tensors(), MemoryLog() as log:
        log.phase = "first"
        kept = torch.zeros(1000)
        view = kept[:10]  # the same storage
        log.phase = "second"
        large = torch.zeros(3000)
        del large
        log.phase = "third"
        del kept
        assert log.now().bytes == 4000
        peak = log.peak()
        assert (peak.bytes, peak.phase) == (16_000, "second")
        del view
        gc.collect()
        assert log.now().bytes == 0
        assert log.peak().bytes == 4000, "what was live when the span began"
    assert torch.UntypedStorage.resize_.__name__ == "resize_" and not dist.is_initialized()


def test_a_storage_that_is_emptied_and_filled_again_counts_while_it_is_full() -> None:
    with fake_tensors(), MemoryLog() as log:
        tensor = torch.zeros(1000)
        tensor.untyped_storage().resize_(0)
        assert log.now().bytes == 0
        tensor.untyped_storage().resize_(4000)
        assert log.now().bytes == 4000
        log.assign(Category.LOSS, [tensor])
        assert log.peak().categories == {Category.LOSS: 4000}


def test_states_are_counted_to_the_byte_on_each_layout() -> None:
    """fp32 masters, two moments and gradients, a copy in bf16: 18 bytes a parameter, shared as the layout shares."""
    config = config_of("bf16", seq_len=16, zero=0, layers=1)
    numbers = 2 * 512 * 128 + 128 * (128 + 64 + 64 + 128) + 3 * 128 * 352 + 3 * 128  # parameters
    states = rehearse(config, layout_of(config, 2), 1).held.categories
    assert states[Category.MASTERS] == states[Category.GRADIENTS] == 4 * numbers
    assert states[Category.OPTIMIZER] == pytest.approx(8 * numbers, abs=100)  # and a count of steps each
    assert states[Category.COPIES] == 2 * numbers
    config.parallel.zero = 3
    states = rehearse(config, layout_of(config, 4), 3).held.categories
    assert states[Category.MASTERS] == numbers
    assert states[Category.OPTIMIZER] == pytest.approx(2 * numbers, abs=100)
    assert not {Category.COPIES, Category.GRADIENTS, Category.GATHERED} & states.keys()


@pytest.mark.parametrize(("zero", "ranks"), [(0, 2), (3, 4)])
def test_frozen_parameters_are_counted_in_the_compute_dtype_and_trained_ones_as_ever(zero: int, ranks: int) -> None:
    config = with_adapter(config_of("bf16", seq_len=16, zero=zero))
    trained, frozen = trained_and_frozen(config)
    assert frozen == parameters_of(config) and trained < frozen / 4
    found = rehearse(config, layout_of(config, ranks), 1)
    states, shards = found.held.categories, ranks if zero else 1
    assert states[Category.FROZEN] == 2 * frozen / shards
    assert states[Category.MASTERS] == 4 * trained / shards
    assert states[Category.OPTIMIZER] == pytest.approx(8 * trained / shards, abs=2000)  # and counts of steps
    assert states.get(Category.COPIES, 0) == (0 if zero else 2 * trained)
    assert found.staged == pytest.approx(12 * trained / ranks, rel=0.3)  # a rank's part of what is trained


@pytest.mark.parametrize(
    ("ranks", "rows", "changes"),
    [
        (1, 48, {"zero": 0}),
        (2, 64, {"zero": 3}),
        (2, 32, {"tp": 2, "zero": 0}),
        (2, 32, {"pp": 2, "zero": 0}),
    ],
    ids=str,
)
def test_operations_are_those_of_the_closed_form(ranks: int, rows: int, changes: dict[str, object]) -> None:
    config = config_of(seq_len=32, **changes)
    config.batch.size = rows
    layout = layout_of(config, ranks)
    counted = sum(rehearse(config, layout, rank).passes.flops for rank in range(ranks))
    per_token = flops_per_token(config.model, config.seq_len, parameters_of(config))
    assert counted == pytest.approx(rows * config.seq_len * per_token, rel=5e-3)


@pytest.mark.parametrize(
    "experts",
    [
        {"ep": 2},
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"ep": 2, "token_dispatcher": "allgather"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_experts_are_rehearsed_and_each_is_held_once_by_its_group(experts: dict[str, object]) -> None:
    config = config_of(seq_len=32, zero=1, **experts)
    config.model.num_experts, config.model.num_experts_per_tok, config.model.router_bias = 4, 2, True
    layout = layout_of(config, 2)
    found = [rehearse(config, layout, rank) for rank in range(2)]
    held = sum(each.held.categories[Category.MASTERS] for each in found)
    assert held == pytest.approx(4 * parameters_of(config), abs=1000)  # and buffers of experts
    assert found[0].passes.flops == found[1].passes.flops > 0


@pytest.mark.long
def test_recomputed_blocks_cost_another_forward_of_them_but_for_the_last_product() -> None:
    config = config_of("bf16", seq_len=32, zero=0)
    once = rehearse(config, layout_of(config, 1), 0, "cuda")
    config.activation_checkpointing = "full"
    again = rehearse(config, layout_of(config, 1), 0, "cuda")
    tokens, width, hidden, layers = 64 * 32, 128, 352, 2
    head, last = 6 * 512 * width * tokens, 2 * hidden * width * tokens * layers  # no backward needs its output
    assert again.passes.flops - once.passes.flops == (once.passes.flops - head) / 3 - last
    assert again.step.bytes < once.step.bytes


@pytest.mark.long
def test_micro_batches_that_are_not_rehearsed_are_counted() -> None:
    """Each but the last sends the same, and the last what two micro-batches send less that."""
    config = config_of(seq_len=32, zero=3)
    found = []
    for rows in (32, 64, 160):  # 1, 2 and 5 micro-batches of each rank
        config.batch.size = rows
        found.append(rehearse(config, layout_of(config, 2), 0).passes)
    one, two, five = found
    assert five == two.plus(two.plus(one, -1), 3)
    assert five.messages["reduce_scatter", "world"].count == 5 * one.messages["reduce_scatter", "world"].count


def test_a_rehearsal_needs_a_process_without_a_process_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="already has a process group"):
            rehearse(config_of(), layout_of(config_of(), 1), 0)
    finally:
        dist.destroy_process_group()
