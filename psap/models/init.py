"""Initial weights of the built-in models."""

from __future__ import annotations

from torch import nn


def init_weights(model: nn.Module) -> None:
    """Give convolutions and linear layers normal weights that keep the variance through relu.

    Biases become 0; batch norms keep PyTorch's weight 1 and bias 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
