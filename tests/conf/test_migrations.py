"""A stored config of an earlier version becomes one of this version."""

from __future__ import annotations

import pytest

from stoker.conf.migrations import migrate
from stoker.conf.schema import Config, RopeParameters, from_dict, to_dict
from stoker.conf.values import ConfigError

SCALED = {"factor": 2.0, "low_frequency_factor": 1.5, "high_frequency_factor": 6.0, "original_context": 128}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, RopeParameters()),
        ({"rope_theta": 5e5}, RopeParameters(rope_theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": SCALED | {"factor": 1.0}}, RopeParameters(rope_theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": SCALED}, RopeParameters("llama3", 5e5, 2.0, 1.5, 6.0, 128)),
        ({"rope_scaling": {"factor": 8.0}}, RopeParameters("llama3", 10000.0, 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": {"rope_theta": 7.0}}, RopeParameters(rope_theta=7.0)),
    ],
)
def test_rotary_values_become_the_dict_of_transformers(model: dict[str, object], expected: RopeParameters) -> None:
    assert from_dict(migrate({"model": model})).model.rope_parameters == expected


@pytest.mark.parametrize("writer", ["thread", "process"])
def test_a_stored_choice_that_changed_no_number_is_dropped(writer: str) -> None:
    stored = to_dict(Config())
    stored["checkpoint"] |= {"writer": writer, "keep": 7}
    assert from_dict(migrate(stored)).checkpoint.keep == 7
    assert stored["checkpoint"]["writer"] == writer, "what was given is left as it is"


def test_a_value_that_was_never_one_is_still_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'checkpoint\.writer'"):
        from_dict(migrate({"checkpoint": {"writer": "fork"}}))
