"""What the cut adds to a model does not change what it computes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.conf.schema import BatchConfig, Config, ModelConfig, ParallelConfig
from stoker.parallel.layout import batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.trainer.parallelize import FUSED_ATTENTION, _checkpoint_activations, compiles, cut
from tests import world
from tests.models.tiny import decoder, rows, shape
from tests.parallel.reference import VOCABULARY, assemble, global_rows, normwise, one_process, small_config

DECODER = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


def losses(mode: str, compiled: bool, zero: int, tied: bool) -> tuple[list[tuple[float, float]], list]:
    config = decoder_config(tied)
    config.activation_checkpointing, config.compile, config.parallel = mode, compiled, ParallelConfig(zero=zero)
    layout = layout_of(config, torch.distributed.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    found = []
    for step in range(1, 6):
        engine.forward_backward(global_rows(config, step)[mesh.dp_rank :: layout.dp])
        result = engine.update(config.optim.lr).read()
        found.append((result.loss, result.grad_norm))
    return found, engine.shards()


def decoder_config(tied: bool):  # type: ignore[no-untyped-def]
    model = ModelConfig(**{**vars(DECODER), "tie_word_embeddings": tied})
    config = small_config(model=model, batch=BatchConfig(size=8, micro_size=2))
    config.data.document_mask = True
    # At a higher rate, or with a smaller eps, rounding, which differs from processor to processor, grows beyond 1e-5.
    config.optim.lr, config.optim.eps = 1e-3, 1e-6
    return config


@pytest.mark.long
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_computes_the_same_with_any_activation_checkpointing(mode: str, zero: int, tied: bool) -> None:
    expected = one_process(decoder_config(tied), 5)
    results = world.run(losses, 2, mode, False, zero, tied)
    for steps, _ in results:
        assert [loss for loss, _ in steps] == pytest.approx(expected.losses, rel=1e-5)
        assert [norm for _, norm in steps] == pytest.approx(expected.norms, rel=1e-5)
    parameters = assemble([shards for _, shards in results])
    for name, value in expected.parameters.items():
        assert normwise(parameters[name], value) < 1e-4, name


@pytest.mark.long
def test_compiled_blocks_compute_the_same() -> None:
    expected = one_process(decoder_config(False), 5)
    for steps, _ in world.run(losses, 2, "none", True, 1, False, timeout=240.0):
        assert [loss for loss, _ in steps] == pytest.approx(expected.losses, rel=1e-4)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(AssertionError, match="none of its parameters is trained"):
        world.run(frozen, 1)


def frozen() -> None:
    config = small_config()
    config.model.target = "tests.toy:build_all_frozen"
    layout = layout_of(config, 1)
    cut(config, mesh_over_default_group(layout, torch.device("cpu"), 60.0), batch_plan(config, layout))


@pytest.mark.parametrize(
    ("wanted", "engine", "zero", "device", "compiled"),
    [
        (None, "fsdp", 3, "cuda", True),
        (None, "deepspeed", 2, "cuda", True),
        (None, "deepspeed", 3, "cuda", False),
        (None, "fsdp", 1, "cpu", False),
        (False, "fsdp", 1, "cuda", False),
        (True, "fsdp", 1, "cpu", True),
    ],
)
def test_blocks_are_compiled_on_gpus_unless_that_is_forbidden(wanted, engine, zero, device, compiled, caplog) -> None:
    config = Config(compile=wanted, parallel=ParallelConfig(engine=engine, zero=zero))
    caplog.set_level("INFO")
    assert compiles(config, torch.device(device)) is compiled
    assert ("compile: off" in caplog.text) == (engine == "deepspeed" and zero == 3), "what is left off is said"


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "again", "attends"), [("none", 0, 1), ("selective", 3, 1), ("full", 6, 2)])
def test_selective_recomputes_every_second_product_and_never_attention(mode: str, again: int, attends: int) -> None:
    """A block multiplies seven times forward and fourteen times backward. The last product is needed by no gradient."""
    config = shape()
    config.num_key_value_heads, config.loss_chunk = config.num_attention_heads, 64
    model = decoder(config)
    tokens, positions, _ = rows(config)
    for block in model.blocks().values():
        _checkpoint_activations(block, mode, None)
    blocks, head = len(model.blocks()), 3  # products of the head: logits, and a gradient by each of their factors
    with Counted() as counted:
        model(tokens, positions, None, tokens).backward()
    assert counted.calls["mm"] == blocks * (21 + again) + head
    assert sum(counted.calls[name] for name in FUSED_ATTENTION) == blocks * attends
