"""From labels to channel groups: what can be pruned together, and why the rest is left alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from psap.calling import called
from psap.errors import TraceError
from psap.graph.alike import SHOWN, NDArrayBool, gather, packed, runs
from psap.graph.attending import moving_macs
from psap.graph.inputs import Inputs, as_inputs, batched, check_model, doubled
from psap.graph.labels import Ints, plain
from psap.graph.rules import RULES
from psap.graph.skipping import ValueAsked
from psap.graph.trace import Call, Tracer, run
from psap.untouched import untouched

Side = tuple[str, int]
"""A dimension of a parameter or buffer: its name, and the dimension."""

MAKES = ("out", "state")
"""Roles of the sides of a weight that make channels; "state" where a weight norm has a gain."""


@dataclass(frozen=True)
class Group:
    """Channels that occur in the same places of the network.

    Attributes:
        name: the first layer that produces them; a number is added where one layer has several
            groups.
        size: C_g, the number of channels.
        start: id of the first one; the channels of a group are numbered consecutively.
        sides: every dimension of a parameter or buffer that shrinks with the group, with how many
            positions a channel has there.
        producers: weights whose filters make the channels.
        layers: modules that shrink.
    """

    name: str
    size: int
    start: int
    sides: Mapping[Side, int]
    producers: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """The channels of a model: what `psap.trace` returns.

    Attributes:
        model: the model that was traced (not copied).
        inputs: the example inputs.
        groups: everything that can be pruned.
        channels: for every side, the channel id at each position, or -1 where it is fixed.
        roles: for every side, "out" if zeros there make the channel zero, "in" if the channel is
            read there, "cut" if it is and is not zero when it is pruned, "state" or "slope" else.
        shapes: shape of every parameter and buffer.
        calls: every use of a weight, for the cost model.
        fixed_macs: MACs of products of activations, for the whole batch.
        products: MACs of such products for every channel of a group, for the whole batch.
        batch: size of the first dimension of the first input.
        normalised: what scales the channels of a weight whose filters are rescaled: the batch norms
            that follow directly, or the gain of standardised filters; by the name of the weight.
        affine: names of all affine parameters of batch norms.
        left_alone: the reason for every layer, or "layer (channels 0-3 of 8)", whose outputs cannot
            be pruned.
        counted: groups whose channels a norm or a mean counts: only graph mode can prune them.
        sizes: channels that calls with sizes touch, by the module in whose forward() they are; -1
            for those that are fixed.
        given: plain arguments that these modules were called with.
        entries: what a second call of these modules needs (`psap.graph.counting.Sizes`).
        channel_of: for every label in the entries its channel, or -1.
        unknown_ops: ATen ops that no rule covers, with how often they were met.
    """

    model: nn.Module
    inputs: Inputs
    groups: tuple[Group, ...]
    channels: Mapping[Side, Ints]
    roles: Mapping[Side, str]
    shapes: Mapping[str, tuple[int, ...]]
    calls: tuple[Call, ...]
    fixed_macs: float
    products: Mapping[int, float]
    batch: int
    normalised: Mapping[str, tuple[str, ...]]
    affine: frozenset[str]
    left_alone: Mapping[str, str]
    counted: frozenset[int]
    sizes: Mapping[str, Ints] = field(repr=False)
    given: Mapping[str, Mapping[str, Any]] = field(repr=False)
    entries: Mapping[str, list[Any] | None] = field(repr=False)
    channel_of: Ints = field(repr=False)
    unknown_ops: Mapping[str, int]
    group_of: Ints = field(repr=False)

    def __repr__(self) -> str:
        channels = sum(group.size for group in self.groups)
        return (
            f"Graph({type(self.model).__name__}: {len(self.groups)} groups, {channels} channels, "
            f"{len(self.left_alone)} left alone)"
        )


@called("psap.trace(model, example_inputs)")
def trace(model: nn.Module, example_inputs: Any, *, gated: bool = False) -> Graph:
    """Find the channel groups of a model by running it once.

    The model is left as it was: parameters, buffers, train flags, random state.

    Args:
        model: an eager ``nn.Module`` on one device.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of inputs by keyword, on
            the model's device. Sizes other than the batch should be those of the real data.
        gated: find only channels that zero filters, biases and affine pairs silence, and that can
            go while every module stays what it is. That is what a `Pruner` can gate, and what
            ``apply(mode="module")`` needs. Else also those that must be cut off where they are
            read (after a sigmoid), and those that a layer norm counts.

    Returns:
        The channel graph.

    Raises:
        ArgumentTypeError: the model is no eager module, or the inputs are no tensors.
        ArgumentError: the model has no parameters or lies on several devices.
        TraceError: the model failed on the inputs.
    """
    model = check_model(model)
    inputs = as_inputs(example_inputs)
    tracer = Tracer(model, RULES, gated=gated)
    with no_collection(), untouched(model):
        run(tracer, model, inputs, training=False)
        if any(name not in tracer.reached for name in tracer.parameters):
            tracer.counting = False
            run_auxiliary(tracer, model, inputs)
        tracer.attending.settle(tracer.labels)
    graph = build(model, inputs, tracer)
    if tracer.counting and not all(_is_read(graph, index) for index in range(len(graph.groups))):
        tracer.counting = False  # evaluation makes what it has no use for; training may give it out
        with no_collection(), untouched(model), suppress(TraceError):  # it may want more inputs
            run_auxiliary(tracer, model, inputs)
        graph = build(model, inputs, tracer)
    return graph


def _is_read(graph: Graph, index: int) -> bool:
    """Whether a weight reads the channels of a group, or a product does, as of queries and keys."""
    sides = graph.groups[index].sides
    return index in graph.products or any(graph.roles[side] in ("in", "cut") for side in sides)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: labels and copies are many small objects, but no cycles."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def run_auxiliary(tracer: Tracer, model: nn.Module, inputs: Inputs) -> None:
    """Parameters that evaluation does not reach may belong to heads of train mode.

    Their labels are all that is wanted, so convolutions are computed only if forward() asks for
    values, or fails without them.
    """
    try:
        tracer.computing = False
        run(tracer, model, inputs, training=True)
        return
    except (TraceError, ValueAsked):
        pass
    finally:
        tracer.computing = True
    try:
        run(tracer, model, inputs, training=True)
    except TraceError:
        twice = doubled(inputs)  # batch norm refuses one value per channel
        if twice is None:
            raise
        run(tracer, model, twice, training=True)


def build(model: nn.Module, inputs: Inputs, tracer: Tracer) -> Graph:
    """Resolve the labels of a finished trace into groups."""
    root, frozen = tracer.labels.resolve()
    vectors, at = _vectors(tracer.along, root)
    roots = {side: vectors[at[side]] for side in at}
    owners = {n: n.rpartition(".")[0].partition(".parametrizations")[0] for n in tracer.shapes}
    _respect_frozen(tracer, roots, frozen)
    weights = {call.weight for call in tracer.calls} & set(tracer.parameters)  # no fixed filters
    alive = _prunable(roots, tracer.roles, weights, frozen, tracer.labels.count)
    channel, sizes, shared = gather(vectors, alive)
    groups = _named(sizes, shared, at, tracer.roles, weights, owners)
    found = [channel[components] for components in vectors]
    channels = {side: found[number] for side, number in at.items()}
    lives = [bool((ids >= 0).any()) for ids in found]
    pruned = {side for side, number in at.items() if lives[number]}
    group_of = np.repeat(np.arange(len(groups)), sizes)
    channel_of = channel[root]
    fixed, products = moving_macs(tracer.products, channel_of, group_of, sizes)
    return Graph(
        model=model,
        inputs=inputs,
        groups=groups,
        channels=channels,
        roles=dict(tracer.roles),
        shapes=dict(tracer.shapes),
        calls=tuple(tracer.calls),
        fixed_macs=tracer.fixed_macs + fixed,
        products=products,
        batch=max(1, _batch(inputs)),
        normalised={k: tuple(sorted(v)) for k, v in tracer.normalised.items()},
        affine=frozenset(tracer.affine),
        left_alone=_reasons(pruned, channels, roots, frozen, weights, owners, tracer),
        counted=_counted(channel_of, group_of, tracer),
        sizes={n: runs(channel_of[labels])[0] for n, labels in met(tracer).items()},
        given=dict(tracer.sizes.given),
        entries=dict(tracer.sizes.entries),
        channel_of=channel_of,
        unknown_ops=dict(tracer.unknown),
        group_of=group_of.astype(np.int64),
    )


def _vectors(along: Mapping[Side, Tensor], root: Ints) -> tuple[list[Ints], dict[Side, int]]:
    """The components along all sides, once for sides with the same labels, and where each is."""
    numbers: dict[Any, int] = {}
    vectors: list[Ints] = []
    at: dict[Side, int] = {}
    for side, labels in along.items():
        key = (labels.data_ptr(), labels.shape, labels.stride())
        at[side] = numbers.setdefault(key, len(vectors))
        if at[side] == len(vectors):
            vectors.append(root[labels.numpy()])
    return vectors, at


def _counted(channel: Ints, group_of: Ints, tracer: Tracer) -> frozenset[int]:
    """The groups of the labels that something counts."""
    found = [channel[labels.reshape(-1).numpy()] for labels in tracer.counted]
    return frozenset(int(group_of[c]) for part in found for c in runs(part)[0] if c >= 0)


def met(tracer: Tracer) -> dict[str, Ints]:
    """By module the labels that calls with sizes in its forward() touch, or a norm in it counts."""
    sizes = tracer.sizes
    found = {name: list(labels.values()) for name, labels in sizes.found.items()}
    for name in sizes.fixed:  # a size that is read off a tensor which shrinks may be for another
        found.setdefault(name, []).extend(sizes.read.get(name, {}).values())
    for name, parameter in sizes.named:
        sides = [labels for (owner, _), labels in tracer.along.items() if owner == parameter]
        found.setdefault(name, []).extend(sides)
    return {
        name: np.concatenate([plain(x).reshape(-1).numpy() for x in labels])
        for name, labels in found.items()
        if labels
    }


def _respect_frozen(tracer: Tracer, roots: Mapping[Side, Ints], frozen: dict[int, str]) -> None:
    """A parameter that does not train keeps its shape."""
    still = {name for name, p in tracer.parameters.items() if not p.requires_grad}
    for (name, _), components in roots.items():
        if name in still:
            for component in runs(components)[0].tolist():
                frozen.setdefault(component, f"{name} is frozen (requires_grad is False)")


def _batch(inputs: Inputs) -> int:
    return next((int(x.shape[0]) for x in batched(inputs)), 1)


def _prunable(
    roots: Mapping[Side, Ints],
    roles: Mapping[Side, str],
    weights: set[str],
    frozen: dict[int, str],
    count: int,
) -> NDArrayBool:
    """Components that some weight produces, and that nothing freezes."""
    alive = np.zeros(count, dtype=bool)
    for side, components in roots.items():
        if roles[side] in MAKES and side[0] in weights:
            alive[components] = True
    if frozen:
        alive[np.fromiter(frozen, dtype=np.int64)] = False
    return alive


def _named(
    sizes: list[int],
    shared: list[dict[int, int]],
    at: Mapping[Side, int],
    roles: Mapping[Side, str],
    weights: set[str],
    owners: Mapping[str, str],
) -> tuple[Group, ...]:
    sharing: dict[int, list[int]] = {}  # groups by vector, to go through all sides in order
    for number, vectors in enumerate(shared):
        for vector in vectors:
            sharing.setdefault(vector, []).append(number)
    sides: list[dict[Side, int]] = [{} for _ in shared]
    for side, vector in at.items():
        for number in sharing.get(vector, ()):
            sides[number][side] = shared[number][vector]
    used: dict[str, int] = {}
    groups: list[Group] = []
    start = 0
    for size, found in zip(sizes, sides, strict=True):
        makers = dict.fromkeys(n for n, d in found if roles[n, d] in MAKES and n in weights)
        name = owners[next(iter(makers))] or next(iter(makers))
        used[name] = used.get(name, 0) + 1
        name += f"#{used[name]}" if used[name] > 1 else ""
        layers = tuple(dict.fromkeys(owners[n] or n for n, _ in found))
        groups.append(Group(name, size, start, found, tuple(makers), layers))
        start += size
    return tuple(groups)


def _reasons(
    pruned: set[Side],
    channels: Mapping[Side, Ints],
    roots: Mapping[Side, Ints],
    frozen: Mapping[int, str],
    weights: set[str],
    owners: Mapping[str, str],
    tracer: Tracer,
) -> dict[str, str]:
    """Why channels of a layer are left alone, for every layer that makes some."""
    reasons: dict[str, str] = {}
    for name, shape in tracer.shapes.items():
        sides = [(name, d) for d in range(len(shape)) if tracer.roles.get((name, d)) in MAKES]
        if name not in weights:
            continue
        layer = owners[name] or name
        if pruned.isdisjoint(sides):
            found = [frozen[c] for side in sides for c in roots[side].tolist() if c in frozen]
            reasons[layer] = found[0] if found else "its channels lead nowhere"
        for side in (side for side in sides if side in pruned):
            stays = np.flatnonzero(channels[side] < 0)
            if stays.size:
                which = f"channels {packed(stays.tolist(), SHOWN)} of {shape[side[1]]}"
                why = frozen.get(int(roots[side][stays[0]]), "they lead nowhere")
                reasons[f"{layer} ({which})"] = why
    smaller = {name for name, _ in pruned}
    for name, parameter in tracer.parameters.items():
        shape = parameter.shape
        if len(shape) < 2 or name in weights or name in smaller:
            continue
        found = [frozen[c] for d in range(len(shape)) for c in roots.get((name, d), ())
                 if c in frozen]  # fmt: skip
        layer = owners[name] or name
        at = layer if layer in reasons or name.endswith(".weight") else name  # a table is no layer
        reasons.setdefault(at, found[0] if found else "not used in forward")
    return reasons
