"""Norms of a small network that go on to count the channels that were removed, as zeros.

A layer norm over C channels divides by C. The masked network still has them all; the small one has
a share s of them, and the others are zero. With means over those that stay,

    mu = s mean(x),    variance = s mean((x - mu)^2) + (1 - s) mu^2,

so the norm stays exact, without a tensor of the old width and without cancellation. These are
plain PyTorch calls: they train, export and run at half precision. (`torch.var_mean` is ten times
slower on a CPU than the two means.)
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = (torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> Tensor:
    """Statistics of low precision are taken in float32, as PyTorch does."""
    return x.float() if x.dtype in _LOW else x


def _standardised(x: Tensor, dims: list[int], share: float, eps: float) -> Tensor:
    mean = share * x.mean(dims, keepdim=True)
    centred = x - mean
    variance = share * centred.square().mean(dims, keepdim=True) + (1 - share) * mean.square()
    return centred * torch.rsqrt(variance + eps)


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int] | None = None
) -> Tensor:
    """X times weight plus bias; these in another shape where it is given."""
    if weight is not None:
        x = x * (weight if shape is None else weight.reshape(shape))
    if bias is not None:
        x = x + (bias if shape is None else bias.reshape(shape))
    return x


def layer_norm(
    x: Tensor, over: int, weight: Tensor | None, bias: Tensor | None, eps: float, share: float
) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last dimensions, of which a share is left.

    Args:
        x: [..., C], floating.
        over: how many of the last dimensions are normalised.
        weight: of the shape of these dimensions, or None.
        bias: likewise.
        eps: added to the variance.
        share: positions that are left over positions that there were; the others count as zero.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    dims = list(range(x.dim() - over, x.dim()))
    return _affine(_standardised(_wide(x), dims, share, eps), weight, bias).to(x.dtype)


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, share: float
) -> Tensor:
    """`torch.nn.functional.group_norm` of channels of which every group has kept a share.

    Args:
        x: [N, C, ...], floating.
        groups: number of groups of channels.
        weight: [C] or None.
        bias: [C] or None.
        eps: added to the variance.
        share: channels that are left over channels that there were; the others count as zero.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    grouped = _wide(x).reshape(x.shape[0], groups, -1)
    y = _standardised(grouped, [2], share, eps).reshape(x.shape)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return _affine(y, weight, bias, shape).to(x.dtype)


def standardised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, share: float
) -> Tensor:
    """Weight standardisation: `torch.nn.functional.batch_norm` of filters of which a share is left.

    Args:
        x: [1, O, R], the filters as rows.
        weight: [O] or None.
        bias: [O] or None.
        eps: added to the variance.
        share: positions that are left over positions that there were; the others count as zero.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    y = _standardised(_wide(x), [0, 2], share, eps)
    return _affine(y, weight, bias, [1, -1, 1]).to(x.dtype)


def rms_norm(
    x: Tensor, over: int, weight: Tensor | None, eps: float | None, share: float
) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimensions, of which a share is left.

    Args:
        x: [..., C], floating.
        over: how many of the last dimensions are normalised.
        weight: of the shape of these dimensions, or None.
        eps: added to the mean square; None for that of the dtype.
        share: positions that are left over positions that there were; the others count as zero.

    Returns:
        A tensor of the shape and dtype of ``x``.
    """
    dims = list(range(x.dim() - over, x.dim()))
    wide = _wide(x)
    size = share * wide.square().mean(dims, keepdim=True)
    y = wide * torch.rsqrt(size + (torch.finfo(wide.dtype).eps if eps is None else eps))
    return _affine(y, weight, None).to(x.dtype)


def mean(x: Tensor, dims: list[int], keepdim: bool, share: float) -> Tensor:
    """`torch.mean` over dimensions of which a share of the positions is left.

    Args:
        x: any shape, floating.
        dims: dimensions to average over.
        keepdim: whether they stay, with size 1.
        share: positions that are left over positions that there were; the others count as zero.

    Returns:
        The mean over all positions that there were.
    """
    return share * x.mean(dims, keepdim=keepdim)


def spread(x: Tensor, kept: Tensor, dim: int, size: int) -> Tensor:
    """Put zeros back where channels went, for what slides over all of them.

    Args:
        x: any shape, with the kept channels along ``dim``.
        kept: int64, where they were.
        dim: the dimension of the channels.
        size: how many there were.

    Returns:
        A tensor of ``size`` positions along ``dim``.
    """
    shape = [size if d == dim else n for d, n in enumerate(x.shape)]
    return x.new_zeros(shape).index_copy(dim, kept, x)
