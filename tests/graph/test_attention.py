"""Attention of every form: half of the channels of its heads go, exactly, or stay for a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import assert_exact, image, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_nets import block, param

import psap

C, H, D = 8, 2, 6
Body = Callable[[Any, Tensor], Tensor]


def tokens(x: Tensor) -> Tensor:
    """[N, 16, C] of [N, C, 8, 8]."""
    return F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)


def split(x: Tensor, heads: int = H) -> Tensor:
    """[N, H, L, D] of [N, L, H D], with a width that is computed."""
    return x.view(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[N, L, H D] of [N, H, L, D]."""
    return x.transpose(1, 2).flatten(2)


def softmax(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.4) -> Tensor:
    return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v


def qkv(m: Any, x: Tensor) -> Tensor:
    return m.qkv(x).reshape(x.shape[0], -1, 3, H, D).permute(2, 0, 3, 1, 4)


def selected(m: Any, x: Tensor) -> Tensor:
    y = qkv(m, x)
    return merge(softmax(y[0], y[1], y[2]))


def sdpa(**options: Any) -> Body:
    def body(m: Any, x: Tensor) -> Tensor:
        return merge(F.scaled_dot_product_attention(*qkv(m, x).unbind(0), **options))

    return body


def masked(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x).unbind(0)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    return merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3))


def chunked(m: Any, x: Tensor) -> Tensor:
    return merge(softmax(*(split(part) for part in m.qkv(x).chunk(3, -1))))


def by_head(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x).view(x.shape[0], -1, H, 3 * D).transpose(1, 2)
    return merge(softmax(*y.split([D, D, D], 3)))


def from_sizes(m: Any, x: Tensor) -> Tensor:
    n, length, c = x.shape
    q, k, v = m.qkv(x).reshape(n, length, 3, H, 3 * c // 4).permute(2, 0, 3, 1, 4)
    q = q * (3 * c // 4) ** -0.5
    return (q @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).reshape(n, length, H * D)


def separate(m: Any, x: Tensor) -> Tensor:
    return merge(softmax(split(m.q(x)), split(m.k(x)), split(m.v(x))))


def crossed(m: Any, x: Tensor) -> Tensor:
    y = x[:, :5]
    return merge(softmax(split(m.q(x)), split(m.k(y)), split(m.v(y))))


def unflattened(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (m.q, m.k, m.v))
    return merge(softmax(q, k, v))


def einsum(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x).unflatten(-1, (H, w)) for f, w in ((m.q, D), (m.k, D), (m.v, 4)))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k).softmax(-1)
    return torch.einsum("bhlm,bmhd->blhd", scores, v).flatten(2)


def multi_query(m: Any, x: Tensor) -> Tensor:
    return merge(softmax(split(m.q(x)), split(m.k1(x), 1), split(m.v1(x), 1)))


def grouped_query(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x), 4), split(m.k6(x)), split(m.v(x))
    return merge(F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True))


def relative_position(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x).unbind(0)
    scores = q @ k.transpose(-2, -1) + m.table[m.index].permute(2, 0, 1)
    return merge(scores.softmax(-1) @ v)


def relative_keys(m: Any, x: Tensor) -> Tensor:
    """Positions that queries are multiplied with."""
    q, k, v = qkv(m, x).unbind(0)
    return merge((q @ k.transpose(-2, -1) + q @ m.keys.t()).softmax(-1) @ v)


def batched(m: Any, x: Tensor) -> Tensor:
    q, k, v = (f(x) for f in (m.q, m.k, m.v))
    scores = torch.baddbmm(m.table[m.index][..., 0], q, k.transpose(1, 2), alpha=0.5)
    return torch.bmm(scores.softmax(-1), v)


def cosine(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x).unbind(0)
    return merge(softmax(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))


def dropped(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x).unbind(0)
    p = 0.5 if m.training else 0.0
    return merge(F.scaled_dot_product_attention(q, k, v, dropout_p=p))


def parts() -> dict[str, Any]:
    """All layers that these bodies use; those that one does not use are no groups."""
    return {
        "qkv": nn.Linear(C, 3 * H * D), "q": nn.Linear(C, H * D), "k": nn.Linear(C, H * D),
        "v": nn.Linear(C, H * 4), "k1": nn.Linear(C, D), "v1": nn.Linear(C, 4),
        "k6": nn.Linear(C, H * 3), "table": param(31, H), "keys": param(16, D),
        "index": torch.arange(16)[:, None] - torch.arange(16) + 15,
    }  # fmt: skip


def model_of(body: Body, width: int, **more: Any) -> nn.Module:
    """A stem, the attention, and what reads it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.proj(body(m, tokens(x)))
        return y.transpose(1, 2).unsqueeze(3)

    return randomise(block(C, forward, proj=nn.Linear(width, C), **parts(), **more))


PACKED = {"qkv": D}
APART = {"q": D, "v": 4}
EXACT: dict[str, tuple[Body, int, dict[str, int]]] = {
    "unbind": (lambda m, x: merge(softmax(*qkv(m, x).unbind(0))), H * D, PACKED),
    "unpacked": (lambda m, x: merge(softmax(*qkv(m, x).unbind())), H * D, PACKED),
    "select": (selected, H * D, PACKED),
    "chunk": (chunked, H * D, {"qkv": D, "qkv#2": D}),
    "by head": (by_head, H * D, {"qkv": D, "qkv#2": D}),
    "sizes of the input": (from_sizes, H * D, PACKED),
    "sdpa": (sdpa(), H * D, PACKED),
    "sdpa, scale": (sdpa(scale=0.3), H * D, PACKED),
    "sdpa, causal": (sdpa(is_causal=True), H * D, PACKED),
    "sdpa, mask": (masked, H * D, PACKED),
    "sdpa, dropout": (dropped, H * D, PACKED),
    "separate": (separate, H * 4, APART),
    "cross": (crossed, H * 4, APART),
    "unflatten": (unflattened, H * 4, APART),
    "einsum": (einsum, H * 4, APART),
    "multi-query": (multi_query, H * 4, {"q": D, "v1": 4}),
    "grouped-query": (grouped_query, 16, {"q": 3, "v": 4}),
    "relative position bias": (relative_position, H * D, PACKED),
    "relative keys": (relative_keys, H * D, PACKED),
    "baddbmm, one head": (batched, H * 4, {"q": H * D, "v": H * 4}),
    "cosine": (cosine, H * D, PACKED),
}


@pytest.mark.parametrize("name", EXACT)
def test_half_of_every_head_goes(name: str) -> None:
    body, width, wanted = EXACT[name]
    model = model_of(body, width)
    graph = psap.trace(model, image())
    sizes = {group.name: group.size for group in graph.groups}
    assert {k: sizes.get(k) for k in wanted} == wanted
    plan = psap.plan(graph, ratio=0.5)
    small = psap.apply(model, plan).model
    dropped = name == "sdpa, dropout"
    if dropped:
        small.eval()
        torch.testing.assert_close(small(image()), psap.mask(model, plan).eval()(image()))
    else:
        assert_exact(model, plan, small, (image(),))
    assert small.get_parameter("proj.weight").shape[1] == width // 2


def heads(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(C, H, batch_first=options.pop("batch_first", True), **options)


MASK = torch.ones(16, 16, dtype=torch.bool).triu(1)
PADDING = torch.arange(16).expand(4, 16) > 11
SELF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no weights": ({}, {"need_weights": False}),
    "weights": ({}, {}),
    "weights of every head": ({}, {"average_attn_weights": False}),
    "no bias": ({"bias": False}, {"need_weights": False}),
    "dropout": ({"dropout": 0.3}, {"need_weights": False}),
    "more keys": ({"add_bias_kv": True}, {"attn_mask": MASK}),
    "more keys, padding": (
        {"add_bias_kv": True}, {"need_weights": False, "key_padding_mask": PADDING},
    ),
    "causal": ({}, {"attn_mask": MASK, "is_causal": True, "need_weights": False}),
    "causal, weights": ({}, {"attn_mask": MASK, "is_causal": True}),
    "float mask": ({}, {"attn_mask": torch.zeros(16, 16).double().masked_fill(MASK, -2.0)}),
    "masks of heads": ({}, {"attn_mask": MASK.expand(8, 16, 16), "need_weights": False}),
    "padding": ({}, {"key_padding_mask": PADDING, "attn_mask": MASK}),
    "time first": ({"batch_first": False}, {"need_weights": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", SELF)
def test_multihead_attention(name: str) -> None:
    made, called = SELF[name]
    options = dict(called)

    def body(m: Any, x: Tensor) -> Tensor:
        x = x if m.mha.batch_first else x.transpose(0, 1)
        y, weights = m.mha(x, x, x, **options)
        y = y if weights is None else y * weights.amax()
        return y if m.mha.batch_first else y.transpose(0, 1)

    model = model_of(body, C, mha=heads(**made))
    check_multihead(model, "in_proj_weight")


def check_multihead(model: nn.Module, weight: str) -> None:
    graph = psap.trace(model, image())
    plan = psap.plan(graph, ratio=0.5)
    result = psap.apply(model, plan)
    assert result.mode == "graph" and result.report["verification"]["modes"] == ("eval", "train")
    rows = model.get_parameter(f"mha.{weight}").shape[0]
    assert result.model.get_parameter(f"mha.{weight}").shape == (rows // 2, C // 2)
    model.get_submodule("mha").dropout = 0.0  # the random numbers are those of other shapes
    result.model.eval()
    assert_exact(model.eval(), plan, psap.apply(model, plan).model, (image(),))


CROSS: dict[str, Body] = {
    "queries alone": lambda m, x: m.mha(x, x[:, :5], x[:, :5], need_weights=False)[0],
    "all three": lambda m, x: m.mha(x, x[:, :5], x[:, 5:10])[0],
    "no batch": lambda m, x: m.mha(x[0], x[0], x[0])[0][None],
}


def test_multihead_attention_with_other_keys() -> None:
    mha = heads(kdim=H * D, vdim=H * 4)
    model = model_of(lambda m, x: m.mha(x, m.k(x), m.v(x), need_weights=False)[0], C, mha=mha)
    sizes = {group.name: group.size for group in psap.trace(model, image()).groups}
    wanted = {"stem": C, "k": H * D, "v": H * 4, "mha": 4, "mha#2": 4, "mha.out_proj": C}
    assert sizes == wanted | {"proj": C, "last": 6}
    check_multihead(model, "q_proj_weight")


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_by_multihead_attention(name: str) -> None:
    check_multihead(model_of(CROSS[name], C, mha=heads()), "in_proj_weight")


def test_a_transformer_layer_trains_and_runs_without_its_fused_forward() -> None:
    layer = nn.TransformerEncoderLayer(C, H, 10, batch_first=True, dropout=0.0)
    model = model_of(lambda m, x: m.layer(x), C, layer=layer)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = psap.apply(model, plan).model
    assert_exact(model, plan, small, (image(),))
    assert small.get_parameter("layer.self_attn.in_proj_weight").shape == (3 * C // 2, C // 2)
    wanted = small.eval()(image())
    small.train()(image()).square().sum().backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if n.startswith("layer"))
    stays = psap.apply(model, plan, inplace=True).model
    torch.testing.assert_close(stays.eval()(image()), wanted)


class Own(nn.MultiheadAttention):
    """A forward() that graph mode has no program for."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y: Tensor = super().forward(x, x, x)[0]
        return y


def rotated(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x).unbind(0)
    angles = torch.arange(16.0).double()[:, None] * torch.arange(D).double()
    return merge(softmax(q * angles.cos(), k * angles.cos(), v))


def linear(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x).unbind(0)
    return merge(q.relu() @ (k.relu().transpose(-2, -1) @ v))


def over_channels(m: Any, x: Tensor) -> Tensor:
    q, k, v = (y.transpose(-2, -1) for y in qkv(m, x).unbind(0))
    return merge(softmax(q, k, v).transpose(-2, -1))


FROZEN: dict[str, tuple[Body, int, str, str]] = {
    "linear": (linear, H * D, "qkv", "a product of two activations"),
    "over channels": (over_channels, H * D, "qkv", "a product of two activations"),
    "rotary": (rotated, H * D, "qkv", "fixed number of channels"),
    "fixed keys": (
        lambda m, x: (m.q(x) @ torch.ones(12, 5, dtype=x.dtype).sin()).softmax(-1) @ m.v(x)[:, :5],
        H * 4, "q", "fixed number of channels",
    ),
    "not zero": (
        lambda m, x: merge(softmax(split(m.q(x)).sigmoid(), split(m.k(x)).exp(), split(m.v(x)))),
        H * 4, "q", "would not stay zero after sigmoid",
    ),
    "zero keys": (
        lambda m, x: m.zeros(x, x, x)[0], C, "zeros", "concatenated data without channels",
    ),
    "own class": (lambda m, x: m.own(x), C, "own", "fixes the width of its heads"),
    "own function": (
        lambda m, x: F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3, C, H, m.own.in_proj_weight, m.own.in_proj_bias, None, None,
            False, 0.0, m.own.out_proj.weight, m.own.out_proj.bias,
        )[0].transpose(0, 1),
        C, "own", "fixes the width of its heads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_the_rest_stays_for_a_reason(name: str) -> None:
    body, width, layer, why = FROZEN[name]
    own, zeros = Own(C, H, batch_first=True), heads(add_zero_attn=True)
    model = model_of(body, width, own=own, zeros=zeros)
    graph = psap.trace(model, image())
    assert why in graph.left_alone[layer]
    assert layer not in {group.name for group in graph.groups}


@pytest.mark.parametrize("name", ["sdpa", "no weights"])
def test_a_gated_trace_keeps_a_width_that_attention_divides_by(name: str) -> None:
    model = model_of(lambda m, x: m.mha(x, x, x, need_weights=False)[0], C, mha=heads())
    if name == "sdpa":
        model = model_of(lambda m, x: merge(F.scaled_dot_product_attention(
            split(m.q(x)), split(m.k(x)), split(m.v(x)))), H * 4)  # fmt: skip
    graph = psap.trace(model, image(), gated=True)
    layer, why = ("q", "scales by the width") if name == "sdpa" else ("mha", "fixes the width")
    assert why in graph.left_alone[layer]
    assert ("v" in {group.name for group in graph.groups}) == (name == "sdpa")


class Branching(nn.Module):
    """Attention that looks at its data, which torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * H * D)

    def forward(self, x: Tensor) -> Tensor:
        return selected(self, x.abs() if bool(x.sum() > 1e9) else x)


@pytest.mark.parametrize("gated", [False, True])
def test_attention_that_no_program_can_stand_for_stays(gated: bool) -> None:
    model = model_of(lambda m, x: m.branching(x), H * D, branching=Branching())
    graph = psap.trace(model, image(), gated=gated)
    assert (
        "cannot be rewritten: torch.fx cannot trace Branching"
        in (graph.left_alone["branching.qkv"])
    )
    plan = psap.plan(graph, ratio=0.5)
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


def test_a_branch_on_the_device_is_not_taken_from_the_example() -> None:
    model = model_of(lambda m, x: selected(m, x) if x.device.type != "meta" else x, H * D)
    graph = psap.trace(model, image())
    assert "branches on a device" in graph.left_alone["qkv"]


def test_a_program_refuses_sizes_that_take_another_branch() -> None:
    model = model_of(lambda m, x: selected(m, x if x.shape[1] > 9 else x * 2), H * D)
    small = psap.apply(model, psap.plan(psap.trace(model, image()), ratio=0.5)).model
    small.eval()(image(4, 3, 16, 16))
    with pytest.raises(psap.ArgumentError, match="something else for inputs of this size"):
        small(image(4, 3, 4, 4))
