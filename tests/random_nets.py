"""Random architectures out of all constructs that the channel graph knows, or does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from nets import Net, conv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from zoo_blocks import StandardConv

Maker = Callable[[Any, int], tuple[nn.Module, int]]
"""Draws a step for an input of C channels; returns it and its number of output channels."""


def _act(draw: Any) -> Callable[[Tensor], Tensor]:
    chosen: Callable[[Tensor], Tensor] = draw(
        st.sampled_from([F.relu, F.gelu, torch.tanh, F.hardswish, lambda x: x])
    )
    return chosen


def _conv(draw: Any, c: int) -> tuple[nn.Module, int]:
    o = draw(st.integers(1, 12))
    k = draw(st.sampled_from([1, 3]))
    act = _act(draw)
    bias = draw(st.booleans())
    norm = draw(st.sampled_from(["none", "bn", "bn, plain", "gn", "gn, one", "gn, two", "in"]))
    norms = {
        "none": nn.Identity,
        "bn": lambda: nn.BatchNorm2d(o),
        "bn, plain": lambda: nn.BatchNorm2d(o, affine=False),
        "gn": lambda: nn.GroupNorm(o, o),
        "gn, one": lambda: nn.GroupNorm(1, o),
        "gn, two": lambda: nn.GroupNorm(2 - o % 2, o, affine=bias),
        "in": lambda: nn.InstanceNorm2d(o, affine=True),
    }
    return Net(
        lambda m, x: act(m.n(m.c(x))), c=conv(c, o, k, bias=bias), n=norms[norm]()
    ), o  # fmt: skip


def _residual(draw: Any, c: int) -> tuple[nn.Module, int]:
    act = _act(draw)
    return Net(lambda m, x: act(x + m.n(m.c(x))), c=conv(c, c), n=nn.BatchNorm2d(c)), c


def _concat(draw: Any, c: int) -> tuple[nn.Module, int]:
    o = draw(st.integers(1, 6))
    first = draw(st.booleans())
    return Net(
        lambda m, x: torch.cat([x, m.c(x)] if first else [m.c(x), x], 1), c=conv(c, o)
    ), c + o  # fmt: skip


def _doubled(draw: Any, c: int) -> tuple[nn.Module, int]:
    kind = draw(st.sampled_from(["cat", "repeat", "stack", "interleave"]))
    body = {
        "cat": lambda m, x: torch.cat([x, m.c(x)], 1) + torch.cat([x, x], 1),
        "repeat": lambda m, x: m.c(x).repeat(1, 2, 1, 1),
        "stack": lambda m, x: torch.stack([m.c(x), x], 1).flatten(1, 2),
        "interleave": lambda m, x: m.c(x).repeat_interleave(2, 1),
    }[kind]
    return Net(body, c=conv(c, c)), 2 * c


def _depthwise(draw: Any, c: int) -> tuple[nn.Module, int]:
    o = c * draw(st.integers(1, 3))
    return Net(lambda m, x: F.relu(m.n(m.c(x))), c=conv(c, o, groups=c), n=nn.BatchNorm2d(o)), o


def _divisor(draw: Any, c: int) -> int:
    return int(draw(st.sampled_from([d for d in range(1, c + 1) if c % d == 0])))


def _grouped(draw: Any, c: int) -> tuple[nn.Module, int]:
    g = _divisor(draw, c)
    o = g * draw(st.integers(1, 3))
    return Net(lambda m, x: F.relu(m.c(x)), c=conv(c, o, groups=g)), o


def _shuffle(draw: Any, c: int) -> tuple[nn.Module, int]:
    g = _divisor(draw, c)
    fixed = draw(st.booleans())

    def body(m: Any, x: Tensor) -> Tensor:
        n, d, h, w = x.shape
        d = c if fixed else d
        return x.view(n, g, d // g, h, w).transpose(1, 2).reshape(n, d, h, w)

    return Net(body), c


def _gate(draw: Any, c: int) -> tuple[nn.Module, int]:
    gate = draw(st.sampled_from([torch.sigmoid, F.hardsigmoid, F.softplus]))
    kind = draw(st.sampled_from(["se", "one", "bare", "sum", "softmax", "slide"]))
    if kind == "se":
        r = draw(st.integers(1, 4))
        return Net(
            lambda m, x: x * gate(m.b(F.relu(m.a(x.mean((2, 3), keepdim=True))))),
            a=conv(c, r, 1),
            b=conv(r, c, 1),
        ), c
    body = {
        "one": lambda m, x: x * gate(m.a(x)),
        "bare": lambda m, x: gate(m.b(x)),
        "sum": lambda m, x: x * gate(x.sum(1, keepdim=True)),
        "softmax": lambda m, x: x * m.b(x).softmax(1),
        "slide": lambda m, x: (
            x * gate(m.s(m.b(x).mean((2, 3)).unsqueeze(1))).transpose(1, 2).unsqueeze(3)
        ),
    }[kind]
    return Net(body, a=conv(c, 1), b=conv(c, c), s=nn.Conv1d(1, 1, 3, padding=1)), c


def _split(draw: Any, c: int) -> tuple[nn.Module, int]:
    if c < 2:
        return nn.Identity(), c
    at = draw(st.integers(1, c - 1))
    kind = draw(st.sampled_from(["split", "slice", "in place", "stride", "select", "chunk"]))
    if kind == "split":
        o = draw(st.integers(1, 5))

        def cut(m: Any, x: Tensor) -> Tensor:
            first, second = x.split([at, c - at], 1)
            return torch.cat([m.a(first), second], 1)

        return Net(cut, a=conv(at, o)), o + c - at
    if kind == "slice":
        return Net(lambda m, x: m.a(x[:, :at])[:, :1] + m.b(x[:, at:]), a=conv(at, 2),
                   b=conv(c - at, 1)), 1  # fmt: skip
    if kind == "in place":

        def body(m: Any, x: Tensor) -> Tensor:
            x = m.a(x)
            x[:, :at].relu_()
            return x

        return Net(body, a=conv(c, c)), c
    if kind == "stride":
        return Net(lambda m, x: x[:, ::2] + m.a(x)[:, 1 : 1 + (c + 1) // 2], a=conv(c, c + 1)), (
            c + 1
        ) // 2
    if kind == "select":
        return Net(lambda m, x: x * x[:, at][:, None] + x, a=nn.Identity()), c
    if c % 2:
        return nn.Identity(), c
    return Net(lambda m, x: x.chunk(2, 1)[0] * torch.sigmoid(m.a(x.chunk(2, 1)[1])),
               a=conv(c // 2, c // 2)), c // 2  # fmt: skip


def _pad(draw: Any, c: int) -> tuple[nn.Module, int]:
    low, high = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    o = c + low + high
    return Net(lambda m, x: F.pad(x, (0, 0, 0, 0, low, high)) + m.a(x), a=conv(c, o)), o


def _spatial(draw: Any, c: int) -> tuple[nn.Module, int]:
    kind = draw(
        st.sampled_from(["pool", "up", "pad", "flip", "shuffle", "unshuffle", "transposed"])
    )
    if kind == "shuffle":
        o = draw(st.integers(1, 3))
        return Net(lambda m, x: F.avg_pool2d(F.pixel_shuffle(m.a(x), 2), 2), a=conv(c, 4 * o)), o
    if kind == "unshuffle":
        return Net(
            lambda m, x: F.pixel_unshuffle(F.interpolate(x, scale_factor=2), 2)[:, : 2 * c]
        ), 2 * c  # fmt: skip
    if kind == "transposed":
        o = draw(st.integers(1, 6))
        return Net(lambda m, x: F.max_pool2d(m.a(x), 2), a=nn.ConvTranspose2d(c, o, 2, 2)), o
    body = {
        "pool": lambda m, x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
        "up": lambda m, x: F.max_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2),
        "pad": lambda m, x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1),
        "flip": lambda m, x: x.flip(draw_dim),
    }[kind]
    draw_dim = draw(st.sampled_from([1, 2, 3]))
    return Net(body), c


def _computed(draw: Any, c: int) -> tuple[nn.Module, int]:
    """A convolution whose weight forward() computes."""
    o = draw(st.integers(1, 8))
    act = _act(draw)
    kind = draw(st.sampled_from(["filters", "weight norm", "spectral norm", "scaled"]))
    if kind == "filters":
        return nn.Sequential(StandardConv(c, o, 3, 1), Net(lambda m, x: act(x))), o
    if kind == "scaled":
        w = nn.Parameter(torch.ones(o, c, 1, 1))
        return Net(lambda m, x: act(F.conv2d(x, m.w * 0.3) + 1), w=w), o
    norm = weight_norm if kind == "weight norm" else spectral_norm
    return Net(lambda m, x: act(m.c(x)), c=norm(conv(c, o))), o


def _parameters(draw: Any, c: int) -> tuple[nn.Module, int]:
    kind = draw(st.sampled_from(["scale", "prelu", "standardised", "raw", "twice", "constant"]))
    p = nn.Parameter(torch.ones(c, 1, 1))
    w = nn.Parameter(torch.ones(c, c, 1, 1))
    body = {
        "scale": lambda m, x: x * m.p + m.p,
        "prelu": lambda m, x: m.act(m.a(x)),
        "standardised": lambda m, x: F.conv2d(x, m.w - m.w.mean((1, 2, 3), keepdim=True)),
        "raw": lambda m, x: F.conv2d(F.conv2d(x, m.w), m.w) * m.p.view(1, -1, 1, 1),
        "twice": lambda m, x: m.a(F.relu(m.a(x))),
        "constant": lambda m, x: torch.cat([m.a(x), torch.ones_like(x)], 1)[:, :c] * 2,
    }[kind]
    return Net(body, p=p, w=w, a=conv(c, c), act=nn.PReLU(c)), c


def _odd(draw: Any, c: int) -> tuple[nn.Module, int]:
    kinds = [
        "plus",
        "cumsum",
        "roll",
        "order",
        "attention",
        "norm",
        "view",
        "mean",
        "response",
        "rms",
    ]
    kind = draw(st.sampled_from(kinds))

    def attention(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (m.a, m.b, m.d))
        return (v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).view_as(x)

    body = {
        "plus": lambda m, x: m.a(x) + 1,
        "cumsum": lambda m, x: m.a(x).cumsum(1),
        "roll": lambda m, x: m.a(x).roll(1, 1),
        "order": lambda m, x: m.a(x)[:, m.order],
        "attention": attention,
        "norm": lambda m, x: m.n(m.a(x).movedim(1, -1)).movedim(-1, 1),
        "mean": lambda m, x: m.a(x) * x.mean(1, keepdim=True),
        "response": lambda m, x: m.a(x) * (x / (1 + x.square().mean((1, 2, 3), keepdim=True))),
        "rms": lambda m, x: F.rms_norm(m.a(x).movedim(1, -1), (c,)).movedim(-1, 1),
        "view": lambda m, x: m.a(x).reshape(-1, c, x.shape[2] * x.shape[3]).view(-1, c, 8, 8),
    }[kind]
    return Net(
        body,
        a=conv(c, c),
        b=conv(c, c),
        d=conv(c, c),
        n=nn.LayerNorm(c),
        order=torch.arange(c).flip(0),
    ), c


STEPS: list[Maker] = [
    *(_conv, _conv, _residual, _concat, _doubled, _depthwise, _grouped, _shuffle, _gate, _gate),
    *(_split, _split, _pad, _spatial, _parameters, _computed, _odd),
]


@st.composite
def networks(draw: Any, steps: int = 6) -> nn.Module:
    """A random network for inputs [N, 3, 8, 8]."""
    layers: list[nn.Module] = []
    c = draw(st.integers(4, 12))
    layers += [conv(3, c), nn.BatchNorm2d(c), nn.ReLU()]
    for maker in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=steps)):
        step, c = maker(draw, c)
        layers.append(step)
        if c > 24:
            layers.append(conv(c, 6, 1))
            c = 6
    kind = draw(st.sampled_from(["pool", "flatten", "permute", "map"]))
    if kind == "pool":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 4)]
    elif kind == "flatten":
        layers += [nn.Flatten(), nn.Linear(c * 64, 7), nn.ReLU(), nn.Linear(7, 4)]
    elif kind == "permute":
        layers += [Net(lambda m, x: m.a(x.permute(0, 2, 3, 1).flatten(1)), a=nn.Linear(c * 64, 4))]
    else:
        layers.append(conv(c, 2, 1))
    return nn.Sequential(*layers)
