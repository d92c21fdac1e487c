"""Small networks of constructs that real models are made of: gates, splits, computed norms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from nets import Net, conv, head
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_nets import block, param


def frozen_batch_norm() -> nn.Module:
    """Statistics and affine pair are buffers, and forward() computes with them."""

    def body(m: Any, x: Tensor) -> Tensor:
        weight, bias, mean, var = (v.reshape(1, -1, 1, 1) for v in (m.w, m.b, m.mean, m.var))
        scale = weight * (var + 1e-5).rsqrt()
        return F.relu(m.one(x) * scale + (bias - mean * scale))

    return block(8, body, one=conv(8, 8), **{n: torch.rand(8) for n in ("w", "b", "mean", "var")})


def selective_kernel() -> nn.Module:
    """Two branches that share a softmax, as in SKNet."""

    def body(m: Any, x: Tensor) -> Tensor:
        both = torch.stack([m.a(x), m.b(x)], 1)
        s = m.up(F.relu(m.down(both.sum(1).mean((2, 3), keepdim=True))))
        n, c, h, w = s.shape
        return (both * torch.softmax(s.view(n, 2, c // 2, h, w), 1)).sum(1)

    return block(8, body, a=conv(8, 8), b=conv(8, 8), down=conv(8, 6, 1), up=conv(6, 16, 1))


def split_attention() -> nn.Module:
    """Two halves of one grouped convolution that share a softmax, as in ResNeSt."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.both(x))
        n, c, h, w = x.shape
        halves = x.reshape(n, 2, c // 2, h, w)
        s = m.up(F.relu(m.down(halves.sum(1).mean((2, 3), keepdim=True))))
        s = F.softmax(s.view(n, 1, 2, -1).transpose(1, 2), 1).reshape(n, 2, c // 2, 1, 1)
        return (halves * s).sum(1)

    return block(
        8, body, both=conv(8, 16, groups=2), down=conv(8, 6, 1), up=conv(6, 16, 1, groups=1)
    )


def grouped_transposed(out: int, groups: int) -> nn.Module:
    return block(
        8,
        lambda m, x: F.relu(m.up(x)),
        up=nn.ConvTranspose2d(8, out, 2, 2, groups=groups),
        last=conv(out, 6),
    )


def fused_product() -> nn.Module:
    return block(8, lambda m, x: torch.addcmul(m.one(x), x, m.one(x)), one=conv(8, 8))


def functional_depthwise() -> nn.Module:
    return block(8, lambda m, x: F.conv2d(x, m.w, padding=1, groups=8), w=param(8, 1, 3, 3))


def fixed_filter() -> nn.Module:
    """A blur: the filter is a buffer, which makes no channel of its own."""

    def body(m: Any, x: Tensor) -> Tensor:
        return F.conv2d(m.one(x), m.filter, padding=1, groups=m.filter.shape[0])

    return block(8, body, one=conv(8, 8), filter=torch.rand(8, 1, 3, 3))


class NormAct(nn.BatchNorm2d):
    """A norm whose forward() does different things in the two modes."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if x.dim() != 4:
            raise ValueError("wants images")
        return F.relu(
            F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training
            )
        )


def cross_stage() -> nn.Module:
    """Halves of fixed size, between modules that torch.fx cannot trace."""

    def body(m: Any, x: Tensor) -> Tensor:
        a, b = m.bn1(m.one(x)).split(4, 1)
        return torch.cat([a, m.two(b)], 1)

    two = nn.Sequential(conv(4, 6), NormAct(6))
    return block(8, body, one=conv(8, 8), bn1=NormAct(8), two=two, last=conv(10, 6))


def cross_channel_gate() -> nn.Module:
    """ECA: a convolution slides over the channels."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        gate = m.slide(x.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)
        return x * gate[:, :, None, None]

    return block(8, body, one=conv(8, 10), slide=nn.Conv1d(1, 1, 3, padding=1), last=conv(10, 6))


def global_response_norm() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        size = x.norm(dim=(2, 3), keepdim=True)
        return x + torch.addcmul(m.shift, m.scale, x * (size / (size.mean(1, keepdim=True) + 1)))

    return block(
        8, body, one=conv(8, 10), scale=param(1, 10, 1, 1), shift=param(1, 10, 1, 1),
        last=conv(10, 6),
    )  # fmt: skip


class StandardConv(nn.Conv2d):
    """Weight standardisation with a gain, by a batch norm of the filters."""

    def __init__(self, c: int, o: int, k: int, groups: int) -> None:
        super().__init__(c, o, k, padding=k // 2, groups=groups)
        self.gain = nn.Parameter(torch.rand(o, 1, 1, 1) + 0.5)
        self.scale = 0.3

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        rows = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        weight = rows.reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)


def standard_filters(kernel: int, groups: int, shift: float = 0.0) -> nn.Module:
    """Between others, since what a filter reads takes part in its mean and variance."""

    def body(m: Any, x: Tensor) -> Tensor:
        return F.silu(m.two(F.gelu(m.one(x)) + shift))

    out = 10 if groups == 10 else 6
    return block(
        8, body, one=StandardConv(8, 10, kernel, 1), two=StandardConv(10, out, kernel, groups),
        last=conv(out, 6),
    )  # fmt: skip


def parametrised(how: Callable[[nn.Module], nn.Module], middle: int, out: int) -> nn.Module:
    """Two convolutions with computed weights, the second one depthwise if it keeps its width."""
    groups = middle if middle == out else 1
    return block(
        8,
        lambda m, x: F.relu(m.two(torch.sigmoid(m.one(x)))),
        one=how(conv(8, middle)),
        two=how(conv(middle, out, groups=groups)),
        last=conv(out, 6),
    )


def by_hook(module: nn.Module) -> nn.Module:
    """The weight norm of older code, which PyTorch advises against."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(module)


def scaled_weight() -> nn.Module:
    """A learning rate that is built into the weight, as in StyleGAN."""
    return block(
        8, lambda m, x: F.relu(F.conv2d(x, m.w * 0.3, padding=1)), w=param(10, 8, 3, 3),
        last=conv(10, 6),
    )  # fmt: skip


def mean_gate() -> nn.Module:
    """A map of the mean over the channels, as in CBAM."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.one(x)
        return x * torch.sigmoid(
            x.mean(1, keepdim=True) + x.square().mean(dim=[1, 2, 3], keepdim=True)
        )

    return block(8, body, one=conv(8, 10), last=conv(10, 6))


def root_mean_square() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return F.rms_norm(m.one(x).movedim(1, -1), (10,), m.scale).movedim(-1, 1)

    return block(8, body, one=conv(8, 10), scale=param(10), last=conv(10, 6))


def shifted() -> nn.Module:
    """A shift that all channels share (HGNet): what is pruned must be cut off where it is read."""

    def body(m: Any, x: Tensor) -> Tensor:
        return m.scale * F.relu(m.one(x)) + m.shift

    return block(8, body, one=conv(8, 10), scale=param(1), shift=param(1), last=conv(10, 6))


def fixed_scale() -> nn.Module:
    def body(m: Any, x: Tensor) -> Tensor:
        return x + m.one(x) * m.scale.view((8, 1, 1))

    return block(8, body, one=conv(8, 8), scale=param(8))


def half_width() -> nn.Module:
    """A width of one layer that is computed from that of another."""

    def body(m: Any, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        both = m.one(x).reshape(n, 2, c // 2, h, w)
        return x * torch.cat([both[:, 1], both[:, 0]], 1).mean((1, 2, 3), keepdim=True).cumsum(1)

    return block(8, body, one=conv(8, 8))


def sorted_outputs() -> nn.Module:
    """Equal scores, which rounding may sort either way."""

    def forward(m: Any, x: Tensor) -> Tensor:
        scores = m.head(F.relu(m.stem(x))).repeat(1, 4)
        order = scores.argsort(1)
        return torch.cat([scores, order.to(scores.dtype)], 1)

    return Net(forward, stem=conv(3, 8), head=head(8))


def in_place_sum_on_slice(gate: bool) -> nn.Module:
    """A shortcut that is added into a slice of a concatenation (GhostNet); or one that is open."""

    def body(m: Any, x: Tensor) -> Tensor:
        out = torch.cat([m.one(x), m.two(x)], 1)[:, :8]
        out += torch.sigmoid(x) if gate else x
        return out

    return block(8, body, one=conv(8, 4), two=conv(8, 4))


def unit_vectors() -> nn.Module:
    """Channels over their norm, which is the same for all of them."""
    return block(8, lambda m, x: F.normalize(m.one(x), dim=1), one=conv(8, 10), last=conv(10, 6))


def fused_glu() -> nn.Module:
    return block(8, lambda m, x: F.glu(m.both(x), 1), both=conv(8, 12), last=conv(6, 6))


def turned_in_place() -> nn.Module:
    """Dimensions that come, go and change places in place, of a tensor and of a view of one."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.deep(x.unsqueeze(2))
        x = x.squeeze_(2).transpose_(1, 3).unsqueeze_(4)
        return m.one(F.relu(x[:, :, :, :, 0].transpose_(3, 1)))

    return block(8, body, deep=nn.Conv3d(8, 10, 1), one=conv(10, 8))


def new_dimensions() -> nn.Module:
    """An index that adds dimensions, where forward() fixes widths."""

    def body(m: Any, x: Tensor) -> Tensor:
        gate = m.gate(x.mean((2, 3)))
        x = m.one(x).view(-1, 8, 8, 8) * gate[:, :, None, None] + gate[..., None, None]
        return F.relu(x[None, :, :8].squeeze(0))

    return block(8, body, one=conv(8, 8), gate=nn.Linear(8, 8), last=conv(8, 6))


def source_masks() -> nn.Module:
    """Masks of two sources times one mixture, as networks that separate sources have them."""

    def body(m: Any, x: Tensor) -> Tensor:
        masks = torch.sigmoid(m.mask(x)).view(-1, 2, 8, 8, 8)
        return (masks * x.unsqueeze(1)).flatten(0, 1)

    return block(8, body, mask=conv(8, 16))


def gated_parts() -> nn.Module:
    """A gate for each quarter of the channels, which stays, so that all of these lose the same."""

    def body(m: Any, x: Tensor) -> Tensor:
        gates = torch.sigmoid(m.gate(x)).unsqueeze(2)
        return (x.view(-1, 2, 8, 8, 8) * gates).view(-1, 16, 8, 8)

    return block(16, body, gate=conv(16, 2))
