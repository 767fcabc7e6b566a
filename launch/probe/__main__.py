"""`python -m stoker.launch.probe [--quick] [--out FILE] [--json] [SETTINGS]`: one rank, under any launcher."""

import os
import sys

if __name__ == "__main__":
    from stoker.trainer.runtime.process import die_with_launcher, set_allocator

    die_with_launcher()
    set_allocator()
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # see trainer/__main__.py
    from stoker.launch.probe.rank import main

    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads sometimes hang in the interpreter's teardown
