"""Tokens per second under `parallel.engine=deepspeed`, beside a minimal DeepSpeed script and Stoker's engine.

    python benchmarks/deepspeed_engine.py [--ranks 2] [--zero 0 1 2 3] [--rounds 7] [--steps 2] [--precision bf16]

The peer follows DeepSpeed's tutorial: the same decoder from the same weights, `deepspeed.initialize`
with the same ZeRO stage, buckets, precision, fp32 accumulation, clipping and fused AdamW, `engine.backward` and
`engine.step`.
Only its ZeRO 0 in bf16 accumulates in bf16: it has no other. All three run in the same processes, in turns of some
steps, and must compute the same losses and gradient norms first. Ratios are medians over the rounds, with their range.
Memory is the worst rank's, of a separate run of each side: resident on CPUs, allocated on GPUs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import statistics
from typing import Any

import torch
import torch.distributed as dist
from ranks import (
    Side,
    Stoker,
    Turn,
    batches,
    check_equal,
    compared,
    in_turn,
    model_of,
    peak_mib,
    run,
    steps_of,
    turn_of,
)

from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.models.decoder import build
from stoker.parallel.batch import Batch
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.initialize import initialize
from stoker.parallel.layout import batch_plan
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import whole_model
from stoker.parallel.registry import LocalShard, whole_registry
from stoker.parallel.rules.settings import DECAYED
from stoker.parallel.shards import PARAMETER, whole
from stoker.trainer.runtime.process import keep_freed_memory

SMALL = ModelConfig(
    name="13M",
    vocab_size=4096,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    intermediate_size=1024,
)
GOAL = 0.97
COLUMNS = ("ZeRO", "stoker, tokens/s", "of a minimal DeepSpeed script", "goal", "of its CPU seconds")
COLUMNS += ("of engine=fsdp", "others' cores", "MiB per rank", "the script's MiB", "fsdp's MiB")


class Everyone:
    """The peer's `mpu`: all ranks are data parallel. Without one it would take ours, which DeepSpeed keeps for good."""

    def get_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def __init__(self, mesh: Mesh) -> None:
        self._alone = mesh.self_group()


class Script:
    """See `ranks.Side`: DeepSpeed as its tutorial has it."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        from stoker.parallel.deepspeed_engine.strategy import imported

        deepspeed = imported(mesh.device)
        self._plan, self._device, self._tokens = batch_plan(config, mesh.layout), mesh.device, config.seq_len
        model = build(config.model, whole_model(config.model.num_hidden_layers))
        registry, named = whole_registry(model), dict(model.named_parameters())
        for name, parameter in named.items():
            held = LocalShard((whole(tuple(parameter.shape)),))
            initialize(registry.shards(name, PARAMETER, held, parameter.detach()), model.initial, config.run.seed)
        roles = registry.roles()
        decayed = [p for n, p in named.items() if roles[n] in DECAYED]
        others = [p for n, p in named.items() if roles[n] not in DECAYED]
        groups = [
            {"params": decayed, "weight_decay": config.optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        betas = config.optim.betas[0], config.optim.betas[1]
        optimizer = torch.optim.AdamW(groups, config.optim.lr, betas, config.optim.eps, fused=True)
        zero = config.parallel.zero
        half = config.precision != "fp32"
        accumulates = config.precision if zero == 0 else "fp32"
        count = sum(parameter.numel() for parameter in named.values())
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self._plan.micro_rows,
            "gradient_accumulation_steps": self._plan.micro_batches,
            "gradient_clipping": config.grad_clip_norm or 0.0,
            "zero_allow_untested_optimizer": True,
            "data_types": {"grad_accum_dtype": accumulates},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": zero,
                "reduce_bucket_size": min(50_000_000, count),
                "overlap_comm": mesh.device.type == "cuda" and zero > 1,
            },
        }
        if half:
            settings[config.precision] = {"enabled": True}
        self._unit = Everyone(mesh)
        self._engine, *_ = deepspeed.initialize(
            model=model.to(PRECISIONS[config.precision]), optimizer=optimizer, mpu=self._unit, config=settings,
            dist_init_required=False,
        )  # fmt: skip
        self._loss = torch.zeros((), device=mesh.device)

    def step(self, rows: Batch) -> None:
        from deepspeed.utils import groups

        groups.mpu = self._unit
        rows = rows.to(self._device)
        size, engine = self._plan.micro_rows, self._engine
        self._loss = torch.zeros((), device=self._device)
        for start in range(0, len(rows), size):
            micro = rows[start : start + size]
            loss = engine(micro.tokens, micro.positions, None, micro.labels) / (size * self._tokens)
            engine.backward(loss)
            engine.step()
            self._loss += loss.detach() / self._plan.micro_batches

    def result(self) -> tuple[float, float]:
        loss = self._loss.clone()
        dist.all_reduce(loss)
        return loss.item() / dist.get_world_size(), float(self._engine.get_global_grad_norm() or float("nan"))


class OwnEngine(Stoker):
    """See `ranks.Side`: the same run under `parallel.engine=fsdp`."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        config = copy.deepcopy(config)
        config.parallel.engine = "fsdp"
        super().__init__(config, mesh)


SIDES: tuple[type[Side], ...] = (Stoker, Script, OwnEngine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--model", help="a model of conf/model; default: 13 million parameters for CPUs")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8, help="of the global batch")
    parser.add_argument("--micro", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    patience = 0.0 if torch.cuda.is_available() else 60.0
    parser.add_argument("--patience", type=float, default=patience, help="seconds to wait, per row, for quiet CPUs")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the runs for memory out")
    options = parser.parse_args()
    model = model_of(options.model) if options.model else SMALL
    model.vocab_size = model.vocab_size or 50304
    print(
        f"{model.name}, {options.ranks} ranks, {options.rows} rows of {options.seq_len} tokens, micro-batches of",
        end=" ",
    )
    print(f"{options.micro}, {options.precision}; {options.rounds} rounds of {options.steps} steps\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|", flush=True)
    for zero in options.zero:
        config = Config(
            model=copy.deepcopy(model),
            batch=BatchConfig(options.rows, options.micro),
            seq_len=options.seq_len,
            parallel=ParallelConfig(zero=zero, engine="deepspeed"),
            optim=OptimConfig(lr=1e-4),
            precision=options.precision,
        )
        print(_row(config, options), flush=True)


def _row(config: Config, options: argparse.Namespace) -> str:
    ours, script, own = run(_in_turn, config, options.ranks, options.rounds, options.steps, options.patience)[0]
    memory = [f"{max(run(_memory, config, options.ranks, side)):,.0f}" if options.memory else "-" for side in SIDES]
    tokens = config.batch.size * config.seq_len
    speed = f"{tokens / statistics.median(turn.seconds for turn in ours):,.0f}"
    ratio, cpu_ratio, others = compared(ours, script)
    cells = [config.parallel.zero, speed, ratio, GOAL, cpu_ratio, compared(ours, own)[0], others, *memory]
    return f"| {' | '.join(map(str, cells))} |"


def _in_turn(config: Config, mesh: Mesh, rounds: int, steps: int, patience: float) -> list[list[Turn]]:
    keep_freed_memory()
    sides = [side(config, mesh) for side in SIDES]  # type: ignore[call-arg]
    rows = batches(config, mesh)
    # DeepSpeed's ZeRO 0 returns no norm in fp32, and rounds more in bf16.
    peer, other = (sides[1], sides[2]) if config.parallel.zero else (sides[2], sides[1])
    check_equal(sides[0], peer, rows[0], config.precision)
    steps_of(other, rows, 3)
    gc.freeze()
    turns = [functools.partial(turn_of, side, rows, steps, mesh.device) for side in sides]
    return in_turn(turns, rounds, patience, mesh)


def _memory(config: Config, mesh: Mesh, build: Any) -> float:
    if build is not Script:
        keep_freed_memory()
    return peak_mib(build, config, mesh)


if __name__ == "__main__":
    main()
