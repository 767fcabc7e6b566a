"""What is about to start: a config and the machine's ranks and GPUs, with what follows from the three."""

from __future__ import annotations

from dataclasses import dataclass

from stoker.conf.schema import Config, ModelConfig
from stoker.parallel.layout import BatchPlan, Layout, batch_plan


@dataclass(frozen=True)
class Start:
    """What is about to start: `config` on `world` ranks, which may use `gpus` GPUs over all machines."""

    config: Config
    world: int
    gpus: int

    @property
    def cuda(self) -> bool:
        """Whether the ranks compute on GPUs."""
        device = self.config.launch.device
        return device == "cuda" or (device is None and self.gpus > 0)

    @property
    def built_in_model(self) -> bool:
        """Whether the shape in `config.model` describes the model; a user's own model may read none of it."""
        return self.config.model.target == ModelConfig().target

    @property
    def dp(self) -> int | None:
        """The data-parallel degree, or None where the axes do not fit the ranks, which is refused by its own entry."""
        wanted = self.config.parallel
        if min(self.world, wanted.tp, wanted.pp) < 1 or self.world % (wanted.tp * wanted.pp):
            return None
        return self.world // (wanted.tp * wanted.pp)

    @property
    def plan(self) -> BatchPlan | None:
        """The split of the rows, or None where they do not divide, which is refused by its own entry."""
        if self.dp is None or self.config.batch.size < 1:
            return None
        try:
            return batch_plan(self.config, Layout(dp_replicate=self.dp))
        except ValueError:
            return None
