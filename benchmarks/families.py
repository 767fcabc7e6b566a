"""Tokens per second of a Llama in transformers' own modules, beside the decoder and beside accelerate, on this machine.

    python benchmarks/families.py [--ranks 2] [--rounds 7] [--steps 2] [--hidden-size 384] [--layers 6] [--patience 60]

A folder of random weights, written by transformers, is trained three ways: by the decoder (`model.init_from`), by
transformers' modules in Stoker (`model.native=false`), and by accelerate, which wraps transformers' model in torch's
DistributedDataParallel, with torch's fused AdamW. All three keep whole states on every rank (ZeRO 0), run in the same
processes in turn, on the same rows, and must compute the same losses and gradient norms first. Goals: transformers'
modules at least 0.8 of the decoder, and at least 1.0 of accelerate.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import Side, Stoker, Turn, batches, check_equal, compared, in_turn, run, steps_of, turn_of

from stoker.conf.compose import compose
from stoker.conf.schema import Config
from stoker.parallel.batch import Batch
from stoker.parallel.layout import batch_plan
from stoker.parallel.mesh import Mesh
from stoker.trainer.pretrained import adopt_shape, load_pretrained
from stoker.trainer.runtime.process import keep_freed_memory

GOALS = {"decoder": 0.8, "accelerate": 1.0}
VOCABULARY = 4096
LR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8, help="of the global batch")
    parser.add_argument("--micro", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for quiet CPUs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder), options)
        found = run(_measured, _config(folder, options, native=True), options.ranks, folder, options)[0]
    tokens = options.rows * options.seq_len
    print(f"{options.ranks} ranks, fp32, torch {torch.__version__}; median ratios of {options.rounds} rounds\n")
    print(
        "| transformers' modules: tokens/s | beside | its tokens/s | ratio (range) | goal | of CPU seconds | others |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    ours = found["transformers"]
    for peer, goal in GOALS.items():
        ratio, cpu, others = compared(ours, found[peer])
        cells = [_speed(ours, tokens), peer, _speed(found[peer], tokens), ratio, str(goal), cpu, others]
        print(f"| {' | '.join(cells)} |")


def _speed(turns: list[Turn], tokens: int) -> str:
    return f"{tokens / sorted(turn.seconds for turn in turns)[len(turns) // 2]:,.0f}"


def _write_model(folder: Path, options: argparse.Namespace) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=max(1, options.hidden_size // 192),
        intermediate_size=options.hidden_size * 8 // 3,
        max_position_embeddings=options.seq_len,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)


def _config(folder: str, options: argparse.Namespace, native: bool) -> Config:
    words = [
        f"model.init_from={folder}", f"model.native={str(native).lower()}", f"seq_len={options.seq_len}",
        f"batch.size={options.rows}", f"batch.micro_size={options.micro}", "precision=fp32", "parallel.zero=0",
        "data.document_mask=false", f"optim.lr={LR}", "optim.weight_decay=0",
    ]  # fmt: skip
    return adopt_shape(compose(words), words)


class _Begun(Stoker):
    """With the weights of the folder."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        load_pretrained(config, self.engine.shards())


class _Accelerate:
    """A loop as accelerate's documentation writes it."""

    def __init__(self, folder: str, config: Config, mesh: Mesh) -> None:
        ranks = {name: str(mesh.rank) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": str(mesh.layout.world)}
        os.environ |= {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # unused: the group exists
        from accelerate import Accelerator
        from transformers import AutoModelForCausalLM

        self._plan, self._clip = batch_plan(config, mesh.layout), config.grad_clip_norm or float("inf")
        self._accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self._plan.micro_batches)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        settings: dict[str, Any] = {"betas": config.optim.betas, "eps": config.optim.eps, "weight_decay": 0.0}
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True, **settings)
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        assert isinstance(self._model, torch.nn.parallel.DistributedDataParallel), "accelerate found no ranks"
        self._loss, self._norm = torch.zeros(()), torch.zeros(())

    def step(self, rows: Batch) -> None:
        loss = torch.zeros(())
        for first in range(0, len(rows.tokens), self._plan.micro_rows):
            part = rows[first : first + self._plan.micro_rows]
            with self._accelerator.accumulate(self._model):
                labels = dict.fromkeys(("labels", "shift_labels"), part.labels.contiguous())
                found = self._model(part.tokens, position_ids=part.positions, use_cache=False, **labels).loss
                self._accelerator.backward(found)
                loss += found.detach() / self._plan.micro_batches
                if self._accelerator.sync_gradients:
                    self._norm = self._accelerator.clip_grad_norm_(self._model.parameters(), self._clip)
                self._optimizer.step()
                self._optimizer.zero_grad()
        self._loss = loss

    def result(self) -> tuple[float, float]:
        mean = self._loss.clone()
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size(), float(self._norm)


def _measured(config: Config, mesh: Mesh, folder: str, options: argparse.Namespace) -> dict[str, list[Turn]]:
    keep_freed_memory()
    rows = batches(config, mesh)
    sides: dict[str, Side] = {
        "transformers": _Begun(_config(folder, options, native=False), mesh),
        "decoder": _Begun(config, mesh),
        "accelerate": _Accelerate(folder, config, mesh),
    }
    ours = sides["transformers"]
    for peer in GOALS:
        check_equal(_Begun(_config(folder, options, native=False), mesh), sides[peer], rows[0], config.precision)
    steps_of(ours, rows, 2)
    turns = [lambda side=side: turn_of(side, rows, options.steps, mesh.device) for side in sides.values()]
    return dict(zip(sides, in_turn(turns, options.rounds, options.patience, mesh), strict=True))


if __name__ == "__main__":
    main()
