"""The server of tests/world.py loads this before it forks ranks: Hydra imports itself in parts, and looks for plugins."""

from __future__ import annotations

from stoker.conf.compose import compose

compose()
