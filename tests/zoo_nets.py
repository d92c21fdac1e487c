"""One small network per construct of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nets import Net, Net2, conv, head
from torch import Tensor, nn
from torch.nn import functional as F


def block(width: int, body: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    """stem conv + BN + ReLU to ``width``, the body, a conv and a head."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.last(body(m, F.relu(m.bn(m.stem(x))))))

    parts.setdefault("last", conv(width, 6))
    return Net(forward, stem=conv(3, width), bn=nn.BatchNorm2d(width), head=head(6), **parts)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def residual() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(x + m.bn2(m.two(F.relu(m.bn1(m.one(x))))))

    return block(
        8, body, one=conv(8, 10), bn1=nn.BatchNorm2d(10), two=conv(10, 8), bn2=nn.BatchNorm2d(8)
    )


def dense_block() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.bn1(m.one(x)))
        z = F.relu(m.bn2(m.two(torch.cat([x, y], 1))))
        return m.norm(torch.cat([x, y, z], 1))

    return block(
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

    return block(12, body, first=conv(12, 12, 1, groups=groups), second=second)


def se(gate: Callable[[Tensor], Tensor]) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        s = m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))
        return x * gate(s)

    return block(8, body, down=conv(8, 4, 1), up=conv(4, 8, 1))


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

    return block(8, body, twice=conv(8, 8))


def shared_parameter() -> nn.Module:
    a, b = conv(8, 8, bias=False), conv(8, 8)
    b.weight = a.weight
    return block(8, lambda m, x: F.relu(m.b(F.relu(m.a(x)))), a=a, b=b)


def raw_parameter() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, m.w, m.c, padding=1))

    return block(8, body, w=param(10, 8, 3, 3), c=param(10), last=conv(10, 6))


def one_or_three(dims: int) -> nn.Module:
    conv_, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv3d, nn.BatchNorm3d)
    pool, mean = (
        (nn.MaxPool1d, nn.AdaptiveAvgPool1d) if dims == 1 else (nn.MaxPool3d, nn.AdaptiveAvgPool3d)
    )
    layers = [conv_(3, 8, 3, padding=1), norm(8), nn.ReLU(), pool(2), conv_(8, 6, 3, padding=1)]
    return nn.Sequential(*layers, mean(1), nn.Flatten(), nn.Linear(6, 5))


def transposed() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.bn1(m.up(x)))

    return block(8, body, up=nn.ConvTranspose2d(8, 10, 2, 2), bn1=nn.BatchNorm2d(10),
                  last=conv(10, 6))  # fmt: skip


def padded() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 4))
        return F.relu(y + m.bn1(m.wide(x)))

    return block(6, body, wide=conv(6, 12, stride=2), bn1=nn.BatchNorm2d(12), last=conv(12, 6))


def sliced() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.a(x[:, :3]), m.b(x[:, 3:])], 1)

    return block(8, body, a=conv(3, 4), b=conv(5, 4))


def chunked() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([m.a(a), m.b(b)], 1)

    return block(8, body, a=conv(4, 4), b=conv(4, 4))


def split_in(*sizes: int) -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b, c = x.split(list(sizes), 1)
        return torch.cat([a, F.relu(m.b(b)), F.relu(m.c(c))], 1)

    _, b, c = sizes
    return block(sum(sizes), body, b=conv(b, b), c=conv(c, c), last=conv(sum(sizes), 6))


def glu() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.both(x).chunk(2, 1)
        return a * torch.sigmoid(b)

    return block(8, body, both=conv(8, 12), last=conv(6, 6))


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

    return block(8, body, one=conv(8, 8))


def in_place_view() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        F.relu_(x[:, :4])
        return x

    return block(8, body, one=conv(8, 8))


def in_place_add_on_view() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        x[:, :4] += 1
        return x

    return block(8, body, one=conv(8, 8))


def in_place_clamp_on_view() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        x[:, :4].clamp_(min=1)
        return x

    return block(8, body, one=conv(8, 8))


def cat_constant() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cat([x, m.grid.expand(x.shape[0], -1, -1, -1)], 1)

    return block(8, body, grid=torch.randn(1, 2, 8, 8), last=conv(10, 6))


def one_channel() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(m.gate(x))

    return block(8, body, gate=conv(8, 1))


def one_channel_added() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return x + m.shift(x)

    return block(8, body, shift=conv(8, 1))


def standardised() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        w = m.w - m.w.mean((1, 2, 3), keepdim=True)
        return F.relu(F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), padding=1))

    return block(8, body, w=param(8, 8, 3, 3))


def attention() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).flatten(2) for f in (m.q, m.k, m.v))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        return (v @ weights.transpose(1, 2)).view_as(x) + x

    return block(8, body, q=conv(8, 8, 1), k=conv(8, 8, 1), v=conv(8, 8, 1))


def layer_norm() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.norm(m.one(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return block(8, body, one=conv(8, 10), norm=nn.LayerNorm(10), last=conv(10, 6))


def unknown() -> nn.Module:
    return block(8, lambda m, x: m.one(x).cumsum(1), one=conv(8, 8))


def layer_scale() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return x + m.gamma * m.one(x) + m.position

    return block(8, body, one=conv(8, 8), gamma=param(8, 1, 1), position=param(1, 8, 8, 8))


def tied_decoder() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(F.conv2d(x, m.w)), m.w)

    return block(8, body, w=param(10, 8, 3, 3))


def conditional_norm() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.batch_norm(m.one(x), None, None, m.scale * 2, m.scale + 1, training=True)

    return block(8, body, one=conv(8, 8), scale=param(8))


def zeros_like_cat() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x)], 1) + m.wide(x)

    return block(4, body, wide=conv(4, 8), last=conv(8, 6))


def rolled() -> nn.Module:
    return block(8, lambda m, x: m.one(x).roll(1, 1), one=conv(8, 8))


def indexed() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.one(x).index_select(1, m.order)

    return block(8, body, one=conv(8, 8), order=torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))


def group_normed(groups: int, affine: bool = True) -> nn.Module:
    return block(
        8,
        lambda m, x: F.relu(m.norm(m.one(x))),
        one=conv(8, 10),
        norm=nn.GroupNorm(groups, 10, affine=affine),
        last=conv(10, 6),
    )


def instance_normed(affine: bool) -> nn.Module:
    return block(
        8,
        lambda m, x: F.relu(m.norm(m.one(x))),
        one=conv(8, 10),
        norm=nn.InstanceNorm2d(10, affine=affine),
        last=conv(10, 6),
    )


def pixel_shuffled() -> nn.Module:
    return block(
        8, lambda m, x: m.up(m.one(x)), one=conv(8, 24), up=nn.PixelShuffle(2), last=conv(6, 6)
    )


def pixel_unshuffled() -> nn.Module:
    return block(8, lambda m, x: F.pixel_unshuffle(m.one(x), 2), one=conv(8, 4), last=conv(16, 6))


def with_prelu(slopes: int) -> nn.Module:
    return block(
        8,
        lambda m, x: m.act(m.one(x)),
        one=conv(8, 10),
        act=nn.PReLU(slopes),
        last=conv(10, 6),
    )


def depthwise(multiplier: int) -> nn.Module:
    wide = 8 * multiplier
    return block(
        8,
        lambda m, x: F.relu(m.bn1(m.dw(x))),
        dw=conv(8, wide, groups=8),
        bn1=nn.BatchNorm2d(wide),
        last=conv(wide, 6),
    )


def grouped() -> nn.Module:
    return block(
        8,
        lambda m, x: F.relu(m.bn1(m.gc(x))),
        gc=conv(8, 12, groups=2),
        bn1=nn.BatchNorm2d(12),
        last=conv(12, 6),
    )


def plain_bn(affine: bool) -> nn.Module:
    return block(
        8,
        lambda m, x: F.relu(m.bn1(m.one(x))),
        one=conv(8, 10),
        bn1=nn.BatchNorm2d(10, affine=affine),
        last=conv(10, 6),
    )


def fixed_view() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.one(x).view(-1, 8, 64).relu().view(-1, 8, 8, 8)

    return block(8, body, one=conv(8, 8))
