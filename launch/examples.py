"""What `stoker COMMAND --help` shows below the options."""

TRAIN = """\
examples:
  stoker train                             a tiny model on Python's own library
  stoker train run.dir=runs/a steps=1000 eval.sequences=64
  stoker train run.dir=runs/a launch.nproc=1            resume it, on one rank
  stoker train data=text data.path=books model=small    your own text
`stoker config` prints every key; conf/schema.py has a comment for each.
"""

CONFIG = """\
examples:
  stoker config model=small optim.lr=3e-4
  stoker config --layout launch.nproc=4096 batch.size=4096 parallel.zero=3
"""

CHECK = """\
examples:
  stoker check launch.nproc=4 parallel.tp=2 parallel.zero=3  against one process
  stoker check model.target=mine:build launch.nproc=2 parallel.pp=2
  stoker check parallel.zero=3 --against "parallel.zero=0"   two layouts
  stoker check model.init_from=DIR launch.nproc=2 --against transformers

In fp32 and with optim.eps=1e-6, so that a difference is more than rounding,
unless precision=... or optim.eps=... is given.
The status is 0 if both are the same run.
"""

TEACH = """\
examples:
  stoker teach lessons model.init_from=TEACHER data=text data.path=books \\
      seq_len=1024 precision=bf16 parallel.tp=2
  stoker train run.dir=runs/student model=small data=text data.path=books \\
      seq_len=1024 objective=distill objective.teacher=lessons

Data, tokenizer, packing and seq_len have to be those of the run that learns.
"""

EVAL = """\
examples:
  stoker eval out/model --tasks mine --include tasks
  stoker eval runs/a --tasks mine --include tasks launch.nproc=2 parallel.tp=2

Nothing is downloaded without --online: tasks read files of yours.
"""

PLAN = """\
examples:
  stoker plan model=small launch.nproc=2
  stoker plan model=llama3_8b seq_len=8192 batch.micro_size=1 parallel.zero=3 \\
      --gpu H100 --gpus 8 --tokens 1e12 --price 2.5 --mtbf 200

The status is 0 if it fits, 1 if it does not, 2 for a start that is refused.
"""

PROBE = """\
examples:
  stoker probe model=small launch.nproc=2
  stoker plan --gpu machine.json model=small launch.nproc=2
  torchrun --nnodes 4 --nproc-per-node 8 ... -m stoker.launch.probe model=small

The status is 0, 1 for a machine that launch.preflight would refuse, and 2 for
a start that is refused.
"""

IMPORT = """\
examples:
  stoker import old/llama out/llama      pytorch_model.bin, or litgpt
  stoker import outputs/checkpoint/step-1000 out/titan --config config.json
  stoker train model.init_from=out/titan optim.init_from=out/titan data=text

OUT is compared with SOURCE by the logits of both, or is not made.
"""


COMPLETION = """\
to have it in every shell:
  bash  echo 'eval "$(stoker completion bash)"' >> ~/.bashrc
  zsh   echo 'eval "$(stoker completion zsh)"' >> ~/.zshrc    (after compinit)
  fish  stoker completion fish > ~/.config/fish/completions/stoker.fish
"""
