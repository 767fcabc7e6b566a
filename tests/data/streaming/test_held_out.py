"""Evaluation and tokenizers under data.mode=streaming."""

from __future__ import annotations

import logging
import re
from collections import Counter
from functools import partial

import pytest

from stoker.data import open_rows, open_samples, open_tokenizer, read_rows
from stoker.data.streaming.lines import Lines
from stoker.data.tokenizer import JsonTokenizer
from tests.data.batches import digest
from tests.data.streaming.conftest import documents, write_lines
from tests.data.streaming.conftest import open_stream as open_streams
from tests.data.streaming.simulated import batches, digests, stream_tokens


@pytest.fixture
def config(config, tmp_path):
    config.data.validation, config.data.cache, config.eval.sequences = 0.2, str(tmp_path / "cache"), 8
    return config


def evaluated(config, split="validation"):
    return [read_rows(sample.plan, sample.numbers) for sample in open_samples(config) if sample.split == split]


def numbers_of(tokens) -> set[int]:
    text = bytes(token for token in tokens if token < 256).decode()
    return {int(number) for number in re.findall(r"\[(\d+)\]", text)}


@pytest.mark.parametrize("packing", ["concatenated", "best_fit", "padded"])
def test_evaluated_documents_are_those_left_out_of_training_for_every_seed(config, packing):
    config.data.packing, config.eval.sequences = packing, 12
    (rows,) = evaluated(config)
    held = numbers_of(rows.tokens.flatten().tolist())
    assert len(held) > 1 and int(rows.valid_tokens()) > 30
    (beside,) = evaluated(config, "train")
    assert len(beside) == len(rows) and not held & numbers_of(beside.tokens.flatten().tolist())
    trained = numbers_of(
        t for stream in stream_tokens(batches(partial(open_streams, config), None), 12) for t in stream
    )
    assert len(trained) > 200 and not held & trained
    config.run.seed = 7
    assert digest(evaluated(config)[0]) == digest(rows)


def test_the_second_start_reads_no_text_for_it(config, tmp_path, monkeypatch):
    first = digest(evaluated(config)[0])
    read = Lines.read
    monkeypatch.setattr(Lines, "read", lambda *_: pytest.fail("a text was read"))
    assert digest(evaluated(config)[0]) == first
    for kept in (tmp_path / "cache").glob("held-out-*.npz"):
        kept.write_bytes(kept.read_bytes()[:-30])
    with pytest.raises(pytest.fail.Exception, match="a text was read"):
        open_samples(config)
    monkeypatch.setattr(Lines, "read", read)
    for path in (tmp_path / "texts").glob("*.jsonl"):
        path.write_bytes(path.read_bytes().replace(b"xxx", b"yyy"))  # of the same sizes
    assert digest(evaluated(config)[0]) != first


def test_no_more_is_read_than_it_takes(config, tmp_path, caplog):
    write_lines(tmp_path / "texts", documents(5000))
    with caplog.at_level(logging.INFO):
        sample = open_samples(config)[0]
    assert len(sample.numbers) == 8 <= sample.plan.rows_per_epoch < 80
    (windows,) = re.findall(r"the validation documents of (\d+) windows", caplog.text)
    assert int(windows) < 10  # of 281


def test_more_rows_than_there_are_is_refused(config):
    config.eval.sequences = 10_000
    with pytest.raises(ValueError, match=r"eval.sequences=10000, but the \d+ validation documents make \d+ sequences"):
        open_samples(config)


def test_sources_of_a_mixture_are_evaluated_by_their_weights(config, tmp_path):
    for name, weight in (("a", 3), ("b", 1)):
        write_lines(tmp_path / name, [f"{n} " + name * (n % 90 + 1) for n in range(400)])
        kind = {"kind": "text", "path": str(tmp_path / name), "weight": weight, "validation": 0.2}
        config.data.sources[name] = kind
    config.data.path, config.data.splits = None, None
    config.eval.sequences = 40
    for split in ("validation", "train"):
        rows = [row for part in evaluated(config, split) for row in part.tokens.tolist()]
        assert Counter("a" if ord("a") in row else "b" for row in rows) == {"a": 30, "b": 10}


def test_rows_to_train_on_have_no_numbers(config):
    with pytest.raises(ValueError, match="cannot be looked up by number"):
        open_rows(config, "train")


@pytest.mark.parametrize("folder", [False, True])
def test_an_existing_trained_tokenizer_is_used_unchanged(config, tmp_path, folder):
    """A tokenizer.json, or the folder that `stoker data tokenizer` writes."""
    from stoker.data.cache import write_tokenizer
    from tests.data.streaming.simulated import World

    trained = JsonTokenizer.train(documents(300), 400)
    write_tokenizer(trained, tmp_path / "tok")
    config.data.tokenizer = str(tmp_path / "tok" if folder else tmp_path / "tok" / "tokenizer.json")
    config.data.cache = str(tmp_path / "cache")
    tokenizer = open_tokenizer(config.data)
    assert tokenizer.fingerprint == trained.fingerprint or not folder
    opener = partial(open_streams, config, tokenizer=tokenizer)
    with World(opener) as world:
        assert world.streams[0].fingerprint["texts.tokenizer"] == tokenizer.fingerprint
        rows = world.batches(3)
    assert "[" in tokenizer.decode(rows[0].tokens[0].tolist())
    splits = [{"dp": 3, "workers": 2, "batches": 1}, {"dp": 2}]
    assert digests(batches(opener, 3, splits)) == digests(rows)
