"""Tensor parallelism on plain local tensors, with sequence parallelism (Korthikanti et al. 2022, section 4.2).

`axis`     this rank's place on the tp axis, and its share of heads, channels and vocabulary
`regions`  the ways into a region and out of it, forward and backward
`layers`   what a model is built from so that it can be cut
`cut`      the walk over a model that cuts it and says what lies where

A region lies between `CopyToTensorParallel` and `RowLinear`. Inside, every rank sees all tokens and has some of the
channels; outside, every rank has all channels, of its share of the tokens under sequence parallelism, else of all of
them.

    region:    Enter -> ColumnLinear (several) -> anything that treats channels, or heads, one by one -> RowLinear
    forward:   all-gather of tokens (else nothing)                          -> reduce-scatter (else all-reduce)
    backward:  reduce-scatter (else all-reduce)                             <- all-gather (else nothing)

The gradient of a parameter is whole on a rank if the rank has seen all that the parameter did, otherwise a part, to be
summed over the group that the registry names. Under sequence parallelism every parameter outside the regions has seen a
share of the tokens only: norms, and the bias of a `RowLinear`, which is added after the sum. Inside, layers that are
not cut have seen this rank's channels only and say so (`ReplicatedInTensorParallel`). Key and value heads that
neighbours share have seen each neighbour's own queries.

The first region starts with an embedding whose vocabulary is shared, the last one ends in a loss whose vocabulary is.
"""

from stoker.parallel.tensor.parallelize import parallelize_tensors
from stoker.parallel.tensor.regions import enable_async_tensor_parallelism

__all__ = ["enable_async_tensor_parallelism", "parallelize_tensors"]
