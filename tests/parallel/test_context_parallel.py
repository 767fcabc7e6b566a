"""Context parallelism: ranks that share the tokens of every sequence compute one process's run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from stoker.conf.schema import BatchConfig, Config
from stoker.models.attention import AttentionMask, CoreAttention, attention, document_mask
from stoker.parallel.batch import Batch
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.sequence import EXCHANGES, SequenceAxis, own_tokens
from stoker.parallel.sequence.blocks import block_size, keys_of, order
from stoker.trainer.parallelize import cut
from stoker.trainer.rehearsal import Category, rehearse
from tests import world
from tests.extent import some
from tests.parallel.parity import Case, assert_parity, train
from tests.parallel.reference import assemble, global_rows, normwise, one_process, small_config
from tests.parallel.test_deepspeed import assert_parity as assert_parity_of_deepspeed
from tests.trainer.rehearsed import config_of as rehearsed_config
from tests.trainer.test_resume import HALF, half

GATHER, ULYSSES = EXCHANGES


def documents_of(length: int, mean: float, seed: int) -> np.ndarray:
    """Of lognormal lengths, as `[length]` numbers."""
    generator, lengths = np.random.default_rng(seed), []
    while sum(lengths) < length:
        lengths.append(min(length, max(1, int(generator.lognormal(np.log(mean), 1)))))
    return np.repeat(np.arange(len(lengths)), lengths)[:length]


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("mean", [500, 4000, 1e9])
def test_no_rank_has_more_than_a_twentieth_more_work_than_the_mean(ranks: int, mean: float) -> None:
    for seed in range(10):
        documents = documents_of(16384, mean, seed)
        work = keys_of(documents)[order(documents, ranks)].sum(1)
        assert work.max() <= 1.05 * work.mean()


@pytest.mark.parametrize(("length", "ranks"), [(12, 2), (12, 4), (12, 12), (64, 4), (1000, 8), (4096, 2)])
def test_every_token_has_one_rank_and_ranks_have_equally_many_in_their_order(length: int, ranks: int) -> None:
    for documents in (np.arange(length), np.zeros(length, int), documents_of(length, 5, 0)):
        found = order(documents, ranks)
        assert found.shape == (ranks, length // ranks)
        assert sorted(found.flatten()) == list(range(length))
        assert (np.diff(found, axis=1) > 0).all()


def test_blocks_divide_a_share_and_are_at_most_128_tokens() -> None:
    for share in (1, 3, 8, 12, 97, 500, 2048, 2**17):
        size = block_size(share)
        assert share % size == 0 and size <= 128
    assert block_size(2048) == 128 and block_size(64) == 8


def test_the_keys_of_a_query_are_counted_within_its_document() -> None:
    assert keys_of(np.array([0, 0, 0, 1, 2, 2])).tolist() == [1, 2, 3, 1, 1, 2]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_ranks_shares_of_a_batch_are_the_batch_with_every_label(exchange: str) -> None:
    rows = replace(global_rows(small_config(), 1), weights=torch.rand(8, 12))
    shares = [own_tokens(rows, SequenceAxis(4, rank, "", exchange, False), True) for rank in range(4)]
    assert sum(int(share.valid_tokens()) for share in shares) == int(rows.valid_tokens())
    back = torch.cat([share.positions for share in shares], 1).argsort(1)
    for name in ("tokens", "labels", "documents", "weights"):
        found = torch.cat([getattr(share, name) for share in shares], 1)
        assert torch.equal(found.gather(1, back), getattr(rows, name)), name


def shared_axis(exchange: str) -> SequenceAxis:
    group = dist.group.WORLD
    assert group is not None
    return SequenceAxis(dist.get_world_size(), dist.get_rank(), group.group_name, exchange, False)


def attended(exchange: str, inputs: list[Tensor], rows: Batch | None, dtype: torch.dtype) -> list[Tensor]:
    """On a rank: attention over shared sequences, and the gradients of its inputs, all at this rank's places."""
    axis = shared_axis(exchange)
    core, masks = CoreAttention(), AttentionMask()
    core.sequence = masks.sequence = axis
    length = inputs[0].shape[1]
    numbers = torch.arange(length).expand(len(inputs[0]), length).contiguous()
    whole = Batch(numbers, numbers, numbers, numbers.int()) if rows is None else replace(rows, tokens=numbers)
    share = own_tokens(whole, axis, rows is not None)
    places = share.tokens
    q, k, v, gradient = (x.to(dtype).gather(1, places[..., None, None].expand(-1, -1, *x.shape[2:])) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = core(q, k, v, masks(share.positions, None if rows is None else share.documents, dtype))
    out.backward(gradient)
    return [places, *(x.detach() for x in (out, q.grad, k.grad, v.grad) if x is not None)]


def alone(inputs: list[Tensor], rows: Batch | None, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, gradient = (x.to(dtype) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, None if rows is None else document_mask(rows.documents, dtype))
    out.backward(gradient)
    return [x.detach() for x in (out, q.grad, k.grad, v.grad) if x is not None]


def together(ranks: list[list[Tensor]]) -> list[Tensor]:
    """Whole tensors from those of the ranks, of which the first are places."""
    places = torch.cat([rank[0] for rank in ranks], 1)
    found = []
    for parts in list(zip(*ranks, strict=True))[1:]:
        x = torch.cat(parts, 1)
        found.append(torch.empty_like(x).scatter_(1, places[..., None, None].expand_as(x), x))
    return found


def inputs_of(length: int, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, n, 8, generator=generator) for n in (heads, kv_heads, kv_heads, heads)]


def rows_with(documents: Tensor) -> Batch:
    """With positions that count from 0 within each document."""
    places = torch.arange(documents.shape[1]).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    positions = places - places.where(begins, 0).cummax(1).values
    return Batch(places, places, positions, documents.int())


DOCUMENTS: dict[str, Tensor | None] = {
    "of unequal length": torch.tensor([[0] * 5 + [1] + [2] * 30 + [3] * 12, [0] * 47 + [1]]),
    "of one token": torch.arange(48).expand(2, 48),
    "one a sequence": torch.zeros(2, 48, dtype=torch.int64),
    "without a mask": None,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_attention_over_shared_sequences_is_attention_over_whole_ones(exchange: str, dtype: torch.dtype) -> None:
    for ranks in (2, 4):
        for name, documents in DOCUMENTS.items():
            rows = None if documents is None else rows_with(documents)
            inputs = inputs_of(48)
            found = together(world.run(attended, ranks, exchange, inputs, rows, dtype))
            for one, other in zip(found, alone(inputs, rows, dtype), strict=True):
                limit = 1e-6 if dtype == torch.float32 else 1e-2
                # Documents of one token have gradients of nothing but rounding
                assert (one - other).norm() <= limit * max(other.norm(), inputs[3].norm()), (ranks, name)


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_ulysses_is_bitwise_attention_over_whole_sequences(kv_heads: int) -> None:
    for documents in DOCUMENTS.values():
        rows = None if documents is None else rows_with(documents)
        inputs = inputs_of(48, heads=8, kv_heads=kv_heads)
        found = together(world.run(attended, 4, ULYSSES, inputs, rows, torch.float32))
        for one, other in zip(found, alone(inputs, rows, torch.float32), strict=True):
            assert torch.equal(one, other)


def test_a_token_changes_no_output_of_another_document() -> None:
    """Bitwise, in whatever block it is."""
    rows = rows_with(DOCUMENTS["of unequal length"])
    inputs = inputs_of(48)
    before = together(world.run(attended, 4, GATHER, inputs, rows, torch.float32))[0]
    for place in (3, 5, 20, 40):
        changed = [x.clone() for x in inputs]
        for x in changed[:3]:
            x[0, place] += 1.0
        after = together(world.run(attended, 4, GATHER, changed, rows, torch.float32))[0]
        same = (before == after).flatten(2).all(2)
        elsewhere = rows.documents != rows.documents[0, place]
        elsewhere[1] = True
        assert same[elsewhere].all() and not same[0, place]


OF_TWO = [
    *[(Layout(cp=2, zero=zero), Case(4, tied=zero == 2, context=EXCHANGES[zero % 2])) for zero in (0, 1, 2, 3)],
    (Layout(cp=2, zero=1), Case(2, optimizer="sgd")),
]
OF_FOUR = [
    (Layout(cp=2, tp=2), Case(4, context=GATHER)),
    (Layout(cp=2, pp=2, zero=1), Case(2, tied=True, context=ULYSSES)),
    (Layout(1, 2, cp=2, zero=2), Case(2, tied=True, context=GATHER)),
    (Layout(cp=2, tp=2, zero=3), Case(4, tied=True, sequence=False, context=ULYSSES)),
    (Layout(cp=4, zero=1), Case(8, context=GATHER)),
    (Layout(2, 1, cp=2, zero=0), Case(2, optimizer="sgd", context=GATHER)),
    (Layout(2, 1, cp=2, zero=3), Case(4, context=ULYSSES)),
    (Layout(cp=2, pp=2, zero=3), Case(1, "interleaved", context=GATHER)),
    (Layout(cp=4, zero=3), Case(4, tied=True, context=ULYSSES)),
    (Layout(1, 2, cp=2, zero=1), Case(4, context=ULYSSES)),
    (Layout(cp=4, zero=0), Case(4, tied=True, optimizer="sgd", context=GATHER)),
    (Layout(1, 2, cp=2, zero=3), Case(1, context=GATHER)),
    (Layout(cp=2, pp=2, zero=0), Case(4, "gpipe", tied=True, context=GATHER)),
]
OF_EIGHT = [
    (Layout(cp=2, tp=2, pp=2, zero=2), Case(2, tied=True, context=GATHER)),
    (Layout(1, 2, cp=2, tp=2, zero=3), Case(2, tied=True, context=ULYSSES)),
    (Layout(2, 1, cp=2, tp=2, zero=1), Case(1, context=GATHER)),
    (Layout(2, 2, cp=2, zero=2), Case(2, context=GATHER)),
    (Layout(cp=4, tp=2, zero=3), Case(4, tied=True, context=GATHER)),
    (Layout(cp=4, pp=2, zero=1), Case(2, "interleaved", context=GATHER)),
    (Layout(cp=4, tp=2, zero=0), Case(4, optimizer="sgd", context=GATHER)),
    (Layout(1, 2, cp=4, zero=3), Case(2, tied=True, context=ULYSSES)),
]


@pytest.mark.parametrize(("layout", "case"), OF_TWO[1:2], ids=str)
def test_two_ranks_compute_what_one_process_computes(layout: Layout, case: Case) -> None:
    assert_parity(layout, [case])


@pytest.mark.long
@pytest.mark.parametrize(("layout", "case"), [*some(OF_TWO[2:], 4), *some(OF_FOUR, 4)], ids=str)
def test_more_layouts_compute_what_one_process_computes(layout: Layout, case: Case) -> None:
    assert_parity(layout, [case])


@pytest.mark.full
@pytest.mark.parametrize(("layout", "case"), OF_EIGHT, ids=str)
def test_eight_ranks_compute_what_one_process_computes(layout: Layout, case: Case) -> None:
    assert_parity(layout, [case])


@pytest.mark.long
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.full)])
def test_deepspeed_computes_what_one_process_computes(tp: int) -> None:
    """Its ranks of ZeRO are those that share sequences."""
    layouts = [Layout(cp=2, tp=tp, zero=zero) for zero in some((1, 0, 3, 2), 2)]
    cases = [(each, Case(8, tied=True, context=EXCHANGES[each.zero % 2])) for each in layouts]
    assert_parity_of_deepspeed(layouts[0].world, cases)


def of_case(layout: Layout, **changes: Any) -> Config:
    config = Case(2, tied=True).config(layout)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def evaluated(config: Config) -> tuple[float, float, int]:
    """On a rank: the mean loss of the first batch without training, that of a part of it, and its valid tokens."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    mine = global_rows(config, 1)[mesh.dp_rank :: layout.dp]
    (loss, tokens), (some_loss, some_tokens) = (mesh.all_reduce(engine.evaluate(rows)) for rows in (mine, mine[:3]))
    return float(loss / tokens), float(some_loss / some_tokens), int(tokens)


@cache
def evaluated_alone() -> tuple[float, float, int]:
    return world.run(evaluated, 1, of_case(Layout()))[0]


@pytest.mark.parametrize("layout", [Layout(cp=2, zero=1)], ids=str)
def test_evaluation_gives_the_loss_of_one_process(layout: Layout) -> None:
    for rank in world.run(evaluated, layout.world, of_case(layout)):
        assert rank[:2] == pytest.approx(evaluated_alone()[:2], rel=1e-5)
        assert rank[2] == evaluated_alone()[2]


def refused(config: Config) -> str:
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    with pytest.raises(ValueError) as error:
        cut(config, mesh, batch_plan(config, layout))
    return str(error.value)


def test_a_model_whose_tokens_meet_in_no_declared_layer_is_refused() -> None:
    config = of_case(Layout(cp=2, zero=0), model=small_config().model)
    for message in world.run(refused, 2, config):
        assert "Toy cannot share sequences over 2 context-parallel ranks" in message
        assert "parallel.cp=1 works" in message
    assert one_process(of_case(Layout(), model=small_config().model), 1).losses


@pytest.mark.long
def test_rules_that_need_norms_or_whole_matrices_get_them() -> None:
    """Of parameters that ZeRO shards over the ranks of a sequence."""

    def configs(layout: Layout) -> list[Config]:
        found = [Case(4, tied=True).config(layout) for _ in range(2)]
        for config, name in zip(found, ("muon", "lamb"), strict=True):
            config.optim.name = name
        return found

    for layout in (Layout(cp=2, zero=2), Layout(cp=2)):
        alone = world.run(train, 1, configs(Layout()), 5)[0]
        ranks = world.run(train, 2, configs(layout), 5)
        for number, expected in enumerate(alone):
            assert ranks[0][number].trace.losses == pytest.approx(expected.trace.losses, rel=1e-5)
            assert ranks[0][number].trace.norms == pytest.approx(expected.trace.norms, rel=1e-5)
            parameters = assemble([rank[number].parameters for rank in ranks])
            for name, value in assemble([expected.parameters]).items():
                assert normwise(parameters[name], value) < 1e-4, name


@pytest.mark.long
def test_a_run_resumes_on_another_cp(tmp_path: Path) -> None:
    """cp 4, one rank, tp 2 x cp 2, over the same rows."""
    trace = one_process(of_case(Layout()), 3 * HALF)
    starts = [(Layout(cp=4, zero=1), GATHER), (Layout(), GATHER), (Layout(tp=2, cp=2, zero=3), ULYSSES)]
    for number, (layout, exchange) in enumerate(starts):
        config = Case(4, tied=True, context=exchange).config(layout)
        ranks = world.run(half, layout.world, config, tmp_path)
        losses, norms = zip(*ranks[0][0], strict=True)
        done = slice(number * HALF, (number + 1) * HALF)
        assert losses == pytest.approx(trace.losses[done], rel=1e-5), layout
        assert norms == pytest.approx(trace.norms[done], rel=1e-5), layout
    parameters = assemble([shards for _, shards in ranks])
    for name, value in trace.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name


def activations(kind: str, cp: int, exchange: str, layers: int) -> int:
    """Bytes at the peak of a step, rehearsed, with all that is sent and received."""
    config = rehearsed_config("bf16", 1024, layers, zero=0, cp=cp, context=exchange, document_mask=True)
    config.batch = BatchConfig(2, micro_size=2)
    peak = rehearse(config, layout_of(config, cp), 0, kind).step
    return sum(peak.categories.get(each, 0) for each in (Category.ACTIVATIONS, Category.LOSS, Category.COMMUNICATION))


@pytest.mark.long
@pytest.mark.parametrize(("kind", "exchange"), [("cpu", GATHER), ("cuda", GATHER), ("cuda", ULYSSES)])
def test_a_rank_of_four_holds_a_quarter_of_the_activations(kind: str, exchange: str) -> None:
    """On CPUs `ulysses` has the mask of whole sequences as one tensor."""
    assert activations(kind, 4, exchange, 8) <= 0.35 * activations(kind, 1, exchange, 8)


@pytest.mark.long
def test_gathered_keys_and_values_live_for_one_layer() -> None:
    """More layers hold more of a rank's share, and no more of what is gathered."""
    more = [activations("cuda", cp, GATHER, 6) - activations("cuda", cp, GATHER, 3) for cp in (1, 4)]
    assert more[1] <= 0.26 * more[0]
