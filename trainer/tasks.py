"""What ranks do for `stoker eval`: rank 0 runs the tasks of lm-eval, and all compute what the model predicts.

Rank 0 sends batches of tokens over the control group, every data-parallel rank predicts its rows, and the sums of what
they found come back. So a task sees one model, whatever the layout.
"""

from __future__ import annotations

import json
from pathlib import Path

from stoker.conf.durable import write_whole
from stoker.trainer.loop import Trainer
from stoker.trainer.predictions import Predictions
from stoker.trainer.runtime.outcome import Outcome


def run_tasks(trainer: Trainer) -> Outcome:
    """Runs instead of `Trainer.fit`; the objective is `stoker.models.objectives.teaching`, with one token a label."""
    ranks = Predictions(trainer)
    if trainer.mesh.rank:
        ranks.serve()
        return Outcome.STOPPED
    from stoker.trainer.harness import results_of  # with lm-eval, which rank 0 alone needs

    try:
        found = results_of(trainer.config, ranks)
    finally:
        ranks.end()
    write_whole(Path(trainer.config.objective.args["results"]), json.dumps(found, default=str).encode())
    return Outcome.STOPPED
