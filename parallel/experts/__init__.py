"""Mixture of experts: feed-forward networks of which each token uses a few.

`layer`        all experts of a layer, as stacked matrices: the tokens sorted by expert, two grouped matrix products
`product`      such a product
`axis`         this rank's place among the ranks that hold the experts together
`dispatch`     tokens to the ranks of their experts and back, by all-to-all or by all-gather
`permutation`  rows in another order, forward and backward
`parallelize`  giving each rank its part of the experts

Expert parallelism divides no tokens: ranks read what they read without it, and each `ep` of those that read different
tokens hold the experts together (`stoker.parallel.layout.Layout`). So an expert's gradient is complete once it is
summed over the ranks with the same experts, and all else is summed over all ranks, as ever. Sums, never means.
"""

from stoker.parallel.experts.axis import ALL_GATHER, ALL_TO_ALL, DISPATCHERS, ExpertAxis, expert_axis
from stoker.parallel.experts.dispatch import tokens_per_expert
from stoker.parallel.experts.layer import Experts
from stoker.parallel.experts.parallelize import divided_layers, expert_layers, parallelize_experts

__all__ = [
    "ALL_GATHER",
    "ALL_TO_ALL",
    "DISPATCHERS",
    "ExpertAxis",
    "Experts",
    "divided_layers",
    "expert_axis",
    "expert_layers",
    "parallelize_experts",
    "tokens_per_expert",
]
