"""VGG-16 with batch norm (Simonyan and Zisserman 2014), with one linear layer, as for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from psap.models.init import init_weights

# Widths of the convolutions, by stage; the image is halved after each stage but the last.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVGG(nn.Module):
    """Plain 3x3 convolutions in five stages, then the mean over the image."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, widths in enumerate(STAGES):
            if index:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                layers.append(nn.Conv2d(in_channels, width, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], at least 16x16, to logits [N, classes]."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        logits: Tensor = self.classifier(x)
        return logits


def vgg16_bn(*, num_classes: int = 10, in_channels: int = 3) -> CifarVGG:
    """VGG-16 for images of at least 16x16: 14.7 million parameters, 313 million MACs at 32x32."""
    return CifarVGG(num_classes, in_channels)
