"""MACs and parameters of any widths against a count on the network that was really made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from nets import chain, image, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES

import psap
from psap.cost import Budget, Cost, CostModel

aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Counts multiply-accumulates, and what layers with weights give out, as they are executed."""

    def __init__(self, model: nn.Module, computed: bool) -> None:
        super().__init__()
        self.computed = computed
        tensors = [*model.parameters(), *model.buffers()]
        self.weights = {t.untyped_storage().data_ptr() for t in tensors}
        self.macs = self.activations = 0

    def given(self, out: Tensor, weight: Tensor) -> None:
        """Count the outputs of a layer; one whose weight is computed must be a convolution."""
        known = weight.untyped_storage().data_ptr() in self.weights
        if weight.dim() > 1 and (known or (self.computed and weight.dim() > 2)):
            self.activations += out.numel()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op is aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            per_position = weight[0].numel()
            self.macs += (x if transposed else out).numel() * per_position
            self.given(out, weight)
        elif op in (aten.mm, aten.bmm):
            self.macs += out.numel() * args[0].shape[-1]
            if op is aten.mm:
                self.given(out, args[1])
        elif op is aten._scaled_dot_product_flash_attention_for_cpu:
            pairs = args[0][..., 0].numel() * args[1].shape[-2]
            self.macs += pairs * (args[0].shape[-1] + args[2].shape[-1])
        elif op is aten.addmm:
            self.macs += out.numel() * args[1].shape[-1]
            self.given(out, args[2])
        return out


def _count(model: nn.Module, inputs: tuple[Tensor, ...], *, computed: bool = True) -> Cost:
    counter = Counter(model, computed)
    with torch.no_grad(), counter:
        model.eval()(*inputs)
    batch, parameters = inputs[0].shape[0], sum(p.numel() for p in model.parameters())
    return Cost(counter.macs // batch, parameters, counter.activations // batch)


@pytest.mark.parametrize("name", [name for name in CASES if name != "auxiliary head"])
def test_against_a_count(name: str) -> None:
    case = CASES[name]
    model = randomise(case.make())
    graph = psap.trace(model, case.inputs)
    cost = CostModel(graph)
    followed = name != "weight standardisation"  # this way of it freezes, so nobody asks for it
    assert cost.dense == _count(model, case.inputs, computed=followed)
    rng = np.random.default_rng(len(name))
    for _ in range(2):
        ratios = {group.name: float(rng.uniform(0, 0.9)) for group in graph.groups}
        plan = psap.plan(graph, ratio=ratios)
        if not plan.sides:
            continue
        try:
            small = psap.apply(model, plan).model
        except psap.VerificationError:
            continue  # halves of a chunk that differ
        assert plan.after == _count(small, case.inputs, computed=followed)
        tensors = [*small.named_parameters(), *small.named_buffers()]  # also fixed filters
        shapes = {name: tuple(p.shape) for name, p in tensors}
        for _, layer in plan.layers:
            assert shapes[layer.weight] == layer.shape
        products = sum(macs * len(plan.groups[g].kept) for g, macs in graph.products.items())
        fixed = (graph.fixed_macs + products) / graph.batch
        assert sum(layer.macs for _, layer in plan.layers) + fixed == plan.after.macs


def test_the_batch_does_not_count() -> None:
    model = randomise(chain(8, 6))
    costs = [CostModel(psap.trace(model, image(n, 3, 8, 8))).dense for n in (1, 3)]
    assert costs[0] == costs[1]
    assert costs[0].macs == 64 * 9 * (3 * 8 + 8 * 6) + 6 * 5


def test_any_group_order_and_every_width() -> None:
    graph = psap.trace(randomise(CASES["dense block"].make()), image())
    cost = CostModel(graph)
    stem, one, two, last = 5, 3, 2, 4
    macs = 64 * 9 * (3 * stem + stem * one + (stem + one) * two + (stem + one + two) * last)
    assert [g.name for g in graph.groups] == ["stem", "one", "two", "last"]
    assert cost.cost([stem, one, two, last]).macs == macs + last * 5
    layers = {layer.weight: layer.shape for layer in cost.layers([stem, one, two, last])}
    assert layers["last.weight"] == (last, stem + one + two, 3, 3)
    assert layers["head.2.weight"] == (5, last)


@pytest.mark.parametrize("name", ["residual", "dense block", "grouped", "chunk", "tied decoder"])
def test_what_one_group_changes(name: str) -> None:
    """All groups in one pass against one group after the other; the same for what fits."""
    case = CASES[name]
    cost = CostModel(psap.trace(randomise(case.make()), case.inputs))
    rng = np.random.default_rng(0)
    for _ in range(5):
        widths = rng.integers(1, cost.sizes + 1)
        others = rng.integers(0, cost.sizes + 1)
        found = cost.changes(widths, others)
        budget = Budget(cost, psap.Target(macs=0.5, activations=0.6))
        room = budget.room(widths, others)
        for group in range(len(widths)):
            alone = np.where(np.arange(len(widths)) == group, others, widths)
            wanted = cost.totals(alone) - cost.totals(widths)
            assert found[:, group] == pytest.approx(wanted, abs=1e-6)
            assert room[group] == budget.fits(alone)


def test_large_layers_are_counted_exactly() -> None:
    model = nn.Sequential(nn.Linear(4000, 3001), nn.Linear(3001, 7))
    cost = CostModel(psap.trace(model, torch.zeros(2, 4000)))
    assert cost.cost([3000]).parameters == 4001 * 3000 + 3001 * 7
    assert cost.cost([3000]).macs == 4000 * 3000 + 3000 * 7


@pytest.mark.parametrize(
    ("target", "fits"),
    [
        (psap.Target(macs=1.0), True),
        (psap.Target(macs=0.999), False),
        (psap.Target(parameters=1.0), True),
        (psap.Target(parameters=0.999), False),
        (psap.Target(macs=1.0, parameters=0.999), False),
        (psap.Target(activations=1.0), True),
        (psap.Target(activations=0.999), False),
    ],
)
def test_fits(target: psap.Target, fits: bool) -> None:
    cost = CostModel(psap.trace(randomise(chain(8, 6)), image()))
    assert cost.fits(cost.sizes, target) is fits
