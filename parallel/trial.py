"""Forward passes on the meta device: shapes of a model's parts, found without memory and before any step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stoker.parallel.model import Part
from stoker.parallel.registry import Registry
from stoker.parallel.sharding import replace_parameters
from stoker.parallel.tensor.check import refuse_open_regions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A micro-batch on the meta device: `rows` of `seq_len` tokens, with documents if attention stays inside them."""

    rows: int
    seq_len: int
    documents: bool

    def activations(
        self, parts: Sequence[Part], build: Callable[[Part], nn.Module], dtype: torch.dtype
    ) -> list[Tensor]:
        """Meta tensors like the outputs of all `parts` but the last when they compute in `dtype`.

        `build` makes a part on the meta device. Raises ValueError for a model that cannot run there, and for a
        persistent buffer that several parts hold: their values would diverge.
        """
        found: list[Tensor] = []
        owners: dict[str, Part] = {}
        for part in parts if len(parts) > 1 else ():
            model = build(part)
            saved = model.state_dict(keep_vars=True)
            for name in (name for name, _ in model.named_buffers() if name in saved):
                if owners.setdefault(name, part) != part:
                    raise ValueError(
                        f"buffer {name} is persistent and in several pipeline stages, which would each change their "
                        "own: register it in a layer, or where part.embedding is true; parallel.pp=1 works"
                    )
            if part.head:
                break
            try:
                replace_parameters(model, lambda _, old: nn.Parameter(old.to(dtype)))  # buffers stay as they are
                with torch.no_grad():
                    output = self._run(model, found[-1] if found else None)
            except Exception as error:
                raise ValueError(
                    f"{type(model).__name__}, layers {part.layers.start} to {part.layers.stop - 1}, does not run on "
                    "the meta device, where a pipeline finds the sizes of activations; forward may not depend on "
                    f"values (such as by .item()): {_first_line(error)}"
                ) from error
            found.append(torch.empty(output.shape, dtype=output.dtype, device="meta"))
        return found

    def refuse_open_regions(
        self,
        model: nn.Module,
        registry: Registry,
        received: Tensor | None,
        build: Callable[[], nn.Module],
        whole: Tensor | None,
    ) -> None:
        """Raises ValueError for a `model`, on the meta device and cut over tp, that leaves a region open.

        `received` is the output of the stage before, if there is one, `whole` the same where no ranks share the tokens.
        `build` makes the same part again, uncut.
        """
        x = None if received is None else received.float().requires_grad_()
        try:
            output = self._run(model, x)
        except Exception as error:
            if self._runs_uncut(build(), whole):
                raise ValueError(
                    f"{type(model).__name__} does not run once it is cut over tensor-parallel ranks: "
                    f"{_first_line(error)} (does a RowLinear end every region that CopyToTensorParallel begins?); "
                    "parallel.tp=1 works"
                ) from error
            log.warning(
                "%s does not run on the meta device, so it could not be checked that it leaves every "
                "tensor-parallel region that it enters: compare with one process by `stoker check` (%s)",
                type(model).__name__,
                _first_line(error),
            )
            return
        refuse_open_regions(model, registry, output, x)

    def _runs_uncut(self, model: nn.Module, received: Tensor | None) -> bool:
        try:
            self._run(model, received)
        except Exception:  # of any kind: the model runs with real tensors only
            return False
        return True

    def _run(self, model: nn.Module, received: Tensor | None) -> Tensor:
        shape = (self.rows, self.seq_len)
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        documents = torch.empty(shape, dtype=torch.int32, device="meta") if self.documents else None
        return model(tokens if received is None else received, tokens, documents, tokens)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
