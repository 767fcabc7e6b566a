"""Injects failures to test that a run survives them: `stoker.conf.faults` defines the kinds."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from stoker.checkpoint import Checkpoints
from stoker.conf.faults import Fault
from stoker.conf.rundir import RunDirectory
from stoker.trainer.report.module_names import ModuleNames

log = logging.getLogger(__name__)

TOO_MUCH = 1 << 50  # float32 numbers that no device has memory for


class Faults:
    """The faults of one rank. A record in the run directory keeps a restart from repeating them."""

    def __init__(
        self, faults: Sequence[Fault], rank: int, run: RunDirectory, checkpoints: Checkpoints, device: torch.device
    ) -> None:
        self._open = [fault for fault in faults if fault.rank == rank]
        self._lasting: list[Fault] = []
        self._run, self._checkpoints, self._device = run, checkpoints, device

    def inject(self, step: int) -> None:
        """Inject the faults due at `step`; some do not return."""
        for fault in [fault for fault in self._open if fault.at == step or self._waits_for_a_save(fault, step)]:
            self._open.remove(fault)
            if not self._first_time(fault):
                continue
            log.warning("fault on purpose: %s", fault)
            if fault.do in ("slow", "nan"):
                self._lasting.append(fault)
            else:
                self._strike(fault)
        self._lasting = [fault for fault in self._lasting if step < fault.at + fault.steps]
        for fault in self._lasting:
            if fault.do == "slow":
                _compute_for_nothing(fault.seconds)

    @contextmanager
    def in_passes(self) -> Iterator[None]:
        """A context for forward and backward of the step."""
        if not any(fault.do == "nan" for fault in self._lasting):
            yield
            return
        with NaNInjector() as poison:
            yield
        for fault in self._lasting:
            if fault.do == "nan":
                self._run.struck(fault.name).write_text(poison.module or "")  # for `stoker replay`

    def _waits_for_a_save(self, fault: Fault, step: int) -> bool:
        """A disk may fill up before the attempt that finds it full began."""
        return fault.do == "disk_full" and fault.at < step

    def _first_time(self, fault: Fault) -> bool:
        mark = self._run.struck(fault.name)
        mark.parent.mkdir(exist_ok=True)
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _strike(self, fault: Fault) -> None:
        if fault.do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.do == "hang":
            sleep_for_ever()
        elif fault.do == "oom":
            torch.empty(TOO_MUCH, device=self._device)
        elif fault.do == "disk_full":
            self._checkpoints.inject_failure(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        else:
            assert fault.do == "net_loss", fault
            cut_connections()


def sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(1.0)


def _compute_for_nothing(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


class NaNInjector:
    """While entered, makes the first floating-point output of `module` nan, or of any if it is None; `module` is then
    set to its name. Works on every engine and layout: hooks are global."""

    def __init__(self, module: str | None = None) -> None:
        self.module = module
        self._done = False
        self._names = ModuleNames()

    def __enter__(self) -> NaNInjector:
        self._names.__enter__()
        self._hook = register_module_forward_hook(self._poison)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._names.__exit__()

    def _poison(self, module: nn.Module, _arguments: Any, output: Any) -> Any:
        if self._done or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        if self.module not in (None, self._names[module]):
            return None
        self.module, self._done = self._names[module], True
        return output * float("nan")


def cut_connections() -> None:
    """Shut down every TCP connection of this process, as a failing network card would."""
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # no socket, or not a connected one
            connection = socket.socket(fileno=os.dup(int(entry.name)))
            with connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    connection.shutdown(socket.SHUT_RDWR)
