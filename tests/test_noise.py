"""Networks whose forward() adds random numbers to channels are proved, and wrong ones refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import psap
from psap.shrink import small_copy, zero_
from psap.verify import verify


class Noisy(nn.Module):
    """Adds noise to its channels, in train mode or always."""

    def __init__(self, kind: str, always: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.kind, self.always = kind, always

    def noise(self, x: Tensor) -> Tensor:
        """Random numbers for every value of ``x``."""
        if self.kind == "randn_like":
            return torch.randn_like(x)
        if self.kind == "normal_":
            return torch.empty_like(x).normal_(std=0.2)
        if self.kind == "Normal":
            return torch.distributions.Normal(torch.zeros_like(x), 0.1).rsample()
        return torch.empty_like(x).uniform_(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        if self.training or self.always:
            x = x + self.noise(x)
        y: Tensor = self.head(self.norm(self.conv2(x)).relu().mean((2, 3)))
        return y


@pytest.mark.parametrize("always", [False, True], ids=["in training", "always"])
@pytest.mark.parametrize("kind", ["randn_like", "normal_", "Normal", "uniform_"])
def test_noise_on_channels(kind: str, always: bool) -> None:
    model, x = Noisy(kind, always), torch.randn(2, 3, 8, 8)
    plan = psap.plan(psap.trace(model, x), ratio=0.5)
    result = psap.apply(model, plan)
    assert result.model.conv2.out_channels == 4
    if kind == "randn_like" or not always:  # other calls freeze what they are added to
        assert result.model.conv1.out_channels == 4
    assert result.report["verification"]["max_relative_error"] < 1e-12
    assert result.report["verification"]["modes"] == ("eval", "train")


def test_noise_that_is_left_out_in_training_must_be_zero_on_average() -> None:
    model, x = Noisy("randn_like", always=False), torch.randn(2, 3, 8, 8)
    model.noise = lambda x: torch.rand_like(x)  # type: ignore[method-assign]
    with pytest.raises(psap.VerificationError, match=r"train mode.*differs is conv2"):
        psap.apply(model, psap.plan(psap.trace(model, x), ratio=0.5))


@pytest.mark.parametrize("always", [False, True], ids=["in training", "always"])
def test_noise_hides_no_wrong_network(always: bool) -> None:
    model, x = Noisy("randn_like", always), torch.randn(2, 3, 8, 8)
    plan = psap.plan(psap.trace(model, x), ratio=0.5)

    def wrong(dense: nn.Module) -> nn.Module:
        small = small_copy(dense, plan)
        small.conv2.weight.data = small.conv2.weight.data.flip(1)
        return small

    with pytest.raises(psap.VerificationError, match=r"first layer that differs is conv2"):
        verify(model, plan, (x,), wrong, zero_, "module")
