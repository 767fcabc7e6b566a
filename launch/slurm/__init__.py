"""Runs as Slurm jobs.

`submit`    `stoker submit`: a settled config becomes a script in the run directory, and the script a job
`batch`     the job's own process, on its first node: starts the ranks, passes signals on, decides what comes next
`node`      on each node, under srun: that node's ranks, through the agent of `stoker.launch.local`
`verdict`   what comes next, as a function of what is known: end, restart, requeue, leave it to the next job of a chain
`commands`  sbatch, scontrol and scancel, and what they answer
`train.sbatch`  the script that `sbatch` takes as it is and that `submit` fills in

There is one brain, `batch`. Where ranks fail it starts them again inside the allocation; where the allocation is taken
away it goes back to the queue. It settles the config once and hands it to the nodes through the environment, with the
address of a store of its own, on a port that the system picked: nodes need neither Hydra nor Slurm's commands, so srun
may put them into containers. Whatever ends the job, the next start finds all there is to know in the run directory.
"""
