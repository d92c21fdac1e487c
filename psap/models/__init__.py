"""The CIFAR and digits models of the demo and the benchmarks, all plain modules."""

from __future__ import annotations

from psap.models.digits import digits_resnet
from psap.models.factory import FACTORIES, create
from psap.models.mobilenet import mobilenet_v2
from psap.models.resnet import resnet20, resnet32, resnet44, resnet56
from psap.models.vgg import vgg16_bn

__all__ = [
    "FACTORIES",
    "create",
    "digits_resnet",
    "mobilenet_v2",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "vgg16_bn",
]
