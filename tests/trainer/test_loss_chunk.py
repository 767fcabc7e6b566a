"""How many tokens the loss takes at a time: a function of the config, the layout and the smallest GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stoker.conf.schema import BatchConfig, Config, ModelConfig, ParallelConfig
from stoker.models.family import build_on_meta
from stoker.models.loss import CHUNK, Head
from stoker.parallel.layout import Layout, layout_of
from stoker.parallel.model import whole_model
from stoker.trainer.loss_chunk import MOST, chunk_that_fits, free_bytes, loss_chunk
from stoker.trainer.parallelize import _prepare_heads
from tests.fake_cuda import install

GIB = 2.0**30
SMALL = ModelConfig(
    vocab_size=128_256,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=8192,
    tie_word_embeddings=True,
)


def config(**changes: Any) -> Config:
    return Config(seq_len=4096, batch=BatchConfig(16, 2), model=SMALL, precision="bf16", **changes)


def mesh(layout: Layout, *memory_gib: float, device: str = "cuda:0") -> Any:
    asked = []

    def gather(text: str) -> list[str]:
        asked.append(text)
        return [str(int(size * GIB)) for size in memory_gib]

    return SimpleNamespace(device=torch.device(device), layout=layout, all_gather_text=gather, asked=asked)


@given(
    free=st.floats(0, 1e12),
    vocabulary=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_chunk_is_the_largest_power_of_two_that_fits_and_never_below_the_default(free, vocabulary, dtype) -> None:
    chunk, each = chunk_that_fits(free, vocabulary, dtype), vocabulary * (2 * dtype.itemsize + 4)
    assert CHUNK <= chunk <= MOST and chunk & (chunk - 1) == 0
    assert chunk == CHUNK or chunk * each <= free
    assert chunk == MOST or 2 * chunk * each > free


def test_more_memory_less_vocabulary_and_fewer_bytes_make_larger_chunks() -> None:
    assert chunk_that_fits(4 * GIB, 128_256, torch.bfloat16) == 4096
    assert chunk_that_fits(8 * GIB, 128_256, torch.bfloat16) == 8192
    assert chunk_that_fits(4 * GIB, 128_256 // 2, torch.bfloat16) == 8192
    assert chunk_that_fits(4 * GIB, 128_256, torch.float32) == 2048
    assert chunk_that_fits(0.0, 128_256, torch.bfloat16) == CHUNK


def test_all_ranks_take_what_fits_the_smallest_gpu(monkeypatch) -> None:
    install(monkeypatch)
    wanted = config(parallel=ParallelConfig(zero=3))
    layout = layout_of(wanted, 2)
    with torch.device("meta"):
        whole = build_on_meta(SMALL, whole_model(16))
    found = {memory: loss_chunk(wanted, mesh(layout, *memory), whole) for memory in ((80, 80), (80, 24), (24, 80))}
    assert found[80, 80] == MOST
    assert found[80, 24] == found[24, 80] == loss_chunk(wanted, mesh(layout, 24, 24), whole)
    assert found[80, 24] < MOST


def test_what_the_config_says_and_cpus_ask_nobody(monkeypatch) -> None:
    install(monkeypatch)
    whole = build_on_meta(SMALL, whole_model(16))
    said = config()
    said.model = dataclasses.replace(SMALL, loss_chunk=512)
    on_gpu, on_cpu = mesh(Layout(), 80), mesh(Layout(), 80, device="cpu")
    assert loss_chunk(said, on_gpu, whole) is None and loss_chunk(config(), on_cpu, whole) is None
    assert not on_gpu.asked and not on_cpu.asked


def test_a_model_of_unknown_shape_takes_a_sixteenth_of_the_memory() -> None:
    other = config()
    other.model = dataclasses.replace(SMALL, target="mine:build")
    assert free_bytes(other, Layout(), 80 * GIB, 10**12, 0) == 5 * GIB
    assert free_bytes(config(), Layout(), 1 * GIB, 10**12, 0) == 0.0


@pytest.mark.parametrize(("chunk", "expected"), [(None, 1024), (4096, 4096)])
def test_heads_are_told(chunk: int | None, expected: int) -> None:
    head = Head(nn.Parameter(torch.zeros(4, 2)))
    _prepare_heads(nn.Sequential(nn.Linear(2, 2), head), chunk, compiled=True)
    assert head.chunk == expected and head.compiled
