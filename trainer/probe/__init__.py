"""What the machines of a run can do, measured by its ranks: `stoker probe`, and `launch.preflight` before training.

`facts`      what a rank found: plain values that travel between ranks as JSON
`products`   rates of matrix products and of memory
`links`      collectives over each axis, and messages between machines, fitted as latency and bandwidth
`storage`    direct input and output of the folders of a run
`host`       clock, versions, limits, network interfaces;  `gpu_health`  what nvidia-smi reports
`needs`      what the run asks of storage
`judge`      from facts to findings: pure functions
`measure`    the order in which ranks measure, together;  `preflight`  the quick part before a run

All ranks measure at the same time, as they train: a rank alone on its machine would have all of its memory bandwidth.
Nothing here uses the process's random numbers or changes what a run computes.
"""
