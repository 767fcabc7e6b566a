"""What we rely on in DeepSpeed, by name: a release that has changed it fails here. And what a user may ask of it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import stoker.parallel.deepspeed_engine.partitions as partitions
from stoker.conf.schema import Config, ParallelConfig
from stoker.conf.values import ConfigError
from stoker.parallel.deepspeed_engine.settings import (
    OFFLOAD_PASSED_ON,
    OWNED,
    PASSED_ON,
    ZERO_PASSED_ON,
    Swap,
    refused_settings,
    settings,
)
from stoker.parallel.deepspeed_engine.swapping import LEAST_BYTES
from stoker.parallel.deepspeed_engine.unit import MeshUnit, ModelParallelUnit
from stoker.parallel.layout import BatchPlan, Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.trainer.parallelize import cut
from stoker.trainer.validate import validate
from tests import world
from tests.parallel.reference import global_rows, small_config


def seen(config: Config) -> dict[str, list[str]]:
    """On a rank: after a step, for each kind of object in TOUCHED that exists, which of its names are missing."""
    layout = layout_of(config, torch.distributed.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    engine.forward_backward(global_rows(config, 1))
    store: Any = engine._weights[0]  # type: ignore[attr-defined]
    optimizer = store._engine.optimizer
    parameter = next(parameter for parameter in store._engine.module.parameters())
    objects = {"DeepSpeedEngine": store._engine, type(optimizer).__name__: optimizer}
    if config.parallel.zero == 3:
        objects |= {"parameter of ZeRO 3": parameter, "ds_tensor": parameter.ds_tensor}
    else:
        objects |= {"parameter of ZeRO 1, 2": parameter, "_hp_mapping": parameter._hp_mapping}
        objects["fragment_address"] = parameter._hp_mapping.lp_fragment_address
    return {
        kind: [name for name in partitions.TOUCHED[kind] if not hasattr(thing, name)] for kind, thing in objects.items()
    }


def seen_in_all(configs: list[Config]) -> list[dict[str, list[str]]]:
    return [seen(config) for config in configs]


def test_every_attribute_that_is_touched_is_there() -> None:
    configs = [small_config(parallel=ParallelConfig(zero=zero, engine="deepspeed")) for zero in (1, 2, 3)]
    configs.append(small_config(parallel=ParallelConfig(zero=1, engine="deepspeed"), precision="bf16"))
    found = world.run(seen_in_all, 1, configs, fresh=True)[0]
    assert {kind for one in found for kind in one} == set(partitions.TOUCHED)
    for one in found:
        for kind, missing in one.items():
            assert not missing, f"DeepSpeed's {kind} has no {', '.join(missing)} any more"


def test_no_attribute_is_touched_that_is_not_listed() -> None:
    source = "".join(
        Path(inspect.getfile(partitions)).with_name(f).read_text()
        for f in ("partitions.py", "strategy.py", "swapping.py")
    )
    read = set(re.findall(r"\b(?:_?optimizer|_?engine|parameter|mapping|there|here|part)\.(\w+)", source))
    listed = {name for names in partitions.TOUCHED.values() for name in names}
    ours = {"numel", "dtype", "master", "parameter", "start", "to", "requires_grad", "detach", "shape", "data"}
    ours |= {"element_size", "view"}
    assert read - ours <= listed, "list it in TOUCHED"
    assert listed <= read, "listed, but not touched"


def test_the_swapper_of_parameters_is_where_it_was() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import utils
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero import Init
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig

    assert "param_swapper" in inspect.signature(Init.__init__).parameters and hasattr(AsyncIOBuilder, "load")
    assert {"AVAILABLE", "NOT_AVAILABLE"} <= set(PartitionedParamStatus.__members__)
    assert utils.MIN_AIO_BYTES == LEAST_BYTES
    wanted = settings(
        Config(parallel=ParallelConfig(zero=3, offload="nvme")), BatchPlan(1, 1, 1), 1, False, Swap(Path("x"), 1)
    )
    zero = wanted["zero_optimization"]
    assert set(zero) <= set(DeepSpeedZeroConfig.model_fields)
    assert set(zero["offload_param"]) <= set(DeepSpeedZeroOffloadParamConfig.model_fields)


def called_on_the_unit() -> list[str]:
    """On a rank: the methods that DeepSpeed called on `mpu` while it trained at every stage."""
    calls: set[str] = set()
    plain = MeshUnit.__getattribute__

    def noted(self: MeshUnit, name: str) -> Any:
        if not name.startswith("_"):
            calls.add(name)
        return plain(self, name)

    MeshUnit.__getattribute__ = noted  # type: ignore[method-assign]
    for zero in (1, 2, 3):
        seen(small_config(parallel=ParallelConfig(zero=zero, engine="deepspeed")))
    return sorted(calls)


def test_deepspeed_calls_only_methods_that_the_unit_has() -> None:
    """DeepSpeed also uses `hasattr`, and takes a missing method for a world of one rank."""
    offered = {name for name in vars(ModelParallelUnit) if name.startswith("get_")}
    optional = {
        "initialize_sequence_parallel",  # must be missing: it would switch the groups off
        "get_sequence_parallel_world_size",  # the rest belongs to DeepSpeed's sequence parallelism, which is not used
        "get_sequence_parallel_rank",
        "get_sequence_parallel_group",
        "get_sequence_data_parallel_group",
        "get_sequence_data_parallel_world_size",
        "get_sequence_data_parallel_rank",
    }
    asked = set(world.run(called_on_the_unit, 1, fresh=True)[0])
    assert asked - optional <= offered, "DeepSpeed needs more than ModelParallelUnit offers"
    assert "initialize_sequence_parallel" not in dir(MeshUnit)


def unit_of(layout: Layout) -> dict[str, Any]:
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    unit: ModelParallelUnit = MeshUnit(mesh)
    answers = {name: getattr(unit, name)() for name in vars(ModelParallelUnit) if name.startswith("get_")}
    return {
        name: torch.distributed.get_process_group_ranks(answer) if name.endswith("_group") else answer
        for name, answer in answers.items()
    }


@pytest.mark.parametrize("layout", [Layout(1, 2, 2), Layout(2, 1, 2), Layout(1, 1, 2, 2), Layout(1, 4)], ids=str)
def test_the_unit_answers_with_the_axes_of_the_mesh(layout: Layout) -> None:
    for rank, found in enumerate(world.run(unit_of, 4, layout)):
        at = layout.coordinate(rank)
        shard = next(ranks for ranks in layout.groups("dp_shard") if rank in ranks)
        tensor = next(ranks for ranks in layout.groups("tp") if rank in ranks)
        wanted = {
            "get_data_parallel_group": shard, "get_data_parallel_group_ranks": shard,
            "get_data_parallel_rank": at.dp_shard, "get_data_parallel_world_size": layout.dp_shard,
            "get_model_parallel_group": tensor, "get_model_parallel_rank": at.tp,
            "get_model_parallel_world_size": layout.tp, "get_tensor_model_parallel_group": tensor,
            "get_tensor_model_parallel_rank": at.tp, "get_tensor_model_parallel_world_size": layout.tp,
        }  # fmt: skip
        assert found == wanted


def test_every_setting_that_is_passed_on_is_known_to_deepspeed() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    assert set(ZERO_PASSED_ON) <= set(DeepSpeedZeroConfig.model_fields)
    offload = {*DeepSpeedZeroOffloadOptimizerConfig.model_fields, *DeepSpeedZeroOffloadParamConfig.model_fields}
    assert set(OFFLOAD_PASSED_ON) <= offload
    zero = {name.removeprefix("zero_optimization.") for name in OWNED if name.count(".") == 1}
    assert zero <= set(DeepSpeedZeroConfig.model_fields)
    assert not set(PASSED_ON) & set(OWNED)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"train_batch_size": 8}, "parallel.deepspeed.train_batch_size is set by Stoker: use batch.size"),
        ({"bf16": {"enabled": True}}, "parallel.deepspeed.bf16 is set by Stoker: use precision"),
        ({"gradient_clipping": 1.0}, "parallel.deepspeed.gradient_clipping is set by Stoker: use grad_clip_norm"),
        ({"optimizer": {}}, "parallel.deepspeed.optimizer is set by Stoker: use optim"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            "parallel.deepspeed.data_types cannot be set: gradients are summed in fp32",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            "parallel.deepspeed.zero_optimization.stage is set by Stoker: use parallel.zero",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "parallel.deepspeed.zero_optimization.offload_optimizer.device is set by Stoker: use parallel.offload",
        ),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_comm"),
        ({"zero_optimization": {"stage3_prefetch_bucket_size": 7, "overlap_comm": True}}, None),
        ({"zero_optimization": 2}, "expected settings such as {overlap_comm:true}"),
    ],
)
def test_what_stoker_owns_is_refused_by_name_with_where_to_set_it(wanted: dict[str, Any], said: str | None) -> None:
    found = "\n".join(refused_settings(wanted))
    assert said in found if said else not found
    config = Config(parallel=ParallelConfig(engine="deepspeed", deepspeed=wanted))
    if said:
        with pytest.raises(ConfigError, match=re.escape(said)):
            validate(config, 2, 0)
    else:
        validate(config, 2, 0)
