"""Facts of ranks that nobody measured."""

from __future__ import annotations

from typing import Any

from stoker.trainer.probe.facts import Facts, Host, Line, Link

FAIR = Line(latency=50e-6, rate=10e9)
MACHINE = Host(cores=64, shm_bytes=1 << 36, open_files=1 << 20)


def ranks(machines: int, each: int = 2, **more: Any) -> list[Facts]:
    """Ranks of equal machines, in order; first ranks have links to all other machines."""
    found = []
    for rank in range(machines * each):
        first = rank // each * each
        links = [Link(other * each, FAIR) for other in range(machines) if other * each != rank]
        values: dict[str, Any] = {
            "rank": rank, "host": f"n{rank // each}", "first": first, "device": "a CPU", "cuda": False,
            "memory_gib": 16.0, "versions": {"torch": "2.13.0"}, "windows": [1e10] * 5,
            "links": links if rank == first else [], "machine": MACHINE if rank == first else None,
        }  # fmt: skip
        found.append(Facts(**{**values, **more}))
    return found
