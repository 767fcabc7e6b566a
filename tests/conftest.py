from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: tests run several ranks on few cores
# Runs in tests have cache folders of their own, in each of which matplotlib would look for all fonts again: seconds.
os.environ.setdefault("MPLCONFIGDIR", str(Path.home() / ".cache" / "matplotlib"))

import hypothesis
import pytest
import torch

from tests.extent import FULL

torch.set_num_threads(1)
hypothesis.settings.register_profile("stoker", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("stoker")

_SIGNALS = (signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """Commands that a test calls set handlers for the process that they usually are. One that is left strikes a later
    test: with SIGPIPE's default, a write into a pipe that nobody reads ends the worker without a word."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.long)
            if not FULL:
                item.add_marker(pytest.mark.skip(reason="takes a minute or more: STOKER_TESTS=full"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Collections of garbage during the tests need not go through what was imported for them: a second each."""
    gc.collect()
    gc.freeze()
