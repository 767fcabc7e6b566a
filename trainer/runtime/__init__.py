"""How a rank lives, hangs and ends.

`process`            the process of a rank: progress stamps, log redirection; `outcome`: records of how attempts end
`requests`           requests to stop or save, by signals, files and a deadline; `signal_listener`: the one reader of signals
`preflight`          checks between machines before they train together; `shutdown_estimate`: seconds a final save takes
`watchdog`           finds ranks without progress from outside; `hang_report` asks them through `stack_dump`, then ends them
`stragglers`         detection of slow ranks; `faults`: failures injected on request
"""
