"""Signals are heard while the main thread is in a C call."""

from __future__ import annotations

import os
import signal
import threading
import time

from stoker.trainer.runtime.signal_listener import SignalListener
from tests.trainer.runtime.deaf import deaf_for


def test_a_callback_is_called_for_a_signal_before_its_handler_can_run() -> None:
    order: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: order.append("handler"))
    listener = SignalListener()
    try:
        listener.on(signal.SIGUSR1, lambda: order.append("heard"))
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        began = time.monotonic()
        deaf_for(0.5)
        assert time.monotonic() - began > 0.4, "the call was cut short"
    finally:
        listener.close()
        signal.signal(signal.SIGUSR1, before)
    assert order == ["heard", "handler"]
