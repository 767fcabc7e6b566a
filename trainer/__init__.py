"""The loop, what one optimizer step is made of, and the one function that cuts a model.

`main`        the rank program (`python -m stoker.trainer`): config -> mesh -> model -> engine -> data ->
`Trainer.fit()`
`start`       from overrides to the config of this start; `assemble`: from that config to a `Trainer`
`cut`         from a model on the meta device to an engine: the order in which a model is cut stands there only
`loop`        the loop; `step_log`: results of steps, read one step late; `schedule`; `evaluation`
`profile`     which steps are profiled, and `breakdown`: where the time of such a step goes
`process`     a rank as a process: progress stamps, logs; `outcome`: how an attempt began and ended
`requests`    what it is asked: signals, files, a deadline; `grace`: how long an end takes; `meeting`: of machines
`watchdog`      ranks that make no progress: seen from outside, examined (`examination`, `stack_dump`), ended;
`stragglers`
`spikes`      which losses are not believed; `replay`: one step once more; `faults`: struck on purpose
`goodput`     what every second of a run was good for
`observers`   what a person sees: `metrics`, `progress` and `live`, `trackers`, `summary`

A step never waits for the device: its result is read while the next step is already queued, and whatever ranks have
to agree on (stop, skip) travels in the same message and takes effect one step late, on all of them alike.
"""
