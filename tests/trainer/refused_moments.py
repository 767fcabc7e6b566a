"""Moments to begin with, and what does not go together with them: entries for the table of `test_refusals`."""

from __future__ import annotations

OF_MOMENTS: dict[str, list[tuple[list[str], int, int, str]]] = {
    "moments to begin with": [
        (
            ["optim.init_from=old", "model.init_from=old", "optim.name=lion"],
            1,
            0,
            "optim.init_from=old holds AdamW's moments: optim.name=adamw goes on with them",
        ),
        (
            ["optim.init_from=old", "model.init_from=old", "optim.groups=[{role: head, name: sgd}]"],
            1,
            0,
            "holds AdamW's moments: optim.groups=[] goes on with them",
        ),
        (
            ["optim.init_from=old", "model.init_from=old", "optim.target=torch.optim:SGD"],
            1,
            0,
            "holds AdamW's moments: optim.target=null goes on with them",
        ),
        (["optim.init_from=old"], 1, 0, "without the weights of these moments: model.init_from=old"),
        (
            ["optim.init_from=old", "model.init_from=old", "model.init_only=[layers.*]"],
            1,
            0,
            "optim.init_from=old with model.init_only: its moments are of all weights of a model",
        ),
        (
            ["optim.init_from=old", "model.init_from=old", "adapter.name=lora"],
            1,
            0,
            "optim.init_from=old with adapter=lora: its moments are of all weights",
        ),
    ],
}
