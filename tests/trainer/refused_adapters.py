"""What adapters do not go together with: entries for the table of `test_refusals`."""

from __future__ import annotations

DEEPSPEED = ["parallel.engine=deepspeed"]

OF_ADAPTERS: dict[str, list[tuple[list[str], int, int, str]]] = {
    "settings of no adapter": [
        (["adapter.rank=4"], 1, 0, "adapter.rank=4 with adapter=none: adapter=lora trains an adapter"),
    ],
    "frozen parameters of an adapter run": [
        (["adapter.name=lora", "model.freeze=[embedding]"], 1, 0, "model.freeze=[] works, or adapter=none"),
    ],
    "a base to keep": [
        (["adapter.name=lora", "adapter.keep_base=true"], 1, 0, "adapter.keep_base=false works"),
    ],
    "packed bases": [
        (["adapter.name=dora", "adapter.base=nf4"], 1, 0, "adapter=lora works, or adapter.base=null"),
        (["adapter.name=lora", "adapter.base=nf4", "precision=fp8"], 1, 0, "precision=bf16 works"),
    ],
    "dropout of DoRA": [
        (["adapter.name=dora", "adapter.dropout=0.1"], 1, 0, "adapter.dropout=0 works, or adapter=lora"),
    ],
    "DoRA under DeepSpeed": [
        (["adapter.name=dora", "precision=bf16", *DEEPSPEED], 1, 0, "parallel.engine=fsdp works, or adapter=lora"),
    ],
}
