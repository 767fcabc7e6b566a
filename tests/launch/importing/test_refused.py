"""Files that are nearly right, or that would run code, end in one line and leave nothing behind."""

from __future__ import annotations

import argparse
import fractions
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stoker.launch.cli import main
from stoker.launch.importing import pickled
from tests.launch.importing.sources import write_bin, write_deepspeed, write_litgpt, write_torchtitan


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sources")
    write_bin(home / "bin", "llama")
    write_bin(home / "files", "qwen2", files=2)
    write_litgpt(home / "litgpt", "llama", interleaved=True)
    write_torchtitan(home / "dcp", "llama")
    return home


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    held = torch.load(path, weights_only=True)
    edit(held)
    torch.save(held, path)


def settings(path: Path, **changes: object) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as held:
        parts = {part.filename: held.read(part) for part in held.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts.items():
            packed.writestr(name, data)


def described(folder: Path, edit: Callable[[Any], None]) -> None:
    """Changes `.metadata` of a folder of DCP."""
    path = folder / ".metadata"
    held = pickle.loads(path.read_bytes())
    edit(held)
    path.write_bytes(pickle.dumps(held))


def without_chunk(held: Any) -> None:
    entry = held.state_dict_metadata["layers.1.attention.wq.weight"]
    entry.size = torch.Size((entry.size[0] + 2, *entry.size[1:]))


def leading_elsewhere(held: Any) -> None:
    for info in held.storage_data.values():
        info.relative_path = "../" + info.relative_path


NAME = "model.layers.1.mlp.up_proj.weight"
SINGLE = "pytorch_model.bin"
CASES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a missing key": ("bin", lambda f: change(f / SINGLE, lambda held: held.pop(NAME)), f"{NAME} is missing"),
    "an extra key": (
        "bin",
        lambda f: change(f / SINGLE, lambda held: held.update(extra=torch.ones(1))),
        "extra is not in this model",
    ),
    "a wrong shape": (
        "bin",
        lambda f: change(f / SINGLE, lambda held: held.update({NAME: held[NAME][:-1].clone()})),
        f"{NAME} has shape (47, 32), the model's has (48, 32)",
    ),
    "no tensor": (
        "bin",
        lambda f: change(f / SINGLE, lambda held: held.update(epoch=3)),
        f"{SINGLE} holds no tensors by name: epoch is int",
    ),
    "repeated numbers": (
        "bin",
        lambda f: change(f / SINGLE, lambda held: held.update({NAME: torch.ones(1).expand(48, 32)})),
        f"{NAME} of shape (48, 32) repeats numbers",
    ),
    "a torn zip": ("bin", lambda f: cut(f / SINGLE), f"{SINGLE} is damaged or cut short"),
    "a compressed zip": ("bin", lambda f: compressed(f / SINGLE), f"{SINGLE}: its part"),
    "other bytes": ("bin", lambda f: (f / SINGLE).write_bytes(b"x" * 500), f"{SINGLE} is damaged, or no file of"),
    "no config": ("bin", lambda f: (f / "config.json").unlink(), "--config FILE gives one of Hugging Face's"),
    "a file that is missing": (
        "files",
        lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink(),
        "names pytorch_model-00002-of-00002.bin, not there",
    ),
    "a tensor that the index has elsewhere": (
        "files",
        lambda f: change(f / "pytorch_model-00001-of-00002.bin", lambda held: held.popitem()),
        "pytorch_model.bin.index.json does not fit its files",
    ),
    "other heads": (
        "litgpt",
        lambda f: settings(f / "model_config.yaml", n_head=8, n_query_groups=8),
        "attn.attn.weight has shape (64, 32); model_config.yaml makes 192 rows of it",
    ),
    "another model of litgpt": (
        "litgpt",
        lambda f: settings(f / "model_config.yaml", parallel_residual=True),
        "model_config.yaml: parallel_residual=True: models with parallel_residual=False are imported",
    ),
    "layers that litgpt's config does not have": (
        "litgpt",
        lambda f: settings(f / "model_config.yaml", n_layer=4),
        "transformer.h.3.attn.qkv.weight is missing",
    ),
    "another name of litgpt": (
        "litgpt",
        lambda f: change(f / "lit_model.pth", lambda held: held.update({"transformer.h.0.lora": torch.ones(1)})),
        "transformer.h.0.lora: a model of litgpt of Llama's kind has no such tensor",
    ),
    "a DCP file that is missing": ("dcp", lambda f: (f / "__0_0.distcp").unlink(), "names __0_0.distcp, which is no"),
    "a DCP file that is cut short": (
        "dcp",
        lambda f: (f / "__0_0.distcp").write_bytes((f / "__0_0.distcp").read_bytes()[:3000]),
        "it is cut short",
    ),
    "a DCP tensor with a gap": (
        "dcp",
        lambda f: described(f, without_chunk),
        "layers.1.attention.wq.weight of shape (34, 32) is incomplete: 1024 of its 1088 elements",
    ),
    "a DCP file elsewhere": (
        "dcp",
        lambda f: described(f, leading_elsewhere),
        "names the file ../__0_0.distcp: not a .distcp file of this folder",
    ),
    "a DCP description cut short": ("dcp", lambda f: cut(f / ".metadata"), ".metadata is damaged"),
    "a DCP description of something else": (
        "dcp",
        lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        ".metadata does not describe a checkpoint",
    ),
    "no checkpoint": ("bin", lambda f: (f / SINGLE).unlink(), "has none of the files that are imported"),
}


def refused(folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The line with which an import is refused."""
    assert main(["import", str(folder), str(out), *more]) in (1, 2)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "Traceback" not in shown, shown
    assert not out.exists() and not out.with_name(f".{out.name}.unfinished").exists()
    return shown


@pytest.mark.parametrize("case", CASES)
def test_a_nearly_right_source_is_refused_in_one_line(
    case: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, damage, message = CASES[case]
    shutil.copytree(sources / kind, tmp_path / "source")
    damage(tmp_path / "source")
    assert message in refused(tmp_path / "source", tmp_path / "out", capsys)


def test_the_advice_for_a_missing_config_works(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "bin", tmp_path / "source")
    config = (tmp_path / "source" / "config.json").rename(tmp_path / "config.json")
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out"), "--config", str(config)]) == 0


def test_more_than_tensors_is_read_with_trust_only(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sources / "litgpt", tmp_path / "source")
    path = tmp_path / "source" / "lit_model.pth"
    state = torch.load(path, weights_only=True)
    torch.save({"model": state, "fraction": fractions.Fraction(1, 2)}, path)
    line = refused(tmp_path / "source", tmp_path / "out", capsys)
    assert "lit_model.pth holds more than tensors (fractions.Fraction)" in line and "--trust unpickles it" in line
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "out"), "--trust"]) == 0
    assert "not imported: fraction" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bin", "dcp", "dcp tensor", "deepspeed"])
def test_code_in_a_pickle_does_not_run(
    kind: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, made = tmp_path / "source", tmp_path / "made"
    if kind == "deepspeed":
        (folder / "global_step1").mkdir(parents=True)
        (folder / "latest").write_text("global_step1")
        torch.save(Runs(made), folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    else:
        shutil.copytree(sources / kind.partition(" ")[0], folder)
        if kind == "bin":
            torch.save({"a": Runs(made)}, folder / SINGLE)
        elif kind == "dcp":
            (folder / ".metadata").write_bytes(pickle.dumps(Runs(made)))
        else:
            written = io.BytesIO()
            torch.save(Runs(made), written)
            (folder / "__0_0.distcp").write_bytes(written.getvalue())

            def first(held: Any) -> None:
                for info in held.storage_data.values():
                    info.offset, info.length = 0, len(written.getvalue())

            described(folder, first)
    line = refused(folder, tmp_path / "out", capsys)
    assert "mkdir" in line or "optim_states.pt holds pickled objects" in line
    assert not made.exists()


def test_a_description_can_name_records_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    for held in (argparse.Namespace, torch.nn.Linear, torch.distributed.checkpoint.FileSystemReader, eval, {1, 2}):
        path.write_bytes(pickle.dumps({"a": held}, protocol=2 if isinstance(held, set) else 4))
        with pytest.raises(ValueError, match=r"\.metadata holds [\w.]+, which describes no tensors"):
            pickled.description(path)


def test_a_description_is_no_longer_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MOST_PICKLE_BYTES", 100)
    (tmp_path / "m").write_bytes(bytes(101))
    with pytest.raises(ValueError, match="more than 100 bytes"):
        pickled.description(tmp_path / "m")
    torch.save({f"name {number}": torch.ones(1) for number in range(9)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"its pickle has .* bytes; at most 100 are read"):
        pickled.tensors_of(tmp_path / "w.pth", trust=False)


def test_a_deepspeed_folder_without_a_rank_s_file_or_step_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_deepspeed(tmp_path / "source", "llama", stage=2)
    capsys.readouterr()  # the bars of transformers
    (tmp_path / "source" / "global_step3" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    line = refused(tmp_path / "source", tmp_path / "out", capsys, "--trust")
    assert "global_step3: DeepSpeed cannot put its files together: Expected 2" in line
    (tmp_path / "source" / "latest").write_text("../elsewhere")
    line = refused(tmp_path / "source", tmp_path / "out", capsys, "--trust")
    assert "latest names '../elsewhere', which is no folder beside it" in line
