"""`launch.preflight`: the quick part of `stoker probe`, in the ranks, before they train."""

from __future__ import annotations

from collections.abc import Callable

from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.parallel.mesh import Mesh
from stoker.trainer.probe.judge import REFUSE, judge
from stoker.trainer.probe.measure import PREFLIGHT, measure
from stoker.trainer.runtime.process import Place


def preflight(config: Config, mesh: Mesh, place: Place, say: Callable[[str], None], repeats: int = 1) -> None:
    """Report what is wrong with the machines, by `say` on rank 0. A collective of all ranks.

    Raises ConfigError, on all ranks, for findings that refuse. `repeats` is that of `measure`.
    """
    findings = judge(measure(config, mesh, place, PREFLIGHT, repeats=repeats), config)
    if mesh.rank == 0:
        for finding in findings:
            if finding.severity != REFUSE:
                say(f"preflight: {finding.text}")
    refused = [finding.text for finding in findings if finding.severity == REFUSE]
    if refused:
        raise ConfigError("\n".join(f"launch.preflight: {text}" for text in refused))
