"""Loaded by the server of tests/world.py before it forks: Hydra imports itself in parts, and looks for plugins."""

from __future__ import annotations

from stoker.conf.compose import compose

compose()
