"""The schemas of all ops, namespace ``torch.ops.psap``. Read this first.

Every op exists as soon as this package is imported: Python defines it and gives it the reference
(any device) and a fake kernel (shapes only); a compiled part overrides single devices. None is
differentiable. F is the number of filters of all layers (dimension 0 of every weight), L the
number of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from psap_kernels import _load

SCHEMAS = {
    # filter_sums float32 [6, F], filter_counts int32 [3, F],
    # layer_sums float64 [L, 7], layer_counts int64 [L, 3]; grads: L tensors or none; tau: [L].
    "layer_stats": (
        "(Tensor[] weights, Tensor[] grads, Tensor tau)"
        " -> (Tensor filter_sums, Tensor filter_counts, Tensor layer_sums, Tensor layer_counts)"
    ),
    # out[t] = tensors[t][keep_dim0[t]][:, keep_dim1[t]]; int64 indices, [O] tensors use the first.
    "shrink": "(Tensor[] tensors, Tensor[] keep_dim0, Tensor[] keep_dim1) -> Tensor[]",
    # tensors[t][~keep[t]] = 0; keep: bool [O].
    "zero_filters_": "(Tensor(a!)[] tensors, Tensor[] keep) -> ()",
    # tensors[t][rows[t]] = saved[t]; rows: int64, unique.
    "restore_filters_": "(Tensor(a!)[] tensors, Tensor[] rows, Tensor[] saved) -> ()",
}

_library = torch.library.Library("psap", "DEF")


def _define(name: str, schema: str) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    if not name.endswith("_"):
        return

    # A kernel that writes through a pointer must tell autograd that the tensors have changed.
    def bump_version(keyset: Any, tensors: list[torch.Tensor], *rest: Any) -> None:
        increment_version(tensors)
        overload = getattr(torch.ops.psap, name).default
        overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, tensors, *rest)

    _library.impl(name, bump_version, "ADInplaceOrView", with_keyset=True)


for _name, _schema in SCHEMAS.items():
    _define(_name, _schema)

# Its kernels override the reference for CPU tensors; where it is missing, nothing changes.
_load.part("_C")


def register(name: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give op ``name`` its reference, which serves every device, and its fake kernel."""
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"psap::{name}", fake, lib=_library)
