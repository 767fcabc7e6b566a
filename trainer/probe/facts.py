"""What a rank found of its machine: values that travel between ranks as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from stoker.trainer.probe.passes import Passes


@dataclass(frozen=True)
class Line:
    """Seconds of a message, fitted: `latency + bytes / rate`."""

    latency: float  # seconds
    rate: float  # bytes a second


@dataclass(frozen=True)
class Link:
    """Messages from this rank to the first rank of another machine."""

    to: int
    line: Line

    def better(self, other: Link) -> Link:
        """The best of two measurements of a link: what else a machine does only makes them worse."""
        return Link(self.to, Line(min(self.line.latency, other.line.latency), max(self.line.rate, other.line.rate)))


@dataclass(frozen=True)
class AxisLink:
    """Collectives over this rank's group of an axis, while all groups of the axis run theirs."""

    axis: str
    kind: str  # all_reduce | all_gather | reduce_scatter | all_to_all | send
    ranks: list[int]
    line: Line  # of the bytes that one link of a ring carries
    largest: int  # bytes of the largest message


@dataclass(frozen=True)
class FolderRate:
    """Input or output of a folder. `rate` is None where it could not be told from memory, for the reason in `why`."""

    what: str  # data | checkpoints | cache | offload
    path: str
    way: str  # read | write
    rate: float | None  # bytes a second
    bytes: int = 0
    why: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi reports it; None where it reports nothing."""

    name: str
    uuid: str
    uncorrected: int | None = None  # memory errors since the last reset
    remap_pending: bool = False  # a row of memory waits for a reset to be replaced
    remap_failed: bool = False
    slowed: list[str] = field(default_factory=list)  # why its clock is lower: heat, power


@dataclass(frozen=True)
class Interface:
    """A network interface or InfiniBand port."""

    name: str
    kind: str  # ethernet | infiniband
    active: bool
    gbit_s: float | None = None


@dataclass(frozen=True)
class Host:
    """A machine, as its first rank found it."""

    cores: int
    shm_bytes: int | None = None  # size of /dev/shm
    memlock: int | None = None  # bytes; None: unlimited
    open_files: int | None = None  # None: unlimited
    interfaces: list[Interface] = field(default_factory=list)
    gpus: list[Gpu] | None = None  # None: no nvidia-smi
    visible: int = 0  # GPUs that torch sees


@dataclass(frozen=True)
class Facts:
    """What one rank found. Rates are in operations or bytes a second, None where not measured."""

    rank: int
    host: str
    first: int  # the first rank of its machine
    device: str
    cuda: bool
    memory_gib: float
    clock: float = 0.0  # seconds ahead of rank 0's
    versions: dict[str, str] = field(default_factory=dict)
    windows: list[float] = field(default_factory=list)  # rates of one matrix product, in spans of all ranks at once
    peaks: dict[str, float] = field(default_factory=dict)  # best rate by dtype
    own: float | None = None  # rate over the products of the model, in the run's precision
    memory: float | None = None  # read and written
    to_device: float | None = None
    from_device: float | None = None
    call: float | None = None  # seconds of an operation on the host
    passes: Passes | None = None  # of the model's own
    axes: list[AxisLink] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)  # of the first rank of a machine
    folders: list[FolderRate] = field(default_factory=list)  # of the first rank of a machine
    machine: Host | None = None  # of the first rank of a machine

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def facts_of(text: str) -> Facts:
    """The inverse of `Facts.text`."""
    values: dict[str, Any] = json.loads(text)
    values["axes"] = [AxisLink(**{**each, "line": Line(**each["line"])}) for each in values["axes"]]
    values["links"] = [Link(each["to"], Line(**each["line"])) for each in values["links"]]
    values["passes"] = Passes(**values["passes"]) if values["passes"] is not None else None
    values["folders"] = [FolderRate(**each) for each in values["folders"]]
    if (machine := values["machine"]) is not None:
        machine["interfaces"] = [Interface(**each) for each in machine["interfaces"]]
        if machine["gpus"] is not None:
            machine["gpus"] = [Gpu(**each) for each in machine["gpus"]]
        values["machine"] = Host(**machine)
    return Facts(**values)
