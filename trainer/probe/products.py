"""Rates of matrix products and of memory, on this rank's device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stoker.conf.schema import Config
from stoker.models.family import build_on_meta
from stoker.parallel.dtypes import PRECISIONS
from stoker.parallel.layout import Layout, batch_plan
from stoker.parallel.mesh import Mesh
from stoker.parallel.model import whole_model
from stoker.parallel.tensor.layers import ColumnLinear, RowLinear

SIZES = {"cuda": (4096, 8192, 16384), "cpu": (256, 1024, 2048, 4096)}  # of square matrices
WINDOW_SIZE = {"cuda": 8192, "cpu": 256}
TRIES = 5
COPIED = {"cuda": 1 << 30, "cpu": 64 << 20}  # bytes
PINNED = 256 << 20
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class Product:
    """`[tokens, inputs] x [inputs, outputs]` and the two products of its gradients, so often in a micro-batch."""

    tokens: int
    inputs: int
    outputs: int
    count: int

    @property
    def flops(self) -> int:
        return 6 * self.tokens * self.inputs * self.outputs


def dtype_of(precision: str) -> str:
    """The dtype whose products are measured for a run in `precision`."""
    return "bf16" if precision == "fp8" else precision


def model_products(config: Config, layout: Layout) -> list[Product]:
    """Those of a rank in one micro-batch of the whole model, by its linear layers, embedding and head aside.

    `config.model.vocab_size` must be set. Layers that tensor parallelism divides are a rank's share.
    """
    whole = build_on_meta(config.model, whole_model(config.model.num_hidden_layers))
    tokens = batch_plan(config, layout).micro_rows * config.seq_len // layout.cp
    found: dict[tuple[int, int], int] = {}
    for module in whole.modules():
        if isinstance(module, nn.Linear):
            inputs = module.in_features // (layout.tp if isinstance(module, RowLinear) else 1)
            outputs = module.out_features // (layout.tp if isinstance(module, ColumnLinear) else 1)
            if inputs and outputs:
                found[inputs, outputs] = found.get((inputs, outputs), 0) + 1
    return [Product(tokens, *shape, count) for shape, count in found.items()]


def best_rate(dtype: str, device: torch.device, seconds: float, sizes: Sequence[int] = ()) -> float:
    """Operations a second of the best size of square product `a @ b.T`, about `seconds` for each that takes no longer.

    As linear layers multiply: on CPUs without units for bf16 `a @ b` is ten times slower.
    """
    best = 0.0
    for size in sizes or SIZES[device.type]:
        if best and 3 * 2 * size**3 / best > seconds:
            break
        a, b = (_normal(size, size, dtype, device) for _ in range(2))
        multiply = _multiply(a, b.t())
        once = timed(multiply, 1, device)
        if once < seconds or device.type == "cuda":
            once = min(once, timed(multiply, 1, device))
        count = max(1, round(seconds / TRIES / once))
        tries = min(TRIES, int(seconds / once))
        best = max(best, *(2 * size**3 / timed(multiply, count, device) for _ in range(tries)), 2 * size**3 / once)
    return best


def windows(
    device: torch.device, number: int, seconds: float, together: Callable[[], object], repeats: int = 1
) -> list[float]:
    """Operations a second of one size in each of `number` windows, which begin after `together`: bf16, fp32 on a CPU.

    A rank that is held back now and then is as slow as it is over a whole window. `repeats` more of the work stand for
    a slower rank in tests.
    """
    size, dtype = WINDOW_SIZE[device.type], "bf16" if device.type == "cuda" else "fp32"
    multiply = _multiply(*(_normal(size, size, dtype, device) for _ in range(2)))
    timed(multiply, 2, device)
    found = []
    for _ in range(number):
        together()
        began, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds:
            for _ in range(repeats):
                multiply()
            synchronize(device)
            done += 1
        found.append(done * 2 * size**3 / spent)
    return found


def own_rate(products: Sequence[Product], dtype: str, device: torch.device, seconds: float, rate: float) -> float:
    """Operations a second over all of `products`, weighted by what they are of a step, in about `seconds`.

    Tokens are fewer where a product would take too long at `rate`.
    """
    share = seconds / len(products)
    flops = spent = 0.0
    for product in products:
        most = int(share / TRIES * rate / (product.flops / product.tokens))
        tokens = min(product.tokens, max(_LEAST_TOKENS, most))
        x = _normal(tokens, product.inputs, dtype, device)
        weight = _normal(product.outputs, product.inputs, dtype, device)
        gradient = _normal(tokens, product.outputs, dtype, device)
        multiply = [_multiply(x, weight.t()), _multiply(gradient, weight), _multiply(gradient.t(), x)]

        def all_three(multiply: Sequence[Callable[[], object]] = multiply) -> None:
            for each in multiply:
                each()

        seconds_each = timed(all_three, 1, device)
        if seconds_each < share or device.type == "cuda":  # else its time is over; on GPUs the first call loads kernels
            once = min(seconds_each, timed(all_three, 1, device))
            count, tries = max(1, int(share / TRIES / once)), max(1, min(TRIES, int(share / once)))
            seconds_each = statistics.median(timed(all_three, count, device) for _ in range(tries))
        flops += product.count * product.flops
        spent += product.count * seconds_each * product.tokens / tokens
    return flops / spent


def memory_rate(device: torch.device, seconds: float) -> float:
    """Bytes a second that are read and written by copies within the device's memory."""
    source = torch.zeros(COPIED[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), seconds, device)


def host_device_rates(device: torch.device, seconds: float) -> tuple[float | None, float | None]:
    """Bytes a second from pinned memory of the host to a GPU, and back; None for a CPU."""
    if device.type != "cuda":
        return None, None
    host = torch.zeros(PINNED // 4, pin_memory=True)
    there = torch.zeros(PINNED // 4, device=device)
    into = _best(lambda: there.copy_(host, non_blocking=True), seconds, device)
    back = _best(lambda: host.copy_(there, non_blocking=True), seconds, device)
    return host.nbytes / into, host.nbytes / back


def _normal(rows: int, columns: int, dtype: str, device: torch.device) -> torch.Tensor:
    """Not zeros, which take less power; from a generator of its own."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, device=device, generator=generator).to(PRECISIONS[dtype])


def _multiply(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return lambda: torch.mm(a, b, out=out)


def _best(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """The fewest seconds of one of several calls within `seconds`."""
    timed(work, 1, device)
    began, best = time.perf_counter(), float("inf")
    while time.perf_counter() - began < seconds:
        best = min(best, timed(work, 1, device))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Of one of `count` calls in a row."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        work()
    synchronize(device)
    return max(1e-9, time.perf_counter() - began) / count


def of_all_ranks(mesh: Mesh, values: Sequence[float]) -> list[list[float]]:
    """For each of `values` that of every rank. A collective of all ranks, each with as many values."""
    texts = mesh.all_gather_text(" ".join(map(repr, values)))
    return [list(column) for column in zip(*(map(float, text.split()) for text in texts), strict=True)]
