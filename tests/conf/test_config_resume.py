from __future__ import annotations

import pytest

from stoker.conf.compose import compose
from stoker.conf.resume import Change, check_changes, merge, pin
from stoker.conf.schema import kinds, lookup
from stoker.conf.values import ConfigError

STORED = pin(compose(["steps=50", "optim.lr=0.5", "optim.eps=1e-6", "model.args={a: 1, b: 2}", "run.change=true"]))


def keys(changes: list[Change]) -> dict[str, str]:
    return {change.key: change.kind for change in changes}


def test_without_overrides_the_run_is_the_stored_one():
    config, changes = merge(STORED, [])
    assert changes == []
    assert {key for key in kinds() if lookup(config, key) != lookup(STORED, key)} == {"run.change"}


def test_a_key_override_sets_only_that_key():
    config, changes = merge(STORED, ["optim.lr=0.25"])
    assert changes == [Change("optim.lr", 0.5, 0.25, "maths")]
    assert config.optim.eps == 1e-6 and config.steps == 50


def test_a_group_override_replaces_the_whole_node():
    config, changes = merge(STORED, ["optim.momentum=0.5", "optim=sgd"])
    assert config.optim == compose(["optim=sgd", "optim.momentum=0.5"]).optim
    assert keys(changes) == dict.fromkeys(
        ["optim.name", "optim.lr", "optim.weight_decay", "optim.eps", "optim.momentum"], "maths"
    )


def test_a_key_below_args_leaves_the_other_keys():
    config, changes = merge(STORED, ["model.args.b=3", "model.args.c.d=4"])
    assert config.model.args == {"a": 1, "b": 3, "c": {"d": 4}}
    assert keys(changes) == {"model.args": "fixed"}
    assert STORED.model.args == {"a": 1, "b": 2}


def test_the_value_it_already_has_is_no_change():
    assert merge(STORED, ["optim.lr=5e-1", "steps=50", "model=tiny", "model.args={a: 1, b: 2}"])[1] == []


def test_the_schedule_keeps_its_length_when_the_run_is_extended():
    config, changes = merge(STORED, ["steps=80"])
    assert config.schedule.total_steps == 50
    assert keys(changes) == {"steps": "free"}


@pytest.mark.parametrize("override", ["schedule=wsd", "schedule.total_steps=null"])
def test_a_pinned_schedule_stays_pinned(override):
    config, changes = merge(STORED, [override, "steps=80"])
    assert config.schedule.total_steps == 50
    assert "schedule.total_steps" not in keys(changes)


def test_the_schedule_is_lengthened_by_number_only_and_that_is_maths():
    config, changes = merge(STORED, ["schedule.total_steps=80"])
    assert config.schedule.total_steps == 80
    assert keys(changes) == {"schedule.total_steps": "maths"}


def test_pin_keeps_a_length_that_was_given():
    assert pin(compose(["steps=50", "schedule.total_steps=70"])).schedule.total_steps == 70
    assert STORED.schedule.total_steps == 50


def test_keys_of_one_start_are_taken_from_this_start():
    assert merge(STORED, [])[0].run.change is False
    config, changes = merge(STORED, ["run.change=true", "run.fresh=true"])
    assert config.run.change and config.run.fresh and changes == []


def test_free_changes_pass():
    check_changes(merge(STORED, ["parallel.zero=3", "launch.nproc=4", "steps=90"])[1], allow=False)


def test_fixed_changes_are_refused_even_when_change_is_allowed():
    changes = merge(STORED, ["seq_len=64", "run.seed=1", "optim.lr=1"])[1]
    with pytest.raises(ConfigError) as error:
        check_changes(changes, allow=True)
    assert "  run.seed: 0 -> 1\n  seq_len: 512 -> 64" in str(error.value)
    assert "optim.lr" not in str(error.value)


def test_maths_changes_are_shown_and_need_to_be_allowed():
    changes = merge(STORED, ["optim.lr=1", "batch.size=64", "steps=90"])[1]
    with pytest.raises(ConfigError) as error:
        check_changes(changes, allow=False)
    assert "run.change=true allows it:\n  batch.size: 32 -> 64\n  optim.lr: 0.5 -> 1.0" in str(error.value)
    assert "steps" not in str(error.value).splitlines()[-1]
    check_changes(changes, allow=True)


def test_a_wrong_override_is_refused_as_at_a_first_start():
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        merge(STORED, ["stepz=3"])
