"""The program of a rank of `stoker probe`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker.conf.schema import Config
from stoker.conf.values import ConfigError
from stoker.launch.arguments import add_probe
from stoker.launch.train import say
from stoker.parallel.devices import backend_of, order_kernels, set_exactness
from stoker.parallel.layout import layout_of
from stoker.parallel.mesh import Mesh, start_mesh, stop_mesh, use_threads
from stoker.trainer.failure import NotMet
from stoker.trainer.probe.facts import Facts
from stoker.trainer.probe.judge import REFUSE, judge
from stoker.trainer.probe.measure import FULL, QUICK, measure
from stoker.trainer.probe.needs import needs_of
from stoker.trainer.probe.products import Product, dtype_of, model_products
from stoker.trainer.rendezvous import config_of_rank, store_of_rank
from stoker.trainer.runtime.gpus import take_device
from stoker.trainer.runtime.process import keep_freed_memory, place_from_environment

RUN_NAME = "probe"  # where none is given: ranks of several machines must agree on one


@dataclass(frozen=True)
class Options:
    quick: bool = False
    out: str = "machine.json"
    json: bool = False

    def words(self) -> list[str]:
        """For the command line of a rank."""
        given = ["--quick"] * self.quick + ["--json"] * self.json
        return [*given, "--out", self.out]


def main(words: Sequence[str]) -> int:
    """One rank; its exit status. The first rank prints and writes what all found."""
    parser = argparse.ArgumentParser(prog="stoker.launch.probe")
    add_probe(parser)
    parser.add_argument("overrides", nargs="*")
    given, more = parser.parse_known_args(words)
    options, overrides = Options(given.quick, given.out, given.json), [*given.overrides, *more]
    place = place_from_environment()
    try:
        named = any(word.startswith(("run.dir=", "run.name=")) for word in overrides)
        config = config_of_rank([*overrides, *([] if named else [f"run.name={RUN_NAME}"])], place)
        store = store_of_rank(place)
        device, _ = take_device(config, place, store)
        use_threads(config.launch.threads, place.local_world)
        set_exactness(config.deterministic)
        order_kernels(device)
        if device.type == "cpu":
            keep_freed_memory()  # as a run's ranks do
        layout, backend = layout_of(config, place.world), backend_of(config.launch.backend, device)
        mesh = start_mesh(layout, device, store, place.rank, config.parallel.timeout_seconds, backend)
        complete, problem = _complete(config) if place.rank == 0 else (config, None)
        effort = QUICK if options.quick else FULL
        products, vocabulary = _products(mesh, complete, problem)
        model = dataclasses.replace(config.model, vocab_size=vocabulary)
        facts = measure(dataclasses.replace(config, model=model), mesh, place, effort, products)
        stop_mesh()
        return _report(complete, problem, facts, options) if place.rank == 0 else 0
    except (ConfigError, NotMet) as error:
        say(str(error) if place.rank == 0 else f"rank {place.rank}: {error}")
        return 2 if isinstance(error, ConfigError) else 1


def _complete(config: Config) -> tuple[Config, str | None]:
    """`config` with its vocabulary, or why its model cannot be built."""
    from stoker.trainer.facts import with_vocabulary

    try:
        return with_vocabulary(config), None
    except (ValueError, OSError) as error:
        return config, f"the model's own products were left out: {error}"


def _products(mesh: Mesh, config: Config, problem: str | None) -> tuple[list[Product], int | None]:
    """Those of the model, and its vocabulary, as rank 0 finds them. A collective of all ranks."""
    found = model_products(config, mesh.layout) if mesh.rank == 0 and problem is None else []
    text = json.dumps([config.model.vocab_size, *(dataclasses.asdict(product) for product in found)])
    vocabulary, *products = json.loads(mesh.all_gather_text(text)[0])
    return [Product(**each) for each in products], vocabulary


def _report(config: Config, problem: str | None, facts: Sequence[Facts], options: Options) -> int:
    from stoker.launch.probe.machine import Report, bottleneck, machine_of  # they rehearse a step: seconds of imports
    from stoker.launch.probe.show import print_report

    rates = [each.own or each.peaks[dtype_of(config.precision)] for each in facts]
    needs = needs_of(config, sum(rates)) if problem is None else None
    findings = judge(facts, config, needs)
    machine = machine_of(facts, config)
    sentence, times = bottleneck(facts, config, findings, machine) if problem is None else (problem, None)
    report = Report(config, facts, findings, needs, machine, sentence, times)
    values = report.values()
    Path(options.out).write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    if options.json:
        print(json.dumps(values, allow_nan=False))
    else:
        print_report(report)
        print(f"written to {options.out}: `stoker plan --gpu {options.out}` plans by it")
    return 1 if any(finding.severity == REFUSE for finding in findings) else 0
