"""A step of a model with experts over ranks, beside a loop written by hand over the same grouped products.

    python benchmarks/moe.py [--ranks 2 4] [--dispatchers alltoall allgather] [--rounds 7] [--steps 2] ...

Every rank is in one expert group (`parallel.ep` = ranks), at ZeRO 0. Beside Stoker run, in the same processes and in
turns of some steps, from the same weights:

- grouped: one all-to-all each way, a grouped product of all experts, one all-reduce of the other gradients, fused AdamW
- looped: the same with a loop over the experts of a rank
- without messages: Stoker, with tokens that stay where they are; what its step is shorter by is communication that
  nothing hides.

Both peers must compute the same losses and gradient norms first. Ratios are medians over the rounds, with their range.
Goal: at least 1.0 of the grouped loop.
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
import torch.nn.functional as F
from peers import _initialised as initialised
from ranks import Stoker, Turn, batches, check_equal, compared, in_turn, run, turn_of
from torch import Tensor, nn

from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.parallel.batch import Batch
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.experts import dispatch
from stoker.parallel.layout import batch_plan
from stoker.parallel.mesh import Mesh
from stoker.trainer.runtime.process import keep_freed_memory

MODEL = ModelConfig(
    name="experts",
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=512,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
)
COLUMNS = ("ranks", "dispatcher", "tokens/s", "of grouped (range)", "of looped (range)", "of CPU seconds of grouped")
COLUMNS += ("exposed communication", "others' cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--dispatchers", nargs="*", default=["alltoall", "allgather"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--experts", type=int, default=MODEL.num_experts)
    parser.add_argument("--hidden-size", type=int, default=MODEL.hidden_size)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16, help="of the global batch")
    parser.add_argument("--micro", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait, per row, for quiet CPUs")
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|", flush=True)
    for ranks in options.ranks:
        for dispatcher in options.dispatchers:
            config = Config(
                model=copy.deepcopy(MODEL),
                batch=BatchConfig(options.rows, options.micro),
                seq_len=options.seq_len,
                parallel=ParallelConfig(zero=0, ep=ranks, token_dispatcher=dispatcher),
                optim=OptimConfig(lr=1e-4),
                precision=options.precision,
                compile=False,
            )
            config.model.num_experts, config.model.hidden_size = options.experts, options.hidden_size
            print(_row(config, ranks, options), flush=True)


def _row(config: Config, ranks: int, options: argparse.Namespace) -> str:
    measured = run(_measured, config, ranks, options.rounds, options.steps, options.patience)[0]
    ours, grouped, looped, silent = measured
    of_grouped, of_cpu, others = compared(ours, grouped)
    exposed = [1 - quiet.seconds / turn.seconds for turn, quiet in zip(ours, silent, strict=True)]
    speed = config.batch.size * config.seq_len / statistics.median(turn.seconds for turn in ours)
    share = f"{statistics.median(exposed):.1%} of the step"
    cells = [ranks, config.parallel.token_dispatcher, f"{speed:,.0f}", of_grouped, compared(ours, looped)[0], of_cpu]
    return f"| {' | '.join(map(str, [*cells, share, others]))} |"


def _measured(config: Config, mesh: Mesh, rounds: int, steps: int, patience: float) -> list[list[Turn]]:
    keep_freed_memory()
    ours, rows = Stoker(config, mesh), batches(config, mesh)
    peers = [ByHand(config, mesh, loops) for loops in (False, True)]
    check_equal(ours, peers[0], rows[0], config.precision)
    for _ in range(3):  # as often as the other peer
        peers[1].step(rows[0])
    gc.freeze()
    turns = [functools.partial(turn_of, side, rows, steps, mesh.device) for side in (ours, *peers)]
    return in_turn([*turns, functools.partial(_silent, turns[0])], rounds, patience, mesh)


def _silent(turn: Any) -> Turn:
    """A turn whose tokens are exchanged with nobody: as many rows, and the same work."""
    names = ("_all_to_all", "all_gather", "reduce_scatter")
    before = {name: getattr(dispatch, name) for name in names}
    dispatch._all_to_all = lambda x, *_: x  # type: ignore[assignment]
    dispatch.all_gather = lambda x, _, size: x.repeat(size, *[1] * (x.dim() - 1))  # type: ignore[assignment]
    dispatch.reduce_scatter = lambda x, _, size: x.chunk(size)[0].contiguous()  # type: ignore[assignment]
    try:
        return turn()
    finally:
        for name, function in before.items():
            setattr(dispatch, name, function)


class ByHand:
    """See `ranks.Side`: fp32 masters, a compute copy, gradients summed in fp32."""

    def __init__(self, config: Config, mesh: Mesh, loops: bool) -> None:
        self._config, self._plan, self._world = config, batch_plan(config, mesh.layout), mesh.layout.world
        self.net = net = initialised(config)
        experts: set[nn.Parameter] = set()
        for block in net.layers.values():
            block.mlp.experts = _Experts(block.mlp.experts, mesh.rank, self._world, loops)
            experts |= set(block.mlp.experts.parameters())
        self._parameters = list(net.parameters())
        self._masters = [nn.Parameter(p.detach().clone()) for p in self._parameters]
        net.to(PRECISIONS[config.precision])
        self._dense = [n for n, p in enumerate(self._parameters) if p not in experts]
        self._mine = [n for n, p in enumerate(self._parameters) if p in experts]
        optim = config.optim
        decayed = {id(m) for m in self._masters if m.dim() > 1} - {id(self._masters[0])}  # not the embedding
        groups = [
            {"params": [m for m in self._masters if (id(m) in decayed) == decay], "weight_decay": rate}
            for decay, rate in ((True, optim.weight_decay), (False, 0.0))
        ]
        self._optimizer = torch.optim.AdamW(groups, optim.lr, (optim.betas[0], optim.betas[1]), optim.eps, fused=True)
        self._loss, self._norm = torch.zeros(()), torch.zeros(())

    def step(self, rows: Batch) -> None:
        size, self._loss = self._plan.micro_rows, torch.zeros(())
        for master in self._masters:
            master.grad = torch.zeros_like(master)
        for start in range(0, len(rows), size):
            micro = rows[start : start + size]
            loss = self.net(micro.tokens, micro.positions, None, micro.labels)
            loss = loss / (rows.labels.numel() * self._world)
            loss.backward()
            self._loss += loss.detach()
            torch._foreach_add_([m.grad for m in self._masters], [p.grad for p in self._parameters])
            self.net.zero_grad()
        gradients = [m.grad for m in self._masters]
        dense = [gradients[n] for n in self._dense]
        flat = torch.cat([gradient.flatten() for gradient in dense])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in dense])
        torch._foreach_copy_(dense, [part.view_as(gradient) for part, gradient in zip(parts, dense, strict=True)])
        squares = torch.stack(torch._foreach_norm([gradients[n] for n in self._mine])).square().sum()
        dist.all_reduce(squares)
        self._norm = (squares + flat.square().sum()).sqrt()
        torch._foreach_mul_(gradients, ((self._config.grad_clip_norm or 1e9) / (self._norm + 1e-6)).clamp(max=1.0))
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._masters)

    def result(self) -> tuple[float, float]:
        loss = self._loss.clone()
        dist.all_reduce(loss)
        return loss.item(), self._norm.item()


class _Experts(nn.Module):
    """A rank's experts, as in a dozen lines of torch."""

    def __init__(self, whole: Any, rank: int, size: int, loops: bool) -> None:
        super().__init__()
        self.num, self.size, self.own, self.loops = whole.num, size, whole.num // size, loops
        mine = slice(rank * self.own, (rank + 1) * self.own)
        self.gate_up = nn.Parameter(whole.gate_up_proj.detach()[mine].clone())
        self.down = nn.Parameter(whole.down_proj.detach()[mine].clone())

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        flat, k = chosen.flatten(), chosen.shape[1]
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.size * self.own)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        sent = counts.view(self.size, -1).sum(1).tolist()
        taken = received.view(self.size, -1).sum(1).tolist()
        rows = _Exchange.apply(x[order // k], taken, sent)
        to = torch.arange(self.own).repeat(self.size).repeat_interleave(received).argsort(stable=True)
        results = self._compute(rows[to], received.view(self.size, -1).sum(0))
        results = _Exchange.apply(torch.empty_like(results).index_copy(0, to, results), sent, taken)
        weighted = results * weights.flatten()[order][:, None].to(results.dtype)
        return torch.zeros_like(x).index_add(0, order // k, weighted)

    def _compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        if self.loops:
            found = []
            for part, gate_up, down in zip(rows.split(counts.tolist()), self.gate_up, self.down, strict=True):
                gate, up = (part @ gate_up.T).chunk(2, dim=-1)
                found.append((F.silu(gate) * up) @ down.T)
            return torch.cat(found)
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: list[int], sent: list[int]) -> Tensor:
        ctx.splits = (sent, taken)
        out = x.new_empty(sum(taken), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), taken, sent)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        sent, taken = ctx.splits
        out = gradients[0].new_empty(sum(sent), gradients[0].shape[1])
        dist.all_to_all_single(out, gradients[0].contiguous(), sent, taken)
        return out, None, None


if __name__ == "__main__":
    main()
