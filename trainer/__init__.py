"""The loop, what one optimizer step is made of, and the one function that cuts a model.

`main`         the rank program (`python -m stoker.trainer`), from config to `Trainer.fit()`
`settle`       from overrides to a config (`stored_run`, `validate`); `assemble`: from that to a `Trainer`
`parallelize`  from a model on the meta device to an engine, in one order
`loop`         the loop; `step_log`: results of steps, read one step late; `schedule`; `evaluation`
`spikes`       which losses are taken for spikes; `replay`: a step again; `checking`: for `stoker check`
`pretrained`   weights from Hugging Face's files or from another run
`runtime`      how a rank lives, hangs and ends
`report`       what a person sees of a run

A step never waits for the device: its result is read while the next step is already queued, and whatever ranks have
to agree on (stop, skip) travels in the same message and takes effect one step late, on all of them alike.
"""
