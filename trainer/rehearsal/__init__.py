"""A rehearsal: the whole step of one rank of any layout, on fake tensors over a process group that sends nothing.

What runs is the product: the engine that `stoker.trainer.parallelize` builds, its forward and backward passes, its
update, its evaluation. So what is counted of it is what a run needs, and no formula beside the code can be wrong.

`fake_ranks`  a mesh of one rank without the others, and tensors without memory
`memory`      storages over time, by category, and the peak
`work`        floating-point operations, bytes that pass through memory, messages by kind and group
`stand_ins`   kernels of which the real ones keep other tensors, or take too many operations
`layers`      which layers are alike, so that a few of them stand for all
`marks`       moments between two blocks
`extrapolate` from two rehearsals with few layers to all
`run`         building, a step and an evaluation, one after the other
"""

from stoker.trainer.rehearsal.memory import Category, Mark, Peak, Span
from stoker.trainer.rehearsal.run import Rehearsal, rehearse
from stoker.trainer.rehearsal.work import Traffic, Work

__all__ = ["Category", "Mark", "Peak", "Rehearsal", "Span", "Traffic", "Work", "rehearse"]
