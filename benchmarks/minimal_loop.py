"""The peer of benchmarks/loop_overhead.py: a training loop as one would write it by hand, with torch only.

Same model, rows of the same shape, bf16, accumulation, gradient clipping and fused AdamW; DistributedDataParallel for
ZeRO 0, `fully_shard` for 1 to 3. No checkpoints, no metrics, no exact data: random windows of a token file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from stoker.conf.schema import Config, from_dict
from stoker.models.decoder import build
from stoker.parallel.model import whole_model
from stoker.trainer.runtime.process import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", help="a Stoker config as JSON")
    parser.add_argument("tokens", help="uint16 token file")
    parser.add_argument("out", help="where rank 0 writes the seconds of each step, as JSON")
    options = parser.parse_args()
    config: Config = from_dict(json.loads(Path(options.config).read_text()))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    keep_freed_memory()  # as a rank of Stoker does
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    torch.manual_seed(0)
    model = build(config.model, whole_model(config.model.num_hidden_layers)).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    cast = contextlib.nullcontext
    zero = config.parallel.zero
    if world == 1 or zero == 0:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model
        cast = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731
    else:
        # Inputs of blocks are in bf16 but for the tables of rotary embedding, which stay in fp32 as in Stoker.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(device.type, (world,))
        for block in model.layers.values():
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=zero == 3)
        net = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=zero == 3)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    tokens = np.memmap(options.tokens, np.uint16, "r")
    random = np.random.default_rng(rank)
    rank_rows, micro_rows, length = config.batch.size // world, config.batch.micro_size, config.seq_len
    positions = torch.arange(length, device=device).expand(micro_rows, length).contiguous()
    seconds = []
    for _ in range(config.steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        for start in range(0, rank_rows, micro_rows):
            last = start + micro_rows >= rank_rows
            if world > 1 and zero == 0:
                net.require_backward_grad_sync = last
            elif world > 1:
                net.set_requires_gradient_sync(last or zero > 1)
                net.set_reshard_after_backward(last or zero == 3)
                net.set_is_last_backward(last)
            starts = random.integers(0, len(tokens) - length - 1, micro_rows)
            window = np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)
            rows = torch.from_numpy(window).to(device)
            with cast():
                loss = net(rows[:, :-1].contiguous(), positions, None, rows[:, 1:].contiguous())
            (loss / (rank_rows * length)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        Path(options.out).write_text(json.dumps(seconds))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # gloo's threads now and then hang in the interpreter's teardown
