"""An imported folder beside the model that its source was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stoker.conf.compose import compose
from stoker.trainer.import_check import compare_import, load_theirs
from stoker.trainer.pretrained import adopt_shape


def assert_computes_the_same(model: Any, out: Path) -> None:
    """transformers and Stoker compute from `out` what transformers' `model` computes."""
    tokens = torch.randint(0, 320, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits
        found = load_theirs(out, model.config)(tokens).logits
    assert (found - expected).norm() / expected.norm() < 1e-5
    config = adopt_shape(compose([f"model.init_from={out}"]), [])
    assert "equal to transformers'" in str(compare_import(config))
