"""Distillation: a student learns a teacher's distribution for each label, and the label (Hinton et al. 2015)."""

from __future__ import annotations

from stoker.conf.schema import ObjectiveConfig
from stoker.parallel.objective import NextToken


class Distill(NextToken):
    """The loss of `stoker.parallel.objective.Teacher`, over labels as that of next_token is. A `Taught` objective."""

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.temperature, self.mix = config.temperature, config.mix
