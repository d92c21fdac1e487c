"""MobileNetV2 (Sandler et al. 2018) for small images: the first two strides are 1."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from psap.models.init import init_weights

# (expansion, channels, blocks, stride of the first block), by stage.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _conv(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    pad = kernel // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, pad, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; with a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = in_channels * expansion
        layers = [_conv(in_channels, width, 1)] if expansion > 1 else []
        self.body = nn.Sequential(
            *layers,
            _conv(width, width, 3, stride=stride, groups=width),
            nn.Conv2d(width, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] to [N, O, H / stride, W / stride]."""
        out: Tensor = self.body(x)
        return x + out if self.residual else out


class CifarMobileNetV2(nn.Module):
    """Seventeen inverted residual blocks between two plain convolutions."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv(in_channels, 32, 3)]
        width = 32
        for expansion, channels, blocks, stride in STAGES:
            for index in range(blocks):
                step = 1 if index else stride
                layers.append(InvertedResidual(width, channels, expansion, step))
                width = channels
        layers.append(_conv(width, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, classes]."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits


def mobilenet_v2(*, num_classes: int = 10, in_channels: int = 3) -> CifarMobileNetV2:
    """MobileNetV2 for small images: 2.2 million parameters, 88 million MACs at 32x32."""
    return CifarMobileNetV2(num_classes, in_channels)
