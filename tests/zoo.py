"""One network per construct: what can be pruned in it, and what must be left alone and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from nets import Net, Net2, chain, conv, head, image
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what the graph should say.

    Attributes:
        make: builds the model.
        groups: size of every group by name.
        alone: a part of the reason why a layer is left alone, by layer.
        inputs: the example inputs.
        mode: how the small network must be made.
    """

    make: Callable[[], nn.Module]
    groups: dict[str, int]
    alone: dict[str, str] = field(default_factory=dict)
    inputs: tuple[Any, ...] = field(default_factory=lambda: (image(),))
    mode: str = "module"


def _block(width: int, body: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    """stem conv + BN + ReLU to ``width``, the body, a conv and a head."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.last(body(m, F.relu(m.bn(m.stem(x))))))

    parts.setdefault("last", conv(width, 6))
    return Net(forward, stem=conv(3, width), bn=nn.BatchNorm2d(width), head=head(6), **parts)


def _p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def residual() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(x + m.bn2(m.two(F.relu(m.bn1(m.one(x))))))

    return _block(
        8, body, one=conv(8, 10), bn1=nn.BatchNorm2d(10), two=conv(10, 8), bn2=nn.BatchNorm2d(8)
    )


def dense_block() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.bn1(m.one(x)))
        z = F.relu(m.bn2(m.two(torch.cat([x, y], 1))))
        return m.norm(torch.cat([x, y, z], 1))

    return _block(
        8,
        body,
        one=conv(8, 4),
        bn1=nn.BatchNorm2d(4),
        two=conv(12, 6),
        bn2=nn.BatchNorm2d(6),
        norm=nn.BatchNorm2d(18),
        last=conv(18, 6),
    )


def shuffle(groups: int, second: nn.Module) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        n, c, h, w = x.shape
        x = x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.second(x)

    return _block(12, body, first=conv(12, 12, 1, groups=groups), second=second)


def se(gate: Callable[[Tensor], Tensor]) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        s = m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))
        return x * gate(s)

    return _block(8, body, down=conv(8, 4, 1), up=conv(4, 8, 1))


def permuted() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(F.relu(m.stem(x)).permute(0, 2, 3, 1).flatten(1))

    return Net(forward, stem=conv(3, 6), fc=nn.Linear(6 * 64, 5))


def flattened() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc2(F.relu(m.fc(m.stem(x).flatten(1))))

    return Net(forward, stem=conv(3, 6), fc=nn.Linear(6 * 64, 8), fc2=nn.Linear(8, 5))


def shared_module() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.twice(F.relu(m.twice(x))))

    return _block(8, body, twice=conv(8, 8))


def shared_parameter() -> nn.Module:
    a, b = conv(8, 8, bias=False), conv(8, 8)
    b.weight = a.weight
    return _block(8, lambda m, x: F.relu(m.b(F.relu(m.a(x)))), a=a, b=b)


def raw_parameter() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, m.w, m.c, padding=1))

    return _block(8, body, w=_p(10, 8, 3, 3), c=_p(10), last=conv(10, 6))


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def conv1d() -> nn.Module:
    return sequence(
        nn.Conv1d(3, 8, 3, padding=1),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(8, 6, 3),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def conv3d() -> nn.Module:
    return sequence(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 6, 3, padding=1),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def transposed() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.bn1(m.up(x)))

    return _block(8, body, up=nn.ConvTranspose2d(8, 10, 2, 2), bn1=nn.BatchNorm2d(10),
                  last=conv(10, 6))  # fmt: skip


def padded() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 4))
        return F.relu(y + m.bn1(m.wide(x)))

    return _block(6, body, wide=conv(6, 12, stride=2), bn1=nn.BatchNorm2d(12), last=conv(12, 6))


def sliced() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.a(x[:, :3]), m.b(x[:, 3:])], 1)

    return _block(8, body, a=conv(3, 4), b=conv(5, 4))


def chunked() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([m.a(a), m.b(b)], 1)

    return _block(8, body, a=conv(4, 4), b=conv(4, 4))


def split_in(*sizes: int) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b, c = x.split(list(sizes), 1)
        return torch.cat([a, F.relu(m.b(b)), F.relu(m.c(c))], 1)

    _, b, c = sizes
    return _block(sum(sizes), body, b=conv(b, b), c=conv(c, c), last=conv(sum(sizes), 6))


def glu() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.both(x).chunk(2, 1)
        return a * torch.sigmoid(b)

    return _block(8, body, both=conv(8, 12), last=conv(6, 6))


def two_inputs() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = F.relu(m.a(x) + m.b(y))
        return {"logits": m.head(z), "maps": [m.out(z), (m.fc(z.mean((2, 3))),)]}

    return Net2(
        forward, a=conv(3, 8), b=conv(2, 8), head=head(8), out=conv(8, 3), fc=nn.Linear(8, 2)
    )


def auxiliary() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Any:
        x = F.relu(m.bn(m.stem(x)))
        main = m.head(F.relu(m.last(m.drop(x))))
        return (main, m.aux_head(F.relu(m.aux(m.drop(x))))) if m.training else main

    return Net(
        forward,
        stem=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        last=conv(8, 6),
        head=head(6),
        aux=conv(8, 4),
        aux_head=head(4, 3),
        drop=nn.Dropout(0.0),
    )


def in_place() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.one(x)
        y += x
        y.mul_(2).relu_()
        return y

    return _block(8, body, one=conv(8, 8))


def in_place_view() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        F.relu_(x[:, :4])
        return x

    return _block(8, body, one=conv(8, 8))


def in_place_add_on_view() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        x[:, :4] += 1
        return x

    return _block(8, body, one=conv(8, 8))


def in_place_clamp_on_view() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        x[:, :4].clamp_(min=1)
        return x

    return _block(8, body, one=conv(8, 8))


def cat_constant() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cat([x, m.grid.expand(x.shape[0], -1, -1, -1)], 1)

    return _block(8, body, grid=torch.randn(1, 2, 8, 8), last=conv(10, 6))


def one_channel() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(m.gate(x))

    return _block(8, body, gate=conv(8, 1))


def one_channel_added() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return x + m.shift(x)

    return _block(8, body, shift=conv(8, 1))


def standardised() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        w = m.w - m.w.mean((1, 2, 3), keepdim=True)
        return F.relu(F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), padding=1))

    return _block(8, body, w=_p(8, 8, 3, 3))


def weight_norm() -> nn.Module:
    return _block(
        8,
        lambda m, x: F.relu(m.one(x)),
        one=nn.utils.parametrizations.weight_norm(conv(8, 8)),
    )


def attention() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (m.q, m.k, m.v))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return (v @ weights.transpose(1, 2)).view_as(x) + x

    return _block(8, body, q=conv(8, 8, 1), k=conv(8, 8, 1), v=conv(8, 8, 1))


def layer_norm() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.one(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return _block(8, body, one=conv(8, 10), norm=nn.LayerNorm(10), last=conv(10, 6))


def plus_one() -> nn.Module:
    return _block(8, lambda m, x: m.one(x) + 1, one=conv(8, 8))


def unknown() -> nn.Module:
    return _block(8, lambda m, x: m.one(x).cumsum(1), one=conv(8, 8))


def layer_scale() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return x + m.gamma * m.one(x) + m.position

    return _block(8, body, one=conv(8, 8), gamma=_p(8, 1, 1), position=_p(1, 8, 8, 8))


def tied_decoder() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(F.conv2d(x, m.w)), m.w)

    return _block(8, body, w=_p(10, 8, 3, 3))


def conditional_norm() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.batch_norm(m.one(x), None, None, m.scale * 2, m.scale + 1, training=True)

    return _block(8, body, one=conv(8, 8), scale=_p(8))


def zeros_like_cat() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x)], 1) + m.wide(x)

    return _block(4, body, wide=conv(4, 8), last=conv(8, 6))


def rolled() -> nn.Module:
    return _block(8, lambda m, x: m.one(x).roll(1, 1), one=conv(8, 8))


def indexed() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.one(x).index_select(1, m.order)

    return _block(8, body, one=conv(8, 8), order=torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))


def group_normed(groups: int, affine: bool = True) -> nn.Module:
    return _block(
        8,
        lambda m, x: F.relu(m.norm(m.one(x))),
        one=conv(8, 10),
        norm=nn.GroupNorm(groups, 10, affine=affine),
        last=conv(10, 6),
    )


def instance_normed(affine: bool) -> nn.Module:
    return _block(
        8,
        lambda m, x: F.relu(m.norm(m.one(x))),
        one=conv(8, 10),
        norm=nn.InstanceNorm2d(10, affine=affine),
        last=conv(10, 6),
    )


def pixel_shuffled() -> nn.Module:
    return _block(
        8, lambda m, x: m.up(m.one(x)), one=conv(8, 24), up=nn.PixelShuffle(2), last=conv(6, 6)
    )


def pixel_unshuffled() -> nn.Module:
    return _block(8, lambda m, x: F.pixel_unshuffle(m.one(x), 2), one=conv(8, 4), last=conv(16, 6))


def with_prelu(slopes: int) -> nn.Module:
    return _block(
        8,
        lambda m, x: m.act(m.one(x)),
        one=conv(8, 10),
        act=nn.PReLU(slopes),
        last=conv(10, 6),
    )


def depthwise(multiplier: int) -> nn.Module:
    wide = 8 * multiplier
    return _block(
        8,
        lambda m, x: F.relu(m.bn1(m.dw(x))),
        dw=conv(8, wide, groups=8),
        bn1=nn.BatchNorm2d(wide),
        last=conv(wide, 6),
    )


def grouped() -> nn.Module:
    return _block(
        8,
        lambda m, x: F.relu(m.bn1(m.gc(x))),
        gc=conv(8, 12, groups=2),
        bn1=nn.BatchNorm2d(12),
        last=conv(12, 6),
    )


def plain_bn(affine: bool) -> nn.Module:
    return _block(
        8,
        lambda m, x: F.relu(m.bn1(m.one(x))),
        one=conv(8, 10),
        bn1=nn.BatchNorm2d(10, affine=affine),
        last=conv(10, 6),
    )


def fixed_view() -> nn.Module:
    """A fixed view in the middle of forward."""

    def body(m: Any, x: Tensor) -> Tensor:
        return m.one(x).view(-1, 8, 64).relu().view(-1, 8, 8, 8)

    return _block(8, body, one=conv(8, 8))


OUT = {"head.2": "output of the model"}


def _case(
    make: Callable[[], nn.Module], *, alone: dict[str, str] | None = None, **groups: int
) -> Case:
    mode = "graph" if groups.pop("graph", 0) else "module"
    return Case(
        make,
        {k.replace("__", "#"): v for k, v in groups.items()},
        {**OUT, **(alone or {})},
        mode=mode,
    )


CASES: dict[str, Case] = {
    "chain": Case(lambda: chain(8, 10), {"0": 8, "3": 10}, {"6.2": "output of the model"}),
    "bias": Case(lambda: chain(8, 10, bias=True), {"0": 8, "3": 10}, {"6.2": "output"}),
    "residual": _case(residual, stem=8, one=10, last=6),
    "dense block": _case(dense_block, stem=8, one=4, two=6, last=6),
    "depthwise": _case(lambda: depthwise(1), stem=8, last=6),
    "depthwise, multiplier 3": _case(lambda: depthwise(3), stem=8, last=6),
    "grouped": _case(grouped, stem=4, gc=6, last=6),
    "shuffle, grouped": _case(
        lambda: shuffle(3, conv(12, 12, 1, groups=3)), stem=4, first=1, second=4, last=6
    ),
    "shuffle, plain": _case(
        lambda: shuffle(3, conv(12, 12, 1)), stem=4, first=4, second=12, last=6
    ),
    "shuffle, depthwise": _case(
        lambda: shuffle(3, conv(12, 12, groups=12)), stem=4, first=4, last=6
    ),
    "se, sigmoid": _case(lambda: se(torch.sigmoid), stem=8, down=4, last=6),
    "se, hardsigmoid": _case(lambda: se(F.hardsigmoid), stem=8, down=4, last=6),
    "permute and flatten": Case(permuted, {"stem": 6}, {"fc": "output of the model"}),
    "flatten": Case(flattened, {"stem": 6, "fc": 8}, {"fc2": "output of the model"}),
    "module called twice": _case(shared_module, stem=8, last=6),
    "parameter of two modules": _case(shared_parameter, stem=8, last=6),
    "raw parameter": _case(raw_parameter, stem=8, w=10, last=6),
    "conv1d": Case(conv1d, {"0": 8, "4": 6}, {"7": "output"}, (image(4, 3, 12),)),
    "conv3d": Case(conv3d, {"0": 8, "4": 6}, {"7": "output"}, (image(2, 3, 4, 4, 4),)),
    "transposed": _case(transposed, stem=8, up=10, last=6),
    "padded shortcut": _case(padded, stem=6, wide=6, last=6, graph=1),
    "slices": _case(sliced, stem=3, stem__2=5, a=4, b=4, last=6, graph=1),
    "chunk": _case(chunked, stem=4, stem__2=4, a=4, b=4, last=6),
    "split, equal": _case(
        lambda: split_in(4, 4, 4), stem=4, stem__2=4, stem__3=4, b=4, c=4, last=6, graph=1
    ),
    "split, unequal": _case(
        lambda: split_in(2, 4, 6), stem=2, stem__2=4, stem__3=6, b=4, c=6, last=6, graph=1
    ),
    "glu": _case(glu, stem=8, both=6, last=6),
    "two inputs, dict output": Case(
        two_inputs,
        {"a": 8},
        {"head.2": "output", "out": "output", "fc": "output"},
        (image(), image(4, 2, 8, 8)),
    ),
    "auxiliary head": _case(
        auxiliary, alone={"aux_head.2": "output of the model"}, stem=8, last=6, aux=4
    ),
    "in place": _case(in_place, stem=8, last=6),
    "in place on a view": _case(in_place_view, stem=8, one=8, last=6, graph=1),
    "in place, add on a view": _case(in_place_add_on_view, stem=8, one=4, last=6),
    "in place, clamp on a view": _case(in_place_clamp_on_view, stem=8, one=4, last=6),
    "cat with a constant": _case(cat_constant, stem=8, last=6, alone={"grid": "used by aten.exp"}),
    "one channel multiplied": _case(one_channel, stem=8, last=6, alone={"gate": "spreads it over"}),
    "one channel added": _case(
        one_channel_added, last=6, alone={"stem": "not stay zero", "shift": "spreads it over"}
    ),
    "weight standardisation": _case(
        standardised, last=6, alone={"stem": "computed in forward", "w": "used by aten.mean"}
    ),
    "weight norm": _case(
        weight_norm,
        last=6,
        alone={"stem": "computed in forward", "one.parametrizations.weight": "weight_norm"},
    ),
    "attention": _case(
        attention,
        last=6,
        alone={
            "stem": "fixed number of channels",
            **dict.fromkeys("qkv", "a product of two activations"),
        },
    ),
    "layer norm": _case(layer_norm, stem=8, last=6, alone={"one": "layer norm over the channels"}),
    "x + 1": _case(plus_one, stem=8, last=6, alone={"one": "not stay zero after add of a const"}),
    "bare sigmoid": _case(
        lambda: _block(8, lambda m, x: torch.sigmoid(m.one(x)), one=conv(8, 8)),
        stem=8,
        last=6,
        alone={"one": "would not stay zero after sigmoid"},
    ),
    "unknown op": _case(unknown, stem=8, last=6, alone={"one": "no rule for aten.cumsum"}),
    "layer scale and position": _case(layer_scale, stem=8, last=6),
    "tied decoder": _case(
        tied_decoder, last=6, alone={"w": "read and written", "stem": "read and written"}
    ),
    "computed norm": _case(conditional_norm, stem=8, last=6, alone={"one": "computed in forward"}),
    "cat with zeros_like": _case(zeros_like_cat, stem=4, last=6),
    "roll": _case(rolled, stem=8, last=6, alone={"one": "roll moves channels"}),
    "index_select": _case(indexed, stem=8, last=6, alone={"one": "index_select moves channels"}),
    "group norm, one channel each": _case(lambda: group_normed(10), stem=8, one=10, last=6),
    "group norm, several": _case(
        lambda: group_normed(5), stem=8, last=6, alone={"one": "group norm over several channels"}
    ),
    "group norm, no parameters": _case(
        lambda: group_normed(10, False), stem=8, last=6, alone={"one": "without parameters"}
    ),
    "instance norm, affine": _case(
        lambda: instance_normed(True), stem=8, last=6, alone={"one": "computed in forward"}
    ),
    "pixel shuffle": _case(pixel_shuffled, stem=8, one=6, last=6),
    "pixel unshuffle": _case(pixel_unshuffled, stem=8, one=4, last=6),
    "prelu, one slope": _case(lambda: with_prelu(1), stem=8, one=10, last=6),
    "prelu, a slope per channel": _case(lambda: with_prelu(10), stem=8, one=10, last=6),
    "batch norm": _case(lambda: plain_bn(True), stem=8, one=10, last=6),
    "batch norm, not affine": _case(lambda: plain_bn(False), stem=8, one=10, last=6),
    "fixed view": _case(fixed_view, stem=8, one=8, last=6, graph=1),
}
