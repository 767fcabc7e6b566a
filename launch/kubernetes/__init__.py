"""Runs on Kubernetes and on clouds: manifests that `stoker submit` renders, and the process that a pod starts.

`manifests`  a JobSet, a TrainJob of Kubeflow's Trainer v2, or a task of SkyPilot, from a settled config
`pod`        starts the ranks of one pod; the pods of a set meet at a gate of the first one

A pod that is evicted gets SIGTERM: its ranks save within the grace period and end, the set is started again, and the
run resumes. Checkpoints and metrics are on a volume that all pods mount.
"""
