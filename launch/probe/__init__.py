"""`stoker probe`: what the machines of a run can do, which part of them is slow, and what bounds a step.

`start`     ranks on this machine
`rank`      the program of a rank, under `stoker probe`, torchrun or srun; the first one reports
`machine`   machine.json, which `stoker plan --gpu` takes, and the sentence on the bottleneck
`show`      tables for a terminal

Measuring and judging are in `stoker.trainer.probe`: ranks do them before they train, too (`launch.preflight`).
"""
