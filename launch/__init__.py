"""From a command line to running ranks.

`cli`       the command `stoker`: parses its arguments (`arguments`, `examples`), prints one line for a wrong one
`local`     ranks on this machine, through the elastic agent that torchrun uses
`slurm`     the same on the machines of a job
`status`, `logs`, `stopping`, `control`  watching and controlling a run, through files in its directory
`generate`  text from a run's newest checkpoint
`replay`    recomputes one step of a run
`importing`  checkpoints of other programs as model folders
`inspect`   tables of checkpoints

`stoker train` settles the whole config first (`stoker.trainer.settle`), so that every error
that can be found early is reported before a process is spawned. The ranks it starts are `python -P -m stoker.trainer`,
the same program that torchrun starts; ours get the settled config through the environment instead of composing it
again.
"""
