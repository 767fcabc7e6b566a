"""Output of a run: terminal, metrics file, trackers, profiles.

`observer`           the events of a run; `observers` dispatches them, on global rank 0
`metrics`            metrics.jsonl, one JSON object a step
`progress`, `live`   lines in a pipe, a live view on a terminal; `summary`: the table and the picture at the end
`trackers`           Weights & Biases and TensorBoard, written by a separate process (`tracker_process`)
`goodput`            accounts for every second of a run
`profile`            traces of chosen steps; `breakdown`: where the time of such a step goes (`module_names`)
"""
