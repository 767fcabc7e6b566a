"""How a rank finds its config and the other ranks, under any launcher."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from stoker.conf.files import expand
from stoker.conf.schema import Config, from_dict
from stoker.conf.values import ConfigError
from stoker.parallel.loopback import is_loopback, loopback_store
from stoker.trainer.failure import NotMet
from stoker.trainer.runtime.gpus import ranks_of
from stoker.trainer.runtime.process import Console, Place
from stoker.trainer.settle import settle_config

CONFIG_VARIABLE = "STOKER_CONFIG"  # our launcher passes the settled config to ranks, as JSON
RENDEZVOUS_SECONDS = 300.0


def config_of_rank(overrides: Sequence[str], place: Place) -> Config:
    """The settled config: the launcher's, else that of `overrides`. Raises ConfigError."""
    given = os.environ.get(CONFIG_VARIABLE)
    if given is not None:
        return from_dict(json.loads(given))
    say = Console().say if place.rank == 0 else (lambda _: None)
    overrides = expand(overrides, say)
    if place.world > 1 and not any(o.startswith(("run.dir=", "run.name=")) for o in overrides):
        raise ConfigError("set run.dir=... or run.name=...: every rank must find the same run directory")
    if place.world > 1 and "LOCAL_RANK" in os.environ and "LOCAL_WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "LOCAL_RANK is set and LOCAL_WORLD_SIZE is not: set it to the number of ranks on this machine"
        )
    config, _ = settle_config(
        overrides,
        lambda config: ranks_of(config, place),
        refitted=say,
        tell=say,
        restarted=place.restart > 0,
        check_import=place.rank == 0,  # the others wait for it in the preflight checks
    )
    return config


def store_of_rank(place: Place) -> dist.Store:
    """The launcher's store. torchrun keeps one over restarts, with the keys of earlier attempts.

    Raises ConfigError where MASTER_PORT is taken, NotMet where rank 0 is not reached.
    """
    if place.world == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if place.rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ and is_loopback(address) and port.isdecimal():
        with suppress(OSError):  # taken: by an earlier run of this process, which torch knows, or by another program
            return loopback_store(int(port))
    patience = timedelta(seconds=RENDEZVOUS_SECONDS)
    try:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.world, timeout=patience))
        return store
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise ConfigError(f"MASTER_PORT: another program listens on {where}; name a free port") from error
        raise NotMet(
            f"rank {place.rank} has not reached the other ranks at {where} within {RENDEZVOUS_SECONDS:.0f} s: is rank "
            "0 running, "
            "and may this machine connect to it?"
        ) from error
