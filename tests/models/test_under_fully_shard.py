"""The decoder under torch's `fully_shard`: bf16 copies of fp32 weights compute what plain bf16 weights compute."""

from __future__ import annotations

import torch

from tests import world
from tests.models.tiny import decoder, gradients, rows, shape

# Since torch 2.15 `fully_shard` reduces the gradients of norms, which compute in fp32, without rounding them to bf16.
UNROUNDED = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)


def sharded_errors(tied: bool) -> dict[str, float]:
    """Relative errors of the loss and of each gradient, against the same model as plain bf16 tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    config = shape(tie_word_embeddings=tied)
    tokens, positions, labels = rows(config)
    documents = torch.arange(20).div(8, rounding_mode="floor").int().expand(2, 20)
    plain = decoder(config).bfloat16()
    expected = plain(tokens, positions, documents, labels)
    expected.backward()

    model = decoder(config)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in [*model.blocks().values(), model]:
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    model.rebuild_buffers()
    loss = model(tokens, positions, documents, labels)
    loss.backward()
    errors = {"loss": abs(loss - expected).item() / expected.item()}
    wanted = gradients(plain)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert isinstance(gradient, DTensor)
        error = gradient.full_tensor() - wanted[name]  # the mean over ranks that have the same rows
        errors[name] = (error.norm() / wanted[name].norm()).item()
    return errors


def test_sharded_weights_compute_what_plain_ones_compute() -> None:
    for tied in (False, True):
        for errors in world.run(sharded_errors, 2, tied):
            for name, error in errors.items():
                assert error <= (2**-8 if UNROUNDED and name.endswith("norm.weight") else 0.0), name
