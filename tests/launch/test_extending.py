"""The recipes of docs/extending.md: every block is executed, and every recipe's proof is seen to hold."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from stoker.conf.schema import Config
from stoker.parallel import native
from stoker.trainer.report.tracker_process import Memory, follow
from tests import world
from tests.launch.newcomer import SHAPE, SMALL, Newcomer
from tests.pages import ROOT, blocks
from tests.parallel.conformance import STEPS, reference, train
from tests.parallel.reference import Trace, assemble, small_config
from tests.parallel.test_conformance import assert_same

PAGE = blocks(ROOT / "docs" / "extending.md")
WORDS = [*SHAPE, *SMALL, "steps=3", "launch.nproc=2", "precision=fp32"]


def program(name: str) -> dict[str, Any]:
    """The names that a block of the page defines."""
    [text] = [block.text for block in PAGE if block.file == name]
    found: dict[str, Any] = {"__name__": name}
    exec(compile(text, name, "exec"), found)
    return found


@pytest.fixture
def reader(newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch) -> Newcomer:
    newcomer.write([*PAGE, *blocks(ROOT / "docs" / "own_model.md")])
    monkeypatch.setattr(sys, "path", [str(newcomer.home), *sys.path])
    yield newcomer  # type: ignore[misc]
    for block in PAGE:
        sys.modules.pop(block.file.removesuffix(".py"), None)


def types(reader: Newcomer, heading: str, *more: str) -> list[str]:
    """The outputs of the commands of a section, all of which succeed."""
    outputs = []
    for command in (command for block in PAGE if block.heading == heading for command in block.commands()):
        status, output = reader.types(command.text, *WORDS, *more)
        assert status == 0, output
        outputs.append(output)
    assert outputs
    return outputs


def test_a_model_is_the_same_on_every_layout(reader: Newcomer) -> None:
    [output] = types(reader, "A model")
    assert "the same run, within the rounding of fp32" in output


def test_a_source_reads_every_document(reader: Newcomer) -> None:
    (reader.home / "notes").mkdir()
    for n in range(30):
        (reader.home / f"notes/{n:02}.note").write_text(json.dumps({"body": f"note {n} says {n * n}. " * 9}))
    verified, _ = types(reader, "A source")
    assert "30" in verified and len(reader.steps("runs/notes")) == 3
    (reader.home / "notes/07.note").write_text('{"title": "no body"}')
    status, output = reader.types("stoker data plan data.target=notes:open_source data.path=notes data.args.key=body")
    assert status == 2 and "07.note: no field 'body'; it has title" in output
    status, output = reader.types("stoker train data.target=notes:open_source data.path=notes", *WORDS)
    assert status == 2 and "data.args.key: name the field" in output


def test_an_objective_computes_the_same_where_the_vocabulary_is_divided(reader: Newcomer) -> None:
    [output] = types(reader, "An objective")
    assert "the same run, within the rounding of fp32" in output


def test_an_optimizer_computes_the_same_where_parameters_are_divided(reader: Newcomer) -> None:
    [output] = types(reader, "An optimizer")
    assert "the same run, within the rounding of fp32" in output


def test_a_tracker_gets_each_step_once(tmp_path: Path) -> None:
    said: list[str] = []
    ended = threading.Event()
    ended.set()
    metrics = tmp_path / "metrics.jsonl"
    for steps in (range(1, 6), range(1, 9)):  # the second attempt began at a checkpoint and repeats steps
        metrics.write_text("".join(json.dumps({"step": n, "loss": 4 / n, "note": "x"}) + "\n" for n in steps))
        memory = Memory(tmp_path, "text", "run", said.append)
        sink = program("text_sink.py")["Text"](
            {"run_dir": str(tmp_path)}, memory.run_id, memory.last_step + 1, said.append
        )
        with open(metrics, "rb", buffering=0) as file:
            follow(file, memory, sink, ended)
        sink.close("completed")
    assert (tmp_path / "steps.txt").read_text().splitlines() == [f"{n} {4 / n}" for n in range(1, 9)]
    assert said == [f"steps in {tmp_path}/steps.txt"] * 2


def trained_plainly(config: Config) -> tuple[Trace, list[Any]]:
    """On a rank: `train` with the strategy of the page."""
    strategy = program("plain.py")["PlainStrategy"]
    native._store = lambda config, mesh, plan, registry, model, precision: strategy(model, mesh)  # type: ignore[assignment]
    return train(config)


def test_an_engine_computes_what_one_process_computes() -> None:
    config = small_config()
    config.parallel.zero = 0
    results = world.run(trained_plainly, 2, config, fresh=True)  # it changes a module
    assert len(results[0][0].losses) == STEPS
    assert_same(results[0][0], reference("adamw"), assemble([shards for _, shards in results]), 1e-4)


def test_every_block_is_a_file_or_commands() -> None:
    assert all(block.file or block.commands() for block in PAGE)
    assert {block.heading for block in PAGE} == {
        "A model", "A source", "An objective", "An optimizer", "A tracker", "An engine",
    }  # fmt: skip
