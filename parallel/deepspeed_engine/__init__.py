"""DeepSpeed's ZeRO as a sharding strategy (`parallel.engine=deepspeed`).

`settings`    DeepSpeed's own settings: those that follow from our config, those a user may pass on, those refused
`unit`        our process groups as the `mpu` object from which DeepSpeed takes its groups
`partitions`  where its three ZeRO optimizers keep fp32 masters and reduced gradients
`strategy`    `stoker.parallel.sharding.ShardingStrategy` over them
`swapping`    parameters on NVMe: the folder, the disk space and the locked memory that its swapper needs
`async_io`    the extension that the swapper reads and writes with: requirements of its build, which takes minutes
`refused`     what does not go together with any of this

What DeepSpeed does: partition parameters, gather them, reduce gradients as backward makes them, keep fp32 masters
on the configured device. Everything that decides the numbers of a run stays with the engine: it sums losses, measures
the norm, clips, scales the loss and steps the optimizer on DeepSpeed's fp32 partitions, exactly as it does under
`parallel.engine=fsdp` (`stoker.parallel.native`). So `deepspeed_engine.step()` is never called: its norm waits for the
device, counts replicated parameters by attributes that do not survive, and its overflow flag is not reduced over all
ranks.

DeepSpeed's data-parallel group is that of `Layout.sharding`; sums over other axes follow its reduction, on this rank's
partition: `Layout.replication` here, the model-parallel groups in the engine. That is exact as long as the partitions
coincide, so parameters that are partial over the same groups are partitioned together. ZeRO 0 is ZeRO 1 over a single
rank, and `parallel.dp_replicate` works at every stage.

DeepSpeed keeps `mpu`, persistence thresholds and a patched `F.linear` (ZeRO 3) in module globals: one mesh per process.
"""
