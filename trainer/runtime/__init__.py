"""The process of a rank: signals, hangs, failures, outcome.

`process`            the process of a rank: progress stamps, log redirection; `outcome`: records of how attempts end
`requests`           requests to stop or save; `signal_listener`: reads signals
`preflight`          checks between machines before training; `shutdown_estimate`: seconds of a last save
`watchdog`           finds ranks without progress from outside and ends them; `hang_report` collects their `stack_dump`
`stragglers`         detection of slow ranks; `faults`: failures injected on request
"""
