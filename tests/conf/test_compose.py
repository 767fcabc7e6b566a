from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

from stoker.conf.compose import compose
from stoker.conf.overrides import GROUPS_FOLDER
from stoker.conf.schema import Config, DataConfig, ModelConfig, from_dict, to_dict


def test_nothing_overridden_gives_the_defaults_of_the_schema():
    composed, plain = compose(), Config()
    assert composed.model.name == "tiny" and composed.data.name == "stdlib"
    plain = dataclasses.replace(plain, model=composed.model, data=composed.data)
    assert composed == plain


def test_the_result_is_typed_to_the_leaves():
    config = compose(["optim.lr=1", "optim.betas=[0,0.5]", "model.args.depth=3"])
    assert type(config) is Config and type(config.model) is ModelConfig and type(config.data) is DataConfig
    assert type(config.optim.lr) is float and type(config.optim.betas) is list and type(config.model.args) is dict
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_key_wins_over_its_group_in_either_order():
    for overrides in (["optim=sgd", "optim.lr=3"], ["optim.lr=3", "optim=sgd"]):
        config = compose(overrides)
        assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 3.0, 0.9)


def test_the_last_of_two_values_wins():
    assert compose(["steps=1", "steps=2"]).steps == 2


def test_composing_twice_carries_nothing_over():
    assert compose(["steps=3", "optim=sgd"]) == compose(["steps=3", "optim=sgd"])
    assert compose() != compose(["steps=3"])


def test_a_program_that_uses_hydra_itself_keeps_its_state():
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(GROUPS_FOLDER / "optim"), version_base="1.3"):
        compose(["steps=3"])
        assert hydra_compose("sgd").name == "sgd"


def test_it_composes_from_any_directory_and_importing_it_brings_no_hydra(tmp_path):
    program = (
        "import sys, conf.compose, conf.resume, conf.limits\n"
        "assert 'hydra' not in sys.modules and 'omegaconf' not in sys.modules and 'torch' not in sys.modules\n"
        "print(conf.compose.compose(['steps=7']).steps)"
    )
    environment = {"PYTHONPATH": str(GROUPS_FOLDER.parent)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("7\n", "")
