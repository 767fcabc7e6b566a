"""What a user gets wrong ends in one clear line, a status that is not zero, and nothing lost or left running."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stoker.conf.rundir import RunDirectory
from stoker.launch.cli import main
from stoker.trainer.report.metrics import read
from stoker.trainer.runtime.outcome import Outcome, read_ending
from tests.launch.runs import (
    command,
    environment,
    finish,
    last_step,
    overrides,
    started,
    steps_of,
    train_forked,
    train_here,
    wait_until,
    write_text,
)

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """`stoker <words>` in this process, for commands that start no ranks: (exit status, all output)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.chdir(home)

    def run(*words: str) -> tuple[int, str]:
        capfd.readouterr()
        return main(words), "".join(capfd.readouterr())

    return run


def process(home: Path) -> Call:
    """`stoker <words>` as a process: (exit status, all output)."""
    return lambda *words: finish(home, command(*words), timeout=60)


def refused(call: Call, *words: str) -> str:
    """The message of `stoker <arguments>` when it refuses: one line, with several reasons below it."""
    status, output = call(*words)
    assert status != 0, output
    lines = output.strip().splitlines()
    complaints = [line for line in lines if line.startswith("stoker: ") and "run directory " not in line]
    assert len(complaints) == 1 and "Traceback" not in output, output
    return output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["parallel.zeros=3"], "parallel.zero"),
        (["model=tinny"], "tiny"),
        (["steps=many"], "steps"),
        (["batch.size=0"], "batch.size"),
        (["batch.size=9"], "batch.size"),
        (["seq_len=1"], "seq_len"),
        (["parallel.zero=7"], "parallel.zero"),
        (["launch.device=cuda", "launch.nproc=64"], "GPU"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_a_rank_is_spawned(
    home: Path, call: Call, words: list[str], expected: str
) -> None:
    run = home / "refused"
    assert expected in refused(call, "train", *overrides(run, home / "text", *words))
    assert not run.exists()


def test_an_unknown_command_gets_the_closest(home: Path) -> None:
    status, output = finish(home, command("trian"))
    assert status == 2 and "'train'" in output and len(output.strip().splitlines()) == 1


def test_missing_and_empty_data_are_named(home: Path, call: Call) -> None:
    (home / "empty").mkdir()
    (home / "binary").mkdir()
    (home / "binary" / "a.txt").write_bytes(b"\xff\xfe\xfa")
    for folder in ("nowhere", "empty", "binary"):
        assert str(home / folder) in refused(call, "train", *overrides(home / f"run-{folder}", home / folder))


def test_data_shorter_than_a_row_are_named(home: Path) -> None:
    (home / "short").mkdir()
    (home / "short" / "a.txt").write_text("few words")
    assert "row" in refused(process(home), "train", *overrides(home / "run-short", home / "short"))


def test_a_run_directory_that_cannot_be_written_is_named(home: Path, call: Call) -> None:
    (home / "file").touch()
    assert str(home / "file") in refused(call, "train", *overrides(home / "file" / "run", home / "text"))


@pytest.mark.parametrize(
    ("key", "path", "message"),
    [
        ("model.target", "no_such_module:build", "cannot import 'no_such_module'"),
        ("model.target", "stoker.models.decoder:biuld", "module 'stoker.models.decoder' has no 'biuld'"),
        ("optim.target", "defective:build", "NameError: name 'undefined' is not defined ({home}/defective.py:1)"),
        ("data.target", "half:build", "SyntaxError: "),
        ("optim.target", "sys:path", "expected a function or a class"),
    ],
)
def test_code_that_cannot_be_imported_is_named_before_a_rank_is_spawned(
    home: Path, call: Call, key: str, path: str, message: str
) -> None:
    (home / "defective.py").write_text("undefined\n")
    (home / "half.py").write_text("def build(:\n")
    status, output = call("train", *overrides(home / "no-code", home / "text"), f"{key}={path}")
    assert status == 2 and message.format(home=home) in output and key in output, output
    assert len(output.strip().splitlines()) == 1 and RunDirectory(home / "no-code").attempt_numbers() == []


def test_a_launcher_without_the_number_of_ranks_on_a_machine_is_refused(home: Path) -> None:
    place = ("RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=0")
    words = ["env", *place, command()[0], "-P", "-m", "stoker.trainer", *overrides(home / "alone", home / "text")]
    status, output = finish(home, words)
    assert status == 2 and len(output.splitlines()) == 1 and "LOCAL_WORLD_SIZE is not" in output, output


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    run = home / "trained"
    train_here(home, overrides(run, home / "text", "steps=3"))
    return run


@pytest.mark.long
def test_fewer_steps_than_are_done_are_told(home: Path, trained: Path) -> None:
    run = home / "fewer"
    shutil.copytree(trained, run)
    status, output = train_forked(home, [f"run.dir={run}", "steps=2"])
    assert status == 0 and last_step(run) == 3, output
    assert "nothing to do: steps=2 is below the 3 that are done; set steps above 3 to continue" in output


def test_a_wrong_prompt_run_or_step_is_named(home: Path, call: Call, trained: Path) -> None:
    assert "prompt" in refused(call, "generate", str(trained), "--prompt", "")
    assert "temperature" in refused(call, "generate", str(trained), "--prompt", "a", "--temperature", "0")
    assert "step 99" in refused(call, "generate", str(trained), "--prompt", "a", "--step", "99")
    assert "not a run directory" in refused(call, "generate", str(home / "nowhere"), "--prompt", "a")
    early = home / "early"
    shutil.copytree(trained, early, ignore=shutil.ignore_patterns("step-*"))
    assert "no checkpoints" in refused(call, "generate", str(early), "--prompt", "a")
    assert "no checkpoints" in refused(call, "checkpoint", "ls", str(early))


def test_the_model_generates_and_the_same_seed_repeats_the_text(home: Path, call: Call, trained: Path) -> None:
    words = ["generate", str(trained), "--prompt", "document", "--tokens", "20", "--seed", "3"]
    (status, first), (_, second) = process(home)(*words), call(*words)
    assert status == 0 and first == second and first.startswith("document") and len(first) > len("document\n")


def test_checkpoints_are_listed_and_proven_and_damage_is_found(home: Path, call: Call, trained: Path) -> None:
    status, output = call("checkpoint", "ls", str(trained))
    assert status == 0 and "valid" in output
    status, output = call("checkpoint", "verify", str(trained))
    assert status == 0, output
    run = home / "damaged"
    subprocess.run(["cp", "-r", trained, run], check=True)
    [checkpoint] = RunDirectory(run).checkpoints.glob("step-*")
    file = checkpoint / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status, output = call("checkpoint", "verify", str(run))
    assert status == 1 and file.name in output


@pytest.mark.long
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(home: Path) -> None:
    run = home / "fallback"
    train_here(home, overrides(run, home / "text", "steps=10"))
    before = steps_of(run)
    newest = RunDirectory(run).checkpoints / "step-00000010" / "rank-00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[-3] ^= 16
    newest.write_bytes(content)
    status, output = finish(home, command("train", f"run.dir={run}", "steps=11"))
    assert status == 0, output
    assert "step-00000010" in output and "damaged" in output
    assert steps_of(run)[:10] == before and len(steps_of(run)) == 11


@pytest.mark.long
def test_where_no_checkpoint_is_sound_the_run_ends_and_starts_over_only_on_request(home: Path, trained: Path) -> None:
    run = home / "all damaged"
    subprocess.run(["cp", "-r", trained, run], check=True)
    [checkpoint] = RunDirectory(run).checkpoints.glob("step-*")
    file = checkpoint / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    words = overrides(run, home / "text", "steps=3")
    status, output = finish(home, command("train", *words))
    assert status == 1 and "no checkpoint is sound" in output and file.name in output and "restarting" not in output, (
        output
    )
    assert "Traceback" not in output and len(RunDirectory(run).attempt_numbers()) == 2
    status, output = finish(home, command("train", *words))
    assert status == 2 and "run.fresh=true" in output, output
    status, output = finish(home, command("train", *words, "run.fresh=true"))
    assert status == 0, output
    assert steps_of(run) == steps_of(trained)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.full  # the last save is tried again for a minute
def test_a_full_disk_fails_the_save_and_keeps_the_checkpoint_before(home: Path, call: Call, small_disk: Path) -> None:
    run = small_disk / "run"
    words = overrides(
        run, home / "text", "steps=12", "checkpoint.every=4", "checkpoint.keep=20", "checkpoint.on_error=fail"
    )
    with started(home, command("train", *words, "launch.max_restarts=0")) as train:
        wait_until(lambda: (RunDirectory(run).checkpoints / "step-00000004").exists(), train)
        output, _ = train.communicate(timeout=120)
    kept = sorted(path.name for path in RunDirectory(run).checkpoints.glob("step-*[0-9]"))
    assert train.returncode != 0, output
    assert "checkpoint" in output and "Traceback" not in output, output
    assert kept and kept[-1] < "step-00000012", "the test's disk is too large"
    ending = read_ending(RunDirectory(run), 1)
    assert ending is None or ending.outcome is Outcome.FAILED
    status, output = call("checkpoint", "verify", str(run))
    assert status == 0, output


@pytest.mark.long
def test_a_closed_terminal_does_not_end_a_run(home: Path) -> None:
    run = home / "closed"
    read_end, write_end = os.pipe()
    words = command("train", *overrides(run, home / "text", "steps=12"))
    train = subprocess.Popen(
        words, env=environment(home), cwd=home, stdout=write_end, stderr=subprocess.DEVNULL, start_new_session=True
    )
    os.close(write_end)
    os.close(read_end)
    assert train.wait(timeout=60) == 0
    assert last_step(run) == 12 and len(read(RunDirectory(run).metrics)) == 12


@pytest.mark.long
def test_a_trained_tokenizer_outlives_the_texts(home: Path, call: Call) -> None:
    texts = write_text(home / "passing")
    more = ["data.tokenizer=bpe", "data.bpe_vocab=320", "steps=2"]
    assert finish(home, command("train", *overrides(home / "bpe", Path("passing"), *more)))[0] == 0
    subprocess.run(["rm", "-r", texts], check=True)
    status, output = call("generate", str(home / "bpe"), "--prompt", "document", "--tokens", "5")
    assert status == 0 and output.startswith("document"), output


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_generates(home: Path, call: Call) -> None:
    run = home / "speaks"
    train_here(home, overrides(run, home / "text", "steps=10"))
    file = RunDirectory(run).checkpoints / "step-00000010" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    status, output = call("generate", str(run), "--prompt", "a", "--tokens", "5")
    assert status == 0 and "step-00000010" in output and "damaged" in output


def test_a_model_that_no_longer_fits_its_checkpoints_is_named(home: Path, call: Call, trained: Path) -> None:
    run = home / "unfit"
    subprocess.run(["cp", "-r", trained, run], check=True)
    config = RunDirectory(run).config
    config.write_text(config.read_text().replace("num_hidden_layers: 2", "num_hidden_layers: 1"))
    assert "layers.1." in refused(call, "generate", str(run), "--prompt", "a")
    config.write_text(
        config.read_text()
        .replace("num_hidden_layers: 1", "num_hidden_layers: 2")
        .replace("intermediate_size: 64", "intermediate_size: 32")
    )
    assert "layers.0.mlp" in refused(call, "generate", str(run), "--prompt", "a")


@pytest.mark.long
def test_a_defect_in_a_users_model_is_located_and_not_retried(home: Path) -> None:
    (home / "mine.py").write_text("def build(config, part):\n    return config.args['reach']\n")
    run = home / "defect"
    output = refused(process(home), "train", *overrides(run, home / "text", "model.target=mine:build"))
    assert "KeyError: 'reach'" in output and "mine.py:2" in output
    assert RunDirectory(run).attempt_numbers() == [1]
