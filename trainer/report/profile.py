"""Profiling: steps traced into files (`profile.steps`), and phases of steps for metrics.jsonl (`profile.phases_every`).

Both use torch's profiler, of which a process has one at a time: the steps of `profile.steps` have no phases. Ranks
profile the same steps, so that none waits for another that is slowed down by its profiler. What a step computes is
not touched; it takes longer, and so does its `step_seconds`, which the phases do not hide. The steps of `profile.steps`
also mark the forward of each module; `stoker profile` reads what they leave.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from stoker.conf.schema import ProfileConfig
from stoker.trainer.report.breakdown import events_of, over_ranks, phase_seconds
from stoker.trainer.report.module_ranges import ModuleRanges

log = logging.getLogger(__name__)

MEMORY_EVENTS = 100_000  # newest allocations and frees in a memory snapshot; several kB each, by torch's docs


class Profiler:
    """Profiles the steps that `config` names; the others cost a comparison."""

    def __init__(
        self,
        config: ProfileConfig,
        device: torch.device,
        trace: Path,
        memory_snapshot: Path,
        say: Callable[[str], None] = log.info,
        modules: Mapping[str, nn.Module] | None = None,
        held: Callable[[], Mapping[str, int]] = dict,
        gather: Callable[[str], list[str]] = lambda text: [text],
    ) -> None:
        """`trace` and `memory_snapshot` are the files to write (the second on GPUs only); `say` prints a line.

        `modules` are marked in traces, by name. `held` returns the bytes of what stays on the device, by category.
        `gather` returns a text of every rank; all ranks call it in the same steps.
        """
        self._first, self._last = config.steps or (0, 0)
        self._every = config.phases_every
        self._on_gpu = device.type == "cuda"
        self._device, self._trace, self._memory_snapshot, self._say = device, trace, memory_snapshot, say
        self._ranges, self._held, self._gather = ModuleRanges(modules or {}), held, gather
        self._recording: profile | None = None  # of `profile.steps`

    @contextmanager
    def step(self, step: int) -> Iterator[dict[str, float]]:
        """The work of `step` is done inside. What is yielded then holds the metrics that profiling adds to the step."""
        metrics: dict[str, float] = {}
        if self._first <= step <= self._last:
            with self._traced(step), record_function(f"ProfilerStep#{step}"):  # the name that trace viewers expect
                yield metrics
        elif self._every and step % self._every == 0:
            self._wait_for_device()  # what came before is not of this step
            with self._profile() as traced:
                yield metrics
                self._wait_for_device()
            own = phase_seconds(events_of(traced))
            metrics |= own | over_ranks([json.loads(text) for text in self._gather(json.dumps(own))])
        else:
            yield metrics

    def close(self) -> None:
        """Write the trace, if one is being recorded. A failure is reported and does not end the run."""
        if self._recording is None:
            return
        recorded, self._recording = self._recording, None
        self._ranges.__exit__()
        try:
            recorded.add_metadata_json("stoker.memory", json.dumps(self._memory()))
            recorded.stop()
            self._trace.parent.mkdir(parents=True, exist_ok=True)
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(self._memory_snapshot))
                torch.cuda.memory._record_memory_history(enabled=None)
            unfinished = self._trace.with_name(f".{self._trace.name}")
            recorded.export_chrome_trace(str(unfinished))
            unfinished.replace(self._trace)
        except (OSError, RuntimeError) as error:
            log.warning("no trace is written to %s", self._trace, exc_info=error)
            self._say(f"no trace is written: {error}")
        else:
            self._say(f"traced: {self._trace.parent}")

    @contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        if self._recording is None:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS, clear_history=True)
                torch.cuda.reset_peak_memory_stats(self._device)
            self._recording = self._profile()
            self._recording.start()
            self._ranges.__enter__()
        try:
            yield
        except Exception:
            self.close()  # the snapshot shows the allocations before an out-of-memory error
            raise
        if step == self._last:
            self.close()

    def _memory(self) -> dict[str, int]:
        """Bytes on the device: the most in the traced steps ("peak", on GPUs only), and of what is always there."""
        peak = {"peak": torch.cuda.max_memory_allocated(self._device)} if self._on_gpu else {}
        return {**self._held(), **peak}

    def _profile(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
        return profile(activities=activities)

    def _wait_for_device(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
