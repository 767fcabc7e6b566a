"""From a command line to running ranks.

`cli`       the command `stoker`: reads the words (some are in `arguments`), prints one line when they are wrong
`local`     ranks on this machine, through the elastic agent that torchrun uses
`slurm`     the same on the machines of a job
`status`, `logs`, `stopping`  looking after a run, through files in its directory
`generate`  text from a run's newest checkpoint
`replay`    one step of a run once more
`show`      tables of checkpoints

`stoker train` settles the whole config first (`stoker.trainer.settle`), so that everything that can be known to be
wrong is said before a process is spawned. The ranks it starts are `python -P -m stoker.trainer`, the same program that
torchrun starts; ours get the settled config through the environment instead of composing it again.
"""
