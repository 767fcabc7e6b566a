"""The loop, the parts of one optimizer step, and the one function that parallelizes a model.

`main`         the rank program (`python -m stoker.trainer`), from config to `Trainer.fit()`
`settle`       from overrides to a config (`stored_run`, `validate`); `assemble`: from that to a `Trainer`
`parallelize`  from a model on the meta device to an engine, in one order
`loop`         the loop; `step_log`: results of steps, read one step late; `schedule`; `evaluation`
`spikes`       which losses count as spikes; `replay`: recomputes a step; `checking`: for `stoker check`
`pretrained`   weights from Hugging Face's files or from another run
`runtime`      the process of a rank: signals, hangs, failures, outcome
`report`       metrics, terminal output, trackers, profiles

A step never waits for the device: its result is read while the next step is already queued, and the flags on
which ranks have to agree (stop, skip) are reduced in the same message and take effect one step late, on all ranks.
"""
