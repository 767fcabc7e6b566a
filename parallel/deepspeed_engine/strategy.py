"""The sharding strategy over DeepSpeed's ZeRO."""

from __future__ import annotations

import io
import logging
import os
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stoker.conf.schema import Config
from stoker.parallel.deepspeed_engine.async_io import load_async_io
from stoker.parallel.deepspeed_engine.partitions import (
    FlatBf16Partitions,
    FlatPartitions,
    Partitions,
    SplitPartitions,
    part_of,
)
from stoker.parallel.deepspeed_engine.settings import Swap, settings
from stoker.parallel.deepspeed_engine.swapping import (
    keep_in_memory,
    require_lockable,
    require_room,
    swap_folder,
    swapped_bytes,
)
from stoker.parallel.deepspeed_engine.unit import MeshUnit
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.layout import OF_TOKENS, BatchPlan
from stoker.parallel.mesh import Mesh
from stoker.parallel.mmap_offload import offloaded
from stoker.parallel.model import ParallelizableModel
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.sharding import materialise, replace_parameters
from stoker.parallel.shards import flat_range


class DeepSpeedStrategy:
    """A `ShardingStrategy`. Each tensor of `tensors` is flat: a range of the flattened parameter."""

    def __init__(self, config: Config, mesh: Mesh, plan: BatchPlan, model: nn.Module, registry: Registry) -> None:
        deepspeed = imported(mesh.device)
        unit = MeshUnit(mesh)
        rank, ranks = unit.get_data_parallel_rank(), unit.get_data_parallel_world_size()
        pipelined, split = mesh.layout.pp > 1, config.parallel.zero == 3
        named = dict(model.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        trained = sum(parameter.numel() for parameter in named.values() if parameter.requires_grad)

        dtype = PRECISIONS[config.precision]
        replace_parameters(model, lambda _, old: nn.Parameter(old.to(dtype), old.requires_grad))
        swap = self._prepare_swapping(config, mesh, model, ranks) if split else None
        wanted = settings(config, plan, trained, mesh.device.type == "cuda", swap)
        if swap is not None:
            require_lockable(locked_bytes(wanted["zero_optimization"], trained // ranks, dtype))
        if split:
            self._convert_block_by_block(deepspeed, model, mesh, unit, wanted)
        materialise(model, mesh.device)
        named = dict(model.named_parameters())
        optimizer = torch.optim.SGD(_partitioned_together(named, registry), lr=0.0)  # never stepped: it names groups
        memory = offloaded(config.parallel)
        with memory, redirect_stdout(io.StringIO()):  # it prints its memory use at every log level
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, mpu=unit, dist_init_required=False, config=wanted
            )
        engine.set_gradient_accumulation_boundary(False)
        self._engine = engine
        self.module: nn.Module = model if pipelined else engine
        # Where the accumulation boundary is set, DeepSpeed reduces at the end of backward.
        self._sets_boundary = not pipelined and not split and type(engine.optimizer).__name__ != "BF16_Optimizer"
        self._partitions: Partitions
        if split:
            self._partitions = SplitPartitions(engine.optimizer, rank, ranks)
        elif type(engine.optimizer).__name__ == "BF16_Optimizer":
            self._partitions = FlatBf16Partitions(engine, ranks)
        else:
            self._partitions = FlatPartitions(engine.optimizer, reduces=not pipelined)
        self._replicate = mesh.group("replicas")

        layout = mesh.layout
        replica = layout.place(mesh.rank, layout.replication)
        self._names = {id(parameter): name for name, parameter in named.items()}
        fragments = {self._names[id(part.parameter)]: part for part in self._partitions.fragments()}
        self.tensors: dict[str, Tensor] = {}
        self.held: dict[str, LocalShard] = {}
        for name, parameter in named.items():
            part, copies, copy = fragments.get(name), layout.replicas, replica
            if part is not None:
                start, tensor = part.start, part.master
            elif parameter.requires_grad:  # all of it is on other ranks
                start, tensor = 0, torch.empty(0, device=mesh.device)
            elif split:
                start, count = part_of(parameter, rank)
                with memory:
                    keep_in_memory(parameter)
                    tensor = parameter.ds_tensor.data[:count]  # type: ignore[attr-defined]
            else:
                start, tensor = 0, parameter.detach().view(-1)
                copies, copy = layout.size(OF_TOKENS), layout.place(mesh.rank, OF_TOKENS)
            self.tensors[name] = tensor
            self.held[name] = LocalShard(flat_range(shapes[name], start, start + tensor.numel()), copy, copies)

    def _prepare_swapping(self, config: Config, mesh: Mesh, model: nn.Module, ranks: int) -> Swap | None:
        """Where DeepSpeed may keep the parameters on NVMe, if it is to. Raises ValueError where that will not work."""
        if config.parallel.offload != "nvme":
            return None
        assert config.parallel.nvme_path is not None, "refused"
        load_async_io(announce=mesh.rank == 0)
        self._swap_folder = swap_folder(Path(config.parallel.nvme_path))
        require_room(self._swap_folder.path, sum(swapped_bytes(model, ranks)), mesh)
        largest = max(-(-parameter.numel() // ranks) for parameter in model.parameters())
        return Swap(self._swap_folder.path, largest)

    def on_backward_start(self, *, is_last: bool) -> None:
        if self._sets_boundary:
            self._engine.set_gradient_accumulation_boundary(is_last)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: tensor for name, tensor in self.tensors.items() if not tensor.numel()}
        own = {self._names[id(parameter)]: gradient for parameter, gradient in self._partitions.gradients()}
        if self._replicate is not None and own:
            flat = torch.cat(list(own.values()))
            dist.all_reduce(flat, group=self._replicate)
            own = dict(zip(own, flat.split([part.numel() for part in own.values()]), strict=True))
        return found | own

    def on_optimizer_step(self) -> None:
        self._partitions.renew()

    @staticmethod
    def _convert_block_by_block(
        deepspeed: Any, model: nn.Module, mesh: Mesh, unit: MeshUnit, wanted: dict[str, Any]
    ) -> None:
        """Partition one block after the other, so that no rank ever holds the whole model."""
        cuttable: ParallelizableModel = model  # type: ignore[assignment]
        group = unit.get_data_parallel_group()
        swapper = None  # the first that is made, on NVMe: another would empty its folder
        for block in [*cuttable.blocks().values(), model]:
            materialise(block, mesh.device)
            swapper = deepspeed.zero.Init(
                module=block,
                data_parallel_group=group,
                config_dict_or_path=wanted,  # the dtype too: one that is given is not taken on CPUs
                mpu=unit,
                param_swapper=swapper,
            ).param_swapper


def locked_bytes(zero: dict[str, Any], held: int, dtype: torch.dtype) -> int:
    """What DeepSpeed locks in memory to swap parameters, of which a rank holds `held` elements."""
    buffers = zero["offload_param"]
    written = min(zero["sub_group_size"] + buffers["buffer_size"], held)
    return (buffers["buffer_count"] * buffers["buffer_size"] + written) * dtype.itemsize


def _partitioned_together(named: dict[str, nn.Parameter], registry: Registry) -> list[dict[str, Any]]:
    """Groups of parameters that are partial over the same ranks, so that those ranks partition them alike."""
    groups: dict[tuple[str, ...], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            groups.setdefault(registry.entries[name].partial, []).append(parameter)
    return [{"params": groups[partial]} for partial in sorted(groups)]


def imported(device: torch.device) -> Any:
    """Import DeepSpeed with the accelerator set: by default it probes for one and builds a CPU collectives kernel."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.compiler as compiler

    log.setLevel(logging.WARNING)
    log.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    warnings.filterwarnings("ignore", r"`torch.distributed.*_tensor` is deprecated", FutureWarning)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Every ZeRO optimizer checks whether it is Muon, whose import loads torch's compiler: two seconds.
    compile_now, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        compiler.compile = compile_now
    return deepspeed
