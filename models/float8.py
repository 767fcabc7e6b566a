"""Which linear layers of a model compute in float8: the config's choice, for any family."""

from __future__ import annotations

from torch import nn

from stoker.conf.schema import Config
from stoker.models.adapters import Names
from stoker.parallel.tensor.float8 import SLOT, UNIT, Float8
from stoker.parallel.tensor.low_rank import AdaptedLinear, takes_adapters

NONE = (
    "precision=fp8: {} has no linear layer in its blocks that can compute in float8 (a multiple of 16 features, one "
    "that adapters could take, and not in fp8.filter_fqns): precision=bf16 works"
)


def compute_in_float8(part: nn.Module, config: Config) -> nn.Module:
    """`part` of a model, before it is cut, changed in place: linear layers of its blocks compute in float8.

    Those of `fp8.filter_fqns`, and those with a number of features that is no multiple of 16, stay as they are.
    """
    names = Names(part, config)
    inside, patterns = tuple(names.blocks.values()), config.fp8.filter_fqns
    for name, layer in part.named_modules():
        if not isinstance(layer, nn.Linear) or not name.startswith(inside) or not takes_adapters(layer):
            continue
        if any(names.matching(pattern, [name]) for pattern in patterns):
            continue
        if layer.in_features % UNIT == 0 and layer.out_features % UNIT == 0:
            if type(layer) is nn.Linear:
                layer.__class__ = AdaptedLinear
            setattr(layer, SLOT, Float8(config.fp8.amax_floor))
    return part
