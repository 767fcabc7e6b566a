"""Context parallelism: ranks that share the tokens of every sequence.

`axis`    this rank's place on the cp axis, and how attention meets there
`blocks`  which tokens of a sequence a rank takes
`regions` the messages between the ranks, forward and backward
`layer`   the declared layer, in which alone tokens of a sequence meet

Outside attention a token needs no other token, so a rank computes its own share of each sequence and sums gradients
with the others as data-parallel ranks do: ZeRO shards over the axis, and losses and counts are sums over it. Labels
belong to tokens before a sequence is cut, so none is lost at a border.

    gather   keys and values of all tokens come to the queries of each rank, layer by layer. Work follows from queries:
             each rank takes blocks of the sequence whose queries see as many keys as those of any other rank.
    ulysses  queries, keys and values of all tokens come to a rank for some of the heads (Jacobs et al. 2023, DeepSpeed
             Ulysses). Heads are equal work, so that each rank takes one run of the sequence.
"""

from stoker.parallel.sequence.axis import EXCHANGES, SequenceAxis, sequence_axis
from stoker.parallel.sequence.blocks import own_tokens
from stoker.parallel.sequence.layer import SequenceLayer, parallelize_sequence

__all__ = ["EXCHANGES", "SequenceAxis", "SequenceLayer", "own_tokens", "parallelize_sequence", "sequence_axis"]
