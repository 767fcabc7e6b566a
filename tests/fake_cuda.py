"""torch.cuda without a GPU: records what each thread does, and refuses what would make a context on another GPU.

As on a real machine, every thread's current GPU is number 0 until the thread sets it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass
class FakeCuda:
    """`visible` GPUs, of which this process has contexts on `contexts`."""

    visible: int = 8
    uuids: list[str] = field(default_factory=lambda: [f"{number:08d}-aaaa" for number in range(16)])
    contexts: set[int] = field(default_factory=set)
    streams: list[FakeStream] = field(default_factory=list)
    registered: dict[int, int] = field(default_factory=dict)  # address -> bytes
    blocking: list[bool] = field(default_factory=list)  # of every event waited for by the host
    milliseconds: float = 0.0  # the clock of the events
    passed: bool = True  # have the events passed?
    _local: threading.local = field(default_factory=threading.local)

    @property
    def current(self) -> int:
        return getattr(self._local, "device", 0)

    def set_device(self, device: Any) -> None:
        self._local.device = device if isinstance(device, int) else torch.device(device).index
        self.contexts.add(self.current)

    def touch(self) -> None:
        """Something runs on this thread's current GPU."""
        self.contexts.add(self.current)

    def stream(self, device: Any = None) -> FakeStream:
        self.touch()
        self.streams.append(FakeStream(self, torch.device(device)))
        return self.streams[-1]

    @contextmanager
    def on_stream(self, stream: FakeStream | None) -> Iterator[None]:
        if stream is not None:
            assert stream.device.index == self.current, "the thread's GPU is another than the stream's"
            self.touch()
        yield

    def properties(self, device: Any) -> Any:
        number = torch.device(device).index
        return SimpleNamespace(uuid=self.uuids[number], total_memory=80 * 2**30)

    def cudart(self) -> Any:
        def register(address: int, size: int, flags: int) -> int:
            self.registered[address] = size
            return 0

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=self.registered.pop)


@dataclass
class FakeStream:
    cuda: FakeCuda
    device: torch.device

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.touch()

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.cuda)


class FakeEvent:
    def __init__(self, cuda: FakeCuda, enable_timing: bool = False, blocking: bool = False) -> None:
        self.cuda, self.blocking, self.at = cuda, blocking, 0.0

    def record(self, stream: FakeStream | None = None) -> None:
        self.at = self.cuda.milliseconds

    def synchronize(self) -> None:
        self.cuda.blocking.append(self.blocking)

    def query(self) -> bool:
        return self.cuda.passed

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


class OnGpu(Tensor):
    """A tensor of the CPU's memory that claims to be on a GPU."""

    number = 3

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.number)


def on_gpu(tensor: Tensor) -> Tensor:
    return torch.Tensor._make_subclass(OnGpu, tensor)


def install(monkeypatch: pytest.MonkeyPatch, visible: int = 8) -> FakeCuda:
    """A FakeCuda in the place of torch.cuda, for the rest of the test."""
    cuda = FakeCuda(visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda.visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda.visible > 0)
    monkeypatch.setattr(torch.cuda, "set_device", cuda.set_device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cuda.properties)
    monkeypatch.setattr(torch.cuda, "cudart", cuda.cudart)
    monkeypatch.setattr(torch.cuda, "Stream", cuda.stream)
    monkeypatch.setattr(torch.cuda, "stream", cuda.on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream(cuda, torch.device("cuda", 3)))
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: FakeEvent(cuda, **options))
    return cuda
