"""Random float64 copies of a model, and random inputs, for the proof."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from psap.copying import copied
from psap.graph.inputs import Inputs, batched


@torch.no_grad()
def randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float64 copy with random norms, and no parameter that is the same number everywhere."""
    dense = copied(model).double()
    for module in dense.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    _randomise(tensor, name in ("weight", "running_var"), generator)
    for parameter in dense.parameters():
        if parameter.is_floating_point() and parameter.numel():
            first, last = parameter.reshape(-1)[[0, -1]]
            if bool(first == last) and bool((parameter == first).all()):
                _randomise(parameter, bool(first != 0), generator)
    return dense


def _randomise(tensor: Tensor, positive: bool, generator: torch.Generator) -> None:
    numbers = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    tensor.copy_(numbers + (0.5 if positive else -0.5))


def random_inputs(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Random float64 inputs, at least two of them where the inputs are a batch of one.

    Every other sample is large, so that no bias keeps an activation function on one of its sides.
    """
    tensors = batched(inputs)
    single = bool(tensors) and all(x.shape[0] == 1 for x in tensors)

    def made(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = [2, *x.shape[1:]] if single and x.dim() else list(x.shape)
        if x.is_floating_point():
            numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
            if numbers.dim():
                numbers[1::2] *= 8
            return numbers.to(x.device)
        return x.expand(shape).clone()

    result: Inputs = tree_map(made, inputs)
    return result
