"""What a start would need, by a rehearsal of it, and the record of that in a run.

`make`     the plan of a config on so many ranks: classes of ranks, memory, operations (`stoker.trainer.rehearsal`)
`times`    how long that takes on a device: an estimate, which names its parts
`record`   the plan of an attempt, written beside its training

`stoker plan` (`stoker.launch.plan`) prints and searches what is made here.
"""
