"""CUDA graphs of a network's passes: a small network on a large GPU waits for its host else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Whole(nn.Module):
    """Holds a network, so that nothing of the network itself is patched."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class Graphed:
    """Calls a network in train mode through CUDA graphs of its forward and backward pass.

    They are recorded anew when other tensors make the network, as after it was shrunk. Batches of
    another shape than the recorded one, and all on a CPU, go the usual way.
    """

    def __init__(self) -> None:
        self._shape: torch.Size | None = None
        self._made_of: list[Tensor] = []
        self._at: list[tuple[int, torch.Size, bool]] = []
        self._call: Any = None

    def __call__(self, model: nn.Module, x: Tensor) -> Any:
        """What ``model(x)`` gives; x [N, C, H, W]."""
        if not x.is_cuda or (self._shape is not None and x.shape != self._shape):
            return model(x)
        tensors = [*model.parameters(), *model.buffers()]
        at = [(t.data_ptr(), t.shape, t.requires_grad) for t in tensors]
        same = len(tensors) == len(self._made_of) and at == self._at
        if not same or any(a is not b for a, b in zip(tensors, self._made_of, strict=True)):
            self._record(model, x)
            self._shape, self._made_of, self._at = x.shape, tensors, at
        return self._call(x)

    def _record(self, model: nn.Module, x: Tensor) -> None:
        """Record the passes; what they count on the way (running statistics) is put back."""
        self._call = None  # the memory of the old graphs is free for the new ones
        # The recorded pass lives on, and later ones share its AccumulateGrad nodes, which are of
        # another stream. Autograd waits for it, and would warn that this costs time.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        before = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._call = torch.cuda.make_graphed_callables(_Whole(model), (x.clone(),))
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
