"""The command `stoker`."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import pydoc
import select
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import stoker
from stoker.launch import arguments, examples

DESCRIPTION = "Distributed training of language models, with one result on every layout."

TOGETHER = {  # in one line of the list of commands
    "eval": ("teach", "Store a teacher's predictions, or run lm-eval's tasks."),
    "import": ("export", "Write a model for other libraries, or make one of theirs."),
    "requeue": ("stop", "Make a run save and end, or go back to Slurm's queue."),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit status, one of docs/launch.md. An error in the arguments is one line on stderr."""
    from stoker.conf.files import expand
    from stoker.conf.printable import printable
    from stoker.conf.reasons import reason, with_cause
    from stoker.conf.values import ConfigError
    from stoker.launch.train import say

    words = list(sys.argv[1:] if words is None else words)
    if words[:1] in ([], ["help"]):
        words = [*words[1:], "--help"]
    top = parser()
    options, more = top.parse_known_args(words)
    if more and (not hasattr(options, "overrides") or any(word.startswith("-") for word in more)):
        top.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        if hasattr(options, "overrides"):
            files = [f"--config={file}" for file in options.config]
            folders = [f"--config-dir={folder}" for folder in options.config_dir]
            trusted = ["run.trust=true"] if getattr(options, "trust", False) else []
            settings = [*options.overrides, *more]  # they may stand on both sides of an option
            given = [*files, *folders, *settings, *trusted]
            options.overrides = given if getattr(options, "multirun", False) else expand(given, say)
        status = options.command(options)
        sys.stdout.flush()  # here, and not when the interpreter ends: a closed pipe is no error of the command
        return status
    except BrokenPipeError as error:
        if not _reader_is_gone():
            print(printable(f"stoker: {reason(error)}"), file=sys.stderr)
            return 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left in the buffer
        return 128 + signal.SIGPIPE
    except ConfigError as error:
        print(printable(f"stoker: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        print(printable(f"stoker: {reason(error)}"), file=sys.stderr)
        return 1
    except ValueError as error:
        print(printable(f"stoker: {with_cause(error)}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _reader_is_gone() -> bool:
    """Whether the standard output leads to a program that has ended, as in `| head`."""
    try:
        sys.stdout.flush()
        output = sys.stdout.fileno()
    except BrokenPipeError:
        return True
    except OSError:  # no file
        return False
    looking = select.poll()  # nothing may be left to flush: a long text was on its way when the pipe broke
    looking.register(output, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in looking.poll(0))


class _Parser(argparse.ArgumentParser):
    """Answers an unknown command with the closest known one; shows a help that is longer than the screen in pages."""

    def print_help(self, file: Any = None) -> None:
        text = self.format_help()
        if file is None and sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines:
            pydoc.pager(text)
        else:
            super().print_help(file)

    def error(self, message: str):  # type: ignore[no-untyped-def]
        if "invalid choice" in message:
            word = message.split("'")[1]
            known = [choice for action in self._actions for choice in (action.choices or ())]
            close = difflib.get_close_matches(word, known, 1, 0.3)
            message = f"there is no command {word!r}" + (f": did you mean {close[0]!r}?" if close else "")
        elif message.startswith("unrecognized"):
            from stoker.conf.overrides import dashed

            options = [word for word in message.partition(": ")[2].split() if word.startswith("-")]
            message += f"; {dashed(options[0] if options else '')}"
        self.exit(2, f"stoker: {message} (see {self.prog} --help)\n")


class _OneLineEach(argparse.HelpFormatter):
    """A line for each command: argparse leaves the indentation of commands out when it measures their names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=20)
        self._action_max_length = 18

    def format_help(self) -> str:
        return super().format_help().replace("\n\ncommands:\n", "\n", 1)  # all commands are one screen

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if isinstance(action, argparse._SubParsersAction) else text  # less its own line


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    usage = f"stoker COMMAND ...\n{DESCRIPTION}"  # without a line between: the help is one screen
    top = _Parser(prog="stoker", usage=usage, formatter_class=_OneLineEach, add_help=False)
    top.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    version = f"stoker {stoker.__version__}"
    top.add_argument("--version", action="version", version=version, help=argparse.SUPPRESS)
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND", prog="stoker")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, more: str = "") -> argparse.ArgumentParser:
        layout = argparse.RawDescriptionHelpFormatter  # keeps the lines of `more`
        command = commands.add_parser(name, help=text, description=text, epilog=more, formatter_class=layout)
        command.set_defaults(command=run)
        return command

    train = add("train", _train, "Train on this machine, or resume the run in run.dir.", examples.TRAIN)
    arguments.add_settings(train)
    train.add_argument("-m", "--multirun", action="store_true", help="a run for each combination: `stoker sweep`")
    arguments.add_trust(train)

    config = add("config", _config, "Print the composed, validated config and exit.", examples.CONFIG)
    arguments.add_settings(config)
    config.add_argument("--layout", action="store_true", help="print the place of every rank instead")
    config.add_argument("--schedule", action="store_true", help="draw the learning rate over the steps instead")

    plan = add("plan", _plan, "Show the memory and the time that a start would need.", examples.PLAN)
    arguments.add_settings(plan)
    plan.add_argument(
        "--gpu", metavar="NAME", help="device to plan for: H100, or a JSON file (default: this machine's)"
    )
    plan.add_argument("--gpus", metavar="N", type=int, help="how many ranks (default: those of a start)")
    plan.add_argument("--tokens", metavar="T", type=float, help="tokens of the run (default: those of its steps)")
    plan.add_argument("--price", metavar="P", type=float, help="of a GPU for an hour: prints what the run costs")
    plan.add_argument("--mtbf", metavar="H", type=float, help="hours between failures: prints how often to save")
    plan.add_argument("--search", action="store_true", help="rank the layouts; settings that are given stay")
    plan.add_argument("--run", metavar="RUN", help="plan a run's newest attempt as stored, beside what it measured")
    plan.add_argument("--png", metavar="FILE", help="draw the memory of a rank over a step")
    plan.add_argument("--json", action="store_true", help="everything, as JSON")

    probe = add("probe", _probe, "Measure machines, links and storage; name what is slow.", examples.PROBE)
    arguments.add_settings(probe)
    arguments.add_probe(probe)

    check = add("check", _check, "Compare a layout with one process, or with transformers.", examples.CHECK)
    arguments.add_settings(check)
    check.add_argument("--against", metavar='"OVERRIDES"', help="this layout, or transformers; default: one process")
    check.add_argument("--steps", type=int, default=5, help="how many steps (default 5; one against transformers)")
    arguments.add_trust(check)

    replay = add("replay", _replay, "Compute a step again; find what is not finite.")
    replay.add_argument("run", help="run directory")
    replay.add_argument("--step", type=int, required=True, help="which step")
    arguments.add_trust(replay)

    teach = add("teach", _teach, "Store what a teacher predicts for each label of the data.", examples.TEACH)
    teach.add_argument("folder", type=Path, help="where; `objective.teacher` of the runs that learn from it")
    arguments.add_settings(teach)
    teach.add_argument("--top-k", type=int, default=32, help="how many tokens for each label (default 32)")
    teach.add_argument("--labels", action="store_true", help="of the labels alone: a reference for dpo, ipo and kto")
    arguments.add_trust(teach)

    evaluate = add("eval", _eval, "Run tasks of lm-eval on a model folder or a run.", examples.EVAL)
    evaluate.add_argument("model", help="folder of a model in Hugging Face's format, or run directory")
    arguments.add_settings(evaluate)
    evaluate.add_argument("--tasks", required=True, help="names of tasks, with commas between")
    evaluate.add_argument("--include", metavar="DIR", type=Path, help="folder with files of tasks of your own")
    evaluate.add_argument("--fewshot", type=int, help="examples before each question (default: the task's)")
    evaluate.add_argument("--limit", type=int, help="questions of each task at most")
    evaluate.add_argument("--step", type=int, help="of a run: this step's checkpoint instead of the newest")
    evaluate.add_argument("--online", action="store_true", help="tasks may download their data")
    evaluate.add_argument("-o", "--out", metavar="FILE", type=Path, help="write the results as JSON, too")
    arguments.add_trust(evaluate)

    generate = add("generate", _generate, "Continue a text with a run's newest checkpoint.")
    generate.add_argument("run", help="run directory")
    begin = generate.add_mutually_exclusive_group(required=True)
    begin.add_argument("--prompt", help="text to continue; with --chat what the user writes")
    begin.add_argument("--ids", help="token ids to continue, such as 1,5,3: ids come out, and no tokenizer is needed")
    generate.add_argument(
        "--chat", action="store_true", help="the prompt is a user's turn (or JSON: a list of messages)"
    )
    generate.add_argument("--system", help="with --chat: a system message before it")
    generate.add_argument("--tokens", type=int, default=200, help="how many tokens at most (default 200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 < t; smaller is more certain (default 0.8)")
    generate.add_argument("--top-k", type=int, help="only the k likeliest tokens")
    generate.add_argument("--top-p", type=float, help="only the likeliest tokens that together have this probability")
    generate.add_argument("--greedy", action="store_true", help="always the likeliest token")
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    generate.add_argument("--step", type=int, help="of this step's checkpoint instead of the newest")
    arguments.add_trust(generate)

    export = add("export", _export, "Write a checkpoint as a model for other libraries.")
    export.add_argument("run", help="run directory")
    export.add_argument("out", help="directory to make; must not exist, or be empty")
    forms = "hf: safetensors (default); dcp: torchtitan's; gguf: llama.cpp's"
    export.add_argument("--format", choices=("hf", "dcp", "gguf"), default="hf", help=forms)
    export.add_argument("--gguf", dest="format", action="store_const", const="gguf", help="short for --format gguf")
    export.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the weights (default: the imported model's, else fp32)",
    )
    export.add_argument("--ema", action="store_true", help="the moving average of the weights (optim.ema)")
    export.add_argument("--merge", action="store_true", help="of a run with an adapter: the whole model with it added")
    export.add_argument("--step", type=int, help="of this step's checkpoint instead of the newest")
    export.add_argument("--shard-size", default="5GB", help="largest size of one file (default 5GB)")
    arguments.add_trust(export)

    foreign = add("import", _import, "Make a model folder of another program's checkpoint.", examples.IMPORT)
    foreign.add_argument("source", metavar="SOURCE", help="folder of the checkpoint")
    foreign.add_argument("out", metavar="OUT", help="directory to make; must not exist, or be empty")
    foreign.add_argument("--config", metavar="FILE", help="config.json of the model, where SOURCE has none")
    foreign.add_argument("--shard-size", metavar="SIZE", default="5GB", help="largest size of one file (default 5GB)")
    foreign.add_argument("--no-optimizer", action="store_true", help="the model alone, without AdamW's moments")
    foreign.add_argument("--trust", action="store_true", help="unpickle more than tensors, which can run any code")

    arguments.add_runs(add)
    with_commands = (
        (arguments.add_checkpoints, "checkpoint", "List, verify, compare, remove checkpoints, or request one."),
        (arguments.add_data, "data", "Prepare data, and show what a run reads."),
    )
    for add_commands, name, text in with_commands:
        command = add(name, lambda _: 0, text)
        command.set_defaults(command=functools.partial(_help, command))
        add_commands(command)
    completion = add("completion", _completion, "Print a script for the completion of a shell.", examples.COMPLETION)
    what = completion.add_mutually_exclusive_group(required=True)
    what.add_argument("shell", nargs="?", choices=("bash", "zsh", "fish"), help="whose script to print")
    what.add_argument("--line", help="print what can follow this line, as these scripts ask for it")
    lines = {line.dest: line for line in commands._choices_actions}
    for second, (first, text) in TOGETHER.items():  # the list of commands is one screen
        lines[first].metavar, lines[first].help = f"{first}, {second}", text
        commands._choices_actions.remove(lines[second])
    return top


def _help(command: argparse.ArgumentParser, _: argparse.Namespace) -> int:
    """Of a command that has commands, given without one."""
    command.print_help()
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.multirun:
        from stoker.launch.sweep import sweep

        return sweep(options.overrides)
    from stoker.launch.train import train

    return train(options.overrides)


def _config(options: argparse.Namespace) -> int:
    from stoker.conf.compose import compose
    from stoker.conf.rundir import to_yaml
    from stoker.launch.train import ranks_for, say, where
    from stoker.trainer.budget import settle_steps
    from stoker.trainer.validate import validate

    overrides = options.overrides
    config = compose(overrides)
    if config.model.init_from is not None:
        from stoker.trainer.pretrained import adopt_shape

        config = adopt_shape(config, overrides)
    if config.tokens is not None:
        config = settle_steps(config, overrides, first=True, tell=say)
    world = ranks_for(config)
    if options.schedule:
        from stoker.launch import schedule

        validate(config, *where(config))
        for line in schedule.lines_of(config, shutil.get_terminal_size((120, 24)).columns):
            print(line)
        return 0
    if not options.layout:
        validate(config, *where(config))
        print(to_yaml(config), end="")
        return 0
    from stoker.launch.layout import lines_of
    from stoker.parallel.layout import batch_plan, layout_of

    validate(config, world, gpus=world)  # for ranks anywhere, not the GPUs of this machine
    layout = layout_of(config, world)
    for line in lines_of(layout, batch_plan(config, layout), shutil.get_terminal_size((120, 24)).columns):
        print(line)
    return 0


def _probe(options: argparse.Namespace) -> int:
    from stoker.launch.probe.rank import Options
    from stoker.launch.probe.start import probe

    return probe(options.overrides, Options(options.quick, options.out, options.json).words())


def _plan(options: argparse.Namespace) -> int:
    from stoker.conf.values import ConfigError
    from stoker.launch.plan import Asked, plan, plan_run

    form = "json" if options.json else "text"
    if options.run is not None:
        given = [
            *options.overrides,
            *(f"--{name}" for name in ("gpus", "tokens", "price", "mtbf", "png") if vars(options)[name]),
        ]
        if given:
            raise ConfigError(f"--run {options.run}: it is planned as it is stored, without {' '.join(given)}")
        return plan_run(options.run, options.gpu, form)
    asked = Asked(options.tokens, options.price, options.mtbf)
    return plan(options.overrides, options.gpu, options.gpus, asked, form, options.search, options.png)


def _check(options: argparse.Namespace) -> int:
    if options.against == "transformers":
        from stoker.launch.check_transformers import check_transformers

        return check_transformers(options.overrides)
    from stoker.launch.check import check

    return check(options.overrides, options.against, options.steps)


def _replay(options: argparse.Namespace) -> int:
    from stoker.launch.replay import replay_step

    return replay_step(options.run, options.step, options.trust)


def _completion(options: argparse.Namespace) -> int:
    from stoker.launch.completion import candidates, script

    if options.line is None:
        print(script(options.shell), end="")
    else:
        for candidate in candidates(parser(), options.line):
            print(candidate)
    return 0


def _teach(options: argparse.Namespace) -> int:
    from stoker.launch.teach import teach

    return teach(options.folder, options.overrides, None if options.labels else options.top_k)


def _eval(options: argparse.Namespace) -> int:
    from stoker.launch.evaluate import evaluate

    return evaluate(options)


def _generate(options: argparse.Namespace) -> int:
    from stoker.launch.generate import generate_text

    return generate_text(options)


def _export(options: argparse.Namespace) -> int:
    from stoker.launch.export import export

    return export(options)


def _import(options: argparse.Namespace) -> int:
    from stoker.launch.importing.command import import_checkpoint

    return import_checkpoint(options)


if __name__ == "__main__":
    sys.exit(main())
