"""The model: Stoker's own decoder, to be replaced by yours. Any nn.Module with the same four methods trains."""

from stoker.conf.schema import ModelConfig
from stoker.models.decoder import build as decoder
from stoker.parallel.model import ParallelizableModel, StageSpec


def build(config: ModelConfig, part: StageSpec) -> ParallelizableModel:
    """The layers `part.layers` of the model that `config`, the section `model` of the settings, describes."""
    return decoder(config, part)
