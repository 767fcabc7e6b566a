"""`python -m trainer [overrides]`: one rank of a run, under torchrun or any launcher that sets its variables."""

import gc
import os
import sys

from trainer.rooms import shadowed_rooms

if __name__ == "__main__":
    shadows = shadowed_rooms()  # before anything of another room is imported
    if shadows:
        sys.exit("stoker: " + shadows[0])
    # OpenMP threads that wait spin, and on a machine with other work 50 times longer than the work they wait for takes.
    # This few rounds cost nothing on an idle machine. It is read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.disable()  # torch is a quarter of a million objects that stay: looking for garbage there is a fifth of a start
    from trainer.main import main

    gc.freeze()
    gc.enable()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all is written; gloo's threads now and then hang in the interpreter's teardown
