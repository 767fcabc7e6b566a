"""The model: Stoker's own decoder, to be replaced by yours. Any nn.Module with the same four methods trains."""

from torch import nn

from stoker.conf.schema import ModelConfig
from stoker.models.decoder import build as decoder
from stoker.parallel.model import Part


def build(config: ModelConfig, part: Part) -> nn.Module:
    """The layers `part.layers` of the model that `config`, the section `model` of the settings, describes."""
    return decoder(config, part)
