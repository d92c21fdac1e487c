"""Every op in plain PyTorch: the fallback where nothing is compiled, and what kernels must equal.

The arguments are those of the schemas in ``_library``, already checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Dtypes that few operations of PyTorch know, and integers of their size.
_INTEGERS = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
    torch.float8_e8m0fnu: torch.uint8,
}


def layer_stats(
    weights: list[Tensor], grads: list[Tensor], tau: Tensor, per_input: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums and counts per filter and per layer, all of them taken in float64."""
    filter_sums = [tau.new_empty((6, 0), dtype=torch.float32)]
    filter_counts = [tau.new_empty((3, 0), dtype=torch.int32)]
    layer_sums = [tau.new_empty((0, 7), dtype=torch.float64)]
    layer_counts = [tau.new_empty((0, 3), dtype=torch.int64)]
    input_sums = [tau.new_empty(0, dtype=torch.float32)]
    for layer, weight in enumerate(weights):
        w = _rows(weight)
        g = _rows(grads[layer]) if grads else torch.zeros_like(w)
        wg = w * g if grads else g  # 0 without gradients, where w is NaN too
        sums = torch.stack([t.sum(1) for t in (w.abs(), w * w, g.abs(), g * g, wg.abs(), wg, w)])
        counts = torch.stack(
            [t.sum(1) for t in (w.abs() < tau[layer], ~w.isfinite(), ~g.isfinite())]
        )
        filter_sums.append(sums[:6].float())
        filter_counts.append(counts.int())
        layer_sums.append(sums.sum(1)[None])
        layer_counts.append(counts.sum(1)[None])
        if per_input and weight.dim() > 1:
            others = [d for d in range(weight.dim()) if d != 1]
            input_sums.append(wg.reshape(weight.shape).sum(others).float())
    return (
        torch.cat(filter_sums, 1),
        torch.cat(filter_counts, 1),
        torch.cat(layer_sums),
        torch.cat(layer_counts),
        torch.cat(input_sums),
    )


def _rows(tensor: Tensor) -> Tensor:
    """[O, ...] -> float64 [O, n]; view() cannot infer n where O is 0."""
    return tensor.double().reshape(tensor.shape[0], tensor.shape[1:].numel())


def abs_histogram(
    tensors: list[Tensor], scales: Tensor, first: int, shift: int, bins: int
) -> Tensor:
    """A bincount of the keys."""
    counts = scales.new_zeros((len(tensors), bins + 2), dtype=torch.int64)
    for layer, tensor in enumerate(tensors):
        value = (tensor.float().abs() * scales[layer]).abs().reshape(-1)
        key = torch.where(value.isnan(), 2**31 - 1, value.view(torch.int32).long())
        column = torch.where(key < first, -1, (key - first) >> shift).clamp(-1, bins) + 1
        counts[layer] = torch.bincount(column, minlength=bins + 2)
    return counts


def gate_stats_(
    sums: Tensor,
    seen: Tensor,
    values: list[Tensor],
    grads: list[Tensor],
    terms: Tensor,
    offsets: Tensor,
    scale: float,
) -> None:
    """One dot product a term, in float64; no value is brought to the host."""
    dots = sums.new_zeros(terms.shape[0])
    for k, (value, grad) in enumerate(zip(values, grads, strict=True)):
        at = (terms[:, 0] == k).nonzero()[:, 0]
        v, g = _rows(value)[terms[at, 1].long()], _rows(grad)[terms[at, 2].long()]
        dots[at] = (v * g).sum(1)
    lengths = offsets.diff()
    channel = torch.arange(len(lengths), device=sums.device).repeat_interleave(lengths)
    d = torch.zeros_like(sums[0]).index_add_(0, channel, dots) * scale
    finite = d.isfinite().all()
    d = torch.where(finite, d, 0.0)
    sums += torch.stack([d, d * d])
    seen += torch.stack([finite, ~finite])


def shrink(tensors: list[Tensor], keep_dim0: list[Tensor], keep_dim1: list[Tensor]) -> list[Tensor]:
    """Two index_selects, in the memory format of the input."""
    outputs = []
    for tensor, keep0, keep1 in zip(tensors, keep_dim0, keep_dim1, strict=True):
        out = _bits(tensor).index_select(0, keep0)
        if tensor.dim() > 1:
            out = out.index_select(1, keep1)
        out = out.contiguous(memory_format=memory_format(tensor))
        outputs.append(out if out.dtype == tensor.dtype else out.view(tensor.dtype))
    return outputs


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Return the format that ``shrink`` keeps.

    channels_last where the tensor has it; a tensor that is contiguous too (one channel, a 1x1
    kernel) counts as channels_last only if its last stride is the number of channels.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.dim())
    if wanted is None or not tensor.is_contiguous(memory_format=wanted):
        return torch.contiguous_format
    both = tensor.is_contiguous()
    if both and (tensor.shape[1] == 1 or tensor.stride(-1) != tensor.shape[1]):
        return torch.contiguous_format
    return wanted


def zero_filters_(tensors: list[Tensor], keep: list[Tensor]) -> None:
    """A masked fill: multiplying would leave NaN."""
    for tensor, kept in zip(tensors, keep, strict=True):
        _bits(tensor).masked_fill_(~kept.reshape(-1, *[1] * (tensor.dim() - 1)), 0)


def restore_filters_(tensors: list[Tensor], rows: list[Tensor], saved: list[Tensor]) -> None:
    """An index copy: the bits of ``saved`` as they are."""
    for tensor, index, values in zip(tensors, rows, saved, strict=True):
        _bits(tensor).index_copy_(0, index, _bits(values))


def _bits(tensor: Tensor) -> Tensor:
    """The same memory, in a dtype that every operation of PyTorch knows."""
    known = _INTEGERS.get(tensor.dtype)
    return tensor if known is None else tensor.view(known)
