"""`stoker plan --search`: which layouts are compared, how they are ranked, and the line that starts the best."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from stoker.conf.schema import BatchConfig
from stoker.launch.cli import main
from stoker.launch.plan import search
from stoker.parallel.layout import batch_plan, layout_of
from tests.trainer.rehearsed import config_of

SMALL = ["model.hidden_size=64", "model.intermediate_size=64", "model.num_hidden_layers=1", "seq_len=64"]


def test_every_combination_that_divides_is_a_layout_once_and_settings_that_are_given_stay() -> None:
    config = config_of()
    config.batch = BatchConfig(size=8)
    found = list(search.layouts(config, 4, []))
    assert len({str(each) for each in found}) == len(found) > 100
    for each in found:
        layout = layout_of(each, 4)
        assert batch_plan(each, layout).micro_rows == each.batch.micro_size
        assert layout.pp <= config.model.num_hidden_layers
    assert {each.parallel.zero for each in found} == {0, 1, 2, 3} and {each.parallel.tp for each in found} == {1, 2, 4}
    config.parallel.tp = 2
    kept = list(search.layouts(config, 4, ["parallel.tp"]))
    assert {each.parallel.tp for each in kept} == {2} and len(kept) < len(found)
    assert not any(word.startswith("parallel.tp=") for word in search.settings(kept[0], ["parallel.tp"]))


def test_layouts_are_ranked_by_their_step_and_the_best_is_a_line_of_train(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(search, "TRIED", 2)
    given = [*SMALL, "batch.size=4", "parallel.tp=1", "activation_checkpointing=none"]
    assert main(["plan", "--search", *given, "--gpu", "H100", "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = [each["times"]["step"]["total"] for each in found["ranked"]]
    assert len(seconds) == found["rehearsed"] == 2 and seconds == sorted(seconds)
    assert found["layouts"] == found["likely"] == 4 * 2, "four stages of ZeRO, rows of 1 and 2, and one layer"
    assert found["best"][:2] == ["stoker", "train"] and set(given) <= set(found["best"])
    assert main(["plan", *found["best"][2:], "--gpu", "H100", "--gpus", "2"]) == 0, "the line is one of train"
    assert shlex.join(found["best"]).count("parallel.tp=") == 1


def test_a_search_needs_rates_and_a_layout_that_is_not_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.json").write_text('{"memory_gib": 80}')
    assert main(["plan", "--search", *SMALL, "--gpu", "unknown.json", "--gpus", "2"]) == 2
    assert "the rates of this device in bf16 are not known" in capsys.readouterr().err
    (tmp_path / "tiny.json").write_text(json.dumps({"memory_gib": 1, "tflops": {"bf16": 1}, "hbm_gb_s": 1}))
    assert main(["plan", "--search", *SMALL, "--gpu", "tiny.json", "--gpus", "2"]) == 1
    assert "none of them fits" in capsys.readouterr().out
