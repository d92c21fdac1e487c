"""Replaces the constants of a program that count channels by the number of those that stay."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from psap import counted
from psap.errors import VerificationError
from psap.graph.labels import Ints
from psap.graph.trace import MERGED, View

Stays = list[Tensor | None]
"""For every dimension of an activation a bool mask [size], or None if all of it stays."""


@dataclass
class Record:
    """What one run of the dense program showed.

    Attributes:
        labels: channel labels of every value that has some.
        values: shapes of tensors, and values of everything else.
        views: which parameter a value is.
        kept: positions of each parameter that stay, by dimension.
        shapes: shapes of the parameters.
        constants: tensors that the small program needs, by name.
    """

    labels: dict[fx.Node, Tensor] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    views: dict[fx.Node, View] = field(default_factory=dict)
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def of_parameter(self, node: fx.Node) -> Stays | None:
        """Which positions of a parameter stay, per dimension of the value that it is."""
        view = self.views[node]
        kept = self.kept.get(view.name, {})
        if not kept:
            return None
        masks: list[Tensor] = []
        for dim, size in enumerate(self.shapes[view.name]):
            mask = torch.full((size,), dim not in kept)
            mask[list(kept.get(dim, ()))] = True
            masks.append(mask)
        rest = torch.ones(1, dtype=torch.bool)
        for mask in masks[1:]:
            rest = (rest[:, None] & mask).reshape(-1)
        found = {-1: None, MERGED: rest, **dict(enumerate(masks))}
        return [None if (m := found[d]) is None or bool(m.all()) else m for d in view.dims]


def _stays(node: Any, record: Record, alive: Ints) -> Stays | None:
    """Which positions of an activation stay, per dimension; None if nothing goes."""
    labels = record.labels.get(node)
    if node in record.views:
        return record.of_parameter(node)
    if labels is None:
        return None
    lives = torch.from_numpy(alive)[labels].bool()
    if bool(lives.all()):
        return None
    if not bool(lives.any()) and len(record.values[node]) > 1:
        gone = torch.zeros(record.values[node][1], dtype=torch.bool)  # a slice of what goes
        return [gone if dim == 1 else None for dim in range(lives.dim())]
    masks: Stays = []
    for dim in range(lives.dim()):
        others = [d for d in range(lives.dim()) if d != dim]
        along = lives.amax(others) if others else lives
        masks.append(None if along.numel() == 1 else along)
    outer = torch.ones_like(lives)
    for dim, mask in enumerate(masks):
        if mask is not None:
            outer &= mask.view([-1 if d == dim else 1 for d in range(lives.dim())])
    if not torch.equal(outer, lives):
        raise VerificationError(
            f"the channels of {node.name} cannot be removed: they form no block"
        )
    return masks


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
    bound = inspect.signature(node.target).bind(*twin.args, **twin.kwargs)
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


def _kept_before(mask: Tensor | None, index: int) -> int:
    return index if mask is None else int(mask[:index].sum())


def rewrite(node: fx.Node, twin: fx.Node, record: Record, alive: Ints) -> None:
    """Replace the constants of one call, if it has any that count channels."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or not node.args:
        return
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return
    if name in ("view", "reshape", "flatten", "expand", "pad"):
        stays = _stays(node, record, alive)
        if name != "pad":
            _sizes(node, twin, record, alive, stays)
        elif stays is not None:
            _pad(twin, record.values[source], record.values[node], stays)
        return
    before = _stays(source, record, alive)
    if name in COUNTS and before is not None:
        _count(node, twin, record.values[source], before)
    elif node.target is operator.getitem and before is not None:
        _slices(twin, node.args[1], record.values[source], before)
    elif name in ("split", "chunk", "tensor_split") and before is not None:
        _split(node, twin, record.values[source], record.values[node], before)
    elif name.startswith("conv") and before is not None:
        _groups(twin, record.values[source], before)
        _slide(twin, record, record.values[source], before)
    elif name == "narrow" and before is not None:
        raise VerificationError(f"narrow at {node.name} has no rewriting rule")


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
    value = _in_small(size, record, alive)
    return isinstance(value, int) and value != wanted


def _in_small(value: Any, record: Record, alive: Ints) -> Any:
    """What arithmetic on sizes gives in the small network; None if that is not known."""
    if not isinstance(value, fx.Node):
        return value
    known = record.values.get(value)
    sizes = isinstance(known, torch.Size)
    source = value.args[0] if value.args else None
    if isinstance(source, fx.Node) and isinstance(record.values.get(source), torch.Size):
        if sizes and value.target in (getattr, "size"):  # of a tensor: x.shape or x.size()
            return _small_shape(source, record, alive)
        if value.target == "size" and len(value.args) == 2:
            return _small_shape(source, record, alive)[value.args[1]]  # type: ignore[index]
    if sizes or not isinstance(known, (int, torch.Size)) or value.op != "call_function":
        return None
    args = [_in_small(arg, record, alive) for arg in value.args]
    if any(arg is None for arg in args) or value.target not in _ARITHMETIC:
        return None
    return value.target(*args)


_ARITHMETIC = (
    operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub, operator.mod,
)  # fmt: skip


def _small_shape(source: fx.Node, record: Record, alive: Ints) -> list[int]:
    shape = record.values[source]
    before = _stays(source, record, alive) or [None] * len(shape)
    return [n if mask is None else int(mask.sum()) for n, mask in zip(shape, before, strict=True)]


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
        record.constants[name] = mask.nonzero().flatten()
        with graph.inserting_before(twin):
            kept = graph.get_attr(name)
            whole = graph.call_function(counted.spread, (twin.args[0], kept, dim, shape[dim]))
        twin.args = (whole, *twin.args[1:])
        with graph.inserting_after(twin):
            chosen = graph.call_function(torch.index_select, (twin, dim, kept))
        twin.replace_all_uses_with(chosen)
        chosen.replace_input_with(chosen, twin)


def _pad(twin: fx.Node, small: Any, large: Any, after: Stays) -> None:
    rank = len(large)
    amounts = list(twin.args[1] if len(twin.args) > 1 else twin.kwargs["pad"])  # type: ignore[arg-type]
    for index in range(len(amounts) // 2):
        dim = rank - 1 - index
        mask = after[dim]
        if mask is None or large[dim] == small[dim]:
            continue
        low, high = amounts[2 * index], amounts[2 * index + 1]
        amounts[2 * index] = _kept_before(mask, low)
        amounts[2 * index + 1] = int(mask[large[dim] - high :].sum())
    if len(twin.args) > 1:
        twin.args = (twin.args[0], tuple(amounts), *twin.args[2:])
    else:
        twin.kwargs = {**twin.kwargs, "pad": tuple(amounts)}


def _slices(twin: fx.Node, index: Any, shape: Any, before: Stays) -> None:
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is Ellipsis or item is None for item in items):
        rest = len(shape) - sum(item is not None and item is not Ellipsis for item in items)
        at = items.index(Ellipsis) if Ellipsis in items else len(items)
        if None in items:
            raise VerificationError(f"the new dimensions at {twin.name} have no rewriting rule")
        items[at : at + 1] = [slice(None)] * rest
    new: list[Any] = []
    for dim, item in enumerate(items):
        mask = before[dim] if dim < len(before) else None
        new.append(item if mask is None else _slice(twin, item, mask, shape[dim]))
    twin.args = (twin.args[0], tuple(new) if isinstance(index, tuple) else new[0])


def _slice(twin: fx.Node, item: Any, mask: Tensor, size: int) -> Any:
    if isinstance(item, int) and bool(mask[item]):
        return _kept_before(mask, item % size)
    if not isinstance(item, slice) or any(
        isinstance(v, fx.Node) for v in (item.start, item.stop, item.step)
    ):
        raise VerificationError(f"the index at {twin.name} has no rewriting rule")
    start, stop, step = item.indices(size)
    if step == 1:
        return slice(_kept_before(mask, start), _kept_before(mask, stop))
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[start:stop:step] = True
    return (chosen[mask]).nonzero().flatten().tolist()


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
