"""Muon: how often it orthogonalises and what it sends, fused projections, groups, and what is not trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from stoker.conf.schema import BatchConfig, Config, OptimConfig
from stoker.models.embedding import Embedding
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.model import Role
from stoker.parallel.registry import whole_registry
from stoker.parallel.rules import muon as rule
from stoker.parallel.rules.muon import cost, orthogonalized
from stoker.parallel.rules.ownership import Rectangle, routes
from stoker.parallel.rules.settings import groups_problem, settings_of, unused_group
from stoker.parallel.shards import Chunk, Shard
from stoker.trainer.parallelize import cut
from stoker.trainer.rehearsal.collectives import Collectives
from tests import world
from tests.parallel.conformance import train
from tests.parallel.parity import OPTIMIZERS, Case
from tests.parallel.reference import assemble, global_rows, normwise, one_process, small_config
from tests.parallel.rules.plain import Plain, newton_schulz
from tests.parallel.watching import Syncs

MATRICES, LAYERS = 7, 4  # of a layer of the decoder, in the layout of `Case`


def test_it_is_the_papers_iteration_and_the_result_is_nearly_orthogonal() -> None:
    for shape in ((24, 48), (48, 24), (16, 16)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = orthogonalized(matrix)
        assert normwise(found, newton_schulz(matrix)) < 1e-5
        values = torch.linalg.svdvals(found)
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert not orthogonalized(torch.zeros(3, 4)).any()


def test_in_fp32_it_is_a_thousand_times_less_sensitive_than_in_bf16() -> None:
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    noisy = matrix * (1 + 1e-5 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(2)))
    moved = {t: normwise(orthogonalized(noisy, t), orthogonalized(matrix, t)) for t in (torch.float32, torch.bfloat16)}
    assert moved[torch.float32] < 3e-5 < 1e-3 < moved[torch.bfloat16] < 3e-2


def watched(config: Config) -> tuple[list[tuple[int, ...]], dict[tuple[str, str], Any], list[str]]:
    """On a rank: the shapes that Newton-Schulz ran on in the second step, its messages, and its syncs."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, layout))
    shapes: list[tuple[int, ...]] = []
    before = rule.orthogonalized

    def counted(matrix: Tensor, dtype: torch.dtype) -> Tensor:
        shapes.append(tuple(matrix.shape))
        return before(matrix, dtype)

    rule.orthogonalized = counted
    try:
        rows = global_rows(config, 1)[mesh.dp_rank :: layout.dp]
        engine.forward_backward(rows)
        engine.update(1e-3)
        shapes.clear()
        engine.forward_backward(rows)
        with Syncs() as syncs, Collectives(mesh) as collectives:
            engine.update(1e-3)
    finally:
        rule.orthogonalized = before
    return shapes, collectives.found, syncs.found


@pytest.mark.parametrize(
    ("layout", "replicas"),
    [
        (Layout(1, 2, zero=2), 1),
        pytest.param(Layout(2), 1, marks=pytest.mark.long),
        pytest.param(Layout(tp=2), 1, marks=pytest.mark.long),
        pytest.param(Layout(2, 2, zero=3), 2, marks=pytest.mark.long),
        pytest.param(Layout(1, 2, 2, zero=1), 1, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_each_matrix_is_orthogonalised_once_and_travels_at_most_twice(layout: Layout, replicas: int) -> None:
    config = Case(4, optimizer="muon").config(layout)
    ranks = world.run(watched, layout.world, config)
    assert sum(len(shapes) for shapes, _, _ in ranks) == MATRICES * LAYERS * replicas
    whole = {(32, 32), (16, 32), (48, 32), (32, 48)}
    assert all(set(shapes) <= whole for shapes, _, _ in ranks), "matrices are whole"
    work = [sum(map(cost, shapes)) for shapes, _, _ in ranks]
    assert max(work) <= 1.3 * sum(work) / len(work), "the work is spread"
    of_matrices = 4 * LAYERS * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    for _, traffic, syncs in ranks:
        own = [found for (kind, _), found in traffic.items() if kind == "reduce_scatter"]  # so all-to-all is counted
        assert sum(found.count for found in own) <= 2 and sum(found.bytes for found in own) <= 2 * of_matrices
        assert syncs == []


class Fused(nn.Module):
    fused = {"weight": (0, (8, 4, 4))}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(16, 8)), nn.Parameter(torch.zeros(16))


def test_the_registry_knows_the_matrices_of_a_fused_projection() -> None:
    model = nn.ModuleDict({"embedding": Embedding(5, 8), "qkv": Fused()})
    entries = whole_registry(model).entries
    assert entries["qkv.weight"].matrices() == (
        Chunk((0, 0), (8, 8)),
        Chunk((8, 0), (4, 8)),
        Chunk((12, 0), (4, 8)),
    )
    assert entries["embedding.weight"].matrices() == (Chunk((0, 0), (5, 8)),)


@pytest.mark.parametrize("layout", [Layout(), Layout(1, 2, zero=2), Layout(tp=2)], ids=str)
def test_fused_projections_are_orthogonalised_one_by_one(layout: Layout) -> None:
    config = small_config(batch=BatchConfig(size=8, micro_size=2), optim=replace(OPTIMIZERS["muon"]))
    config.model.target = "tests.parallel.odd_models:build_fused"
    config.parallel.zero, config.parallel.tp = layout.zero, layout.tp

    def matrices(name: str, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(18)) if name.endswith("inner.weight") else [tensor]

    wanted = one_process(config, 4, matrices_of=matrices)
    found = assemble([shards for _, shards in world.run(train, layout.world, config, "fsdp", 4)])
    for name, value in wanted.parameters.items():
        assert normwise(found[name], value) < 1e-4, name


@pytest.mark.parametrize("layout", [Layout(1, 2, zero=1)], ids=str)
def test_groups_have_their_own_rule_rate_and_decay(layout: Layout) -> None:
    groups = [
        {"pattern": "layers.0.*", "name": "lamb", "lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-6},
        {"role": "head", "lr": 5e-4, "weight_decay": 0.0},
        {"role": "matrix", "name": "muon"},
    ]
    optim = OptimConfig(name="adamw", lr=1e-3, eps=1e-6, groups=groups)
    config = small_config(batch=BatchConfig(size=8, micro_size=2), optim=optim)
    config.parallel.zero = layout.zero

    def rule_of(name: str, tensor: Tensor) -> tuple[str, float, float]:
        decay = 0.1 if tensor.dim() > 1 and not name.startswith("embedding") else 0.0
        if name.startswith("layers.0."):
            return "lamb", 2.0, decay
        if name.startswith("head"):
            return "adamw", 0.5, 0.0
        return ("muon" if tensor.dim() > 1 and name.startswith("layers") else "adamw"), 1.0, decay

    plain = Plain(replace(optim, momentum=0.95), rule_of)
    wanted = one_process(config, 4, plain=plain)
    found = assemble([shards for _, shards in world.run(train, layout.world, config, "fsdp", 4)])
    for name, value in wanted.parameters.items():
        assert normwise(found[name], value) < 1e-4, name


@pytest.mark.parametrize("layout", [Layout(1, 2, zero=3), Layout(pp=2)], ids=str)
def test_frozen_parts_stay_and_a_stage_without_a_matrix_takes_part(layout: Layout) -> None:
    config = small_config(batch=BatchConfig(size=8, micro_size=2), optim=replace(OPTIMIZERS["muon"]))
    config.model.target = "tests.toy:build_with_frozen_start"
    config.parallel.zero, config.parallel.pp = layout.zero, layout.pp
    wanted = one_process(config, 4)
    ranks: list[list[Shard]] = [shards for _, shards in world.run(train, layout.world, config, "fsdp", 4)]
    for name, value in assemble(ranks).items():
        assert normwise(value, wanted.parameters[name]) < 1e-4, name


def test_owners_are_holders_with_the_least_work_and_replicas_send_once() -> None:
    a, b, c = (Rectangle(n, Chunk((0, 0), (4, 4))) for n in range(3))
    found = routes(3, [[a, b], [a, c], [b, c]], [5.0, 3.0, 2.0])
    assert found.owners == [0, 2, 1]
    assert found.sent == [[0], [1], [0]], "every owner has its matrix already"
    halves = [Rectangle(0, Chunk((2 * n, 0), (2, 4))) for n in range(2)]
    shared = routes(1, [[halves[0]], [halves[0]], [halves[1]], [halves[1]]], [1.0])
    assert shared.owners == [0] and shared.sent == [[0], [], [0], []]


def test_settings_follow_roles_and_the_first_group() -> None:
    optim = OptimConfig(name="muon", momentum=0.9, groups=[{"pattern": "a.*", "name": "lion"}, {"role": "matrix"}])
    assert settings_of(optim, "a.weight", Role.MATRIX, 2).rule == "lion"
    assert settings_of(optim, "a.weight", Role.MATRIX, 2).betas == (0.9, 0.99)
    assert settings_of(optim, "b.weight", Role.MATRIX, 2).rule == "muon"
    assert settings_of(optim, "b.experts", Role.MATRIX, 3).rule == "adamw"
    for role in (Role.EMBEDDING, Role.HEAD, Role.VECTOR):
        found = settings_of(optim, "b.weight", role, 2)
        assert found.rule == "adamw" and found.decay == (0.1 if role is Role.HEAD else 0.0)
    assert groups_problem(optim) is None
    roles = {"a.weight": Role.MATRIX, "a.bias": Role.VECTOR}
    assert "every parameter in it is in an earlier group" in str(unused_group(optim, roles))
    assert "no trained parameter is in it" in str(unused_group(optim, {"b.bias": Role.VECTOR}))
