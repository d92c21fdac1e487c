"""The schemas of all ops, namespace ``torch.ops.psap``. Read this first.

Every op exists as soon as this package is imported: Python defines it and gives it the reference
(any device) and a fake kernel (shapes only); a compiled part overrides single devices, and Triton
serves CUDA tensors where the CUDA part is not built. None is differentiable. F is the number of
filters of all layers (dimension 0 of every weight), L the number of layers, I the number of input
channels of all layers (dimension 1 of every weight that has one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from psap_kernels import _load

SCHEMAS = {
    # filter_sums float32 [6, F], filter_counts int32 [3, F], layer_sums float64 [L, 7],
    # layer_counts int64 [L, 3], input_sums float32 [I] (sum of w g per input channel; [0] unless
    # per_input); grads: L tensors or none; tau: float32 [L].
    "layer_stats": (
        "(Tensor[] weights, Tensor[] grads, Tensor tau, bool per_input=False)"
        " -> (Tensor filter_sums, Tensor filter_counts, Tensor layer_sums, Tensor layer_counts,"
        " Tensor input_sums)"
    ),
    # counts int64 [L, bins + 2] of key = bits of float32(abs(x)) * scales[l] (float32 product):
    # key < first | bin (key - first) >> shift | beyond the last bin. scales: float32 [L]. NaN has
    # the largest key, 2^31 - 1.
    "abs_histogram": (
        "(Tensor[] tensors, Tensor scales, int first, int shift, int bins) -> Tensor counts"
    ),
    # d[c] = scale * sum over terms t in offsets[c]..offsets[c + 1] - 1, in this order, of
    # <values[k][i], grads[k][j]> with (k, i, j) = terms[t]. If every d is finite: sums[0] += d,
    # sums[1] += d * d, seen[0] += 1; else seen[1] += 1 and nothing else.
    # sums float64 [2, C], seen int64 [2], terms int32 [T, 3], offsets int32 [C + 1].
    "gate_stats_": (
        "(Tensor(a!) sums, Tensor(b!) seen, Tensor[] values, Tensor[] grads, Tensor terms,"
        " Tensor offsets, float scale) -> ()"
    ),
    # out[t] = tensors[t][keep_dim0[t]][:, keep_dim1[t]]; int64 indices, [O] tensors use the first.
    "shrink": "(Tensor[] tensors, Tensor[] keep_dim0, Tensor[] keep_dim1) -> Tensor[]",
    # tensors[t][~keep[t]] = 0; keep: bool [O].
    "zero_filters_": "(Tensor(a!)[] tensors, Tensor[] keep) -> ()",
    # tensors[t][rows[t]] = saved[t]; rows: int64, unique.
    "restore_filters_": "(Tensor(a!)[] tensors, Tensor[] rows, Tensor[] saved) -> ()",
}

_library = torch.library.Library("psap", "DEF")
# How many arguments an op writes to; they come first.
_WRITTEN = {name: schema.count("!") for name, schema in SCHEMAS.items()}
_IN_PLACE_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def count_versions(name: str, arguments: tuple[Any, ...]) -> None:
    """Tell autograd that op ``name``, which writes through pointers, has changed its arguments."""
    for argument in arguments[: _WRITTEN[name]]:
        increment_version(argument)


def call(name: str, arguments: tuple[Any, ...]) -> Any:
    """Call op ``name``; in place too, without a way back through Python.

    The dispatcher would turn every tensor of every list into a Python object and back for
    `bump_version` below, which costs more than many a kernel.
    """
    op = getattr(torch.ops.psap, name).default
    if not _WRITTEN[name]:
        return op(*arguments)
    with torch._C._ExcludeDispatchKeyGuard(_IN_PLACE_KEY):
        op(*arguments)
    count_versions(name, arguments)
    return None


def _define(name: str, schema: str) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if not _WRITTEN[name]:
        return

    def bump_version(keyset: Any, *arguments: Any) -> None:
        count_versions(name, arguments)
        overload = getattr(torch.ops.psap, name).default
        overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    _library.impl(name, bump_version, "ADInplaceOrView", with_keyset=True)


for _name, _schema in SCHEMAS.items():
    _define(_name, _schema)

# Their kernels override the reference for CPU and CUDA tensors; where one is missing, nothing
# changes.
_load.part("_C")
_load.part("_C_cuda")


def register(name: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give op ``name`` its reference, which serves every device, and its fake kernel."""
    reference = _plain_only(name, reference)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"psap::{name}", fake, lib=_library)
    if _load.part("_C_cuda").module is None:
        _library.impl(name, _on_cuda(name, reference), "CUDA")


def _plain_only(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse what made the dispatcher pass a compiled kernel by, before anything is written.

    One sparse or quantized tensor among others is enough for that, and the kernel would have been
    the one to check.
    """

    def run(*arguments: Any) -> Any:
        for argument in arguments:
            for tensor in argument if isinstance(argument, list) else []:
                if tensor.layout != torch.strided or tensor.is_quantized:
                    raise TypeError(
                        f"{name}: a tensor is sparse or quantized, wanted plain ones:"
                        " use .to_dense() or .int_repr()"
                    )
        return reference(*arguments)

    return run


def _on_cuda(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Triton where it can be imported, else the reference; decided at the first call."""

    def run(*arguments: Any) -> Any:
        triton = _load.triton_op(name)
        return (triton or reference)(*arguments)

    return run
