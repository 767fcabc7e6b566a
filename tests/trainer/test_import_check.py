"""An imported model is compared with transformers' own: what differs is refused, and the first layer is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stoker.conf.compose import compose
from stoker.conf.schema import Config, from_dict, to_dict
from stoker.conf.values import ConfigError
from stoker.launch.cli import main
from stoker.models import hugging_face_config
from stoker.trainer import import_check
from stoker.trainer.import_check import LIMIT, compare_import, relative
from stoker.trainer.pretrained import adopt_shape
from stoker.trainer.validate import validate
from tests.models.config_edits import edited
from tests.models.families import FAMILIES, write_family


@pytest.fixture(scope="module")
def plain() -> Config:
    return compose(["seq_len=64", "batch.size=8", "precision=fp32", "launch.device=cpu"])


def adopted(plain: Config, folder: Path) -> Config:
    config = from_dict(to_dict(plain))
    config.model.init_from = str(folder)
    return adopt_shape(config, [])


@pytest.mark.parametrize("case", FAMILIES)
def test_a_model_of_each_family_is_equal(case: str, plain: Config, tmp_path: Path) -> None:
    write_family(tmp_path, case)
    assert "(all 3 layers, 64 tokens)" in str(compare_import(adopted(plain, tmp_path)))


def test_rounding_stays_far_below_the_limit_in_a_deep_model(plain: Config, tmp_path: Path) -> None:
    write_family(tmp_path, "qwen3", num_hidden_layers=32, hidden_size=64, initializer_range=0.1)
    result = str(compare_import(adopted(plain, tmp_path)))
    assert float(result.partition("within ")[2].partition(" ")[0]) < LIMIT / 2, result


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"rms_norm_eps": 0.1}, r"model\.layers\.0 is the first that differs"),
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
            r"model\.layers\.0 is the first that differs",
        ),
    ],
)
def test_a_wrong_mapping_is_refused_and_the_first_layer_named(
    change: dict[str, Any], where: str, plain: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(tmp_path, "llama")
    shape_of = hugging_face_config.shape_of
    monkeypatch.setattr(hugging_face_config, "shape_of", lambda *arguments: shape_of(*arguments) | change)
    with pytest.raises(ConfigError, match=where):
        compare_import(adopted(plain, tmp_path))


def test_the_layer_whose_weights_are_wrong_is_named(
    plain: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(tmp_path, "llama")
    load = import_check.load_theirs

    def load_another(*arguments: Any) -> Any:
        model = load(*arguments)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.1
        return model

    monkeypatch.setattr(import_check, "load_theirs", load_another)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM computes: model\.layers\.1 is the first that differs by"):
        compare_import(adopted(plain, tmp_path))


def test_weights_that_are_not_finite_are_refused(plain: Config, tmp_path: Path) -> None:
    model = write_family(tmp_path, "llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.layers\.2 is the first that is not finite"):
        compare_import(adopted(plain, tmp_path))


def test_what_transformers_cannot_load_is_refused_with_its_reason(plain: Config, tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 5000}))
    with pytest.raises(ConfigError, match="transformers cannot load it: Padding_idx must be within"):
        compare_import(adopted(plain, tmp_path))


def test_what_transformers_cannot_compute_is_refused_with_its_reason(plain: Config, tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": ["sliding_attention"] * 3}))
    with pytest.raises(ConfigError, match="transformers cannot compute its logits: 'LlamaConfig' object has no"):
        compare_import(adopted(plain, tmp_path))


def test_as_many_layers_as_fit_into_memory_are_compared(plain: Config, tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    config = adopted(plain, tmp_path)
    layer = 4 * (32 * 32 * 2 + 16 * 32 * 2 + 48 * 32 * 3 + 2 * 32)
    rest = 4 * (2 * 320 * 32 + 32)
    for layers, expected in ((2, "the first 2 of 3 layers"), (3, "all 3 layers")):
        assert expected in str(compare_import(config, lambda layers=layers: int((rest + layers * layer) / 0.7) + 1))
    assert "not compared with transformers' logits: one layer takes" in str(compare_import(config, lambda: rest))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mystery": 1}))
    with pytest.raises(ConfigError, match=r"holds mystery, which transformers' LlamaConfig does not declare"):
        compare_import(config, lambda: rest)
    assert "all 3 layers" in str(compare_import(config))  # it makes no difference


def test_a_model_that_cannot_be_imported_is_refused_before_a_rank_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = tmp_path / "run", tmp_path / "theirs"
    words = ["train", f"run.dir={run}", f"model.init_from={folder}", "launch.nproc=1", "seq_len=64"]
    assert main(words) == 2
    assert f"model.init_from={folder}: there is no such directory" in capsys.readouterr().err
    write_family(folder, "llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 5000}))
    assert main(words) == 2
    assert "transformers cannot load it" in capsys.readouterr().err and not run.exists()


def logits_of_both(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and transformers', from tokens that the comparison has not seen."""
    folder = Path(str(config.model.init_from))
    tokens = torch.randint(0, 320, (1, 50), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours = import_check._our_outputs(config, tokens)["logits"]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    return ours, theirs.flatten(0, 1)


def outcome_of_edit(seed: int, plain: Config, folder: Path) -> str:
    """One random edit of a random family's config.json: `equal`, or by what it was refused. Raises AssertionError."""
    case, edit = edited(seed, folder)
    try:
        config = adopted(plain, folder)
        validate(config, 1, 0)
    except ConfigError:
        return "refused by the mapping"
    try:
        compare_import(config)
    except ConfigError as error:
        return "refused by transformers" if "transformers cannot" in str(error) else "refused by comparing"
    ours, theirs = logits_of_both(config)
    assert relative(ours, theirs) <= LIMIT, f"{case}, {edit}: differs by {relative(ours, theirs):.1e}, and was accepted"
    return "equal"


def outcomes_of_edits(seeds: Any, plain: Config, tmp_path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for seed in seeds:
        outcome = outcome_of_edit(seed, plain, tmp_path)
        counts[outcome] = counts.get(outcome, 0) + 1
    return counts


@pytest.mark.long
def test_edits_of_config_json_give_equal_logits_or_a_refusal(plain: Config, tmp_path: Path) -> None:
    counts = outcomes_of_edits(random.Random(0).sample(range(300), 60), plain, tmp_path)
    assert counts["equal"] > 15 and counts["refused by the mapping"] > 5, counts


@pytest.mark.full
def test_three_hundred_edits_of_config_json_give_equal_logits_or_a_refusal(plain: Config, tmp_path: Path) -> None:
    counts = outcomes_of_edits(range(300), plain, tmp_path)
    print(counts)
    assert sum(counts.values()) == 300 and counts["equal"] > 100, counts
