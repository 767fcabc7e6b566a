from __future__ import annotations

import pytest

from stoker.conf.migrations import migrate
from stoker.conf.schema import Config, from_dict, to_dict
from stoker.conf.values import ConfigError


@pytest.mark.parametrize("writer", ["thread", "process"])
def test_a_stored_choice_that_changed_no_number_is_dropped(writer: str) -> None:
    stored = to_dict(Config())
    stored["checkpoint"] |= {"writer": writer, "keep": 7}
    assert from_dict(migrate(stored)).checkpoint.keep == 7
    assert stored["checkpoint"]["writer"] == writer, "what was given is left as it is"


def test_a_value_that_was_never_one_is_still_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'checkpoint\.writer'"):
        from_dict(migrate({"checkpoint": {"writer": "fork"}}))
