"""What the optimizer does to local parts, what it must be able to see, and what building it costs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig
from stoker.conf.values import ConfigError
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.model import Role
from stoker.parallel.optimizer import SGD, AdamW, LocalOptimizer
from stoker.parallel.optimizer_needs import declared_needs, needs_wholes, undeclared
from stoker.parallel.shards import PARAMETER, Shard
from stoker.parallel.update import StepFlags
from stoker.trainer.parallelize import cut
from stoker.trainer.validate import validate
from tests import world
from tests.parallel.conformance import train
from tests.parallel.reference import assemble, global_rows, normwise, small_config

HERE = "tests.parallel.optimizers"
ONE, NOT_FOUND = torch.ones(()), torch.zeros(())


@pytest.mark.parametrize(("kind", "own"), [(torch.optim.AdamW, AdamW), (torch.optim.SGD, SGD)])
def test_without_marks_for_the_compiler_a_step_is_the_one_of_torch(
    kind: type[torch.optim.Optimizer], own: type[torch.optim.Optimizer]
) -> None:
    results = []
    for build in (kind, own):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = build([parameter], lr=0.1)  # type: ignore[call-arg]
        seen: list[object] = []
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        for _ in range(3):
            parameter.grad = parameter.detach() ** 2
            optimizer.step()
        assert seen == [True] * 3 and parameter.is_leaf
        results.append(parameter.detach())
    assert torch.equal(*results) and own.__name__ == kind.__name__
    parameter.grad = torch.ones(7)
    assert optimizer.step(lambda: torch.is_grad_enabled()) is True
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 2


def optimizer_of(config: OptimConfig, tensors: dict[str, Tensor]) -> LocalOptimizer:
    """Over `tensors`, whose values are kept: building one leaves zeros for initial weights to fill."""
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    roles = {name: Role.MATRIX if tensor.dim() > 1 else Role.VECTOR for name, tensor in tensors.items()}
    built = LocalOptimizer(config, tensors, roles)
    for name, tensor in tensors.items():
        tensor.copy_(kept[name])
    return built


def test_decay_is_decoupled_with_momentum_too() -> None:
    """By hand: w <- w (1 - lr d), v <- m v + g, w <- w - lr v. A decay inside v would be multiplied by 1 / (1 - m)."""
    config = OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.5)
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
    wanted, velocity = [weight.double(), bias.double()], [torch.zeros(4, 3).double(), torch.zeros(3).double()]
    optimizer = optimizer_of(config, {"weight": weight, "bias": bias})
    for lr in (0.1, 0.1, 0.05, 0.02):
        gradients = [torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)]
        for n, decay in enumerate((0.5, 0.0)):
            velocity[n] = 0.9 * velocity[n] + gradients[n].double() / 4
            wanted[n] = wanted[n] * (1 - lr * decay) - lr * velocity[n]
        optimizer.step(dict(zip(("weight", "bias"), gradients, strict=True)), lr, 4 * ONE, NOT_FOUND)
    assert normwise(weight, wanted[0]) < 1e-6 and normwise(bias, wanted[1]) < 1e-6


def test_a_step_that_is_left_out_decays_nothing() -> None:
    weight = torch.randn(4, 3)
    before, optimizer = weight.clone(), optimizer_of(OptimConfig(name="sgd", weight_decay=0.5), {"weight": weight})
    optimizer.step({"weight": torch.full((4, 3), torch.inf)}, 0.1, ONE, ONE)
    assert torch.equal(weight, before)


def test_a_state_that_is_made_before_the_first_step_is_that_of_one_that_is_not() -> None:
    """Rprop keeps its first learning rate in its state."""
    theirs = torch.randn(4, 3)
    ours, gradient = theirs.clone(), torch.randn(4, 3)
    optimizer = optimizer_of(OptimConfig(target=f"{HERE}:rprop", lr=0.1), {"weight": ours})
    plain = torch.nn.Parameter(theirs)
    reference = torch.optim.Rprop([plain], lr=0.1)
    for _ in range(3):
        plain.grad = gradient.clone()
        reference.step()
        optimizer.step({"weight": gradient.clone()}, 0.1, ONE, NOT_FOUND)
    assert torch.equal(ours, plain.detach())


@pytest.mark.parametrize(
    ("target", "needs"),
    [
        (None, "elementwise"),
        ("torch.optim:AdamW", "elementwise"),
        ("torch.optim:SGD", "elementwise"),
        ("deepspeed.ops.adam:DeepSpeedCPUAdam", "elementwise"),
        ("deepspeed.ops.lamb:FusedLamb", None),
        ("tests.toy:adamw_without_kernels", "elementwise"),
        (f"{HERE}:rprop", "elementwise"),
        (f"{HERE}:Lion", "elementwise"),
        (f"{HERE}:DeclaredLamb", "norms"),
        (f"{HERE}:declared_muon", "matrix"),
        (f"{HERE}:Lamb", None),
        (f"{HERE}:muon", None),
        (f"{HERE}:OwnAdam", None),
        ("torch.optim:Adafactor", None),
    ],
)
def test_what_an_optimizer_needs_is_declared_or_known_by_its_class(target: str | None, needs: str | None) -> None:
    assert declared_needs(OptimConfig(target=target)) == needs
    for given in ("elementwise", "norms", "matrix"):
        if target is not None:
            assert declared_needs(OptimConfig(target=target, needs=given)) == given


def config_with(target: str, layout: Layout, needs: str | None = None) -> Config:
    config = small_config(batch=BatchConfig(size=8, micro_size=2))
    config.optim = OptimConfig(target=f"{HERE}:{target}", lr=1e-3, needs=needs)
    config.parallel.zero, config.parallel.tp, config.parallel.pp = layout.zero, layout.tp, layout.pp
    config.parallel.engine = layout.engine
    return config


DIVIDED = [
    (Layout(1, 2, zero=1), "parallel.zero=0"),
    (Layout(1, 2, zero=3), "parallel.zero=0"),
    (Layout(1, 1, 2), "parallel.tp=1"),
    (Layout(1, 1, 1, 2), "parallel.pp=1"),
    (Layout(1, 2, 2, 1, 2), "parallel.zero=0 parallel.tp=1"),
    (Layout(2, engine="deepspeed"), "parallel.engine=fsdp"),
]


@pytest.mark.parametrize(("layout", "advice"), DIVIDED, ids=str)
def test_what_declares_nothing_is_refused_where_anything_is_divided(layout: Layout, advice: str) -> None:
    for target in ("Lamb", "muon"):
        with pytest.raises(ConfigError) as error:
            validate(config_with(target, layout), layout.world, 0)
        message = str(error.value)
        assert (
            "does not declare what it needs" in message and f"{advice} works" in message and "optim.needs=" in message
        )
        validate(config_with(target, layout, "elementwise"), layout.world, 0)
    validate(config_with("Lion", layout), layout.world, 0)


@pytest.mark.parametrize(
    ("target", "layout", "wholes"),
    [
        ("DeclaredLamb", Layout(1, 2, zero=1), True),
        ("DeclaredLamb", Layout(1, 1, 2), True),
        ("declared_muon", Layout(1, 2, zero=2), True),
        ("declared_muon", Layout(2, engine="deepspeed"), True),
        ("DeclaredLamb", Layout(1, 1, 1, 2), False),
        ("declared_muon", Layout(2), False),
        ("Lion", Layout(1, 2, zero=1), False),
        ("Lamb", Layout(2), False),
    ],
)
def test_norms_and_matrices_are_given_whole_only_where_they_are_divided(
    target: str, layout: Layout, wholes: bool
) -> None:
    config = config_with(target, layout)
    assert undeclared(config, layout) is None and needs_wholes(config.optim, layout) is wholes


def test_declarations_that_are_none_are_refused() -> None:
    two = Layout(1, 2, zero=1)
    for target, said in (("NotAnOption", "needs='luck'"), ("missing", "has no 'missing'"), ("muon", "TypeError")):
        config = config_with(target, two)
        config.optim.args = {"unknown": 1} if target == "muon" else {}
        with pytest.raises(ConfigError, match=said):
            validate(config, 2, 0)
    config = small_config(parallel=config.parallel)
    config.optim.needs = "norms"
    with pytest.raises(ConfigError, match=r"leave optim\.needs out, it is for optim\.target"):
        validate(config, 2, 0)


def test_the_engine_refuses_what_the_launcher_did_not_check() -> None:
    with pytest.raises(AssertionError, match="does not declare what it needs"):
        world.run(train, 2, config_with("Lamb", Layout(1, 2, zero=1)))


def kinds_of(ranks: list[list[Shard]]) -> set[str]:
    return {shard.kind for shards in ranks for shard in shards}


@pytest.mark.parametrize(
    ("target", "layouts"),
    [
        ("Lion", [Layout(1, 2, zero=3)]),
        ("DeclaredLamb", [Layout(2), Layout(1, 2, zero=1), Layout(tp=2)]),
        ("declared_muon", [Layout(1, 2, zero=2)]),
    ],
)
def test_what_is_accepted_trains_as_one_process(target: str, layouts: list[Layout]) -> None:
    (_, alone) = world.run(train, 1, config_with(target, Layout()), "fsdp", 4)[0]
    wanted = {kind: assemble([alone], kind) for kind in kinds_of([alone])}
    for layout in layouts:
        ranks = [shards for _, shards in world.run(train, 2, config_with(target, layout), "fsdp", 4)]
        assert kinds_of(ranks) == wanted.keys()
        for kind, tensors in wanted.items():
            found = assemble(ranks, kind)
            # Signs of gradients that are nearly zero differ, and Muon multiplies in bf16.
            for name, value in tensors.items():
                assert normwise(found[name], value) < (2e-3 if target == "Lion" or kind != PARAMETER else 1e-3), name


class Allocated(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def _freed(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, Tensor) and value.device.type == "cpu":
                storage = value.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result


def memory(config: Config) -> tuple[float, float]:
    """Peak bytes per parameter of building, without initial weights, and of the optimizer's part of training."""
    layout = layout_of(config, dist.get_world_size())
    mesh = mesh_over_default_group(layout, torch.device("cpu"), 60.0)
    gc.collect()
    with Allocated() as allocated:
        engine = cut(config, mesh, batch_plan(config, layout))
        built = allocated.most
        engine.forward_backward(global_rows(config, 1)[mesh.dp_rank :: mesh.layout.dp])
        engine.update(1e-3).read()
    parameters = sum(shard.data.numel() for shard in engine.shards() if shard.kind == "param")
    return built / parameters, allocated.most / parameters


def test_building_takes_no_more_memory_than_training() -> None:
    """Parameters, gradients and two moments of 4 bytes, and 2 to compute with."""
    config = small_config(precision="bf16", batch=BatchConfig(size=2, micro_size=1), optim=OptimConfig(name="adamw"))
    config.model = ModelConfig(target="tests.toy:build", vocab_size=64, hidden_size=512, num_hidden_layers=6)
    ((built, trained),) = world.run(memory, 1, config)
    assert built <= trained
    assert built < 18 * 1.1, f"{built:.1f} bytes a parameter"


def spiked() -> tuple[list[float], list[bool], list[float]]:
    """Loss scales of fp16 steps: an ordinary one, one above a ceiling, one without labels, one that overflows."""
    config = small_config(precision="fp16", batch=BatchConfig(size=8))
    mesh = mesh_over_default_group(Layout(), torch.device("cpu"), 60.0)
    engine = cut(config, mesh, batch_plan(config, Layout()))
    engine.load_state({"step": 0.0, "loss_scale": 1024.0})
    scales, skipped, counts = [], [], []
    for number, said in enumerate(
        (StepFlags(), StepFlags(loss_ceiling=1e-3), StepFlags(norm_ceiling=1e-6), StepFlags(), StepFlags()), 1
    ):
        rows = global_rows(config, number)
        if number == 4:
            rows.labels.fill_(-100)
        if number == 5:
            engine.load_state({"step": 1.0, "loss_scale": 2.0**40, "loss_scale_updates": 1.0})
        engine.forward_backward(rows)
        skipped.append(engine.update(1e-3, said).read().skipped)
        scales.append(engine.state()["loss_scale"])
        counts.append(engine.state()["loss_scale_updates"])
    return scales, skipped, counts


def test_only_an_overflow_lowers_the_loss_scale() -> None:
    ((scales, skipped, counts),) = world.run(spiked, 1)
    assert skipped == [False, True, True, True, True]
    assert scales == [1024.0] * 4 + [2.0**39]
    assert counts == [1.0, 1.0, 1.0, 1.0, 0.0]
