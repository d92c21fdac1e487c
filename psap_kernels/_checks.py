"""Checks of what users pass in. One style: argument, what it was, what is wanted, what to do.

Checks that look at *values* need the data, so they are left out while torch.compile traces; the
kernels check index ranges again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_INT32 = 2**31 - 1


def tensor_list(name: str, value: Sequence[Tensor], *, length: int | None = None) -> list[Tensor]:
    """A sequence of dense tensors; ``length`` of them if given."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        hint = f"wrap it as [{name}]" if isinstance(value, Tensor) else f"use list({name})"
        raise TypeError(
            f"{name} is a {type(value).__name__}, wanted a list or tuple of tensors: {hint}"
        )
    if length is not None and len(value) != length:
        raise ValueError(f"{name} has {len(value)} entries, wanted {length}: one for each tensor")
    for i, item in enumerate(value):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}[{i}] is a {type(item).__name__}, wanted a tensor")
        if item.layout != torch.strided:
            raise TypeError(
                f"{name}[{i}] has layout {item.layout}, wanted torch.strided: use .to_dense()"
            )
        if item.is_nested or item.is_quantized:
            raise TypeError(
                f"{name}[{i}] is a nested or quantized tensor, wanted a plain one:"
                " use .unbind() or .int_repr()"
            )
    return list(value)


def one_device(*groups: Sequence[Tensor]) -> None:
    """All tensors are on one device; the public functions say it better."""
    devices = {tensor.device for group in groups for tensor in group}
    if len(devices) > 1:
        raise ValueError(f"the tensors are on {len(devices)} devices, wanted one")


def filters(name: str, tensors: list[Tensor]) -> None:
    """Every tensor is [O, ...], all on one device."""
    for i, tensor in enumerate(tensors):
        if tensor.dim() == 0:
            raise ValueError(
                f"{name}[{i}] has no dimension, wanted [O, ...] with the filters in dimension 0:"
                " reshape it to [1]"
            )
        same_device(name, i, tensor, tensors[0].device)


# The checks below take the name and the position apart: a label made for every tensor of every
# call would cost more than the kernel does on a small network.


def _label(name: str, i: int | None) -> str:
    return name if i is None else f"{name}[{i}]"


def same_device(name: str, i: int | None, tensor: Tensor, device: torch.device) -> None:
    """``tensor`` is where the others are."""
    if tensor.device != device:
        raise ValueError(
            f"{_label(name, i)} is on {tensor.device}, wanted {device} like the others:"
            f" use .to('{device}')"
        )


# A mask in the place of positions, and the other way round: .to() would give nonsense.
_OTHER_KIND: dict[tuple[torch.dtype, ...], str] = {
    (torch.bool, torch.int64): "pass the positions, mask.nonzero().flatten()",
    (torch.int64, torch.bool): "pass a mask, torch.isin(torch.arange(n), positions)",
}


def dtype(name: str, i: int | None, tensor: Tensor, *wanted: torch.dtype) -> None:
    """``tensor`` has one of the wanted dtypes."""
    if tensor.dtype not in wanted:
        names = " or ".join(str(d) for d in wanted)
        mend = _OTHER_KIND.get((tensor.dtype, *wanted), "convert it with .to()")
        raise TypeError(f"{_label(name, i)} is {tensor.dtype}, wanted {names}: {mend}")


def shape(name: str, i: int | None, tensor: Tensor, wanted: Sequence[int], hint: str) -> None:
    """``tensor`` has exactly this shape."""
    if tensor.shape != wanted:
        raise ValueError(
            f"{_label(name, i)} has shape {list(tensor.shape)}, wanted {list(wanted)}: {hint}"
        )


def stats_arguments(weights: list[Tensor], grads: list[Tensor], tau: Tensor) -> None:
    """Arguments of ``layer_stats``."""
    filters("weights", weights)
    device = weights[0].device if weights else tau.device
    for i, weight in enumerate(weights):
        dtype("weights", i, weight, *FLOATS)
        if weight.numel() > _MAX_INT32 * weight.shape[0]:
            raise ValueError(
                f"weights[{i}] has {weight.shape[1:].numel()} elements in a filter, wanted at most"
                f" {_MAX_INT32} (counts are int32): split the filter"
            )
    for i, grad in enumerate(grads):
        same_device("grads", i, grad, device)
        dtype("grads", i, grad, weights[i].dtype)
        shape("grads", i, grad, weights[i].shape, "pass the gradient of this very weight")
    same_device("tau", None, tau, device)
    dtype("tau", None, tau, torch.float32)
    shape("tau", None, tau, (len(weights),), "pass one threshold for each weight")


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at: not while torch.compile traces or a CUDA graph captures."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


class _Looked:
    """What the values of index tensors were found to fit, until they change.

    A training loop passes the same indices at every step, and to look at them is to wait for the
    device. Those of a CPU are looked at each time: NumPy may change them behind PyTorch's back.
    """

    def __init__(self) -> None:
        self._found: Any = WeakTensorKeyDictionary()  # tensor -> version, and what it fits

    def at(self, index: Tensor, fits: Hashable) -> bool:
        """Whether it was said before that this tensor fits this."""
        if not _waits(index):
            return False
        version, known = self._found.get(index, (None, ()))
        return version == index._version and fits in known

    def note(self, index: Tensor, fits: Hashable) -> None:
        """Say that this tensor fits this."""
        if not _waits(index):
            return
        version, known = self._found.get(index, (None, set()))
        if version != index._version:
            known = set()
        known.add(fits)
        self._found[index] = (index._version, known)


def _waits(index: Tensor) -> bool:
    """Whether looking waits for a device, and changes are counted."""
    return not (index.is_cpu or index.is_inference())


_looked = _Looked()


def index_list(name: str, i: int, index: Tensor, device: torch.device) -> None:
    """An int64 list of indices; ``index_ranges`` looks at the values."""
    same_device(name, i, index, device)
    dtype(name, i, index, torch.int64)
    if index.dim() != 1:
        raise ValueError(
            f"{name}[{i}] has shape {list(index.shape)}, wanted one dimension:"
            " pass a list of indices"
        )


def index_ranges(name: str, lists: dict[int, Tensor], sizes: dict[int, int]) -> None:
    """Every list, by its position in ``name``, stays within its size.

    All lists are looked at together: one by one, this would cost more than the kernel does.
    """
    if not lists or not readable(next(iter(lists.values()))):
        return
    lists = {i: index for i, index in lists.items() if not _looked.at(index, sizes[i])}
    if not lists:
        return
    lengths = torch.tensor([index.shape[0] for index in lists.values()], device="cpu")
    limits = torch.tensor([sizes[i] for i in lists], device="cpu").repeat_interleave(lengths)
    flat = torch.cat(list(lists.values()))
    wrong = (flat < 0) | (flat >= limits.to(flat.device))
    if not wrong.any():
        for i, index in lists.items():
            _looked.note(index, sizes[i])
        return
    for i, index in lists.items():
        for value in index.tolist():
            if not 0 <= value < sizes[i]:
                raise ValueError(
                    f"{name}[{i}] has index {value}, wanted 0 <= index < {sizes[i]}:"
                    " was it made for another layer?"
                )


def expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, so that writing them is undefined."""
    shared = any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return shared and tensor.numel() > 0


def writable(name: str, tensors: list[Tensor]) -> None:
    """No two elements of a tensor share memory."""
    for i, tensor in enumerate(tensors):
        if expanded(tensor):
            raise ValueError(
                f"{name}[{i}] is an expanded tensor, wanted one with memory of its own for every"
                " element: use .clone()"
            )


def zero_arguments(tensors: list[Tensor], keep: list[Tensor]) -> None:
    """Arguments of ``zero_filters_``."""
    filters("tensors", tensors)
    writable("tensors", tensors)
    for i, (tensor, kept) in enumerate(zip(tensors, keep, strict=True)):
        same_device("keep", i, kept, tensor.device)
        dtype("keep", i, kept, torch.bool)
        shape("keep", i, kept, tensor.shape[:1], "pass one value for each filter of its tensor")


def _repeats(index: Tensor) -> bool:
    if not readable(index) or _looked.at(index, "unique"):
        return False
    if index.unique().numel() != index.numel():
        return True
    _looked.note(index, "unique")
    return False


def restore_arguments(tensors: list[Tensor], rows: list[Tensor], saved: list[Tensor]) -> None:
    """Arguments of ``restore_filters_``."""
    filters("tensors", tensors)
    writable("tensors", tensors)
    for i, (tensor, index, values) in enumerate(zip(tensors, rows, saved, strict=True)):
        index_list("rows", i, index, tensor.device)
        if _repeats(index):
            raise ValueError(
                f"rows[{i}] names a row twice, wanted unique rows: two saved copies of one filter"
                " cannot both be restored"
            )
        same_device("saved", i, values, tensor.device)
        dtype("saved", i, values, tensor.dtype)
        wanted = (index.shape[0], *tensor.shape[1:])
        shape("saved", i, values, wanted, f"pass a row for each of rows[{i}]")
    index_ranges("rows", dict(enumerate(rows)), {i: t.shape[0] for i, t in enumerate(tensors)})


def histogram_arguments(
    tensors: list[Tensor], scales: Tensor, first: int, shift: int, bins: int
) -> None:
    """Arguments of ``abs_histogram``."""
    if not isinstance(scales, Tensor):
        raise TypeError(
            f"scales is a {type(scales).__name__}, wanted a float32 tensor [L]:"
            " use torch.tensor(...)"
        )
    device = tensors[0].device if tensors else scales.device
    for i, tensor in enumerate(tensors):
        same_device("tensors", i, tensor, device)
        dtype("tensors", i, tensor, *FLOATS)
    same_device("scales", None, scales, device)
    dtype("scales", None, scales, torch.float32)
    shape("scales", None, scales, (len(tensors),), "pass one factor for each tensor")
    for name, value, low, high in (
        ("first", first, 0, _MAX_INT32),
        ("shift", shift, 0, 30),
        ("bins", bins, 1, 2048),
    ):
        if not isinstance(value, int):
            raise TypeError(f"{name} is a {type(value).__name__}, wanted an int")
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}, wanted {low} to {high}")


def gate_arguments(
    sums: Tensor,
    seen: Tensor,
    values: list[Tensor],
    grads: list[Tensor],
    terms: Tensor,
    offsets: Tensor,
) -> None:
    """Arguments of ``gate_stats_``."""
    wanted = {
        "sums": (sums, torch.float64, (2, max(0, offsets.numel() - 1))),
        "seen": (seen, torch.int64, (2,)),
        "terms": (terms, torch.int32, (terms.shape[0] if terms.dim() else 0, 3)),
        "offsets": (offsets, torch.int32, (max(1, offsets.numel()),)),
    }
    for name, (tensor, kind, size) in wanted.items():
        same_device(name, None, tensor, sums.device)
        dtype(name, None, tensor, kind)
        shape(name, None, tensor, size, "C channels have C + 1 offsets and sums [2, C]")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: use .contiguous()")
    for k, (value, grad) in enumerate(zip(values, grads, strict=True)):
        for name, tensor in (("values", value), ("grads", grad)):
            same_device(name, k, tensor, sums.device)
            dtype(name, k, tensor, *(FLOATS if name == "values" else (value.dtype,)))
            if tensor.dim() == 0:
                raise ValueError(
                    f"{name}[{k}] has no dimension, wanted [O, ...]: reshape it to [1]"
                )
        wanted_shape = (grad.shape[0], *value.shape[1:])
        shape("grads", k, grad, wanted_shape, "its rows must be shaped like those of its value")
    if not readable(sums):
        return
    rows_of = tuple((v.shape[0], g.shape[0]) for v, g in zip(values, grads, strict=True))
    count = terms.shape[0]
    if not (_looked.at(terms, rows_of) and _looked.at(offsets, count)):
        _gate_indices(rows_of, terms.cpu(), offsets.cpu())
        _looked.note(terms, rows_of)
        _looked.note(offsets, count)


def _gate_indices(rows_of: tuple[tuple[int, int], ...], terms: Tensor, offsets: Tensor) -> None:
    ends = offsets[[0, -1]].tolist()
    if ends != [0, terms.shape[0]] or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"offsets run from {ends[0]} to {ends[1]}, wanted an ascending list from 0 to"
            f" {terms.shape[0]}, the number of terms"
        )
    sizes = torch.tensor(rows_of, device="cpu")
    pairs = terms[:, 0].long()
    inside = (pairs >= 0) & (pairs < len(rows_of))
    if bool(inside.all()) and len(pairs):
        rows = terms[:, 1:]
        inside = ((rows >= 0) & (rows < sizes[pairs])).all(1)
    if not bool(inside.all()):
        at = int((~inside).nonzero()[0, 0])
        raise ValueError(
            f"terms[{at}] is {terms[at].tolist()}, wanted (pair, row of its value, row of its"
            f" gradient) within {len(rows_of)} pairs and their rows"
        )
