"""Instance norms without a tensor know the width that they have in the small network."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import psap


def styled() -> nn.Sequential:
    """Convolutions with instance norms that hold no tensor, of which PyTorch checks the width."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3), nn.InstanceNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def widths(model: nn.Module) -> list[int]:
    return [m.num_features for m in model.modules() if isinstance(m, nn.InstanceNorm2d)]


@pytest.mark.parametrize("mode", ["module", "graph"])
@pytest.mark.parametrize("inplace", [False, True])
def test_bare_norms_follow(mode: str, inplace: bool, tmp_path: Path) -> None:
    model, x = styled(), torch.randn(2, 3, 8, 8)
    plan, average = psap.plan(psap.trace(model, x), ratio=0.5), copy.deepcopy(model)
    result = psap.apply(
        model,
        plan,
        friends=[average],
        mode=mode,  # type: ignore[arg-type]
        inplace=inplace,
    )
    assert widths(result.model) == widths(result.friends[0]) == [4, 3]
    assert widths(model) == ([4, 3] if inplace else [8, 6])
    result.model(x)  # a warning of another width would be an error
    psap.save(result, tmp_path / "small.safetensors")
    small = psap.load(tmp_path / "small.safetensors", styled)
    assert widths(small) == [4, 3]
    torch.testing.assert_close(small(x), result.model(x))


def test_bare_norms_follow_while_the_network_shrinks() -> None:
    model, x = styled(), torch.randn(2, 3, 8, 8)
    opt = torch.optim.SGD(model.parameters(), 0.01)
    config = psap.Config(target=psap.Target(macs=0.3), prune_steps=2, progressive=True)
    pruner = psap.Pruner(model, x, optimizer=opt, config=config)
    for _ in range(3):
        for _ in range(10):
            opt.zero_grad()
            model(x).pow(2).mean().backward()
            opt.step()
        pruner.step()
    result = pruner.finish()
    convolutions = [m.out_channels for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    assert widths(result.model) == convolutions[:2]
    assert sum(widths(result.model)) < 14
