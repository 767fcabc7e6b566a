"""What the tests over every layout share: layouts, cases, and the comparison with one process.

The model is the decoder, with fewer kv heads than some tp, a vocabulary that no tp divides, documents of very unequal
length and, where dp is 4, a rank without a single valid token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch.distributed as dist

from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import mesh_over_default_group
from stoker.parallel.shards import GRADIENT, PARAMETER, Shard
from stoker.trainer.magnitudes import set_magnitudes
from stoker.trainer.parallelize import cut
from tests import world
from tests.extent import FULL
from tests.parallel.reference import VOCABULARY, Trace, assemble, global_rows, normwise, one_process, small_config

STEPS = 10
ROWS = 16


OPTIMIZERS = {
    "muon": OptimConfig(name="muon", lr=1e-3, momentum=0.95, eps=1e-6),
    "lamb": OptimConfig(name="lamb", lr=1e-3, betas=[0.9, 0.999], eps=1e-6),
    "lion": OptimConfig(name="lion", lr=1e-4, betas=[0.9, 0.99], weight_decay=1.0),
}


@dataclass(frozen=True)
class Case:
    """What varies over a layout: micro-batches, the schedule of its pipeline, the model and the optimizer."""

    micro: int
    schedule: str = "1f1b"
    tied: bool = False
    optimizer: str = "adamw"
    sequence: bool = True
    context: str = "gather"

    def config(self, layout: Layout, layers: int = 4) -> Config:
        model = ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            tie_word_embeddings=self.tied,
        )
        config = small_config(model=model, batch=BatchConfig(size=ROWS, micro_size=self.micro))
        config.data.document_mask = True
        # At lr 3e-3 rounding grows to 2e-5 within twenty steps; at 1e-3 it stays at 1e-7. A gradient that is only
        # rounding, 1e-9, would move its weight by lr at eps 1e-8, in a direction that the order of a sum decides.
        config.optim = OptimConfig(name="adamw", lr=1e-3, eps=1e-6)
        config.parallel = ParallelConfig(
            tp=layout.tp,
            pp=layout.pp,
            zero=layout.zero,
            dp_replicate=layout.dp_replicate,
            schedule=self.schedule,
            stages_per_rank=2 if self.schedule == "interleaved" else 1,
            sequence_parallel=self.sequence,
            cp=layout.cp,
            context=self.context,
        )
        if self.optimizer == "sgd":
            config.optim = OptimConfig(name="sgd", lr=0.1, momentum=0.9)
        elif self.optimizer in OPTIMIZERS:
            config.optim = replace(OPTIMIZERS[self.optimizer])
        return config


@dataclass(frozen=True)
class Measured:
    """What one rank saw of one case."""

    trace: Trace
    gradients: list[Shard]
    parameters: list[Shard]


def train(configs: list[Config], steps: int = STEPS) -> list[Measured]:
    """On a rank: every config, all of the same layout, from the start."""
    layout = layout_of(configs[0], dist.get_world_size())
    mesh = mesh_over_default_group(layout, world.device(), 60.0)
    found = []
    for config in configs:
        engine = cut(config, mesh, batch_plan(config, layout))
        if config.adapter.name == "dora":  # from rows of length 1 AdamW moves by 4e-5 for the order of sums alone
            set_magnitudes(config, engine.shards())
            engine.shards_written()
        trace, gradients = Trace(), []
        for step in range(1, steps + 1):
            first_row = (step - 1) * config.batch.size
            engine.forward_backward(global_rows(config, step)[mesh.dp_rank :: layout.dp], first_row)
            if step == 1:
                gradients = [replace(s, data=s.data.cpu()) for s in engine.gradient_shards()]
            result = engine.update(config.optim.lr).read()
            trace.losses.append(result.loss)
            trace.norms.append(result.grad_norm)
            trace.tokens.append(result.tokens)
        parameters = [replace(s, data=s.data.cpu().clone()) for s in engine.shards() if s.kind == PARAMETER]
        found.append(Measured(trace, gradients, parameters))
    return found


def factorisations(ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """(dp_replicate, dp_shard, tp, pp) of `ranks` ranks."""
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for sizes_of in itertools.product(sizes, repeat=4):
        if sizes_of[0] * sizes_of[1] * sizes_of[2] * sizes_of[3] == ranks:
            yield sizes_of


def layouts(ranks: int) -> Iterator[Layout]:
    """Every factorisation with every ZeRO stage: 1 to 3 where something is sharded, else 0."""
    for replicate, shard, tp, pp in factorisations(ranks):
        for zero in (1, 2, 3) if shard > 1 else (0,):
            yield Layout(replicate, shard, tp, pp, zero)


def cases(layout: Layout) -> list[Case]:
    """Every schedule with as few micro-batches as it takes and with more; tied or not and the optimizer take turns, so
    that all pairs occur.

    The ZeRO stage shifts the turns: what one layout leaves out another one takes. `FULL` is the whole product.
    """
    rows = ROWS // layout.dp
    schedules = ("1f1b", "gpipe", "interleaved") if layout.pp > 1 else ("1f1b",)
    found = []
    for turn, schedule in enumerate(schedules, layout.zero + layout.tp):
        stages = layout.pp * (2 if schedule == "interleaved" else 1)
        most = 8 if FULL else max(4, 2 * stages)  # with four there is one that is neither the first nor the last
        counts = [count for count in (8, 4, 2, 1) if rows % count == 0 and stages <= count <= most]
        for number, count in enumerate((counts[0], counts[-1])):
            optimizer = "sgd" if (turn + number) % 4 in (1, 2) else "adamw"
            case = Case(rows // count, schedule, tied=(turn + number) % 2 == 0, optimizer=optimizer)
            found += [case, replace(case, tied=not case.tied)] if FULL else [case]
    return found


@cache
def expected(tied: bool, optimizer: str, layers: int = 4) -> Trace:
    return one_process(Case(1, tied=tied, optimizer=optimizer).config(Layout(), layers), STEPS)


def assert_parity(layout: Layout, chosen: list[Case], layers: int = 4, device: str = "cpu") -> None:
    configs = [case.config(layout, layers) for case in chosen]
    measured = world.run(train, layout.world, configs, timeout=240.0, device=device)
    for case, ranks in zip(chosen, zip(*measured, strict=True), strict=True):
        wanted = expected(case.tied, case.optimizer, layers)
        tolerance = 1e-6 if case.optimizer in ("sgd", "lion") else 1e-4
        assert_same(f"{layout}, {case}", ranks, wanted, tolerance)


def assert_same(where: str, ranks: Sequence[Measured], wanted: Trace, tolerance: float) -> None:
    """`ranks` computed what one process did; `tolerance` of parameters, normwise."""
    import pytest  # a machine for `tests.gpu`, which trains with these cases, may have none

    assert all(rank.trace == ranks[0].trace for rank in ranks), f"{where}: ranks disagree about a step"
    trace = ranks[0].trace
    assert trace.tokens == wanted.tokens, where
    assert trace.losses == pytest.approx(wanted.losses, rel=1e-5), where
    assert trace.norms == pytest.approx(wanted.norms, rel=1e-5), where
    gradients = assemble([rank.gradients for rank in ranks], GRADIENT)
    parameters = assemble([rank.parameters for rank in ranks])
    assert gradients.keys() == wanted.gradients.keys(), where
    for name, value in wanted.gradients.items():
        assert normwise(gradients[name], value) < 1e-5, f"{where}: gradient of {name}"
    for name, value in wanted.parameters.items():
        assert normwise(parameters[name], value) < tolerance, f"{where}: {name}"


OF_EIGHT = [
    (Layout(2, 2, 2, 1, 3), Case(2, tied=True)),
    (Layout(1, 2, 2, 2, 2), Case(2, "1f1b", tied=True)),
    (Layout(2, 1, 2, 2, 0), Case(1, "gpipe", optimizer="sgd")),
    (Layout(1, 2, 2, 2, 3), Case(1, "interleaved", tied=True, optimizer="sgd")),
    (Layout(1, 2, 1, 4, 1), Case(2, "1f1b")),
    (Layout(1, 1, 4, 2, 0), Case(4, "interleaved", tied=True)),
]


def assert_every_case(layout: Layout) -> None:
    if layout.pp == 4:  # eight stages want eight layers, in which AdamW lets one process's own rounding grow past 1e-5
        assert_parity(layout, [case for case in cases(layout) if case.schedule != "interleaved"])
        deep = [replace(case, optimizer="sgd") for case in cases(layout) if case.schedule == "interleaved"]
        assert_parity(layout, deep, layers=8)
    else:
        assert_parity(layout, cases(layout))
