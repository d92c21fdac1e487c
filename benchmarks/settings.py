"""What the methods of `benchmarks.accuracy` share: data, network, budgets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from psap.data import Pictures


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all methods of a comparison share.

    Attributes:
        data: a name of `psap.data`.
        network: a name of `psap.models`, or ``package.module:factory``.
        start: fresh weights, or a dense network trained before.
        images: training images per epoch; None for all.
        val_share: share of the training images that is held out for validation.
        epochs: of the run that prunes, fine-tuning included.
        pretrain: epochs of the dense network before, where ``start`` is "pretrained" and the
            weights do not come from a file.
        batch: images per step.
        lr: peak learning rate; cosine to 0.
        prune: shares of the run between which pruning happens.
        pictures: what the images of a folder become; None for other data, or photographs.
    """

    data: Literal["digits", "cifar10", "imagefolder"] = "digits"
    network: str = "digits_resnet"
    start: Literal["scratch", "pretrained"] = "pretrained"
    images: int | None = None
    val_share: float = 0.1
    epochs: int = 30
    pretrain: int = 30
    batch: int = 64
    lr: float = 0.05
    prune: tuple[float, float] = (0.0, 0.5)
    pictures: Pictures | None = None

    @property
    def memory_format(self) -> torch.memory_format:
        """The faster one that is safe.

        In channels_last, PyTorch's CPU kernel for the gradient of a strided 1x1 convolution with
        fewer than 16 input channels writes past its buffer (oneDNN issue 6035); the CIFAR ResNets
        have no such convolution.
        """
        return torch.channels_last if self.data == "cifar10" else torch.contiguous_format


def as_row(setting: Mapping[str, Any] | Setting) -> dict[str, Any]:
    """A setting as values of JSON; what a row is too old to know has its default."""
    body = asdict(setting) if isinstance(setting, Setting) else setting
    return json.loads(json.dumps({**asdict(Setting()), **body}))  # type: ignore[no-any-return]


GREY = Pictures(size=28, crop=1.0, grey=True, flip=False, shift=2)
SETTINGS = {
    "digits-pretrained": Setting(val_share=0.2, epochs=10),
    "digits-scratch": Setting(start="scratch", val_share=0.2, epochs=15, prune=(0.1, 0.6)),
    "cifar-short": Setting(data="cifar10", network="resnet20", images=5000, epochs=2, lr=0.02),
    "cifar-long": Setting(
        data="cifar10", network="resnet20", images=25000, epochs=4, batch=128, lr=0.05
    ),
    "cifar-scratch": Setting(
        data="cifar10", network="resnet20", start="scratch", images=25000, epochs=8, batch=128,
        lr=0.1, prune=(0.1, 0.6),
    ),
    "cifar56-short": Setting(
        data="cifar10", network="resnet56", images=10000, epochs=2, lr=0.02
    ),
    "cifar56": Setting(
        data="cifar10", network="resnet56", epochs=4, batch=128, lr=0.05
    ),
    "cifar56-long": Setting(
        data="cifar10", network="resnet56", epochs=8, batch=128, lr=0.05
    ),
    "cifar-vgg": Setting(
        data="cifar10", network="vgg16_bn", start="scratch", images=5000, epochs=4, lr=0.05,
        prune=(0.1, 0.6),
    ),
    "mnist-pretrained": Setting(
        data="imagefolder", pictures=GREY, images=2500, val_share=0.2, epochs=4, pretrain=8,
        batch=32,
    ),
    "mnist-scratch": Setting(
        data="imagefolder", pictures=GREY, start="scratch", images=2500, val_share=0.2, epochs=4,
        batch=32,
        prune=(0.1, 0.6),
    ),
    "imagefolder": Setting(
        data="imagefolder", network="torchvision.models:resnet50", epochs=40, batch=256, lr=0.1
    ),
}  # fmt: skip
SUITES = {
    "digits": ("digits-pretrained", "digits-scratch"),
    "mnist": ("mnist-pretrained", "mnist-scratch"),
    **{name: (name,) for name in SETTINGS if not name.startswith(("digits", "mnist"))},
}
"""The settings of each suite."""
