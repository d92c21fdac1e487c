"""Norms that count removed channels as zeros, and channels that are cut off where they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import assert_exact, assert_same, conv, image, randomise, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES
from zoo_nets import block

import psap
from psap import counted

KEEP = torch.tensor([0, 2, 3, 6, 7])
Pair = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]

NORMS: dict[str, Pair] = {
    "layer": (
        lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-3),
        lambda x, w, b: counted.layer_norm(x, 1, w, b, 1e-3, 5 / 8),
    ),
    "rms": (
        lambda x, w, b: F.rms_norm(x, (8,), w, 1e-3),
        lambda x, w, b: counted.rms_norm(x, 1, w, 1e-3, 5 / 8),
    ),
    "mean": (
        lambda x, w, b: x.mean((0, 2)),
        lambda x, w, b: counted.mean(x, [0, 2], False, 5 / 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_zeros_count(name: str) -> None:
    dense, small = NORMS[name]
    x, w, b = torch.randn(3, 4, 8).double() + 5, torch.randn(8).double(), torch.randn(8).double()
    gone = torch.ones(8, dtype=torch.bool)
    gone[KEEP] = False
    wanted = dense(x.masked_fill(gone, 0), w, b)
    found = small(x[..., KEEP], w[KEEP], b[KEEP])
    torch.testing.assert_close(found, wanted if name == "mean" else wanted[..., KEEP])


def test_zeros_count_in_standardised_filters() -> None:
    rows, gain = torch.randn(1, 6, 8).double() + 2, torch.randn(6).double()
    masked = rows.clone()
    masked[..., [0, 4, 5]] = 0
    keep = torch.tensor([1, 2, 3, 6, 7])
    wanted = F.batch_norm(masked, None, None, gain, training=True, eps=1e-3)[..., keep]
    found = counted.standardised(rows[..., keep], gain, None, 1e-3, 5 / 8)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "name", ["filters standardised by a batch norm", "filters standardised, 1x1"]
)
def test_a_gated_trace_keeps_what_standardised_filters_read(name: str) -> None:
    model = randomise(CASES[name].make())
    graph = psap.trace(model, image(), gated=True)
    assert {group.name for group in graph.groups} == {"two", "last"}
    assert "weight standardisation over it" in graph.left_alone["stem"]
    plan = psap.plan(graph, ratio=0.5)
    result = psap.apply(model, plan)
    assert result.mode == "module"
    assert_exact(model, plan, result.model, (image(),))


def test_zeros_count_in_every_group() -> None:
    x, w, b = torch.randn(2, 8, 3, 3).double() + 5, torch.randn(8).double(), torch.randn(8).double()
    keep = torch.tensor([1, 2, 3, 5, 6, 7])  # three of four channels of either group
    masked = x.clone()
    masked[:, [0, 4]] = 0
    wanted = F.group_norm(masked, 2, w, b, 1e-3)[:, keep]
    found = counted.group_norm(x[:, keep], 2, w[keep], b[keep], 1e-3, 3 / 4)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_takes_its_statistics_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(16, 8) + 30).to(dtype)
    wide = F.layer_norm(x.double(), (8,))
    found = counted.layer_norm(x, 1, None, None, 1e-5, 1.0)
    own = F.layer_norm(x, (8,))
    assert found.dtype == dtype
    assert (found.double() - wide).abs().max() <= 2 * (own.double() - wide).abs().max()


CUT: dict[str, Any] = {
    "exp": lambda m, x: m.one(x).exp(),
    "1 - x": lambda m, x: 1 - m.one(x),
    "clamp": lambda m, x: m.one(x).clamp(min=0.5),
    "softplus": lambda m, x: F.softplus(m.one(x)),
    "pad": lambda m, x: F.pad(m.one(x), (1, 1, 1, 1), value=1.0),
    "cos": lambda m, x: m.one(x).cos(),
    "softmax": lambda m, x: m.one(x).flatten(2).softmax(2).view_as(x),
    "grouped": lambda m, x: F.conv2d(m.one(x).sigmoid(), m.g, groups=2),
    "depthwise": lambda m, x: m.depth(m.one(x).sigmoid()),
    "transposed": lambda m, x: F.conv_transpose2d(m.one(x).sigmoid(), m.t),
    "read twice": lambda m, x: m.two(m.two(m.one(x)).sigmoid()),
    "linear": lambda m, x: m.fc(m.one(x).sigmoid().movedim(1, -1)).movedim(-1, 1),
}


@pytest.mark.parametrize("name", CUT)
def test_what_is_not_zero_is_cut_off_where_it_is_read(name: str) -> None:
    parts = {
        "one": conv(8, 8), "two": conv(8, 8), "depth": conv(8, 8, groups=8), "fc": nn.Linear(8, 8),
        "g": nn.Parameter(torch.randn(8, 4, 1, 1)), "t": nn.Parameter(torch.randn(8, 8, 1, 1)),
    }  # fmt: skip
    model = randomise(block(8, CUT[name], **parts))
    graph = psap.trace(model, image())
    assert "one" in {layer for group in graph.groups for layer in group.layers}
    assert name == "depthwise" or "cut" in graph.roles.values()
    plan = psap.plan(graph, ratio=0.5)
    assert psap.Plan.from_json(plan.to_json()) == plan
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


def test_counted_channels_need_graph_mode() -> None:
    model = randomise(CASES["layer norm"].make())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    before = snapshot(model)
    with pytest.raises(psap.VerificationError, match=r"gated=True\), which leaves them alone"):
        psap.apply(model, plan, mode="module")
    assert_same(before, snapshot(model))
    gated = psap.plan(psap.trace(model, image(), gated=True), ratio=0.5)
    assert {group.name for group in gated.groups} == {"stem", "last"}
    assert psap.apply(model, gated, mode="module").mode == "module"


def test_a_norm_counts_in_place() -> None:
    model = randomise(CASES["layer norm"].make())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    wanted, parameters = psap.apply(model, plan).model, list(model.parameters())
    result = psap.apply(model, plan, inplace=True)
    assert result.model is model and result.mode == "graph"
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    torch.testing.assert_close(model.eval()(image()), wanted.eval()(image()), rtol=0, atol=0)


def test_a_counted_norm_exports_without_an_op_of_its_own() -> None:
    model = randomise(CASES["layer norm"].make()).float().eval()
    small = psap.apply(model, psap.plan(psap.trace(model, image().float()), ratio=0.5)).model
    program = torch.export.export(small, (image().float(),))
    assert not [n for n in program.graph.nodes if "psap" in str(n.target)]
    assert list(small.state_dict()) == list(model.state_dict())
