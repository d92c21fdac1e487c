"""What PyTorch itself cannot train safely, and small networks run into.

On a CPU, the kernel behind the weight gradient of a strided 1x1 convolution in channels_last writes
past its buffer if there are fewer input channels than lanes: 8 with AVX2, 16 with AVX-512 (oneDNN
issue 6035; seen with PyTorch 2.13 and 2.14). Training then crashes, or goes on with damaged memory.
Contiguous tensors take another kernel.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from psap.errors import PsapWarning
from psap.members import named_modules

LANES = 16


def strided_pointwise(model: nn.Module) -> list[str]:
    """Names of the float32 convolutions on the CPU with 1x1 kernels, strides and no groups."""
    return [
        name
        for name, module in named_modules(model)
        if isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.groups == 1
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    ]


def training_format(model: nn.Module) -> torch.memory_format:
    """Channels_last, which is faster, unless pruning may make it unsafe to train in."""
    return torch.contiguous_format if strided_pointwise(model) else torch.channels_last


def warn_unsafe(model: nn.Module) -> None:
    """Warn of convolutions that may crash when the model is trained further as it is.

    Warns:
        PsapWarning: a strided 1x1 convolution has too few input channels, and the model is in
            channels_last on a CPU.
    """
    modules: dict[str, Any] = dict(named_modules(model))
    names = [n for n in strided_pointwise(model) if modules[n].weight.shape[1] < LANES]
    if names and any(
        p.dim() == 4
        and p.device.type == "cpu"
        and p.is_contiguous(memory_format=torch.channels_last)
        and not p.is_contiguous()
        for p in model.parameters()
    ):
        warnings.warn(
            f"PyTorch may crash when it trains {', '.join(names)} on a CPU in channels_last: a "
            f"strided 1x1 convolution with fewer than {LANES} input channels makes its kernel "
            "write past the end (oneDNN issue 6035). Train in contiguous tensors, "
            "model.to(memory_format=torch.contiguous_format) and inputs alike, or keep "
            f"min_channels={LANES}",
            PsapWarning,
            stacklevel=4,  # apply() is checked by `called`
        )
