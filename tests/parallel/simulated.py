"""torch's pipeline schedules, the real objects, on ranks that are threads and over a network that is a table.

The network is as strict as NCCL: a rank's operations on one communicator run in the order in which they were started,
a transfer takes place when it is at the head on both sides, and nothing is buffered. torch uses a communicator of the
two ranks for what is only sent or only received, and the group's for batches of both. No rank waits in vain: when all
ranks wait, all are released.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.distributed.pipelining import schedules

from stoker.parallel.pipeline import SCHEDULES, Outbox
from stoker.parallel.stages import stages_of


class Deadlock(Exception):
    pass


@dataclass(eq=False)
class Transfer:
    """One side of a message."""

    sends: bool
    rank: int
    peer: int
    message: Hashable


@dataclass(eq=False)
class Batch:
    """Transfers that were started together and run at the same time."""

    open: list[Transfer]
    done: threading.Event = field(default_factory=threading.Event)


class Network:
    def __init__(self, ranks: int) -> None:
        self._lock = threading.Lock()
        self._queues: dict[tuple[Hashable, int], deque[Batch]] = {}  # by communicator and rank
        self._awaited: dict[int, Batch] = {}  # by rank
        self._running = ranks
        self._stuck = False

    def start(self, transfers: list[Transfer]) -> list[Batch]:
        """As `_batch_p2p`: what goes both ways is one batch of the group, else each transfer one of its pair."""
        if len({transfer.sends for transfer in transfers}) == 2:
            return [self._enter("group", transfers)]
        return [self._enter(frozenset((transfer.rank, transfer.peer)), [transfer]) for transfer in transfers]

    def wait(self, rank: int, batches: list[Batch]) -> None:
        for batch in batches:
            with self._lock:
                self._awaited[rank] = batch
                self._look_for_deadlock()
            batch.done.wait()
            with self._lock:
                del self._awaited[rank]
            if self._stuck:
                raise Deadlock(f"rank {rank} waits for {[transfer.message for transfer in batch.open]}")

    def leave(self) -> None:
        with self._lock:
            self._running -= 1
            self._look_for_deadlock()

    def left_over(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def _enter(self, communicator: Hashable, transfers: list[Transfer]) -> Batch:
        batch = Batch(list(transfers))
        with self._lock:
            queue = self._queues.setdefault((communicator, transfers[0].rank), deque())
            queue.append(batch)
            ranks = {transfer.rank for transfer in transfers} if queue[0] is batch else set()
            while ranks:
                ranks |= self._advance(communicator, ranks.pop())
        return batch

    def _advance(self, communicator: Hashable, rank: int) -> set[int]:
        """Run what can run at the head of a queue; the ranks whose queues have moved on."""
        queue = self._queues[communicator, rank]
        moved: set[int] = set()
        for transfer in list(queue[0].open) if queue else ():
            other = self._queues.get((communicator, transfer.peer))
            for match in list(other[0].open) if other else ():
                if match.peer == rank and match.sends != transfer.sends:
                    assert match.message == transfer.message, f"{transfer.message} meets {match.message}"
                    queue[0].open.remove(transfer)
                    other[0].open.remove(match)  # type: ignore[index]
                    break
            if other and not other[0].open:
                other.popleft().done.set()
                moved.add(transfer.peer)
        if queue and not queue[0].open:
            queue.popleft().done.set()
            moved.add(rank)
        return moved

    def _look_for_deadlock(self) -> None:
        waiting = [batch for batch in self._awaited.values() if not batch.done.is_set()]
        if waiting and len(waiting) == self._running:
            self._stuck = True
            for batch in waiting:
                batch.done.set()


class SimulatedStage:
    """The stage interface of a schedule. It checks that all inputs have arrived."""

    has_backward = True
    submod: Any = None
    device = torch.device("cpu")

    def __init__(self, number: int, stages: int, rank: int, ranks: int) -> None:
        self.outbox: Outbox | None = None
        self.network: Any = None
        self.stage_index, self.num_stages, self.group_rank, self.group_size = number, stages, rank, ranks
        self.is_first, self.is_last = number == 0, number == stages - 1
        self.stage_index_to_group_rank = {stage: stage % ranks for stage in range(stages)}
        self.arrived: set[tuple[str, int]] = set()
        self.computed: list[tuple[str, int]] = []
        self.last: list[bool] = []
        self.most_in_flight = 0

    def clear_runtime_states(self) -> None:
        pass

    def perform_reduce_grad(self, factor: int) -> None:
        assert factor == 1

    def forward_one_chunk(self, chunk: int, *_: Any, **__: Any) -> None:
        assert self.is_first or ("forward", chunk) in self.arrived
        self.computed.append(("forward", chunk))
        done = sum(1 if kind == "forward" else -1 for kind, _ in self.computed)
        self.most_in_flight = max(self.most_in_flight, done)

    def backward_one_chunk(self, chunk: int, loss: Any, last_backward: bool, full_backward: bool = True) -> None:
        assert full_backward and ("forward", chunk) in self.computed
        assert self.is_last or ("backward", chunk) in self.arrived
        assert self.is_last == (loss is not None)
        self.computed.append(("backward", chunk))
        self.last.append(last_backward)

    def get_fwd_recv_ops(self, chunk: int) -> list[Transfer]:
        return [] if self.is_first else self._receives("forward", self.stage_index - 1, chunk)

    def get_bwd_recv_ops(self, chunk: int) -> list[Transfer]:
        return [] if self.is_last else self._receives("backward", self.stage_index + 1, chunk)

    def get_fwd_send_ops(self, chunk: int) -> list[Transfer]:
        assert ("forward", chunk) in self.computed
        return [] if self.is_last else self._sends("forward", self.stage_index + 1, chunk)

    def get_bwd_send_ops(self, chunk: int) -> list[Transfer]:
        assert ("backward", chunk) in self.computed
        return [] if self.is_first else self._sends("backward", self.stage_index - 1, chunk)

    def _receives(self, kind: str, source: int, chunk: int) -> list[Transfer]:
        self.arrived.add((kind, chunk))  # or it will have, when the wait that follows is over
        peer = self.stage_index_to_group_rank[source]
        return [Transfer(False, self.group_rank, peer, (kind, self.stage_index, chunk))]

    def _sends(self, kind: str, target: int, chunk: int) -> list[Transfer]:
        peer = self.stage_index_to_group_rank[target]
        sends = [Transfer(True, self.group_rank, peer, (kind, target, chunk))]
        if self.outbox is None:
            return sends
        self.outbox.put(Sent(self.network, self.group_rank, batch) for batch in self.network.start(sends))
        return []


@dataclass
class Sent:
    """The part of torch's `Work` that `Outbox` uses."""

    network: Network
    rank: int
    batch: Batch

    def wait(self) -> None:
        self.network.wait(self.rank, [self.batch])


def simulate(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int) -> list[SimulatedStage]:
    """Run one step; all stages, in order. Raises what torch raises, or Deadlock."""
    stages = ranks * stages_per_rank
    held = [
        [SimulatedStage(number, stages, rank, ranks) for number in stages_of(rank, ranks, stages_per_rank)]
        for rank in range(ranks)
    ]
    runs: list[Any] = [
        SCHEDULES[schedule](
            of_rank if schedule == "interleaved" else of_rank[0],  # type: ignore[arg-type]
            micro_batches,
            loss_fn=lambda output, target: "loss",
            scale_grads=False,
        )
        for of_rank in held
    ]
    network = Network(ranks)
    for of_rank in held:
        outbox = Outbox(ranks) if schedule == "interleaved" else None
        for stage in of_rank:
            stage.network, stage.outbox = network, outbox
    failures: list[BaseException] = []
    local = threading.local()

    def step(rank: int) -> None:
        local.rank = rank
        for started in ("_stage_forward", "_stage_backward", "_stages_forward", "_stages_backward"):
            setattr(runs[rank], f"{started}_initialized", True)  # that part is not simulated
        try:
            runs[rank].step(target=torch.zeros(micro_batches), return_outputs=False)
            if held[rank][0].outbox is not None:
                held[rank][0].outbox.wait()
        except BaseException as failure:
            failures.append(failure)
        finally:
            network.leave()

    threads = [threading.Thread(target=step, args=(rank,)) for rank in range(ranks)]
    with (
        mock.patch.object(schedules, "_batch_p2p", lambda ops, desc=None: network.start(ops)),
        mock.patch.object(schedules, "_wait_batch_p2p", lambda batches: network.wait(local.rank, batches)),
        mock.patch.object(schedules.logger, "error"),
    ):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    assert network.left_over() == 0, "a send or receive had no partner"
    return sorted((stage for of_rank in held for stage in of_rank), key=lambda stage: stage.stage_index)
