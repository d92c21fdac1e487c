"""Replaces the constants of a program that count channels by the number of those that stay."""

from __future__ import annotations

import functools
import inspect
import operator
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional as F

from psap import counted
from psap.errors import VerificationError
from psap.graph.labels import Ints
from psap.sizes import COMPARISONS, Mask, Record, Stays, compare, in_small, numbers, stays_of

COUNTS = ("layer_norm", "group_norm", "rms_norm", "batch_norm", "mean")
"""Calls that divide by a number of channels."""


def _count(node: fx.Node, twin: fx.Node, shape: torch.Size, before: Stays) -> None:
    """Let a norm or a mean count the channels that go as zeros."""
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if name == "mean":
        _mean(node, twin, shape, before)
        return
    if name == "batch_norm" and node.target is not F.batch_norm:
        return
    if node.target not in (F.layer_norm, F.group_norm, F.rms_norm, F.batch_norm):
        raise VerificationError(f"{name} at {node.name} has no rewriting rule")
    bound = _signature(node.target).bind(*twin.args, **twin.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if name == "batch_norm":
        share = _share(shape, before, [d for d in range(len(shape)) if d != 1])
        if share == 1:
            return
        twin.target = counted.standardised
        how = [given["weight"], given["bias"]]
    elif name == "group_norm":
        share = _share(shape, before, [1])
        twin.target = counted.group_norm
        how = [given["num_groups"], given["weight"], given["bias"]]
    else:
        over = len(given["normalized_shape"])
        share = _share(shape, before, list(range(len(shape) - over, len(shape))))
        twin.target = counted.layer_norm if name == "layer_norm" else counted.rms_norm
        how = [over, given["weight"], *([given["bias"]] if name == "layer_norm" else [])]
    twin.args, twin.kwargs = (given["input"], *how, given["eps"], share), {}


_signature = functools.cache(inspect.signature)


def _mean(node: fx.Node, twin: fx.Node, shape: torch.Size, before: Stays) -> None:
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keep: Any = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    dims = list(range(len(shape))) if dims is None else dims
    dims = [d % len(shape) for d in (dims if isinstance(dims, (tuple, list)) else [dims])]
    share = _share(shape, before, dims)
    if share == 1:
        return
    if node.kwargs.get("dtype") is not None:
        raise VerificationError(f"mean with a dtype at {node.name} has no rewriting rule")
    twin.op, twin.target = "call_function", counted.mean
    twin.args, twin.kwargs = (twin.args[0], dims, keep, share), {}


def _share(shape: torch.Size, before: Stays, dims: list[int]) -> float:
    share = 1.0
    for dim in dims:
        mask = before[dim]
        share *= 1.0 if mask is None else int(mask.sum()) / shape[dim]
    return share


def _kept_before(mask: Mask | None, index: int) -> int:
    return index if mask is None else int(mask[:index].sum())


def rewrite(node: fx.Node, twin: fx.Node, record: Record, alive: Ints) -> None:
    """Replace the constants of one call, if it has any that count channels."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return
    numbers(node, twin, record, alive)
    if node.target in COMPARISONS and type(record.values[node]) is bool:
        compare(node, twin, record, alive)
    source = node.args[0] if node.args else node.kwargs.get("query")
    if not isinstance(source, fx.Node):
        return
    if name in ("view", "reshape", "flatten", "expand", "pad"):
        stays = stays_of(node, record, alive)
        if name != "pad":
            _sizes(node, twin, record, alive, stays)
        elif stays is not None:
            _pad(node, twin, record, alive, stays)
        return
    before = stays_of(source, record, alive)
    if name in COUNTS and before is not None:
        _count(node, twin, record.values[source], before)
    elif node.target is operator.getitem and before is not None:
        _slices(node, twin, record, alive, before)
    elif name in ("split", "chunk", "tensor_split") and before is not None:
        _split(node, twin, record.values[source], record.values[node], before)
    elif name.startswith("conv") and before is not None:
        _groups(twin, record.values[source], before)
        _slide(twin, record, record.values[source], before)
    elif node.target is F.scaled_dot_product_attention and before is not None:
        if node.kwargs.get("scale") is None:
            twin.kwargs = {**twin.kwargs, "scale": record.values[source][-1] ** -0.5}
    elif name == "unflatten" and before is not None:
        _unflatten(node, twin, record, alive)
    elif name in ("narrow", "setitem") and before is not None:
        raise VerificationError(f"{name} at {node.name} has no rewriting rule")


def _unflatten(node: fx.Node, twin: fx.Node, record: Record, alive: Ints) -> None:
    stays, shape = stays_of(node, record, alive), record.values[node]
    dim, sizes = node.args[1], node.args[2]
    if stays is None or not isinstance(dim, int) or not isinstance(sizes, (tuple, list)):
        raise VerificationError(f"unflatten at {node.name} has no rewriting rule")
    start = dim % (len(shape) - len(sizes) + 1)
    new = [
        n if mask is None or n == -1 else int(mask.sum())
        for n, mask in zip(sizes, stays[start:], strict=False)
    ]
    twin.args = (twin.args[0], dim, tuple(new))


def _sizes(node: fx.Node, twin: fx.Node, record: Record, alive: Ints, stays: Stays | None) -> None:
    if node.target in (torch.flatten,) or node.target == "flatten":
        return
    packed = len(node.args) == 2 and isinstance(node.args[1], (tuple, list))
    given = node.args[1] if len(node.args) == 2 else None
    if isinstance(given, fx.Node) and isinstance(record.values[given], torch.Size):
        return  # the shape of another tensor, which is right if that is
    sizes: Any = node.args[1] if packed else node.args[1:]
    shape = record.values[node]
    copies: Any = twin.args[1] if packed else twin.args[1:]
    new = []
    for d, (size, copy) in enumerate(zip(sizes, copies, strict=True)):
        mask = stays[d] if stays is not None and d < len(stays) else None
        wanted = int(mask.sum()) if mask is not None else shape[d] if d < len(shape) else 0
        fixed = mask is not None and isinstance(size, int) and size > 0
        if fixed or _other(size, wanted, record, alive):
            copy = wanted
        new.append(copy)
    if stays is not None and len(sizes) != len(shape):
        raise VerificationError(f"the sizes of {node.name} cannot be rewritten")
    twin.args = (twin.args[0], tuple(new)) if packed else (twin.args[0], *new)


def _other(size: Any, wanted: int, record: Record, alive: Ints) -> bool:
    """Whether a size is computed from a number of channels, and comes out different."""
    if not isinstance(size, fx.Node):
        return False
    value = in_small(size, record, alive)
    return isinstance(value, int) and value != wanted


def _groups(twin: fx.Node, shape: Any, before: Stays) -> None:
    """A depthwise convolution has as many groups as channels stay."""
    at = 6 if len(twin.args) > 6 else None
    groups = twin.args[at] if at else twin.kwargs.get("groups", 1)
    mask = before[1] if len(before) > 1 else None
    if groups == shape[1] and groups != 1 and mask is not None:
        if at:
            twin.args = (*twin.args[:at], int(mask.sum()), *twin.args[at + 1 :])
        else:
            twin.kwargs = {**twin.kwargs, "groups": int(mask.sum())}


def _slide(twin: fx.Node, record: Record, shape: torch.Size, before: Stays) -> None:
    """A convolution that slides over channels does so over all that there were."""
    for dim, mask in enumerate(before):
        if mask is None or dim < 2:
            continue
        name, graph = f"_tensor_constant_{twin.name}", twin.graph
        record.constants[name] = torch.from_numpy(np.flatnonzero(mask))
        with graph.inserting_before(twin):
            kept = graph.get_attr(name)
            whole = graph.call_function(counted.spread, (twin.args[0], kept, dim, shape[dim]))
        twin.args = (whole, *twin.args[1:])
        with graph.inserting_after(twin):
            chosen = graph.call_function(torch.index_select, (twin, dim, kept))
        twin.replace_all_uses_with(chosen)
        chosen.replace_input_with(chosen, twin)


def _pad(node: fx.Node, twin: fx.Node, record: Record, alive: Ints, after: Stays) -> None:
    small, large = record.values[node.args[0]], record.values[node]  # type: ignore[index]
    given, copies = (list(n.args[1] if len(n.args) > 1 else n.kwargs["pad"]) for n in (node, twin))  # type: ignore[arg-type]
    amounts = [record.values[v] if isinstance(v, fx.Node) else v for v in given]
    for index in range(len(amounts) // 2):
        dim = len(large) - 1 - index
        mask = after[dim]
        if mask is None or large[dim] == small[dim]:
            continue
        low, high = amounts[2 * index], amounts[2 * index + 1]
        wanted = _kept_before(mask, low), int(mask[large[dim] - high :].sum())
        for at, amount in zip((2 * index, 2 * index + 1), wanted, strict=True):
            if in_small(given[at], record, alive) != amount:
                copies[at] = amount
    if len(twin.args) > 1:
        twin.args = (twin.args[0], tuple(copies), *twin.args[2:])
    else:
        twin.kwargs = {**twin.kwargs, "pad": tuple(copies)}


def _slices(node: fx.Node, twin: fx.Node, record: Record, alive: Ints, before: Stays) -> None:
    index = node.args[1]
    items, copies = (_items(n.args[1], len(before)) for n in (node, twin))
    new: list[Any] = []
    dim = 0
    for item, copy in zip(items, copies, strict=True):
        mask = before[dim] if item is not None and dim < len(before) else None
        new.append(copy if mask is None else _slice(node, (item, copy), mask, record, alive))
        dim += item is not None
    twin.args = (twin.args[0], tuple(new) if isinstance(index, tuple) else new[0])


def _items(index: Any, rank: int) -> list[Any]:
    """An index for every dimension, and None for every new one."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        rest = rank - sum(item is not None and item is not Ellipsis for item in items)
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * rest
    return items


def _slice(node: fx.Node, both: tuple[Any, Any], mask: Mask, record: Record, alive: Ints) -> Any:
    (item, copy), size = both, len(mask)
    if isinstance(item, int) and bool(mask[item]):
        return _kept_before(mask, item % size)
    if not isinstance(item, slice):
        raise VerificationError(f"the index at {node.name} has no rewriting rule")
    ends = (item.start, item.stop, item.step)
    dense = slice(*(record.values.get(v) if isinstance(v, fx.Node) else v for v in ends))
    start, stop, step = dense.indices(size)
    if step != 1:
        chosen = np.zeros(size, dtype=np.bool_)
        chosen[start:stop:step] = True
        return np.flatnonzero(chosen[mask]).tolist()
    wanted = slice(_kept_before(mask, start), _kept_before(mask, stop))
    small = slice(*(in_small(v, record, alive) for v in ends))
    counted_off = any(isinstance(v, fx.Node) for v in ends)
    if counted_off and small.indices(int(mask.sum())) == (wanted.start, wanted.stop, 1):
        return copy
    return wanted


def _split(node: fx.Node, twin: fx.Node, shape: Any, parts: Any, before: Stays) -> None:
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if not isinstance(dim, int):
        raise VerificationError(f"the split at {node.name} has no rewriting rule")
    dim %= len(shape)
    mask = before[dim]
    if mask is None:
        return
    sizes, at = [], 0
    for part in parts:
        sizes.append(int(mask[at : at + part[dim]].sum()))
        at += part[dim]
    twin.target = torch.split if twin.op == "call_function" else "split"
    twin.args = (twin.args[0], sizes, dim)
    twin.kwargs = {}
