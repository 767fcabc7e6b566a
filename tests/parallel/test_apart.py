"""The compiler is not loaded by what torch only marks for it, and once it is loaded all of that is marked."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import torch
from torch.utils.checkpoint import checkpoint
from stoker.parallel.apart import wait_for_compiler
from stoker.parallel.optimizer import SGD, AdamW

wait_for_compiler()

def plain(x):
    return x + 1

left_out = torch._dynamo.disable(plain, reason="a test")
assert left_out.__name__ == "plain" and left_out(torch.ones(())) == 2

for build in (AdamW, SGD):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build([weight], lr=0.5, fused=True)
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(True))
    checkpoint(lambda x: x * x, weight, use_reentrant=False).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert hooked == [True] and type(optimizer).__name__ == build.__mro__[1].__name__
    assert weight.requires_grad and weight.is_leaf and not weight.equal(torch.ones(3)) and torch.is_grad_enabled()
assert "torch._dynamo" not in sys.modules

frames = []
def backend(graph, _):
    frames.append(graph)
    return graph

compiled = torch.compile(lambda x: left_out(x * 2) * 3, backend=backend)
assert compiled(torch.ones(())) == 9 and len(frames) == 2, frames
assert torch._dynamo is sys.modules["torch._dynamo"]
try:
    torch.compile(lambda x: left_out(x * 2) * 3, backend=backend, fullgraph=True)(torch.ones(()))
except torch._dynamo.exc.Unsupported:
    pass
else:
    sys.exit("it is in the graph")
AdamW([weight]).add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
"""


def test_what_torch_marks_for_the_compiler_runs_without_it_and_is_marked_once_it_is_loaded() -> None:
    ended = subprocess.run([sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
