"""The ordinary model, but each forward pass takes a while: time in which a test can do something to a run."""

from __future__ import annotations

import time
from typing import Any

import models.decoder

SECONDS = 0.2


def build(config: Any, part: Any) -> Any:
    model = models.decoder.build(config, part)
    model.register_forward_pre_hook(lambda *_: time.sleep(SECONDS))
    return model
