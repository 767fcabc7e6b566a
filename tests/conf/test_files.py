"""Settings in files of the user's own mean what the same words mean on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.conf.compose import compose
from stoker.conf.files import expand
from stoker.conf.rundir import RunDirectory, write_config
from stoker.conf.schema import Config
from stoker.conf.values import ConfigError

EVERYTHING = """
defaults:
  - model: small
  - override /optim: sgd
steps: 12
batch.size: 16
optim:
  lr: 3e-4
  betas:
    - 0.8
    - 0.9
model:
  rope_parameters: {rope_theta: 5e5}
  args: {depth: 3, name: "7", deep: {a: [x y, null]}}
grad_clip_norm: null
compile: true
run: {name: "1e5"}
data:
  sources: {a: {kind: text, path: "x y", weight: 2}}
launch:
  time: 24:00:00
  setup: |
    module load cuda
    ulimit -n 4096
  sbatch_args: [--account=lab, "--comment=a, b"]
"""
WORDS = [
    "model=small", "optim=sgd", "steps=12", "batch.size=16", "optim.lr=3e-4", "optim.betas=[0.8,0.9]",
    "model.rope_parameters.rope_theta=5e5", "model.args={depth:3,name:'7',deep:{a:[x y,null]}}",
    "grad_clip_norm=null", "compile=true", "run.name=1e5", "data.sources={a:{kind:text,path:x y,weight:2}}",
    "launch.time=24:00:00", "launch.setup=module load cuda\nulimit -n 4096\n",
    "launch.sbatch_args=[--account=lab,'--comment=a, b']",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return path


def test_a_file_says_what_the_words_of_a_command_line_say():
    assert compose(expand(["--config", write("mine.yaml", EVERYTHING)])) == compose(WORDS)


def test_words_without_files_come_back_as_they_were():
    assert expand(WORDS) == WORDS


def test_the_command_line_wins_over_files_and_the_later_file_over_the_earlier():
    write("a.yaml", "steps: 1\nmodel: small\nbatch: {size: 4}\noptim: {lr: 1}")
    write("b.yaml", "steps: 2\nbatch.size: 8")
    words = expand(["--config=a.yaml", "steps=3", "model=tiny", "--config", "b.yaml"])
    assert len({word.partition("=")[0] for word in words}) == len(words), "each key once: some look for the first"
    config = compose(words)
    assert (config.steps, config.model.name, config.batch.size, config.optim.lr) == (3, "tiny", 8, 1)


def test_a_stored_config_can_be_given_back_as_a_file(here: Path):
    config = compose([*WORDS, "data=text", "faults=[{at: 7, do: kill}]", "skip_steps=[[3,4]]"])
    write_config(RunDirectory(here / "run"), config)
    assert compose(expand(["--config", "run/config.yaml"])) == config


def test_a_group_of_the_users_own_builds_on_one_of_ours():
    write("conf/model/mine.yaml", "defaults: [small]\nnum_hidden_layers: 2\nrms_norm_eps: 1e-4\n")
    words = expand(["model=mine", "model.hidden_size=64"])
    assert words[0] == f"model={Path('conf/model/mine.yaml').absolute()}"  # a later start may run elsewhere
    config, small = compose(words), compose(["model=small"])
    assert (config.model.num_hidden_layers, config.model.rms_norm_eps, config.model.hidden_size) == (2, 1e-4, 64)
    assert config.model.intermediate_size == small.model.intermediate_size
    assert expand(words) == words


def test_a_folder_of_groups_goes_before_the_working_directory():
    write("conf/optim/mine.yaml", "name: sgd\nlr: 1\n")
    write("more of them/optim/mine.yaml", "name: sgd\nlr: 2\n")
    write("conf/schedule/short.yaml", "name: constant\n")
    words = ["optim=mine", "schedule=short", "--config-dir=more of them"]
    config = compose(expand(words))
    assert (config.optim.lr, config.schedule.name) == (2, "constant")
    write("more of them/schedule/short.yaml", "name: wsd\n")
    assert compose(expand(words)).schedule.name == "wsd"
    with pytest.raises(ConfigError, match="rename one of the two"):  # Hydra would take the other file
        compose([f"optim={Path('more of them/optim/mine.yaml').absolute()}",
                 f"schedule={Path('conf/schedule/short.yaml').absolute()}"])  # fmt: skip


@pytest.mark.parametrize("word", ["experiment=deep/er", "+experiment=deep/er"])
def test_an_experiment_is_written_as_hydras_users_write_it(word: str):
    write("conf/model/mine.yaml", "num_hidden_layers: 3\n")
    text = "# @package _global_\ndefaults:\n  - override /model: mine\n  - _self_\noptim:\n  lr: 5e-4\nsteps: 7\n"
    write("conf/experiment/deep/er.yaml", text)
    config = compose(expand([word, "steps=8"]))
    assert (config.model.num_hidden_layers, config.optim.lr, config.steps) == (3, 5e-4, 8)


@pytest.mark.parametrize(
    ("words", "files", "message"),
    [
        (["--config=a.yaml"], {"a.yaml": "steps: 3\noptim:\n  rl: 1\n"}, "a.yaml, line 3: unknown key 'optim.rl'"),
        (["--config=a.yaml"], {"a.yaml": "modle:\n  x: 1\n"}, "a.yaml, line 1: unknown key 'modle'"),
        (["--config=a.yaml"], {"a.yaml": "\nsteps: many\n"}, "a.yaml, line 2: steps=many: expected a whole number"),
        (["--config=a.yaml"], {"a.yaml": "run.dir: ${x}\n"}, "a.yaml, line 1: run.dir=${x}: an interpolation"),
        (["--config=a.yaml"], {"a.yaml": "run.dir: ''\n"}, "a.yaml, line 1: run.dir= is empty"),
        (["--config=a.yaml"], {"a.yaml": "optim: [1]\n"}, "unknown optim '[1]'"),
        (["--config=a.yaml"], {"a.yaml": "model: tinny\n"}, "unknown model 'tinny': choose from tiny"),
        (["--config=a.yaml"], {"a.yaml": "defaults: [{modle: small}]\n"}, "line 1: 'modle' is none of the groups"),
        (["--config=a.yaml"], {"a.yaml": "defaults: [small]\n"}, "line 1: expected a choice from a group"),
        (["--config=a.yaml"], {"a.yaml": "- steps\n"}, "a.yaml: expected keys with values"),
        (["--config=a.yaml"], {"a.yaml": "a: [\n"}, "a.yaml is not YAML: "),
        (["--config=a.yaml"], {}, "a.yaml cannot be read: "),
        (["steps=3", "--config"], {}, "--config needs a file behind it"),
        (["--config-dir=nowhere"], {}, "--config-dir nowhere: there is no such folder"),
        (["model=min"], {"conf/model/mine.yaml": ""}, "unknown model 'min': choose from mine, tiny"),
        (["model=mine"], {"conf/model/mine.yaml": "layers: 3\n"}, "mine.yaml, line 1: unknown key 'model.layers'"),
        (["model=mine"], {"conf/model/mine.yaml": "\nhidden_size: x\n"}, "line 2: model.hidden_size=x: expected a wh"),
        (["tracker=../optim/x"], {"conf/optim/x.yaml": "lr: 1"}, "unknown tracker '../optim/x'"),
        (["experiment=b"], {"conf/experiment/a.yaml": ""}, "there is no b.yaml in"),
        (["experiment=b"], {"conf/experiment/a.yaml": ""}, "; there are a"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(words: list[str], files: dict[str, str], message: str):
    for path, text in files.items():
        write(path, text)
    with pytest.raises(ConfigError) as error:
        compose(expand(words))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--config=run/config.yaml"], ["model=mine", "--config-dir=run/conf"]])
def test_files_of_a_run_directory_are_not_read(here: Path, words: list[str]):
    """Somebody else may have put them there, and they can name code."""
    write_config(RunDirectory(here / "run"), Config())
    write("run/conf/model/mine.yaml", "num_hidden_layers: 2\n")
    compose(expand(words))
    RunDirectory(here / "run").attempts.mkdir()
    with pytest.raises(ConfigError, match="lies in the run directory"):
        expand(words)
