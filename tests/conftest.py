from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: tests run several ranks on few cores

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("stoker", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("stoker")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
