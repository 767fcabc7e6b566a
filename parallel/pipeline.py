"""The micro-batches of a step through a pipeline, by torch's schedules: GPipe, 1F1B, interleaved 1F1B.

Training uses torch's schedules, which order the micro-batches on each stage, and torch's stage. Four things differ. The
stage's `ShardingStrategy` alone reduces gradients and reshards parameters after a backward; torch does not see that
modules are sharded. Shapes are given, not found by a forward pass. Tensors that are sent or received are kept only
while their micro-batch is in flight: torch before 2.15 keeps a buffer for each micro-batch of the step, so that the
memory of 1F1B and interleaved 1F1B would grow with their number. And the stage itself starts transfers, when the
schedule asks for them, and waits for what it receives only when it computes with it. Over NCCL each direction
(activations, gradients) has a communicator of its own: what a communicator is given runs in order, so that a gradient
would wait for an activation that nothing needs yet.

Evaluation needs no schedule: every rank computes a stage, sends the result to the next rank and receives one from
the previous rank, all at the same time (`Ring`).

All ranks have the rows, so that only activations and their gradients are sent.
"""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.profiler import record_function

from stoker.parallel.batch import Batch
from stoker.parallel.documents import bounded, document_layers
from stoker.parallel.layout import BatchPlan
from stoker.parallel.mesh import Mesh
from stoker.parallel.objective import NEXT_TOKEN, Objective, shaped, targets_of
from stoker.parallel.sharding import ShardingStrategy
from stoker.parallel.tensor.dropout import token_numbers

WAYS = FORWARD, BACKWARD = "forward", "backward"
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


@dataclass(frozen=True)
class Stage:
    """A stage that this rank holds."""

    number: int  # in the pipeline, from 0
    model: nn.Module  # its part of the model, cut and with memory
    weights: ShardingStrategy


class PipelineSchedule:
    """`stoker.parallel.forward_backward.ForwardBackward` of a rank that holds `stages`, in the order of the pipeline.

    `activations` are meta tensors like the outputs of the stages for one micro-batch, for every stage of the whole
    pipeline but the last: `[tokens, ...]`, fewer tokens where tensor-parallel ranks share them.
    """

    def __init__(
        self,
        mesh: Mesh,
        plan: BatchPlan,
        stages: Sequence[Stage],
        schedule: str,
        document_mask: bool,
        activations: Sequence[Tensor],
        objective: Objective = NEXT_TOKEN,
    ) -> None:
        for way in WAYS:
            mesh.add_groups("pp", mesh.layout.groups("pp"), queue=way)
        ways = {way: mesh.group(f"pp.{way}") for way in WAYS}
        assert len(stages) == 1 or schedule == "interleaved"
        self._device, self._document_mask, self._objective = mesh.device, document_mask, objective
        self._plan, self._stages = plan, stages
        self._documents = [layer for stage in stages if document_mask for layer in document_layers(stage.model)]
        self._group, self._at, self._size = ways[FORWARD], mesh.coordinate.pp, mesh.layout.pp
        self._count = self._size * len(stages)
        assert len(activations) == self._count - 1
        # Inputs and outputs of a stage: None for the first, whose input is tokens, and the last, whose output is the
        # loss.
        self._takes: Sequence[Tensor | None] = [None, *activations]
        gives: Sequence[Tensor | None] = [*activations, None]
        self._factor = torch.ones((), device=mesh.device)
        self._sums = torch.zeros(1 + len(objective.scalars), dtype=torch.float64, device=mesh.device)
        self._rows: Batch | None = None  # of the step
        self._forwards = {
            stage.number: _Forward(stage.model, stage.number, gives[stage.number], objective) for stage in stages
        }
        self._outbox = Outbox(self._size)
        held = [
            _TorchStage(
                self._forwards[stage.number],
                stage,
                self._count,
                mesh.device,
                ways,
                self._takes[stage.number],
                gives[stage.number],
                self._outbox,
            )
            for stage in stages
        ]
        self._schedule_of = functools.cache(  # by the number of micro-batches, which grows with `batch.ramp`
            lambda count: SCHEDULES[schedule](
                held if schedule == "interleaved" else held[0], count, loss_fn=self._loss, scale_grads=False
            )
        )
        if mesh.nccl:  # it connects on first use, for which all ranks of a group have to be there
            for group in ways.values():
                dist.all_reduce(torch.zeros((), device=mesh.device), group=group)

    def train(self, rows: Batch, factor: Tensor) -> Tensor:
        assert len(rows) % self._plan.micro_rows == 0, (len(rows), self._plan)
        self._factor = factor
        self._sums = torch.zeros_like(self._sums)
        self._rows = rows.to(self._device)
        # The schedule cuts its target into micro-batches, whose places in it tell the rows; it has no values to read.
        target = torch.empty(len(rows), device="meta")
        with bounded(self._documents, rows.documents, self._device):
            self._schedule_of(len(rows) // self._plan.micro_rows).step(
                target=target, return_outputs=False, **_inputs(self._rows, self._document_mask)
            )
        self._outbox.wait()
        self._rows = None
        return self._sums

    def evaluate(self, rows: Batch) -> Tensor:
        sums = torch.zeros_like(self._sums)
        for micro, given in self._evaluated(rows):
            sums += self._objective.loss(given, micro).sums()
        return sums

    def log_probabilities(self, rows: Batch, objective: Objective | None = None) -> Tensor | None:
        found = [given for _, given in self._evaluated(rows, objective)]
        return torch.cat(found)[: len(rows)] if found else None

    @torch.no_grad()
    def _evaluated(self, rows: Batch, objective: Objective | None = None) -> list[tuple[Batch, Tensor]]:
        """Each micro-batch and what the head returned for it, on the rank that has the head."""
        with bounded(self._documents, rows.documents, self._device):
            return self._around(rows, objective)

    def _around(self, rows: Batch, objective: Objective | None) -> list[tuple[Batch, Tensor]]:
        size, objective = self._plan.micro_rows, objective or self._objective
        rows = rows.padded(size).to(self._device)
        ring = Ring(self._at, self._size, self._count, len(rows) // size)
        found = []
        received: Tensor | None = None
        for tick in range(ring.ticks):
            transfers = []
            if work := ring.work(tick):
                number, place = work
                micro = rows[place * size : (place + 1) * size]
                inputs = _inputs(micro, self._document_mask)
                output = self._forwards[number].compute(received, objective, **inputs)
                if number == self._count - 1:
                    found.append((micro, shaped(objective, output, micro.labels)))
                else:
                    transfers.append(self._transfer(dist.isend, output, self._at + 1))
            received = None
            following = ring.work(tick + 1)
            taken = self._takes[following[0]] if following else None
            if taken is not None:
                received = torch.empty_like(taken, device=self._device)
                transfers.append(self._transfer(dist.irecv, received, self._at - 1))
            for work_in_flight in dist.batch_isend_irecv(transfers) if transfers else ():
                work_in_flight.wait()
        return found

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        assert self._rows is not None
        first = int(target.storage_offset())
        micro = self._rows[first : first + len(target)]
        loss = self._objective.loss(shaped(self._objective, output, micro.labels), micro)
        self._sums += loss.sums()
        return loss.sum * self._factor

    def _transfer(self, kind: Any, tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self._group, group_peer=peer % self._size)


@dataclass(frozen=True)
class Ring:
    """The schedule of an evaluation: a rank computes in each tick one stage of one micro-batch, or nothing.

    Micro-batches run in rounds of as many as there are ranks, each one tick after the one before, so that a rank that
    holds several stages is free again when the first of them returns.
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

    The order of sends and receives in torch's schedules is one in which every send could be waited for at once, so no
    wait here can hang: tests/parallel/test_schedules.py tries them all.
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


class Inbox:
    """Receives in flight, by the name of what they bring."""

    def __init__(self) -> None:
        self._works: dict[tuple[str, int], list[dist.Work]] = {}

    def put(self, name: tuple[str, int], works: Iterable[dist.Work]) -> None:
        self._works[name] = list(works)

    def wait(self, name: tuple[str, int]) -> None:
        """Until it is here."""
        for work in self._works.pop(name, ()):
            work.wait()


class _TorchStage(PipelineStage):
    """torch's stage. It leaves weights to `ShardingStrategy`, and transfers to the group of their way."""

    def __init__(
        self,
        forward: _Forward,
        stage: Stage,
        count: int,
        device: torch.device,
        ways: Mapping[str, dist.ProcessGroup | None],
        takes: Tensor | None,
        gives: Tensor | None,
        outbox: Outbox,
    ) -> None:
        loss = torch.empty((), device="meta")
        super().__init__(
            forward,
            stage.number,
            count,
            device,
            input_args=() if takes is None else takes.detach().requires_grad_(),
            output_args=(loss if gives is None else gives).detach().requires_grad_(),
            group=ways[FORWARD],
        )
        self._weights, self._takes, self._gives = stage.weights, takes, gives
        self._ways, self._outbox, self._inbox = ways, outbox, Inbox()

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
        self._allocate(self.args_recv_info[fwd_chunk_id], self._takes)
        self._inbox.put((FORWARD, fwd_chunk_id), self._start(FORWARD, super().get_fwd_recv_ops(fwd_chunk_id)))
        return []  # the schedule has nothing to start

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._allocate(self.grad_recv_info[bwd_chunk_id], self._gives)
        self._inbox.put((BACKWARD, bwd_chunk_id), self._start(BACKWARD, super().get_bwd_recv_ops(bwd_chunk_id)))
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._outbox.put(self._start(FORWARD, super().get_fwd_send_ops(fwd_chunk_id)))
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        self._outbox.put(self._start(BACKWARD, super().get_bwd_send_ops(bwd_chunk_id)))
        return []

    def _start(self, way: str, transfers: list[dist.P2POp]) -> list[dist.Work]:
        """As a batch also where it is one: NCCL makes a communicator for each pair of ranks otherwise."""
        group = self._ways[way]
        moved = [dist.P2POp(one.op, one.tensor, group=group, group_peer=one.group_peer) for one in transfers]
        return dist.batch_isend_irecv(moved) if moved else []

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        self._inbox.wait((FORWARD, fwd_chunk_id))
        return self._released(super()._retrieve_recv_activations(fwd_chunk_id), self.args_recv_info[fwd_chunk_id])

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor, ...]:
        self._inbox.wait((BACKWARD, bwd_chunk_id))
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

    def _allocate(self, infos: tuple, like: Tensor | None) -> None:
        for info in infos:
            assert like is not None
            if not hasattr(info, "allocate_buffer"):  # torch 2.15 does it itself
                info.buffer = torch.empty_like(like, device=self.device, requires_grad=False)

    @staticmethod
    def _released(tensors: tuple[Tensor, ...], infos: tuple) -> tuple[Tensor, ...]:
        for info in infos:
            info.buffer = None
        return tensors


class _Forward(nn.Module):
    """A model as torch's pipeline calls it. It holds the model, but not as a child: see the head of this file.

    The output of stage `number` must be like `gives`; None where the output is the loss.
    """

    def __init__(self, model: nn.Module, number: int, gives: Tensor | None, objective: Objective) -> None:
        super().__init__()
        self._models, self._number, self._objective = (model,), number, objective
        self._tokens = token_numbers(model)
        self._expected = None if gives is None else (tuple(gives.shape), gives.dtype)

    def forward(self, *received: Tensor, **inputs: Tensor) -> Tensor:
        with record_function("stoker.forward"):
            return self.compute(received[0] if received else None, self._objective, **inputs)

    def compute(
        self,
        received: Tensor | None,
        objective: Objective,
        tokens: Tensor,
        positions: Tensor,
        labels: Tensor,
        documents: Tensor | None = None,
        numbers: Tensor | None = None,
        **targeted: Tensor,
    ) -> Tensor:
        targets = targets_of(objective, labels, **targeted)
        with self._tokens.of(numbers) if self._tokens is not None else nullcontext():
            output = self._models[0](tokens if received is None else received, positions, documents, targets)
        found = (tuple(output.shape), output.dtype)
        if self._expected not in (None, found):  # the next stage would wait for another number of bytes
            raise ValueError(
                f"pipeline stage {self._number} returned activations {found}, but {self._expected} on the meta device: "
                "their shape and dtype may not depend on values or on the device"
            )
        return output


def _inputs(rows: Batch, document_mask: bool) -> dict[str, Tensor]:
    inputs = {"tokens": rows.tokens, "positions": rows.positions, "labels": rows.labels}
    for name in ("weights", "teacher_tokens", "teacher_log_probabilities", "numbers"):
        if (field := getattr(rows, name)) is not None:
            inputs[name] = field
    return inputs | {"documents": rows.documents} if document_mask else inputs
