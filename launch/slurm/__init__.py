"""Runs as Slurm jobs.

`submit`    `stoker submit`: a settled config becomes a script in the run directory, and the script a job
`batch`     the job's process on its first node: starts the ranks, passes signals on, decides what follows
`node`      on each node, under srun: that node's ranks, through the agent of `stoker.launch.local`
`verdict`   what follows, as a pure function of the facts: end, restart, requeue, leave it to the next job of a chain
`commands`  sbatch, scontrol and scancel, and their output
`train.sbatch`  a script that `sbatch` takes unchanged and that `submit` fills in

Only `batch` decides. Where ranks fail it starts them again inside the allocation; where the allocation is taken away it
requeues the job. It settles the config once and passes it to the nodes through the environment, with the address of its
store, on a port that the system picked: nodes need neither Hydra nor Slurm's commands, so srun may put them into
containers. However the job ends, the next start finds its full state in the run directory.
"""
