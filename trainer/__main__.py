"""`python -m stoker.trainer [overrides]`: one rank of a run, under torchrun or any launcher that sets its variables.

With `--measure` or `--measure-logits` instead of overrides it does a rank's part of `stoker check`, with `--teach` or
`--tasks` of `stoker teach` and `stoker eval`.
"""

import gc
import os
import sys

if __name__ == "__main__":
    from stoker.trainer.runtime.process import die_with_launcher, set_allocator

    die_with_launcher()
    set_allocator()
    # OpenMP threads spin while they wait, and beside another busy process for 50 times longer than the work takes. Few
    # rounds keep that to a factor of 5; idle no cost of them was seen (docs/performance_steps.md). Read with torch.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    gc.disable()  # torch is a quarter of a million permanent objects: scanning them takes a fifth of a start
    from stoker.trainer.main import main

    gc.freeze()
    gc.enable()
    if sys.argv[1:] in (["--measure"], ["--measure-logits"]):
        from stoker.trainer.checking import measure, measure_logits

        status = main([], measure if sys.argv[1] == "--measure" else measure_logits)
    elif sys.argv[1:] == ["--tasks"]:
        from stoker.trainer.tasks import run_tasks

        status = main([], run_tasks)
    elif sys.argv[1:] == ["--teach"]:
        from stoker.trainer.teaching import teach

        status = main([], teach)
    else:
        status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # everything is written; gloo's threads sometimes hang in the interpreter's teardown
