"""`stoker generate`: text from a run's newest valid checkpoint, streamed to the terminal."""

from __future__ import annotations
