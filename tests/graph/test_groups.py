"""From labels to groups: components, freezing, names, and numbers that add up."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import chain, image, randomise
from torch import nn
from zoo import CASES

import psap
from psap.graph.labels import TAINT, Labels, compact, plain, tainted
from psap.graph.rules import RULES
from psap.graph.trace import Tracer, run


@given(st.integers(1, 40), st.data())
def test_components_are_those_of_a_search(count: int, data: st.DataObject) -> None:
    label = st.integers(0, count - 1)
    pairs = data.draw(st.lists(st.tuples(label, label), max_size=60))
    stopped = data.draw(st.lists(label, max_size=4))
    labels = Labels()
    labels.new(count)
    for a, b in pairs:
        labels.unite(torch.tensor([a]), torch.tensor([b]))
    for number, one in enumerate(stopped):
        labels.freeze(torch.tensor([one]), f"reason {number}")
    root, frozen = labels.resolve()
    neighbours: dict[int, set[int]] = {i: {i} for i in range(count)}
    for a, b in pairs:
        neighbours[a].add(b)
        neighbours[b].add(a)
    for start in range(count):
        seen, left = {start}, [start]
        while left:
            new = neighbours[left.pop()] - seen
            seen |= new
            left += new
        assert root[start] == min(seen)
        reasons = [f"reason {n}" for n, one in enumerate(stopped) if one in seen]
        assert frozen.get(min(seen)) == (reasons[0] if reasons else None)


def test_unions_broadcast() -> None:
    labels = Labels()
    grid = labels.new(6).view(2, 3)
    labels.unite(grid, grid[:1])
    assert labels.resolve()[0].tolist() == [0, 1, 2, 0, 1, 2]
    labels.unite(grid[0] | TAINT, grid[0, :1])
    assert labels.resolve()[0].tolist() == [0] * 6


def test_a_long_chain_of_unions_is_resolved_quickly() -> None:
    labels = Labels()
    many = labels.new(200_000)
    labels.unite(many[1:], many[:-1])
    start = time.process_time()
    root, _ = labels.resolve()
    assert not root.any()
    assert time.process_time() - start < 10  # quadratic would take minutes


def test_taint_is_a_bit_of_its_own() -> None:
    labels = torch.tensor([0, 3, 1 << 30])
    assert torch.equal(plain(labels | TAINT), labels)
    assert torch.equal(tainted(labels | TAINT), torch.full((3,), TAINT))
    assert not tainted(labels).any()


@pytest.mark.parametrize(
    ("labels", "shape"),
    [
        (torch.arange(3).view(1, 3, 1).expand(4, 3, 5), (1, 3, 1)),
        (torch.arange(3).view(1, 3, 1).repeat(4, 1, 5), (1, 3, 1)),
        (torch.zeros(4, 5, dtype=torch.int64), (1, 1)),
        (torch.arange(6).view(2, 3), (2, 3)),
        (torch.arange(1), (1,)),
        (torch.tensor(7), ()),
    ],
)
def test_compact(labels: torch.Tensor, shape: tuple[int, ...]) -> None:
    small = compact(labels)
    assert small.shape == shape
    assert torch.equal(small.expand(labels.shape), labels)


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_a_graph_add_up(name: str) -> None:
    case = CASES[name]
    model = randomise(case.make())
    graph = psap.trace(model, case.inputs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    start = 0
    for number, group in enumerate(graph.groups):
        assert group.start == start and group.size > 0
        ids = range(start, start + group.size)
        assert (graph.group_of[start : start + group.size] == number).all()
        start += group.size
        assert group.producers and group.layers
        for side, count in group.sides.items():
            found = Counter(graph.channels[side].tolist())
            assert {found[i] for i in ids} == {count}
    assert start == len(graph.group_of)
    assert len({group.name for group in graph.groups}) == len(graph.groups)
    for (tensor, dim), channels in graph.channels.items():
        assert channels.shape == (tensors[tensor].shape[dim],)
        assert channels.max(initial=-1) < start
        owners = {graph.group_of[c] for c in channels.tolist() if c >= 0}
        assert {n for n, g in enumerate(graph.groups) if (tensor, dim) in g.sides} == owners
        assert graph.roles[tensor, dim] in ("out", "in", "cut", "state", "slope")
    assert dict(graph.shapes) == {n: tuple(t.shape) for n, t in tensors.items()}


def test_no_plan_empties_a_layer() -> None:
    for name in ("slices", "split, unequal", "grouped", "dense block"):
        model = randomise(CASES[name].make())
        plan = psap.plan(psap.trace(model, image()), ratio=0.999)
        assert all(len(side.kept) >= 1 for side in plan.sides)
        assert all(len(group.kept) == 1 for group in plan.groups)


def test_grouped_convolutions_lose_the_same_number_in_every_group() -> None:
    model = randomise(CASES["grouped"].make())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5, score="random")
    kept = plan.kept()["gc.weight"][0]
    first, second = ([k for k in kept if k < 6], [k - 6 for k in kept if k >= 6])
    assert first == second and len(first) == 3


def test_normalised_and_affine_names() -> None:
    graph = psap.trace(randomise(chain(8, 6)), image())
    assert graph.normalised == {"0.weight": ("1.weight",), "3.weight": ("4.weight",)}
    assert graph.affine == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert (graph.batch, graph.fixed_macs) == (4, 0)


def test_ties_reach_through_the_whole_network() -> None:
    """Three residual blocks on one stream are one group."""

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for layer in self.blocks:
                x = x + layer(x.relu())
            return self.last(x)

    (group,) = psap.trace(Stream(), torch.zeros(1, 3, 4, 4)).groups
    assert group.producers == ("stem.weight", *(f"blocks.{i}.weight" for i in range(3)))


def test_a_deep_network_takes_linear_time() -> None:
    def seconds(depth: int) -> float:
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])
        start = time.process_time()
        graph = psap.trace(model, torch.zeros(1, 4))
        psap.apply(model, psap.plan(graph, ratio=0.5), check=False)
        assert len(graph.groups) == depth - 1
        return time.process_time() - start

    few, many = (min(seconds(depth) for _ in range(3)) for depth in (100, 400))
    assert 0 < many < 12 * few  # quadratic would be sixteen times as long


def test_most_channels_have_one_label() -> None:
    tracer = Tracer(model := randomise(chain(8, 6)), RULES)
    run(tracer, model, (image(),), training=False)
    sides = 3 + 8 + 6 + 5  # what the stem reads, and what every layer gives
    assert tracer.labels.count == sides
    assert sum(labels.numel() for labels in tracer.along.values()) > 2 * sides


def test_two_parameters_on_the_same_memory_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    model[1].bias = nn.Parameter(model[0].bias.data)
    with pytest.raises(psap.ArgumentError, match=r"0\.bias and 1\.bias are two parameters on the"):
        psap.trace(model, torch.randn(1, 3, 8, 8))
    model[1].bias = model[0].bias  # the same one: they shrink together
    assert {group.name for group in psap.trace(model, torch.randn(1, 3, 8, 8)).groups} == {"0"}
    flat = torch.randn(16)  # side by side, as the weights of a flattened recurrent network are
    model[0].bias, model[1].bias = (nn.Parameter(part) for part in flat.split(8))
    assert len(psap.trace(model, torch.randn(1, 3, 8, 8)).groups) == 2
