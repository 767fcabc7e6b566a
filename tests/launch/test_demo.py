"""What `make demo` shows at its end, and when it fails. The demo itself takes minutes."""

from __future__ import annotations

import pytest

from stoker.launch.demo import judged


def step(number: int, val: float, train: float) -> dict[str, float]:
    return {"step": number, "loss": 1.9, "val_loss": val, "train_loss": train}


@pytest.mark.parametrize(
    ("val", "train", "wrong"),
    [
        (1.98, 1.91, None),
        (1.98, 2.05, None),
        (1.98, 1.65, "more than 0.1 apart"),
        (1.65, 1.98, "more than 0.1 apart"),
        (2.2, 2.2, "not under 2.1"),
    ],
)
def test_both_losses_are_shown_and_must_be_close(
    val: float, train: float, wrong: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged([step(80, 3.0, 1.0), step(160, val, train), {"step": 161, "loss": 1.9}])
    assert (found is None) == (wrong is None) and (wrong or "") in (found or "")
    assert f"Validation loss {val:.3f} nats per byte, {train:.3f} on training" in capsys.readouterr().out
