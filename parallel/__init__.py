"""Layouts, process groups and the engines that train over them.

`layout`      the sizes of the axes and what follows from them: pure arithmetic, no processes
`refusals`    which configs are refused before a rank is spawned, and why; `start`: the input of these checks
`mesh`        this rank's device and process groups, in one object that is passed, never global
`batch`       the input of an engine; `model`: the protocol that a model must implement
`dtypes`      of tensors, and their names in configs and files
`registry`    for each parameter its global shape and the position of this rank's piece. Initial weights, gradient
              norm, checkpoints and exports use it and nothing else
`shards`      what leaves an engine: chunks of global tensors, free of layout and engine
`tensor`      tensor parallelism: layers that can be sharded over the tp axis, and sequence parallelism
`stages`      which layers a pipeline stage holds; `fp32_modules`: modules that compute in fp32 in any precision;
              `frozen`: parameters that are not trained are stored in the dtype that they compute in
`engine`      the protocol: forward_backward, update, evaluate, shards
`native`      the engine, for every sharding strategy: forward and backward of this rank's stages, then the update
`forward_backward`  the micro-batches of a step: gradient accumulation, or a `pipeline` schedule over stages
`sharding`    the strategies, one object for each stage: `replicated` (ZeRO 0, or a single rank: flat buffers, one
              all-reduce overlapped with backward), `sharded` (ZeRO 1-3 through torch's `fully_shard`), or under
              `parallel.engine=deepspeed` the ZeRO of DeepSpeed (`deepspeed_engine`)
`rules`       update rules: what each needs to see of a parameter, and how it gets that on every layout
`optimizer`   torch optimizers on local shards as plain tensors; `loss_scale`: what fp16 needs besides
`update`      the all-reduce of a step: gradient norm, loss, valid tokens, flags and timings in one message

Gradients: the loss of a micro-batch is a SUM over its tokens, scaled by the nominal 1 / (rows x seq_len) of the
global batch. Gradients are summed over micro-batches and ranks, never averaged; gradients that are partial over
tensor-parallel ranks or over the ends of a pipeline are summed last, over the groups that the registry names. The
number of valid tokens is reduced together with the norm, and nominal / actual is folded, together with the clipping
coefficient, into the scale that the fused optimizer applies anyway. No collective precedes backward, and no pass over
the gradients is made for either.
"""
