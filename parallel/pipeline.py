"""The micro-batches of a step through a pipeline, by torch's schedules: GPipe, 1F1B, interleaved 1F1B.

Training is torch's: its schedule says when which micro-batch passes which stage, its stage sends and receives. Three
things are ours. What follows a backward is left to the stage's `ShardingStrategy`, who alone know when gradients are
reduced and parameters given back; torch does not get to see that modules are sharded. Shapes are given, not found out
with a forward pass. And what travels is kept only while a micro-batch is under way: torch's own buffers are one for
each micro-batch of the step, so that the memory of 1F1B and interleaved 1F1B would grow with their number after all.

Evaluation needs no schedule: every rank computes a stage, hands the result to the next rank and takes the next one
from the previous, all at the same time (`Ring`).

All ranks have the rows, so that only activations and their gradients travel.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.profiler import record_function

from stoker.parallel.batch import Batch
from stoker.parallel.layout import BatchPlan
from stoker.parallel.mesh import Mesh
from stoker.parallel.sharding import ShardingStrategy

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


@dataclass(frozen=True)
class Stage:
    """A stage that this rank holds."""

    number: int  # in the pipeline, from 0
    model: nn.Module  # its part of the model, cut and with memory
    weights: ShardingStrategy


class PipelineSchedule:
    """`stoker.parallel.forward_backward.ForwardBackward` of a rank that holds `stages`, in the order of the pipeline.

    `activation` is a tensor on the meta device like those that go from stage to stage: `[tokens of a micro-batch,
    width]` in the compute dtype, fewer tokens where tensor-parallel ranks share them.
    """

    def __init__(
        self,
        mesh: Mesh,
        plan: BatchPlan,
        stages: Sequence[Stage],
        schedule: str,
        document_mask: bool,
        activation: Tensor,
    ) -> None:
        group = mesh.group("pp")
        assert group is not None and (len(stages) == 1 or schedule == "interleaved")
        self._device, self._document_mask = mesh.device, document_mask
        self._plan, self._stages, self._activation = plan, stages, activation
        self._group, self._at, self._size = group, mesh.coordinate.pp, mesh.layout.pp
        self._count = self._size * len(stages)
        self._factor = torch.ones((), device=mesh.device)
        self._total = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._forwards = {
            stage.number: _Forward(stage.model, None if stage.number == self._count - 1 else activation)
            for stage in stages
        }
        self._outbox = Outbox(self._size) if schedule == "interleaved" else None
        held = [
            _TorchStage(self._forwards[stage.number], stage, self._count, mesh.device, group, activation, self._outbox)
            for stage in stages
        ]
        self._schedule: Any = SCHEDULES[schedule](
            held if schedule == "interleaved" else held[0],
            plan.micro_batches,
            loss_fn=self._loss,
            scale_grads=False,
        )
        if mesh.device.type == "cuda":
            # NCCL connects on first use. Where sends and receives are mixed it connects the whole group, which all
            # have to be there for; torch's schedules see to the pairs.
            dist.all_reduce(torch.zeros((), device=mesh.device), group=group)

    def train(self, rows: Batch, factor: Tensor) -> Tensor:
        assert len(rows) == self._plan.rank_rows, (len(rows), self._plan)
        self._factor = factor
        self._total = torch.zeros_like(self._total)
        inputs = _inputs(rows.to(self._device), self._document_mask)
        self._schedule.step(target=inputs["labels"], return_outputs=False, **inputs)
        if self._outbox is not None:
            self._outbox.wait()
        return self._total

    def evaluate(self, rows: Batch) -> Tensor:
        size = self._plan.micro_rows
        rows = rows.padded(size).to(self._device)
        ring = Ring(self._at, self._size, self._count, len(rows) // size)
        total = torch.zeros_like(self._total)
        received: Tensor | None = None
        with torch.no_grad():
            for tick in range(ring.ticks):
                transfers = []
                if work := ring.work(tick):
                    number, micro = work
                    inputs = _inputs(rows[micro * size : (micro + 1) * size], self._document_mask)
                    output = self._forwards[number].compute(received, **inputs)
                    if number == self._count - 1:
                        total += output
                    else:
                        transfers.append(self._transfer(dist.isend, output, self._at + 1))
                received = None
                following = ring.work(tick + 1)
                if following and following[0] > 0:
                    received = torch.empty_like(self._activation, device=self._device)
                    transfers.append(self._transfer(dist.irecv, received, self._at - 1))
                for work_in_flight in dist.batch_isend_irecv(transfers) if transfers else ():
                    work_in_flight.wait()
        return total

    def _loss(self, loss_sum: Tensor, _: Tensor) -> Tensor:
        self._total += loss_sum.detach()
        return loss_sum * self._factor

    def _transfer(self, kind: Any, tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self._group, group_peer=peer % self._size)


@dataclass(frozen=True)
class Ring:
    """Who does what when in an evaluation: a rank computes in each tick one stage of one micro-batch, or nothing.

    Micro-batches go around in rounds of as many as there are ranks, one a tick behind the other, so that a rank that
    holds several stages is free again when the first of them comes back.
    """

    rank: int
    ranks: int
    stages: int
    micro_batches: int

    @property
    def ticks(self) -> int:
        rounds, last = divmod(max(self.micro_batches - 1, 0), self.ranks)
        return (rounds + 1) * self.stages + last if self.micro_batches else 0

    def work(self, tick: int) -> tuple[int, int] | None:
        """The stage and the micro-batch of this rank at `tick`."""
        rounds, place = divmod(tick - self.rank, self.stages)
        turn, behind = divmod(place, self.ranks)
        micro_batch = rounds * self.ranks + behind
        return (turn * self.ranks + self.rank, micro_batch) if 0 <= micro_batch < self.micro_batches else None


class Outbox:
    """Sends in flight, at most `room` of them: for one more, the oldest must have arrived.

    torch's interleaved schedule waits for its sends at the end of the step, and keeps all that was sent till then. Its
    order of sends and receives is one in which every send could be waited for at once, so no wait here can hang.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._works: deque[dist.Work] = deque()

    def put(self, works: Iterable[dist.Work]) -> None:
        self._works.extend(works)
        self.wait(self._room)

    def wait(self, room: int = 0) -> None:
        """Until no more than `room` are in flight."""
        while len(self._works) > room:
            self._works.popleft().wait()


class _TorchStage(PipelineStage):
    """torch's stage, leaving weights to `ShardingStrategy` and holding what is received and sent only as long as it
    must.

    With an outbox it sends by itself, which only the interleaved schedule allows: the others send while they receive.
    """

    def __init__(
        self,
        forward: _Forward,
        stage: Stage,
        count: int,
        device: torch.device,
        group: dist.ProcessGroup,
        activation: Tensor,
        outbox: Outbox | None,
    ) -> None:
        first, last = stage.number == 0, stage.number == count - 1
        activation = activation.detach().requires_grad_()
        super().__init__(
            forward,
            stage.number,
            count,
            device,
            input_args=() if first else activation,
            output_args=torch.empty((), device="meta", requires_grad=True) if last else activation,
            group=group,
        )
        self._weights, self._activation, self._outbox = stage.weights, activation, outbox

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        self._weights.on_backward_start(is_last=last_backward)
        with record_function("stoker.backward"):
            result = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if self.is_last:
            bwd_kwargs["stage_output"].detach_()  # the schedule keeps the losses, but the graphs need not stay
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._left_to_schedule(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._left_to_schedule(super().get_bwd_send_ops(bwd_chunk_id))

    def _left_to_schedule(self, sends: list[dist.P2POp]) -> list[dist.P2POp]:
        if self._outbox is None:
            return sends
        works = (dist.isend(send.tensor, group=send.group, group_dst=send.group_peer) for send in sends)
        self._outbox.put(work for work in works if work is not None)
        return []

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        return self._released(super()._retrieve_recv_activations(fwd_chunk_id), self.args_recv_info[fwd_chunk_id])

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor, ...]:
        return self._released(super()._retrieve_recv_grads(bwd_chunk_id), self.grad_recv_info[bwd_chunk_id])

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        super()._setup_forward_recv_info(1, has_backward)
        infos = self.args_recv_info[0]
        self._released((), infos)
        for chunk in range(num_microbatches):
            self.args_recv_info[chunk] = tuple(copy.copy(info) for info in infos)

    def _create_grad_recv_info(self, act_send_info: dict) -> tuple:
        infos = super()._create_grad_recv_info(act_send_info)
        self._released((), infos)
        return infos

    def _allocate(self, infos: tuple) -> None:
        for info in infos:
            info.buffer = torch.empty_like(self._activation, device=self.device, requires_grad=False)

    @staticmethod
    def _released(tensors: tuple[Tensor, ...], infos: tuple) -> tuple[Tensor, ...]:
        for info in infos:
            info.buffer = None
        return tensors


class _Forward(nn.Module):
    """A model as torch's pipeline calls it. It holds the model, but not as a child: see the head of this file.

    What it gives must be like `activation`; None where it ends in the loss.
    """

    def __init__(self, model: nn.Module, activation: Tensor | None) -> None:
        super().__init__()
        self._models = (model,)
        self._expected = None if activation is None else (activation.shape, activation.dtype)

    def forward(self, *received: Tensor, **inputs: Tensor) -> Tensor:
        with record_function("stoker.forward"):
            return self.compute(received[0] if received else None, **inputs)

    def compute(
        self,
        received: Tensor | None,
        tokens: Tensor,
        positions: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
    ) -> Tensor:
        output = self._models[0](tokens if received is None else received, positions, documents, labels)
        found = (output.shape, output.dtype)
        if self._expected not in (None, found):  # the next stage would wait for another number of bytes
            raise ValueError(f"a part of the model gave activations {found}, not {self._expected}")
        return output


def _inputs(rows: Batch, document_mask: bool) -> dict[str, Tensor]:
    inputs = {"tokens": rows.tokens, "positions": rows.positions, "labels": rows.labels}
    return inputs | {"documents": rows.documents} if document_mask else inputs
