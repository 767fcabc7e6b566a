"""`python -m tests.gpu`: what one GPU can prove in six minutes, the most knowledge first (`make gpu`).

`__main__`  runs each step in a process of its own, with its own time limit; a table and a JSON at the end
`steps`     the steps that build an engine; `kernels`: attention and the loss; `commands`: `stoker`, benchmarks
`report`    what became of each step: nothing that did not run can look like something that passed

A machine needs torch, transformers, hydra-core, omegaconf and antlr4-python3-runtime, and neither pytest nor DeepSpeed.
With `--device cpu` the same steps run with the device replaced: that proves the script, and nothing of a GPU.
"""
