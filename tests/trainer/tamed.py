"""A model of the user's own, which is ours."""

from __future__ import annotations

from stoker.models.decoder import build

__all__ = ["build"]
