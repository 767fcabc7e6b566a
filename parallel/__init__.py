"""Layouts, process groups and the engines that train over them.

`layout`      the sizes of the axes and what follows from them: pure arithmetic, no processes
`refusals`    which configs are refused before a rank is spawned, and why; `start`: what they judge
`mesh`        this rank's device and process groups, in one object that is passed, never global
`rows`        what the data room hands to an engine; `model`: what an engine asks of a model
`dtypes`      of tensors, and their names in configs and files
`registry`    for each parameter its global shape and where this rank's piece of it lies. Initial weights, gradient
              norm, checkpoints and exports are driven by it; nothing else may guess
`shards`      what leaves an engine: chunks of global tensors, free of layout and engine
`tensor`      tensor parallelism: layers that know how to be cut over the tp axis, and what sequence parallelism adds
`stages`      which layers a pipeline stage holds; `full_precision`: modules that compute in fp32 all the same
`engine`      the protocol: forward_backward, update, evaluate, shards
`native`      the engine, whoever holds the weights: passes through this rank's stages, then the update
`passes`      how the micro-batches of a step go through a model: straight, or through a `pipeline` of stages
`weights`     who holds what, one store for each stage: `replicated` (ZeRO 0, or a single rank: flat buffers, one
              all-reduce overlapped with backward), `sharded` (ZeRO 1-3 through torch's `fully_shard`), or under
              `parallel.engine=deepspeed` the ZeRO of DeepSpeed (`deepspeed_engine`)
`optimizer`   torch optimizers on local shards as plain tensors; `loss_scale`: what fp16 needs besides
`update`      the one message of a step: gradient norm, loss, valid tokens and votes in a single all-reduce

The way of the gradient: the loss of a micro-batch is a SUM over its tokens, scaled by the nominal 1 / (rows x seq_len)
of the global batch. Gradients are summed on the way, over micro-batches and ranks, never averaged; what tensor-parallel
ranks or the ends of a pipeline each hold a part of is summed last, as the registry says. The number of
tokens that really carried a loss travels with the norm, and nominal / actual is folded, together with the clipping
coefficient, into the scale that the fused optimizer applies anyway. No collective precedes backward, and no pass over
the gradients is made for either.
"""
