"""Our process groups behind DeepSpeed's `mpu` interface."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist

from stoker.parallel.mesh import Mesh


class ModelParallelUnit(Protocol):
    """The methods that DeepSpeed calls on the object `mpu`.

    Where one is missing, DeepSpeed assumes a world of one rank and reports nothing.

    There must be none called `initialize_sequence_parallel`: it switches all of this off.
    """

    def get_data_parallel_group(self) -> dist.ProcessGroup: ...
    def get_data_parallel_rank(self) -> int: ...
    def get_data_parallel_world_size(self) -> int: ...
    def get_data_parallel_group_ranks(self) -> list[int]: ...
    def get_model_parallel_group(self) -> dist.ProcessGroup: ...
    def get_model_parallel_rank(self) -> int: ...
    def get_model_parallel_world_size(self) -> int: ...
    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup: ...
    def get_tensor_model_parallel_rank(self) -> int: ...
    def get_tensor_model_parallel_world_size(self) -> int: ...


class MeshUnit:
    """`ModelParallelUnit` over a mesh: data parallel are the axes that ZeRO shards over, model parallel is tp.

    A collective: an axis of size 1 gets a group too, because DeepSpeed takes None for all ranks.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._shard = mesh.group("shards") or mesh.self_group()
        self._tensor = mesh.group("tp") or mesh.self_group()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._shard

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._shard)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._shard)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._shard)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)
