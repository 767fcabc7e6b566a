"""The health of a machine's GPUs, as nvidia-smi reports it."""

from __future__ import annotations

import shutil
import subprocess

from stoker.trainer.probe.facts import Gpu

_SECONDS = 20.0  # nvidia-smi answers late on a machine with a broken GPU
_FIELDS = ("uuid", "name", "ecc.errors.uncorrected.volatile.total")
_REMAPS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
_SLOWED = {
    "hw_thermal_slowdown": "heat",
    "sw_thermal_slowdown": "heat",
    "hw_power_brake_slowdown": "its power supply",
    "hw_slowdown": "its hardware",
}


def gpus() -> list[Gpu] | None:
    """All GPUs of this machine; None where nvidia-smi does not answer."""
    rows = _query("gpu", _FIELDS)
    if rows is None:
        return None
    remaps = {row[0]: row[1:] for row in _query("remapped-rows", _REMAPS) or []}
    slowed = {row[0]: row[1:] for row in _reasons() or []}
    found = []
    for uuid, name, errors in rows:
        pending, failed = remaps.get(uuid, ["", ""])
        why = zip(_SLOWED.values(), slowed.get(uuid, []), strict=False)
        reasons = list(dict.fromkeys(reason for reason, value in why if value == "Active"))
        count = int(errors) if errors.isdecimal() else None  # [N/A] without ECC
        found.append(Gpu(name, uuid, count, _is_yes(pending), _is_yes(failed), reasons))
    return found


def _reasons() -> list[list[str]] | None:
    """The drivers before 535 have the older name."""
    for prefix in ("clocks_event_reasons", "clocks_throttle_reasons"):
        rows = _query("gpu", ("uuid", *(f"{prefix}.{reason}" for reason in _SLOWED)))
        if rows is not None:
            return rows
    return None


def _is_yes(value: str) -> bool:
    return value.lower() in ("yes", "1")


def _query(what: str, fields: tuple[str, ...]) -> list[list[str]] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    words = [program, f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[value.strip() for value in line.split(",")] for line in ended.stdout.splitlines() if line.strip()]
    return rows if all(len(row) == len(fields) for row in rows) else None
