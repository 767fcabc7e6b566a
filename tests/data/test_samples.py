"""What an evaluation reads: samples spread over all documents and sources, and the splits that they come from."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker.conf.schema import Config
from stoker.data import IndexedLoader, open_rows, open_samples, open_tokenizer, read_rows
from stoker.data.samples import Sample, allocate, spread
from tests.data.conftest import write_text, write_texts
from tests.data.counted import base, changed

SEEDS = range(10)


def texts(folder: Path, **data: Any) -> Config:
    return base(folder, target="stoker.data.text:open_source", name="texts", path=str(folder / "texts"), **data)


def one_text(folder: Path, letters: int = 4000) -> Path:
    chance = random.Random(1)
    (folder / "texts").mkdir()
    write_text(folder / "texts" / "input.txt", "".join(chance.choices("abcdefgh \n", k=letters)))
    return folder / "texts"


def ids_of(config: Config, split: str) -> list[int]:
    return open_rows(config, split).tokens.ids[:].tolist()  # type: ignore[union-attr]


def samples(config: Config, **evaluation: Any) -> list[Sample]:
    return open_samples(dataclasses.replace(config, eval=dataclasses.replace(config.eval, **evaluation)))


def test_a_sample_of_64_is_within_its_standard_error_of_the_whole_split_for_ten_seeds(tmp_path: Path) -> None:
    chance = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(120):  # as in a sorted folder, neighbours are alike
        letters = "abcdefghijklmnopqrstuvwxyz"[: 2 + number // 5]
        write_text(tmp_path / "texts" / f"{number:03}.txt", "".join(chance.choices(letters, k=chance.randrange(600))))
    config = texts(tmp_path, validation=0.5)
    plan = open_rows(config, "validation")
    tokens = read_rows(plan, range(plan.rows_per_epoch)).tokens.numpy()
    counts = np.bincount(tokens.ravel(), minlength=257)
    losses = -np.log(counts / counts.sum(), where=counts > 0, out=np.zeros(257))[tokens].mean(1)
    error = losses.std() / 8
    taken = [samples(config, sequences=64, seed=seed)[0].numbers for seed in SEEDS]
    assert {len(set(numbers.tolist())) for numbers in taken} == {64} and len(
        {bytes(numbers) for numbers in taken}
    ) == 10
    assert [round(abs(losses[numbers].mean() - losses.mean()) / error, 1) <= 1 for numbers in taken] == [True] * 10
    assert abs(losses[:64].mean() - losses.mean()) > 3 * error, "the first rows would do as well: this tests nothing"


def test_a_sample_takes_one_of_each_stretch_and_without_a_seed_the_first() -> None:
    for seed in SEEDS:
        assert (spread(5, 35, seed) // 7).tolist() == [0, 1, 2, 3, 4]
    assert spread(7, 7, 3).tolist() == list(range(7))
    assert spread(3, 100, None).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("total", "weights", "available", "expected"),
    [
        (64, [3, 1], [1000, 1000], [48, 16]),
        (64, [3, 1], [10, 1000], [10, 54]),
        (4, [1000, 1], [100, 100], [3, 1]),  # one where there is any
        (1, [1, 5, 2], [9, 9, 9], [0, 1, 0]),
        (9, [1, 0, 1], [2, 9, 3], [2, 0, 3]),  # without a weight none
        (9, [1, 1], [0, 4], [0, 4]),
    ],
)
def test_sources_give_by_their_weights_what_they_have(
    total: int, weights: list[float], available: list[int], expected: list[int]
) -> None:
    assert allocate(total, weights, available) == expected


def test_both_samples_of_a_mixture_have_the_weights_of_training(tmp_path: Path) -> None:
    config = base(tmp_path)
    for name, weight, count in (("a", 3, 40), ("b", 1, 90)):
        write_texts(tmp_path / name, count)
        source = {"kind": "text", "path": str(tmp_path / name), "weight": weight, "validation": 0.4}
        config.data.sources[name] = source
    found = [(sample.split, sample.source, len(sample.numbers)) for sample in samples(config, sequences=16)]
    assert found == [("validation", "a", 12), ("validation", "b", 4), ("train", "a", 12), ("train", "b", 4)]


def test_by_default_at_most_64_are_read_and_none_where_nothing_is_kept(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", 40)
    held = open_rows(texts(tmp_path, validation=0.2), "validation").rows_per_epoch
    assert len(samples(texts(tmp_path, validation=0.2))[0].numbers) == min(64, held)
    assert samples(texts(tmp_path, validation=0.0)) == []
    assert samples(texts(tmp_path, validation=1e-9)) == []  # of forty documents none
    with pytest.raises(
        ValueError, match=r"0 validation documents.*keep the last tokens \(data.validation_by=position\)"
    ):
        samples(texts(tmp_path, validation=1e-9), sequences=8)
    assert samples(texts(tmp_path, validation=1e-2, validation_by="position"))


@pytest.mark.parametrize("mode", ["indexed", "streaming"])
def test_the_end_of_a_single_document_is_kept_for_validation(tmp_path: Path, mode: str) -> None:
    path = one_text(tmp_path) / "input.txt"
    config = texts(tmp_path)
    ids = [*path.read_bytes(), open_tokenizer(config.data).end_of_document]
    assert (ids_of(config, "train"), ids_of(config, "validation")) == (ids[:3601], ids[3601:])
    config.data.mode, config.data.splits = mode, "stoker.data.streaming.sources:open_text"
    validation, beside = samples(config, sequences=8)
    text = path.read_text()
    for sample, part in ((validation, text[3600:]), (beside, text[:3601])):
        for row in read_rows(sample.plan, sample.numbers).tokens.tolist():
            assert bytes(token for token in row if token < 256).decode() in part


def test_a_single_file_of_tokens_is_split_by_position(tmp_path: Path) -> None:
    ids = np.arange(1000, dtype=np.uint16)
    ids.tofile(tmp_path / "train.bin")
    config = base(
        tmp_path, target="stoker.data.token_files:open_source", path=str(tmp_path / "train.bin"), tokenizer=None,
        args={"dtype": "uint16"},
    )  # fmt: skip
    assert (ids_of(config, "train"), ids_of(config, "validation")) == (ids[:900].tolist(), ids[900:].tolist())
    assert ids_of(changed(config, validation_by="documents"), "train") == ids.tolist()
    np.arange(5000, 5100, dtype=np.uint16).tofile(tmp_path / "val.bin")
    apart = changed(config, validation_path=str(tmp_path / "val.bin"))
    assert ids_of(apart, "train") == ids.tolist() and ids_of(apart, "validation") == [*range(5000, 5100)]


def test_how_documents_are_kept_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    one_text(tmp_path, 5000)
    state = IndexedLoader(open_rows(texts(tmp_path), "train"), 24).state()
    for other in ({"validation_by": "documents"}, {"validation_path": __file__}, {"validation": 0.2}):
        with pytest.raises(ValueError, match=r"rows of other data: .*validation"):
            IndexedLoader(open_rows(texts(tmp_path, **other), "train"), 24).load_state(state)


@pytest.mark.parametrize(("mode", "tokenizer"), [("indexed", "byte"), ("indexed", "bpe"), ("streaming", "byte")])
def test_validation_documents_that_lie_apart_are_all_evaluated_and_all_others_trained(
    tmp_path: Path, mode: str, tokenizer: str
) -> None:
    for folder, letter in (("texts", "a"), ("held", "Z")):
        (tmp_path / folder).mkdir()
        for number in range(40):
            write_text(tmp_path / folder / f"{number:02}.txt", letter * (20 + number))
    config = texts(tmp_path, validation_path=str(tmp_path / "held"), tokenizer=tokenizer, bpe_vocab=258)
    decode = open_tokenizer(config.data).decode
    for split in ("train", "validation"):
        assert len(open_rows(config, split).tokens.starts) == 40  # type: ignore[union-attr]
    config.data.mode, config.data.splits = mode, "stoker.data.streaming.sources:open_text"
    for sample, letter in zip(samples(config, sequences=20), "Za", strict=True):
        letters = set("".join(map(decode, read_rows(sample.plan, sample.numbers).tokens.tolist())))
        assert letter in letters and not letters & ({"a", "Z"} - {letter})
