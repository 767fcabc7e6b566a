"""How much the tests try: with `STOKER_TESTS=full` whole products of cases, which takes another half hour."""

from __future__ import annotations

import os

FULL = os.environ.get("STOKER_TESTS") == "full"
