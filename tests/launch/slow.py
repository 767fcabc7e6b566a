"""The ordinary model, but each forward pass takes a while: time in which a test can do something to a run.

A start with STOKER_TEST_SLOW=0 in its environment continues at full speed.
"""

from __future__ import annotations

import os
import time
from typing import Any

from stoker.models import decoder

SECONDS = float(os.environ.get("STOKER_TEST_SLOW", "0.2"))


def build(config: Any, part: Any) -> Any:
    model = decoder.build(config, part)
    model.register_forward_pre_hook(lambda *_: time.sleep(SECONDS))
    return model
