"""One decision for all processes that train one model together."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed, nn

from psap.errors import ArgumentError, PsapWarning


class Ranks:
    """The processes behind a ``DistributedDataParallel`` model; one process for any other model.

    Their weights and their averaged gradients are the same, hence their masks, too. What decides is
    sent from rank 0 all the same: a rank that has drifted must not prune other channels.

    Args:
        model: what the training loop calls.
    """

    def __init__(self, model: Any) -> None:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        self.distributed = isinstance(model, nn.parallel.DistributedDataParallel)
        if self.distributed:
            self._group = model.process_group
            self._source = distributed.get_global_rank(self._group, 0)
            self._device = next(model.parameters()).device

    def refuse_inplace(self, call: str) -> None:
        """Check that a network may change its shapes in place.

        Raises:
            ArgumentError: ``DistributedDataParallel`` holds on to the shapes that it was made with.
        """
        if self.distributed:
            raise ArgumentError(
                f"{call} cannot change a model inside DistributedDataParallel, whose buckets have "
                "the dense shapes; go without, and wrap the small model anew"
            )

    def agree(self, mine: NDArray[Any], what: str) -> NDArray[Any]:
        """What rank 0 has; every rank must ask for the same things in the same order.

        Args:
            mine: an array, of the same shape and dtype on every rank.
            what: its name for the warning.

        Warns:
            PsapWarning: this rank has something else.
        """
        if not self.distributed:
            return mine
        raw = torch.from_numpy(np.ascontiguousarray(mine).reshape(-1).view(np.uint8))
        sent = raw.to(self._device, copy=True)  # the backend of a GPU sends nothing else
        distributed.broadcast(sent, self._source, group=self._group)
        received = sent.cpu()
        if not torch.equal(received, raw):
            warnings.warn(
                f"rank {distributed.get_rank(self._group)} found other {what} than rank 0, which "
                "decides: its weights have drifted; do all ranks start from one checkpoint, and is "
                "all training done through DistributedDataParallel?",
                PsapWarning,
                stacklevel=2,
            )
        theirs: NDArray[Any] = received.numpy().view(mine.dtype).reshape(mine.shape)
        return theirs
