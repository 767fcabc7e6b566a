"""Weights in four bits: the published table and rounding, their bytes, and one process's numbers on every layout."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from stoker.conf.schema import AdapterConfig, Config
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import PARAMETER
from stoker.parallel.tensor.nf4 import BLOCK, VALUES, dequantised, packed_in, quantised, rounded
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import some
from tests.parallel.parity import Case, Measured, layouts, train
from tests.parallel.test_adapter_parity import assert_same

# Of bitsandbytes' `dQuantizeNF4` (csrc/kernels.cu): a number above border n has a code above n.
BORDERS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip


def test_a_number_has_the_code_between_the_published_borders() -> None:
    borders = torch.tensor(BORDERS)
    above = torch.nextafter(borders, torch.ones(()))
    for values, shift in ((borders, 0), (above, 1)):
        row = torch.zeros(1, BLOCK)
        row[0, : len(values)], row[0, -1] = values, 1.0  # which makes the scale 1
        codes, scales = quantised(row)
        assert scales.tolist() == [[1.0]]
        found = torch.stack([codes >> 4, codes & 15], -1).flatten().tolist()
        assert found[:15] == [number + shift for number in range(15)] and found[-1] == 15


def test_blocks_have_scales_of_their_own_and_a_slice_is_packed_alike() -> None:
    values = torch.randn(6, 3 * BLOCK, generator=torch.Generator().manual_seed(0))
    values[2, BLOCK : 2 * BLOCK] = 0
    codes, scales = quantised(values)
    assert codes.shape == (6, 3 * BLOCK // 2) and torch.equal(scales, values.view(6, 3, BLOCK).abs().amax(-1))
    part = quantised(values[1:4, BLOCK:])
    assert torch.equal(part[0], codes[1:4, BLOCK // 2 :]) and torch.equal(part[1], scales[1:4, 1:])
    unpacked = dequantised(codes, scales)
    table = torch.tensor(VALUES)
    nearest = (values.view(6, 3, BLOCK, 1) / scales[..., None, None].clamp_min(1e-30) - table).abs().amin(-1)
    assert torch.allclose((unpacked - values).view(6, 3, BLOCK).abs(), nearest * scales[..., None], atol=1e-6)
    assert torch.equal(rounded(unpacked), unpacked) and not unpacked[2, BLOCK : 2 * BLOCK].any()


def test_bitsandbytes_packs_the_same() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(32, 4 * BLOCK, generator=torch.Generator().manual_seed(0)).to(dtype)
        theirs, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        codes, scales = quantised(values.float())
        assert torch.equal(theirs.view_as(codes), codes) and torch.equal(state.absmax.view_as(scales), scales)
        assert torch.equal(functional.dequantize_4bit(theirs, state), dequantised(codes, scales, dtype))


def config_of(case: Case, layout: Layout) -> Config:
    """Of a model whose rows are blocks, on two tensor-parallel ranks too."""
    config = case.config(layout, layers=2)
    config.model.hidden_size, config.model.intermediate_size = 2 * BLOCK, 2 * BLOCK
    config.adapter = AdapterConfig("lora", rank=4, base="nf4", target_modules=["q", "down"], dropout=0.2)
    return config


def assert_one_run(layout: Layout, case: Case, **parallel: str) -> None:
    config = config_of(case, layout)
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    wanted = world.run(train, 1, [config_of(Case(4, tied=case.tied), Layout())], timeout=240.0)[0][0]
    found: list[list[Measured]] = world.run(train, layout.world, [config], timeout=240.0, fresh=bool(parallel))
    assert_same(f"{layout}, {case}", wanted, [rank[0] for rank in found])


@pytest.mark.parametrize("layout", [Layout(tp=2)], ids=str)
def test_a_layout_trains_beside_the_packed_base_of_one_process(layout: Layout) -> None:
    assert_one_run(layout, Case(4))


@pytest.mark.long
@pytest.mark.parametrize("layout", some(list(layouts(2)), 2), ids=str)
def test_every_layout_trains_beside_the_packed_base_of_one_process(layout: Layout) -> None:
    assert_one_run(layout, Case(4, tied=True))


@pytest.mark.full
@pytest.mark.parametrize("layout", [Layout(1, 2, zero=3), Layout(pp=2)], ids=str)
def test_deepspeed_trains_beside_the_packed_base_of_one_process(layout: Layout) -> None:
    assert_one_run(layout, Case(4), engine="deepspeed")


@dataclass(frozen=True)
class Held:
    bytes: int  # of all tensors of this rank but those of the run's buffers
    packed: int
    elements: int  # of packed weights


def held(config: Config) -> tuple[Held, dict[str, tuple[tuple[int, ...], tuple[int, ...], list[int]]]]:
    """On a rank: what is held in memory, and each packed weight with its place."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    gc.collect()
    before = traced()
    engine = cut(config, mesh, batch_plan(config, layout))
    gc.collect()
    packed = packed_in(engine.modules())
    assert not any(shard.name == each.name for each in packed for shard in engine.shards() if shard.kind == PARAMETER)
    size = sum(each.codes.nbytes + each.scales.nbytes for each in packed)
    found = Held(traced() - before, size, sum(each.chunk.numel for each in packed))
    return found, {each.name: (each.chunk.offsets, each.chunk.sizes, each.codes.tolist()) for each in packed}


def traced() -> int:
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_packed_base_takes_little_more_than_half_a_byte_an_element_and_is_a_slice_of_the_whole() -> None:
    config = config_of(Case(4), Layout())
    alone, whole = world.run(held, 1, config, fresh=True)[0]
    assert alone.elements == 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 128)
    assert alone.packed <= 0.57 * alone.elements
    plain = config_of(Case(4), Layout())
    plain.adapter.base = None
    unpacked = world.run(held, 1, plain, fresh=True)[0][0]
    assert unpacked.bytes - alone.bytes >= (4 - 0.57) * alone.elements  # no other copy is left
    for _, parts in world.run(held, 2, config_of(Case(4), Layout(tp=2))):
        for name, (offsets, sizes, codes) in parts.items():
            rows, columns = (slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            every = torch.tensor(whole[name][2])
            assert torch.equal(every[rows, columns.start // 2 : columns.stop // 2], torch.tensor(codes)), name


def test_rows_that_are_no_blocks_are_refused_by_name() -> None:
    config = config_of(Case(4), Layout())
    config.model.hidden_size = BLOCK + 32
    with pytest.raises(AssertionError, match=r"96 input features of layers\.0\.attention\.q\.weight.*base=null works"):
        world.run(held, 1, config)
