from __future__ import annotations

import json

import pytest

from stoker.conf.lasting import lasting
from stoker.conf.schema import Config, from_dict, kinds, lookup, to_dict
from stoker.conf.values import ConfigError


def test_a_config_survives_json():
    config = Config()
    config.model.args = {"depth": [1, {"a": None}]}
    config.grad_clip_norm = None
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_key_has_a_kind():
    found = kinds()
    assert found["seq_len"] == "fixed" and found["optim.lr"] == "maths" and found["parallel.tp"] == "free"
    assert found["model.rope_parameters.factor"] == "fixed"
    assert set(found.values()) == {"free", "maths", "fixed"}


def test_defaults_are_not_shared_between_configs():
    Config().optim.betas.append(0.5)
    Config().model.args["depth"] = 1
    assert Config().optim.betas == [0.9, 0.95] and Config().model.args == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepz": 3}, "unknown key 'stepz'"),
        (
            {"model": {"rope_parameters": {"faktor": 2}}},
            "unknown key 'model.rope_parameters.faktor': did you mean 'model.rope_parameters.factor'?",
        ),
        ({"steps": "many"}, "steps='many': expected a whole number"),
        ({"steps": True}, "steps=True: expected a whole number"),
        ({"compile": 1}, "compile=1: expected true or false"),
        ({"parallel": 3}, "parallel=3: expected a section of keys"),
        ({"optim": {"betas": [0.9, "x"]}}, "optim.betas=[0.9, 'x']: expected a list of numbers"),
        ({"batch": {"micro_size": 1.5}}, "batch.micro_size=1.5: expected a whole number or null"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_whole_key(values, words):
    with pytest.raises(ConfigError) as error:
        from_dict(values)
    assert words in str(error.value)


def test_a_whole_number_may_stand_for_a_float_and_becomes_one():
    config = from_dict({"grad_clip_norm": 2, "optim": {"lr": 1}})
    assert type(config.grad_clip_norm) is float and type(config.optim.lr) is float
    assert from_dict({"grad_clip_norm": None}).grad_clip_norm is None


def test_lookup_follows_dots():
    assert lookup(Config(), "model.rope_parameters.rope_theta") == 10000.0


def test_keys_of_one_start_are_not_stored():
    config = Config()
    config.run.fresh = config.run.change = True
    config.run.name = "kept"
    assert (lasting(config).run.fresh, lasting(config).run.change, lasting(config).run.name) == (False, False, "kept")
