"""Running statistics near those of the data, so that no norm levels out what it reads.

A batch norm whose running variance is a thousand times that of its input gives almost only its
bias; behind a few of them nothing of the input is left, and two networks look the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from psap.layerwise import few
from psap.members import named_modules

Moments = dict[str, tuple[Tensor, Tensor]]
"""By the name of a norm the mean and variance [C] of its first input."""


@contextmanager
def settling(model: nn.Module, active: bool) -> Iterator[Moments]:
    """Let every batch norm take statistics near those of its first input, while the block runs."""
    found: Moments = {}
    norms = [
        (name, module)
        for name, module in (model.named_modules() if active else ())
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None
    ]
    with ExitStack() as hooks:
        for name, module in norms:

            def note(m: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                x = args[0] if args else None
                if name not in found and isinstance(x, Tensor) and x.dim() > 1 and x.numel():
                    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
                        found[name] = _moments(x)
                        _settle(m, *found[name])

            hooks.enter_context(module.register_forward_pre_hook(note))
        yield found


def settle(
    model: nn.Module, found: Moments, kept: Mapping[str, Mapping[int, tuple[int, ...]]]
) -> None:
    """Give the norms of a model these statistics, changed by those that each has now.

    Args:
        model: the dense network, or the small one.
        found: what `settling` gave.
        kept: by parameter or buffer and dimension the positions that the model has.
    """
    there = dict(named_modules(model))
    for name, (mean, variance) in found.items():
        if name not in there:
            continue  # it went with a residual branch
        stays = kept.get(f"{name}.running_mean", {}).get(0)
        if stays is not None:
            at = torch.tensor(stays, device=mean.device)
            mean, variance = mean[at], variance[at]
        _settle(there[name], mean, variance)


def _settle(module: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Statistics that were near 0 and 1 come near these; those of another size stay."""
    center, spread = module._buffers.get("running_mean"), module._buffers.get("running_var")
    if center is not None and spread is not None and center.shape == spread.shape == mean.shape:
        center.mul_(variance.sqrt()).add_(mean)
        spread.mul_(variance)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, at a few positions."""
    channels = few(x, 1).movedim(1, 0).flatten(1)
    mean = channels.mean(1)
    variance = (channels - mean[:, None]).square_().mean(1)
    count = channels.shape[1]  # of few numbers some are alike by chance, or all if there is one
    spread = (variance if count > 1 else mean.square()).mean() / count
    # what is smaller than these would magnify rounding errors, the more the more norms there are
    variance = torch.maximum(variance, torch.maximum(spread, 1e-8 * mean.square()))
    return mean, torch.where(variance > 0, variance, 1.0)
