"""Models sharded over tp compute the same as whole ones, and the registry has the position of every piece."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from stoker.conf.schema import ModelConfig
from stoker.models.decoder import build
from stoker.parallel.batch import IGNORE_INDEX
from stoker.parallel.initialize import initialize
from stoker.parallel.layout import Layout
from stoker.parallel.mesh import Mesh, mesh_over_default_group
from stoker.parallel.model import Part, whole_model
from stoker.parallel.registry import LocalShard, Registry
from stoker.parallel.sharding import materialise
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard, whole
from stoker.parallel.tensor import parallelize_tensors
from stoker.parallel.tensor.axis import Share, TensorAxis
from tests import toy, world
from tests.models.tiny import decoder, rows, shape
from tests.parallel.reference import assemble, normwise

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 14, [0] * 20], dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    """A model and what it is fed: two rows of 20 tokens, or their activations where the part has no embedding."""

    changes: dict[str, Any] = field(default_factory=dict)
    part: Part = field(default_factory=lambda: whole_model(3))
    masked: bool = False
    without_labels: bool = False
    built_by_user: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> ModelConfig:
        return shape(**{"vocab_size": 97, **self.changes})

    def model(self) -> nn.Module:
        if not self.built_by_user:
            return decoder(self.config, self.part)
        model = toy.build(self.config, self.part)
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, 0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
        return model

    def input(self) -> Tensor:
        if self.part.embedding:
            return rows(self.config)[0]
        generator = torch.Generator().manual_seed(8)
        return torch.randn(40, self.config.hidden_size, generator=generator).to(self.dtype)

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        _, positions, labels = rows(self.config)
        if self.without_labels:
            labels = torch.full_like(labels, IGNORE_INDEX)
        return model(x, positions, DOCUMENTS if self.masked else None, labels)

    def backward(self, output: Tensor, share: slice = slice(None)) -> None:
        """From the loss; where the part has no head from the rows of a random gradient of its activations."""
        if self.part.head:
            (output / 40).backward()
        else:
            generator = torch.Generator().manual_seed(9)
            output.backward(torch.randn(40, self.config.hidden_size, generator=generator).to(self.dtype)[share])


ALL = {"tie_word_embeddings": True, "qkv_bias": True, "qk_norm": True}
PROJECTION_NORMS = {"qk_norm": True, "qk_norm_over": "projection", "norm_placement": "after"}
CASES = {
    "decoder": Case(),
    "one kv head": Case({"num_key_value_heads": 1, "qkv_bias": True}),
    "kv heads as many as heads": Case({"num_key_value_heads": 4, "qkv_bias": True, "qk_norm": True}),
    "tied": Case({"tie_word_embeddings": True, "vocab_size": 98}),
    "norms over projections": Case(PROJECTION_NORMS),
    "norms over projections, one kv head": Case({**PROJECTION_NORMS, "num_key_value_heads": 1}),
    "biases and norms": Case({"qkv_bias": True, "qk_norm": True}),
    "all": Case({**ALL, "num_key_value_heads": 1, "loss_chunk": 100}, masked=True),
    "documents": Case(masked=True),
    "no label": Case(ALL, without_labels=True),
    "first part": Case(ALL, Part(range(2), embedding=True, head=False)),
    "middle part": Case(ALL, Part(range(1, 2), embedding=False, head=False)),
    "last part": Case(ALL, Part(range(1, 3), embedding=False, head=True), masked=True),
    "last part, untied": Case({}, Part(range(2, 3), embedding=False, head=True)),
    "a user's model": Case(built_by_user=True),
    "a part of a user's model": Case(part=Part(range(1), embedding=False, head=False), built_by_user=True),
}


@dataclass(frozen=True)
class Ran:
    """What came of a case, on one rank or in one process. `output` is the loss, else activations."""

    output: Tensor
    gradients: list[Shard]
    input_gradient: Tensor | None
    gathered: Tensor | None = None  # all ranks' output, where each has a share of the tokens


def tensor_mesh() -> Mesh:
    return mesh_over_default_group(Layout(tp=dist.get_world_size()), torch.device("cpu"), 60.0)


def held_shards(registry: Registry, kind: str, tensors: dict[str, Tensor]) -> list[Shard]:
    return [
        shard
        for name, tensor in tensors.items()
        for shard in registry.shards(name, kind, LocalShard((whole(tuple(tensor.shape)),)), tensor)
    ]


def summed_gradients(model: nn.Module, registry: Registry, mesh: Mesh) -> dict[str, Tensor]:
    """As an engine sees to it: parts are summed over the groups that the registry names."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.float()
        for group in registry.entries[name].partial:
            dist.all_reduce(found[name], group=mesh.group(group))
    return found


def ran_cut(cases: list[Case], sequence: bool, recompute: str = "none", backend: Any = None) -> list[Ran]:
    """On a rank: every case, cut over all ranks. `backend`: of torch.compile, of every block."""
    mesh = tensor_mesh()
    found = []
    for case in cases:
        model = case.model()
        registry = parallelize_tensors(model, mesh, sequence)
        model.to(case.dtype)
        for block in model.blocks().values():  # type: ignore[operator]
            if recompute != "none":
                kept = [torch.ops.aten.mm.default, torch.ops._c10d_functional.all_to_all_single.default]
                options = {"context_fn": partial(create_selective_checkpoint_contexts, kept)}
                options = options if recompute == "selective" else {}
                # type: ignore[arg-type]
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
            if backend is not None:
                block.forward = torch.compile(block.forward, backend=backend, fullgraph=True)
        x, mine = case.input(), slice(None)
        if sequence:
            mine = slice(mesh.rank * 40 // mesh.layout.tp, (mesh.rank + 1) * 40 // mesh.layout.tp)
        if not case.part.embedding:
            x = x[mine].requires_grad_()
        output = case.run(model, x)
        case.backward(output, mine)
        output, gradients = output.detach(), summed_gradients(model, registry, mesh)
        parts = [torch.empty_like(output) for _ in range(mesh.layout.tp)]
        dist.all_gather(parts, output)
        gathered = torch.cat(parts) if sequence and not case.part.head else None
        found.append(Ran(output, held_shards(registry, GRADIENT, gradients), x.grad, gathered))
    return found


def ran_uncut(case: Case) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """Output, gradients and the input's gradient of a case in one process."""
    model, x = case.model().to(case.dtype), case.input()
    if not case.part.embedding:
        x.requires_grad_()
    output = case.run(model, x)
    case.backward(output)
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, x.grad


@cache
def whole_registry(name: str) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    return ran_uncut(CASES[name])


@pytest.mark.long
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_all_gradients_are_those_of_the_uncut_model(ranks: int, sequence: bool) -> None:
    results = world.run(ran_cut, ranks, list(CASES.values()), sequence)
    for number, name in enumerate(CASES):
        output, gradients, input_gradient = whole_registry(name)
        of_ranks = [result[number] for result in results]
        for ran in of_ranks:
            assert torch.equal(ran.output, of_ranks[0].output) or ran.gathered is not None, f"{name}: ranks disagree"
            assert normwise(ran.output if ran.gathered is None else ran.gathered, output) < 1e-5, name
        found = assemble([ran.gradients for ran in of_ranks], GRADIENT)
        assert found.keys() == gradients.keys(), name
        for parameter, wanted in gradients.items():
            assert normwise(found[parameter], wanted) < 1e-5, f"{name}: {parameter}"
        if input_gradient is not None:
            pieces = [ran.input_gradient for ran in of_ranks if ran.input_gradient is not None]
            assert normwise(torch.cat(pieces) if sequence else pieces[-1], input_gradient) < 1e-5, name


def test_no_label_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    output, gradients, _ = whole_registry("no label")
    assert output.item() == 0.0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("sequence", [False, True])
def test_bf16_loses_no_more_than_it_does_uncut(sequence: bool) -> None:
    precise, coarse = (
        Case({**ALL, "num_key_value_heads": 1}),
        Case({**ALL, "num_key_value_heads": 1}, dtype=torch.bfloat16),
    )
    output, gradients, _ = ran_uncut(precise)
    rough_output, rough_gradients, _ = ran_uncut(coarse)
    of_ranks = [result[0] for result in world.run(ran_cut, 4, [coarse], sequence)]
    assert normwise(of_ranks[0].output, output) < 2 * normwise(rough_output, output) + 1e-3
    found = assemble([ran.gradients for ran in of_ranks], GRADIENT)
    ratios = [
        normwise(found[name], wanted) / normwise(rough_gradients[name], wanted) for name, wanted in gradients.items()
    ]
    assert max(ratios) < 3.0 and sum(ratios) / len(ratios) < 1.5


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_activations_may_be_computed_again(recompute: str) -> None:
    cases = [CASES["all"], CASES["middle part"]]
    for sequence in (False, True):
        kept, again = (world.run(ran_cut, 2, cases, sequence, how) for how in ("none", recompute))
        for rank, rank_again in zip(kept, again, strict=True):
            for ran, ran_again in zip(rank, rank_again, strict=True):
                assert torch.equal(ran.output, ran_again.output)
                pairs = zip(ran.gradients, ran_again.gradients, strict=True)
                assert all(torch.equal(a.data, b.data) for a, b in pairs)


def ran_compiled(case: Case, sequence: bool) -> tuple[Ran, list[list[str]]]:
    """On a rank: the case, and the collectives in the graphs of its one block, forward and backward."""
    backend = AotEagerAndRecordGraphs()
    ran = ran_cut([case], sequence, backend=backend)[0]
    graphs = [*backend.fw_graphs, *backend.bw_graphs]
    return ran, [re.findall(r"_c10d_functional\.((?!wait)\w+)", graph.code) for graph in graphs]


@pytest.mark.long
@pytest.mark.parametrize("sequence", [False, True])
def test_a_compiled_block_is_one_graph_that_sees_the_collectives(sequence: bool) -> None:
    (ran, graphs), _ = world.run(ran_compiled, 2, CASES["middle part"], sequence, timeout=200.0)
    expected = whole_registry("middle part")[0]
    assert normwise(ran.output if ran.gathered is None else ran.gathered, expected) < 1e-5
    one_way = ["all_gather_into_tensor", "all_to_all_single"] if sequence else ["all_reduce"]
    assert graphs == [2 * one_way, 2 * one_way]


def initial_shards(config: ModelConfig, built_by_user: bool, sequence: bool) -> list[Shard]:
    mesh = tensor_mesh()
    with torch.device("meta"):
        model = (toy.build if built_by_user else build)(config, whole_model(config.num_hidden_layers))
    registry = parallelize_tensors(model, mesh, sequence)
    materialise(model, mesh.device)
    model.rebuild_buffers()  # type: ignore[operator]
    shards = held_shards(registry, PARAMETER, {name: p.detach() for name, p in model.named_parameters()})
    initialize(shards, model.initial, 5)  # type: ignore[arg-type]
    return shards


@pytest.mark.parametrize(
    ("ranks", "changes", "built_by_user"),
    [
        (2, ALL, False),
        (4, {"qkv_bias": True}, False),
        (4, ALL, False),
        (4, {"num_key_value_heads": 1}, False),
        (4, {}, True),
    ],
)
def test_initial_weights_are_bitwise_those_of_one_process(ranks: int, changes: dict, built_by_user: bool) -> None:
    config = shape(**{"vocab_size": 97, "initializer_range": 0.02, **changes})
    expected = assemble(world.run(initial_shards, 1, config, built_by_user, True))
    found = assemble(world.run(initial_shards, ranks, config, built_by_user, True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def frozen_and_tied() -> tuple[bool, list[bool], int]:
    with torch.device("meta"):
        model = build(shape(tie_word_embeddings=True), whole_model(3))
    model.layers["0"].requires_grad_(False)
    registry = parallelize_tensors(model, tensor_mesh(), True)
    tied = model.head.weight is model.embedding.weight
    trainable = [registry.entries[name].trainable == p.requires_grad for name, p in model.named_parameters()]
    return tied, trainable, sum("embedding" in name or "head" in name for name in registry.entries)


def test_what_is_tied_stays_tied_and_what_is_frozen_stays_frozen() -> None:
    for tied, trainable, entries in world.run(frozen_and_tied, 2):
        assert tied and all(trainable) and entries == 1


def shares_of(layout: Layout, units: int) -> tuple[list[Share], list[list[list[int]]]]:
    """Every rank's share of `units`, and the groups that it made for it."""
    shares, made = [], []
    for rank in range(layout.world):
        groups: list[list[list[int]]] = []
        mesh: Any = SimpleNamespace(layout=layout, add_groups=lambda _, lists, made=groups: made.append(lists))
        # type: ignore[arg-type]
        axis = TensorAxis(mesh, layout.tp, layout.coordinate(rank).tp, group=None, group_name="", sequence=True)
        shares.append(axis.share(units))
        made += groups
    return shares, made


def test_adjacent_ranks_share_units_that_are_fewer_than_ranks() -> None:
    layout = Layout(dp_shard=2, tp=4)
    shares, groups = shares_of(layout, 2)
    assert groups == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 8, "all ranks make all groups"
    pair = [Share(0, 1, 0, 2, ("tp_2",)), Share(0, 1, 1, 2, ("tp_2",))]
    assert shares[:4] == shares[4:] == [*pair, *(replace(share, start=1, stop=2) for share in pair)]
    assert shares_of(layout, 1) == ([Share(0, 1, rank % 4, 4, ("tp",)) for rank in range(8)], [])
    assert shares_of(layout, 8) == ([Share(2 * n, 2 * n + 2) for n in range(4)] * 2, [])
    with pytest.raises(ValueError, match="6 units do not divide over 4"):
        shares_of(layout, 6)


def refused(changes: dict[str, Any], ordinary: bool = False) -> str:
    model = nn.Sequential(nn.Linear(2, 2)) if ordinary else build(shape(**changes), whole_model(3))
    with pytest.raises(ValueError) as error:
        parallelize_tensors(model, tensor_mesh(), True)
    return str(error.value)


def refusals_of_three_ranks() -> list[str]:
    return [
        refused({}, ordinary=True),
        refused({"num_attention_heads": 4}),
        refused({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}),
        refused({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "intermediate_size": 47}),
        refused({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 2}),
    ]


def test_what_cannot_be_shared_is_refused_by_name() -> None:
    ordinary, heads, kv_heads, hidden, vocabulary = world.run(refusals_of_three_ranks, 3)[0]
    assert "Sequential cannot be cut over 3" in ordinary and "parallel.tp=1 works" in ordinary
    assert heads == "layers.0.attention.q: 4 units do not divide over 3 tensor-parallel ranks"
    assert kv_heads.startswith("layers.0.attention.k: 2 units")
    assert hidden.startswith("layers.0.mlp.gate: 47 units")
    assert vocabulary == "embedding: 2 units are fewer than 3 tensor-parallel ranks"


def failures_of_wrong_input() -> tuple[str, bool, bool]:
    """The error for 3 tokens, and whether tokens after and before the vocabulary fail on this rank."""
    model = decoder(shape(vocab_size=97))
    parallelize_tensors(model, tensor_mesh(), True)
    with pytest.raises(ValueError) as error:
        model(torch.zeros(1, 3, dtype=torch.int64), torch.arange(3)[None], None)
    vocabulary = model.embedding.vocabulary
    assert vocabulary is not None

    def fails(token: int) -> bool:
        row, _ = vocabulary.own(torch.tensor([token]))
        return not 0 <= int(row) < len(model.embedding.weight)

    return str(error.value), fails(97), fails(-1)


def test_tokens_that_do_not_divide_and_tokens_outside_the_vocabulary_fail() -> None:
    said = "sequence parallelism: a micro-batch of 3 tokens does not divide over 2 ranks"
    assert world.run(failures_of_wrong_input, 2) == [(said, False, True), (said, True, False)]


def evaluated(sequence: bool) -> float:
    model = CASES["all"].model()
    parallelize_tensors(model, tensor_mesh(), sequence)
    with torch.no_grad():
        return CASES["all"].run(model, CASES["all"].input()).item()


def test_without_gradients_the_loss_is_the_same() -> None:
    for sequence in (False, True):
        for loss in world.run(evaluated, 2, sequence):
            assert loss == pytest.approx(whole_registry("all")[0].item(), rel=1e-6)
