"""An out-of-memory error: what asked for the memory, and settings that need less."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from stoker.conf.schema import AdapterConfig, BatchConfig, Config, ModelConfig, ParallelConfig
from stoker.models.loss import CHUNK, Aim, summed_loss
from stoker.parallel.layout import layout_of
from stoker.trainer.need import MARGIN, need_of
from stoker.trainer.out_of_memory import component_of, explain, is_out_of_memory, nearest_that_fit
from stoker.trainer.parallelize import parameters_of

GIB = 2.0**30
LLAMA_8B = Config(
    seq_len=8192,
    batch=BatchConfig(size=64, micro_size=4),
    parallel=ParallelConfig(zero=3),
    model=ModelConfig(
        vocab_size=128_256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
    ),
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=str,
)
def test_every_allocator_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_the_component_is_read_off_the_traceback() -> None:
    with pytest.raises(RuntimeError) as raised:
        summed_loss(torch.ones(2, 3), torch.ones(5, 4), Aim(torch.zeros(2, dtype=torch.int64)), 2)
    assert component_of(raised.value) == "the loss"
    assert component_of(RuntimeError("raised nowhere")) == "this rank"


def test_the_nearest_settings_that_fit_are_named_and_do_fit() -> None:
    parameters = parameters_of(LLAMA_8B)
    assert parameters == 8_030_261_248
    found = nearest_that_fit(LLAMA_8B, 8, parameters, 80 * GIB, 0.0)
    assert found == ["batch.micro_size=1", "activation_checkpointing=full"] or len(found) == 2
    for words in found:
        changed = LLAMA_8B
        for word in words.split():
            section, _, rest = word.partition(".")
            if rest:
                key, _, value = rest.partition("=")
                inner = dataclasses.replace(getattr(changed, section), **{key: type_of(value)})
                changed = dataclasses.replace(changed, **{section: inner})
            else:
                key, _, value = word.partition("=")
                changed = dataclasses.replace(changed, **{key: value})
        assert need_of(changed, layout_of(changed, 8), parameters).total <= MARGIN * 80 * GIB
    assert need_of(LLAMA_8B, layout_of(LLAMA_8B, 8), parameters).total > MARGIN * 80 * GIB


def test_a_smaller_chunk_of_the_loss_is_the_least_intrusive() -> None:
    """Half of the vocabulary's logits of 8,192 tokens are 10 GiB here: where it fits by a little, they are enough."""
    parameters = parameters_of(LLAMA_8B)
    large = dataclasses.replace(LLAMA_8B, model=dataclasses.replace(LLAMA_8B.model, loss_chunk=8192))
    small = need_of(LLAMA_8B, layout_of(LLAMA_8B, 8), parameters).total
    assert need_of(large, layout_of(large, 8), parameters).total > small + 5 * GIB
    assert nearest_that_fit(large, 8, parameters, small / MARGIN * 1.01, 0.0)[0] == f"model.loss_chunk={CHUNK}"
    assert "model.loss_chunk" not in " ".join(nearest_that_fit(LLAMA_8B, 8, parameters, 400 * GIB, 0.0))


def test_on_a_gpu_the_chunk_that_the_run_took_is_what_a_smaller_one_is_named_for(monkeypatch) -> None:
    model = dataclasses.replace(LLAMA_8B.model, num_hidden_layers=1)
    config = dataclasses.replace(LLAMA_8B, model=model, batch=BatchConfig(size=8, micro_size=1))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 79 * GIB)
    properties = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    line = explain(error, config, 8, torch.device("cuda", 0))
    assert "2.0 GiB more than the 79.0 GiB that this rank held of 80.0 GiB" in line
    assert f"estimated to fit: model.loss_chunk={CHUNK}" in line
    said = dataclasses.replace(config, model=dataclasses.replace(model, loss_chunk=CHUNK))
    assert "model.loss_chunk" not in explain(error, said, 8, torch.device("cuda", 0))


def type_of(value: str) -> int | str:
    return int(value) if value.isdecimal() else value


def test_what_the_run_needed_corrects_the_estimate() -> None:
    """Twice as much as estimated: what was estimated to fit by a little does not."""
    parameters = parameters_of(LLAMA_8B)
    need = need_of(LLAMA_8B, layout_of(LLAMA_8B, 8), parameters)
    assert len(nearest_that_fit(LLAMA_8B, 8, parameters, 400 * GIB, 0.0)) == 2
    needed = need.held + 50 * need.activations
    tight = nearest_that_fit(LLAMA_8B, 8, parameters, 80 * GIB, needed)
    assert "batch.micro_size=1" not in tight


def test_nothing_is_promised_where_nothing_fits() -> None:
    parameters = parameters_of(LLAMA_8B)
    assert nearest_that_fit(LLAMA_8B, 1, parameters, 8 * GIB, 0.0) == []


def test_the_estimate_of_what_is_held_counts_the_bytes_of_a_parameter() -> None:
    """ZeRO 3 in bf16 with AdamW over 8 ranks: 16 bytes a parameter, shared, and two gathered blocks."""
    parameters = parameters_of(LLAMA_8B)
    held = need_of(LLAMA_8B, layout_of(LLAMA_8B, 8), parameters).held
    assert held == pytest.approx(parameters * 16 / 8 + 2 * parameters / 32 * 2, rel=1e-6)


def test_a_frozen_parameter_is_held_in_the_compute_dtype_or_in_four_bits() -> None:
    """Its bytes beside two gathered blocks: shared by ZeRO, but for packed ones."""
    parameters = parameters_of(LLAMA_8B)
    packed = dataclasses.replace(LLAMA_8B, adapter=AdapterConfig("lora", base="nf4"))
    for config, bytes_ in ((LLAMA_8B, 2 / 8), (packed, 0.5625)):
        held = need_of(config, layout_of(config, 8), parameters, frozen=parameters).held
        assert held == pytest.approx(parameters * bytes_ + 2 * parameters / 32 * 2, rel=1e-6)
