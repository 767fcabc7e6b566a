"""What a person and other tools see of a run.

`observer`           the events of a run; `observers` passes them on, on global rank 0
`metrics`            metrics.jsonl, one JSON object a step
`progress`, `live`   lines in a pipe, a live view on a terminal; `summary`: the table and the picture at the end
`trackers`           Weights & Biases and TensorBoard, written by a process of their own (`tracker_process`)
`goodput`            what the seconds of a run were spent on
`profile`            traces of chosen steps; `breakdown`: where the time of such a step goes (`module_names`)
"""
