"""Keys for one start, and the form in which a run keeps its config, without them."""

from __future__ import annotations

import dataclasses

from stoker.conf.schema import Config

PER_START = ("run.fresh", "run.change", "run.trust", "run.adopt", "launch.deadline")  # keys that no run keeps


def lasting(config: Config) -> Config:
    """`config` without the keys for one start: the form in which a run keeps it."""
    run = dataclasses.replace(config.run, fresh=False, change=False, trust=False, adopt=False)
    return dataclasses.replace(config, run=run, launch=dataclasses.replace(config.launch, deadline=None))
