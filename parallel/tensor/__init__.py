"""Tensor parallelism on plain local tensors, with sequence parallelism (Korthikanti et al. 2022, section 4.2).

`axis`     this rank's place on the tp axis, and its share of heads, channels and vocabulary
`regions`  the ways into a region and out of it, forward and backward
`layers`   layers that can be sharded, from which a model is built
`low_rank` what an adapter adds to a linear layer, and its cut
`nf4`      frozen weights packed in four bits
`dropout`  which of its inputs it leaves out, the same on every layout
`float8`   products in float8, as a property of a linear layer
`parallelize`  shards every such layer of a model, and returns the registry

A region lies between `CopyToTensorParallel` and `RowLinear`. Inside, every rank has all tokens and some of the
channels; outside, every rank has all channels, of its share of the tokens under sequence parallelism, else of all of
them.

    region:    CopyToTensorParallel -> ColumnLinear (several) -> elementwise over channels or heads -> RowLinear
    forward:   all-gather of tokens (else nothing)                          -> reduce-scatter (else all-reduce)
    backward:  reduce-scatter (else all-reduce)                             <- all-gather (else nothing)

The gradient of a parameter is complete on a rank if the rank computed every use of the parameter; otherwise it is
partial and summed over the group that the registry names. Under sequence parallelism every parameter outside the
regions is used on a share of the tokens only: norms, and the bias of a `RowLinear`, which is added after the sum.
Inside, layers that are not sharded are used on this rank's channels only, and are marked
(`ReplicatedInTensorParallel`). Key and value heads that several ranks share are used with the queries of each of these
ranks.

The first region starts with an embedding whose vocabulary is shared, the last one ends in a loss whose vocabulary is.
"""

from stoker.parallel.tensor.parallelize import parallelize_tensors
from stoker.parallel.tensor.regions import enable_async_tensor_parallelism

__all__ = ["enable_async_tensor_parallelism", "parallelize_tensors"]
