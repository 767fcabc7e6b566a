"""Arguments of the commands for runs, checkpoints and data.

The code of a command is imported when the command runs: `stoker --help` loads no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Protocol


class Add(Protocol):
    """Adds a command to the parser."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = ""
    ) -> argparse.ArgumentParser: ...


SUBMIT_EXAMPLES = """\
examples:
  stoker submit launch=slurm run.dir=runs/a launch.nodes=4 launch.gpus=8 \\
      launch.time=24:00:00 launch.partition=a100
  stoker submit launch=slurm run.dir=runs/a launch.chain=5   five jobs in a row
  stoker submit launch=slurm run.dir=runs/b launch.array=0-3 run.seed={task}
  stoker submit launch=kubernetes launch.image=me/stoker launch.volume=runs \\
      launch.nodes=4 launch.gpus=8 run.dir=a --dry-run
"""


REPORT_EXAMPLES = """\
examples:
  stoker report runs/a -o a.html
  stoker report runs/a runs/b runs/c       overlaid, with a table of differences
  stoker report runs/a --md
"""


PROFILE_EXAMPLES = """\
examples:
  stoker train run.dir=runs/a 'profile.steps=[10,13]'    traces steps
  stoker profile runs/a
  stoker profile runs/a --rank 3 --json
"""

SWEEP_EXAMPLES = """\
examples:
  stoker sweep run.dir=sweeps/lr optim.lr=1e-3,3e-4 model.num_hidden_layers=4,8
  stoker sweep run.dir=sweeps/some optim.lr=1e-3,3e-4 batch.size=8,16 --random 3
  stoker sweep run.dir=sweeps/ask steps=100 --ask "python propose.py"

The same command goes on with a sweep that was interrupted (docs/sweeps.md).
"""


def add_probe(command: argparse.ArgumentParser) -> None:
    """For `stoker probe` and for its ranks."""
    command.add_argument("--quick", action="store_true", help="smaller sizes, for less time")
    command.add_argument("--out", metavar="FILE", default="machine.json", help="what to write (default machine.json)")
    command.add_argument("--json", action="store_true", help="print the contents of that file instead of tables")


def add_trust(command: argparse.ArgumentParser) -> None:
    """For commands that may run code which a stored config names."""
    text = "run code that the stored config names, though this user has not started the run"
    command.add_argument("--trust", action="store_true", help=text)


def add_settings(command: argparse.ArgumentParser) -> None:
    """For commands that compose a config."""
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="what differs from the defaults: model=small steps=1000 parallel.zero=3",
    )
    command.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="YAML file of settings; KEY=VALUE wins over it"
    )
    command.add_argument(
        "--config-dir", metavar="DIR", action="append", default=[],
        help="folder of groups of your own (default: conf), for model=NAME, experiment=NAME, ...",
    )  # fmt: skip


def add_runs(add: Add) -> None:
    init = add("init", _init, "Make a folder to start a project from.")
    init.add_argument("folder", help="folder to make, or to add the files to")

    sweep = add("sweep", _sweep, "Train a run for each combination of several values.", SWEEP_EXAMPLES)
    add_settings(sweep)
    sweep.set_defaults(multirun=True)
    some = sweep.add_mutually_exclusive_group()
    some.add_argument("--random", metavar="N", type=int, help="only N of the combinations, picked at random")
    some.add_argument("--ask", metavar="CMD", help="a program that proposes the settings of each run (docs/sweeps.md)")
    sweep.add_argument("--seed", type=int, default=0, help="of --random (default 0)")
    add_trust(sweep)

    submit = add("submit", _submit, "Submit a run to Slurm or Kubernetes, or print a manifest.", SUBMIT_EXAMPLES)
    add_settings(submit)
    submit.add_argument("--dry-run", action="store_true", help="print the script or manifest and submit nothing")
    add_trust(submit)

    status = add("status", _status, "Show how a run is doing: attempts, step, speed, time left.")
    status.add_argument("run", help="run directory")

    report = add("report", _report, "Write a page about a run, or about several together.", REPORT_EXAMPLES)
    report.add_argument("run", nargs="+", help="run directory; several are drawn into the same charts")
    report.add_argument("-o", "--out", metavar="FILE", help="file to write (default: report.html)")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--md", action="store_true", help="Markdown without charts, to the standard output or FILE")
    form.add_argument("--json", action="store_true", help="JSON, with the points of all curves, likewise")

    compare = add("compare", _compare, "Show what differs between two runs, and from which step.")
    compare.add_argument("run", help="run directory")
    compare.add_argument("other", help="run directory of the other")

    profile = add("profile", _profile, "Show where the time of traced steps goes, and what helps.", PROFILE_EXAMPLES)
    profile.add_argument("run", help="run directory")
    profile.add_argument("--attempt", type=int, help="traces of this attempt (default: the newest that has some)")
    profile.add_argument("--rank", type=int, help="details of this rank (default: the one that works longest)")
    profile.add_argument("--json", action="store_true", help="everything, as JSON")

    logs = add("logs", _logs, "Show what ranks wrote.")
    logs.add_argument("run", help="run directory")
    logs.add_argument("--rank", type=int, action="append", help="of this rank only; can be given several times")
    logs.add_argument("--attempt", type=int, help="of this attempt (default: the newest)")
    logs.add_argument("--lines", type=int, default=20, help="so many last lines of each (default 20; 0: all)")
    logs.add_argument("--follow", "-f", action="store_true", help="continue with new lines, across restarts too")

    stop = add("stop", _stop, "Make a run save and end, and wait for it.")
    stop.add_argument("run", help="run directory")
    stop.add_argument("--wait", type=float, default=600.0, help="seconds to wait at most (default 600)")

    requeue = add("requeue", _requeue, "Make a Slurm run save and go back to the queue.")
    requeue.add_argument("run", help="run directory")
    add_trust(requeue)


def add_checkpoints(checkpoint: argparse.ArgumentParser) -> None:
    checkpoint_commands = checkpoint.add_subparsers(metavar="COMMAND")

    def of_checkpoints(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = checkpoint_commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run)
        command.add_argument("run", help="run directory")
        return command

    of_checkpoints("ls", _checkpoint_ls, "List a run's checkpoints: step, size, layout, validity, loss.")
    verify = of_checkpoints("verify", _checkpoint_verify, "Read every block of a run's checkpoints; prove them whole.")
    verify.add_argument("--step", type=int, help="only this step's checkpoint")
    diff = of_checkpoints("diff", _checkpoint_diff, "What differs between two checkpoints: config, state, tensors.")
    diff.add_argument("first", type=int, help="step of the one")
    diff.add_argument("second", type=int, help="step of the other")
    diff.add_argument(
        "--kind", action="append", default=[], help="only tensors of this kind: param, optim.exp_avg, ..."
    )
    most = diff.add_mutually_exclusive_group()
    most.add_argument(
        "--tensors", type=int, default=20, help="show so many, parameters and the most changed first (20)"
    )
    most.add_argument("--all", action="store_true", help="show all tensors that differ")
    remove = of_checkpoints("rm", _checkpoint_rm, "Remove checkpoints, but never the last valid one.")
    remove.add_argument("step", type=int, nargs="+", help="steps of those to remove")
    save = of_checkpoints("save", _checkpoint_save, "Request a checkpoint of a running job now, and wait for it.")
    save.add_argument("--wait", type=float, default=600.0, help="seconds to wait at most (default 600)")


def add_data(data: argparse.ArgumentParser) -> None:
    data_commands = data.add_subparsers(metavar="COMMAND")
    made: dict[str, argparse.ArgumentParser] = {}
    for name, run, text in (
        ("prepare", _data_made, "Tokenise data on all cores, into the cache or a folder; resumes after a kill."),
        ("pack", _data_made, "Write the training documents as webdataset shards."),
        ("tokenizer", _data_made, "Train a byte-level BPE on the training documents."),
        ("plan", _data_shown, "What a run of this config reads: documents, tokens, rows and epochs by source."),
        ("peek", _data_shown, "Show the documents of a step of a run, past or to come."),
        ("verify", _data_shown, "Read every byte of token files, or every document of sources, and prove them whole."),
    ):
        made[name] = data_commands.add_parser(name, help=text, description=text)
        made[name].set_defaults(command=run, what=name)
    for name in ("pack", "tokenizer"):
        made[name].add_argument("--out", required=True, help="folder to write to")
    for name in ("prepare", "pack", "plan", "tokenizer"):
        add_settings(made[name])
    made["prepare"].add_argument("--out", help="put the token files here (default: the cache)")
    made["pack"].add_argument("--megabytes", type=float, default=256, help="size of a shard (default 256)")
    made["tokenizer"].add_argument("--vocab", type=int, default=8192, help="how many tokens (default 8192)")
    made["peek"].add_argument("run", help="run directory")
    made["peek"].add_argument("--step", type=int, required=True, help="which step")
    made["peek"].add_argument("--rows", type=int, default=4, help="how many rows at most (default 4)")
    made["peek"].add_argument("--characters", type=int, default=600, help="of a document at most (default 600)")
    add_trust(made["peek"])
    made["verify"].add_argument(
        "paths", nargs="*", help="token files or a cache (default: the default cache), or KEY=VALUE of sources"
    )


def _init(options: argparse.Namespace) -> int:
    from stoker.launch.init import init

    return init(options.folder)


def _sweep(options: argparse.Namespace) -> int:
    from stoker.launch.sweep import sweep

    return sweep(options.overrides, options.random, options.seed, options.ask)


def _submit(options: argparse.Namespace) -> int:
    from stoker.conf.compose import compose

    if compose([word.replace("{task}", "0") for word in options.overrides]).launch.name in ("kubernetes", "skypilot"):
        from stoker.launch.kubernetes.manifests import submit as submit_pods

        return submit_pods(options.overrides, options.dry_run)
    from stoker.launch.slurm.submit import submit

    return submit(options.overrides, options.dry_run)


def _status(options: argparse.Namespace) -> int:
    from stoker.launch.status import status

    return status(options.run)


def _report(options: argparse.Namespace) -> int:
    from stoker.launch.report import report

    return report(options.run, options.out, "md" if options.md else "json" if options.json else "html")


def _compare(options: argparse.Namespace) -> int:
    from stoker.launch.compare import compare_runs

    return compare_runs(options.run, options.other)


def _profile(options: argparse.Namespace) -> int:
    from stoker.launch.profile import profile

    return profile(options.run, options.attempt, options.rank, "json" if options.json else "text")


def _logs(options: argparse.Namespace) -> int:
    from stoker.launch.logs import show

    return show(options.run, options.rank, options.attempt, options.lines, options.follow)


def _stop(options: argparse.Namespace) -> int:
    from stoker.launch.stopping import stop

    return stop(options.run, options.wait)


def _requeue(options: argparse.Namespace) -> int:
    from stoker.launch.stopping import requeue

    return requeue(options.run, options.trust)


def _checkpoint_ls(options: argparse.Namespace) -> int:
    from stoker.launch.inspect import list_checkpoints

    return list_checkpoints(options.run)


def _checkpoint_verify(options: argparse.Namespace) -> int:
    from stoker.launch.inspect import verify_checkpoints

    return verify_checkpoints(options.run, options.step)


def _checkpoint_diff(options: argparse.Namespace) -> int:
    from stoker.launch.inspect import compare_checkpoints

    most = None if options.all else options.tensors
    return compare_checkpoints(options.run, options.first, options.second, options.kind, most)


def _checkpoint_rm(options: argparse.Namespace) -> int:
    from stoker.launch.control import remove_checkpoints

    return remove_checkpoints(options.run, options.step)


def _checkpoint_save(options: argparse.Namespace) -> int:
    from stoker.launch.control import save_now

    return save_now(options.run, options.wait)


def _data_made(options: argparse.Namespace) -> int:
    from stoker.launch import data_make as make
    from stoker.launch.train import refusing

    with refusing():
        return {"prepare": make.prepare, "pack": make.pack, "tokenizer": make.tokenizer}[options.what](options)


def _data_shown(options: argparse.Namespace) -> int:
    from stoker.launch import data_show as show
    from stoker.launch.data_peek import peek
    from stoker.launch.data_verify import verify
    from stoker.launch.train import refusing

    with refusing():
        return {"plan": show.plan, "peek": peek, "verify": verify}[options.what](options)
