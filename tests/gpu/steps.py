"""Steps that build an engine, in this process or on ranks of `tests.world`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stoker.checkpoint.staging import Snapshot, StagingPool
from stoker.conf.schema import BatchConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from stoker.parallel.batch import Batch
from stoker.parallel.devices import backend_of, gpu_of, order_kernels, pick_device, set_exactness
from stoker.parallel.engine import Engine
from stoker.parallel.layout import Layout, batch_plan, layout_of
from stoker.parallel.mesh import Mesh, start_mesh, stop_mesh
from stoker.parallel.shards import GRADIENT
from stoker.parallel.tensor.float8 import SLOT, Float8, refuse_device
from stoker.parallel.tensor.layers import ColumnLinear
from stoker.trainer.parallelize import cut
from stoker.trainer.runtime.compiled import compiled_folder, remove_unfinished_builds
from tests import world
from tests.parallel.parity import Case, expected, train
from tests.parallel.reference import assemble, normwise

LIMIT = 1e-5  # of losses, norms and gradients in fp32
world.CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "stoker.parallel.sharded"])  # no more


def card(device: str, _: Path) -> dict[str, Any]:
    """Names and versions, and the ceilings of matrix products and copies, beside which all else is judged."""
    place = pick_device(device, 0)
    on_gpu = place.type == "cuda"
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": gpu_of(place)}
    if on_gpu:
        properties = torch.cuda.get_device_properties(place)
        found |= {"name": properties.name, "memory": properties.total_memory, "nccl": list(torch.cuda.nccl.version())}
    size = 8192 if on_gpu else 512
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
        found[f"matmul {name}"] = 2 * size**3 / seconds(lambda a=a, b=b: torch.mm(a, b), place) / 1e12
    there = torch.zeros(1 << (28 if on_gpu else 22), dtype=torch.uint8, device=place)
    here = torch.zeros(there.shape, dtype=torch.uint8, pin_memory=on_gpu)
    copies = {"to the host": (here, there), "from the host": (there, here), "on the device": (there.clone(), there)}
    for way, (target, source) in copies.items():
        took = seconds(lambda t=target, s=source: t.copy_(s, non_blocking=True), place)
        found[f"copy {way}"] = there.nbytes / took / 2**30
    assert all(value > 0 for name, value in found.items() if name.startswith(("matmul", "copy")))
    name = found.get("name", "CPU")
    summary = f"{name}, torch {torch.__version__}: {found['matmul bf16']:.3g} TFLOP/s in bf16"
    return {"summary": f"{summary}, {found['copy to the host']:.1f} GiB/s to the host", **found}


def one_rank(device: str, _: Path) -> dict[str, Any]:
    """One rank, over NCCL on a GPU, against plain torch on the CPU: losses, norms and gradients in fp32."""
    cases = [Case(8), Case(4, tied=True), Case(16, optimizer="sgd")]
    return {"summary": _compared(Layout(), cases, device, None)}


def ranks_on_one_card(device: str, _: Path) -> dict[str, Any]:
    """Two and four ranks that share the card over gloo: ZeRO 1 and 3, tensor parallelism."""
    layouts = [Layout(1, 2, zero=1), Layout(1, 2, zero=3), Layout(tp=2), Layout(1, 2, 2, zero=3)]
    lines = [f"{layout}: {_compared(layout, [Case(2, tied=True)], device, 'gloo')}" for layout in layouts]
    return {"summary": f"{len(lines)} layouts compute the same run", "layouts": lines}


def _compared(layout: Layout, cases: Sequence[Case], device: str, backend: str | None) -> str:
    """The worst relative difference. Raises AssertionError above LIMIT."""
    configs = [case.config(layout) for case in cases]
    ranks = world.run(train, layout.world, configs, 3, timeout=80.0, device=device, backend=backend)
    worst = 0.0
    for number, case in enumerate(cases):
        wanted = expected(case.tied, case.optimizer)
        measured = [rank[number] for rank in ranks]
        gradients = assemble([rank.gradients for rank in measured], GRADIENT)
        assert gradients.keys() == wanted.gradients.keys()
        found = [normwise(gradients[name], value) for name, value in wanted.gradients.items()]
        for own, theirs in ((measured[0].trace.losses, wanted.losses), (measured[0].trace.norms, wanted.norms)):
            found += [abs(a - b) / abs(b) for a, b in zip(own, theirs, strict=False)]
        worst = max(worst, *found)
        assert worst < LIMIT, f"{layout}, {case}: differs by {worst:.1e}, limit {LIMIT}"
    return f"within {worst:.1e}, limit {LIMIT}"


class OneRank:
    """An engine on this process alone."""

    def __init__(self, config: Config, device: str) -> None:
        set_exactness(config.deterministic)
        place = pick_device(device, 0)
        order_kernels(place)
        layout = layout_of(config, 1)
        self.config = config
        self.mesh: Mesh = start_mesh(layout, place, dist.HashStore(), 0, 600.0, backend_of(None, place))
        self.engine: Engine = cut(config, self.mesh, batch_plan(config, layout))

    def __enter__(self) -> OneRank:
        return self

    def __exit__(self, *_: object) -> None:
        stop_mesh()

    def step(self) -> Any:
        self.engine.forward_backward(self.rows())
        return self.engine.update(1e-4)

    def rows(self) -> Batch:
        assert self.config.model.vocab_size is not None
        shape = (self.config.batch.size, self.config.seq_len)
        tokens = torch.randint(self.config.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        positions = torch.arange(shape[1]).expand(shape).contiguous()
        documents = (positions // 24).int()
        batch = Batch(tokens, tokens.roll(-1, 1), positions, documents)
        return batch.pin() if self.mesh.device.type == "cuda" else batch


def _config(device: str, **changes: Any) -> Config:
    """A model that a GPU takes milliseconds for, and a CPU too."""
    width = 1024 if device == "cuda" else 64
    model = ModelConfig(
        vocab_size=32_000 if device == "cuda" else 256,
        hidden_size=width,
        num_hidden_layers=8 if device == "cuda" else 2,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        intermediate_size=3 * width,
    )
    length = 2048 if device == "cuda" else 48
    config = Config(model=model, batch=BatchConfig(4, 2), seq_len=length, parallel=ParallelConfig(zero=0))
    config.optim, config.compile, config.data.document_mask = OptimConfig(lr=1e-4), False, False
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def host_syncs(device: str, _: Path) -> dict[str, Any]:
    """Five steps in which nothing may make the host wait for the device; results are read a step late, outside."""
    found: list[str] = []
    for precision in ("bf16", "fp16") if device == "cuda" else ("bf16",):
        with OneRank(_config(device, precision=precision), device) as rank:
            rank.step().read()
            rank.step().read()
            for _ in range(5):
                found += _syncs_of(rank, device)
    assert not found, f"{len(found)} calls wait for the device: {found[0]}"
    return {"summary": "0 in 5 steps", "found": found}


def _syncs_of(rank: OneRank, device: str) -> list[str]:
    if device == "cpu":
        from tests.parallel.watching import Syncs

        with Syncs() as syncs:
            rank.step()
        return syncs.found
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            rank.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}: {w.message}" for w in caught if "synchroniz" in str(w.message)]


def compiled(device: str, _: Path) -> dict[str, Any]:
    """Compilation with each kind of activation checkpointing, with and without documents: as eager, never twice."""
    from torch._dynamo.utils import counters

    remove_unfinished_builds(compiled_folder())  # of a step that was killed before
    modes = ("none", "selective", "full") if device == "cuda" else ("selective",)
    found: dict[str, Any] = {}
    for mode in modes:
        for documents in (False, True) if device == "cuda" else (False,):
            losses = []
            for compiles in (False, True):
                torch._dynamo.reset()
                config = _config(device, activation_checkpointing=mode, compile=compiles)
                config.data.document_mask = documents
                with OneRank(config, device) as rank:
                    losses.append([rank.step().read().loss for _ in range(2)])
                    before = counters["stats"]["unique_graphs"]
                    losses[-1].append(rank.step().read().loss)
                    again = counters["stats"]["unique_graphs"] - before
                    assert again == 0, f"{mode}, documents {documents}: {again} graphs were compiled in the third step"
            worst = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
            assert worst < 5e-3, f"{mode}, documents {documents}: differs from eager by {worst:.1e}"
            found[f"{mode}, {'documents' if documents else 'no documents'}"] = worst
    return {"summary": f"{len(found)} combinations, within {max(found.values()):.1e} of eager", "differences": found}


def kernels(device: str, _: Path) -> dict[str, Any]:
    """The twenty kernels that take the most time of a step."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with OneRank(_config(device), device) as rank:
        rank.step().read()
        with profile(activities=activities) as trace:
            rank.step().read()

    def cost(e: Any) -> float:
        return getattr(e, "self_device_time_total" if device == "cuda" else "self_cpu_time_total")

    events = sorted(trace.key_averages(), key=cost, reverse=True)[:20]
    total = sum(cost(event) for event in trace.key_averages())
    assert total > 0, "the profiler saw no kernel"
    listed = [f"{cost(event) / total:.1%} {event.key} x {event.count}" for event in events]
    print("\n".join(listed), flush=True)
    return {"summary": f"first: {listed[0]}", "kernels": listed}


def offload_and_staging(device: str, _: Path) -> dict[str, Any]:
    """Seconds and memory of a step with offloaded parameters, and of a snapshot into the staging pool."""
    found: dict[str, Any] = {}
    for offload in ("none", "cpu"):
        config = _config(device)
        config.parallel.offload = offload
        with OneRank(config, device) as rank:
            loss = [rank.step().read().loss for _ in range(2)][-1]
            found[f"step, offload {offload}"] = seconds(lambda rank=rank: rank.step().read(), rank.mesh.device)
            if device == "cuda":
                found[f"memory, offload {offload}"] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            found[f"loss, offload {offload}"] = loss
            shards = rank.engine.shards()
            pool = StagingPool()
            plan = pool.prepare(shards)
            began = time.perf_counter()
            for window in pool.fill(shards, Snapshot(shards)):
                size = len(window)
            found[f"staging, offload {offload}"] = plan.file_bytes / (time.perf_counter() - began) / 2**30
            assert size == plan.file_bytes
    differs = abs(found["loss, offload none"] - found["loss, offload cpu"]) / found["loss, offload none"]
    assert differs < 1e-3, f"offloaded, the loss differs by {differs:.1e}"
    steps = [found[f"step, offload {offload}"] for offload in ("none", "cpu")]
    staging = found["staging, offload none"]
    return {"summary": f"a step {steps[0]:.3f} s, offloaded {steps[1]:.3f} s; staging {staging:.1f} GiB/s", **found}


def products_in_float8(device: str, _: Path) -> dict[str, Any]:
    """A product on tensor cores beside the emulated one, its time beside bf16's, and the first loss beside bf16's."""
    place = pick_device(device, 0)
    refuse_device(place)
    size = 4096 if device == "cuda" else 256
    x, weight = (torch.randn(size, size, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16) for n in (1, 2))
    layer = ColumnLinear(size, size, bias=False)
    setattr(layer, SLOT, Float8(1e-12))
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    emulated = layer(x)
    layer, x = layer.to(place), x.to(place)
    differs = normwise(layer(x).cpu(), emulated)
    assert differs < 1e-2, f"the product differs from the emulated one by {differs:.1e}"
    times = [seconds(lambda work=work: work(), place) for work in (lambda: layer(x), lambda: x @ layer.weight.t())]
    losses = []
    for precision in ("fp8", "bf16"):
        with OneRank(_config(device, precision=precision), device) as rank:
            losses.append(rank.step().read().loss)
    loss = abs(losses[0] - losses[1]) / losses[1]
    assert 0 < loss < 1e-3, f"the first loss differs from that of bf16 by {loss:.1e}"
    summary = f"a product of {size} takes {times[0] / times[1]:.2f} of bf16's time, rounding included"
    return {"summary": summary, "differs": differs, "first loss": loss, "float8": times[0], "bf16": times[1]}


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of the best of five."""
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
