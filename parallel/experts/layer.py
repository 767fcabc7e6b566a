"""The experts of one layer: SwiGLU networks (Shazeer 2020) whose matrices are stacked, computed together, none dropped.

Tokens are sorted by expert, stably, so that the rows of an expert stand in the order of one process's tokens, and
the results of a token are summed in the order of its choices: nothing depends on how many tokens an expert got.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stoker.parallel.experts.axis import ALL_TO_ALL, ExpertAxis
from stoker.parallel.experts.dispatch import at_home, by_all_gather, by_all_to_all
from stoker.parallel.experts.product import grouped_product
from stoker.parallel.registry import Entry, Piece
from stoker.parallel.shards import Chunk
from stoker.parallel.tensor.axis import Share, TensorAxis, sharded_entry
from stoker.parallel.tensor.layers import TensorLayer
from stoker.parallel.tensor.regions import all_gather, enter, leave


class Experts(TensorLayer):
    """`num` experts of `width` features and `hidden` channels, stacked as Hugging Face's files of today hold them.

    Expert parallelism gives a rank equally many of them, tensor parallelism some of the channels of each.
    """

    tensor: TensorAxis | None = None  # None unless the channels are cut
    experts: ExpertAxis | None = None  # None while this rank has all experts

    def __init__(self, num: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num, 2 * hidden, width))  # gate, then up
        self.down_proj = nn.Parameter(torch.empty(num, width, hidden))
        self.describe(num, width, hidden)

    def describe(self, num: int, width: int, hidden: int) -> None:
        """The sizes of the whole layer."""
        self.num, self.hidden = num, hidden
        self.fused = {"gate_up_proj": (1, (hidden, hidden)), "down_proj": (1, (width,))}  # matrices of an expert

    def cut(self, axis: TensorAxis) -> list[Entry]:
        if not axis.experts:  # each rank computes whole experts: of its tokens, or the same as the others
            return []
        self.tensor, share = axis, axis.equal_share(self.hidden)
        both = _gate_and_up(tuple(self.gate_up_proj.shape), share)
        return [both, sharded_entry("down_proj", tuple(self.down_proj.shape), 2, share)]

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' results, `[tokens, width]`, in the dtype of `x`.

        `x` is `[tokens, width]`; `chosen` int64 `[tokens, k]`, numbers of experts; `weights` `[tokens, k]`.
        """
        if self.tensor is None:
            return self._whole(x, chosen, weights)
        if self.tensor.sequence:
            chosen = all_gather(chosen, self.tensor.group_name, self.tensor.size)
        return leave(self._whole(enter(x, self.tensor), chosen, enter(weights, self.tensor)), self.tensor)

    def _whole(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.experts is None:
            return at_home(x, chosen, weights, self.num, self.compute)
        dispatched = by_all_to_all if self.experts.dispatcher == ALL_TO_ALL else by_all_gather
        return dispatched(x, chosen, weights, self.num, self.compute, self.experts)

    def compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        """The results for `rows`, `[rows, width]`: `counts` of them for each expert of this rank, in order (int64)."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = grouped_product(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        return grouped_product(F.silu(gate) * up, self.down_proj, ends)


def _gate_and_up(shape: tuple[int, ...], share: Share) -> Entry:
    """The entry of `gate_up_proj` of the global `shape` of which this rank holds `share` of gate and of up."""
    num, both, width = shape
    pieces = tuple(
        Piece(
            Chunk((0, number * len(share), 0), (num, len(share), width)),
            Chunk((0, number * (both // 2) + share.start, 0), (num, len(share), width)),
        )
        for number in range(2)
    )
    return Entry("gate_up_proj", shape, pieces)
