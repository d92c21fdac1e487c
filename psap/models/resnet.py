"""The CIFAR ResNets (He et al. 2015, section 4.2) with parameter-free shortcuts (option A)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from psap.models.init import init_weights


class PaddedBlock(nn.Module):
    """Two 3x3 convolutions; where the width grows, the shortcut drops pixels and pads channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[N, I, H, W] to [N, O, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.pad or self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels; 6 * blocks + 2 layers with weights.

    The names of the parameters are those of the common pretrained files.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


def _stage(blocks: int, in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    rest = (PaddedBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(PaddedBlock(in_channels, out_channels, stride), *rest)


def resnet20(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-20: 0.27 million parameters, 41 million MACs at 32x32."""
    return CifarResNet(3, num_classes, in_channels)


def resnet32(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-32: 0.46 million parameters, 69 million MACs at 32x32."""
    return CifarResNet(5, num_classes, in_channels)


def resnet44(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-44: 0.66 million parameters, 98 million MACs at 32x32."""
    return CifarResNet(7, num_classes, in_channels)


def resnet56(*, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-56: 0.85 million parameters, 126 million MACs at 32x32."""
    return CifarResNet(9, num_classes, in_channels)
