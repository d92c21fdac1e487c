"""Small networks that PyTorch may crash on are named, and psap's own loops keep clear of them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import psap
from psap import data, hazards
from psap.models import create
from psap.run import Run
from psap.run_config import RunConfig


def net(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 1, stride=2), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 4, 2),
    )  # fmt: skip


def apply(model: nn.Module, format: torch.memory_format, **options) -> None:
    model = model.to(memory_format=format)
    x = torch.zeros(2, 3, 4, 4).to(memory_format=format)
    psap.apply(model, psap.plan(psap.trace(model, x), ratio=0.5, **options))


def test_names_the_layer_and_what_to_do() -> None:
    with pytest.warns(psap.PsapWarning, match=r"trains 2 on a CPU in channels_last.*6035.*=16"):
        apply(net(), torch.channels_last)


def test_says_nothing_where_it_is_safe() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(net(), torch.contiguous_format)
        apply(net(32), torch.channels_last)
        apply(net(), torch.channels_last, min_channels=16)
        hazards.warn_unsafe(net(8).to("meta", memory_format=torch.channels_last))
        hazards.warn_unsafe(net(8).double().to(memory_format=torch.channels_last))


def test_format_of_a_run(tmp_path: Path) -> None:
    assert hazards.training_format(create("resnet20")) == torch.channels_last
    assert hazards.training_format(create("digits_resnet")) == torch.contiguous_format
    run = Run(RunConfig(arch="digits_resnet", target_macs=0.5, out=str(tmp_path)))
    x, _ = next(iter(run.data.train))
    assert x.stride() == (64, 64, 8, 1)
    assert all(p.is_contiguous() for p in run.model.parameters())


def test_data_in_either_format() -> None:
    digits = data.load("digits")
    for format in (torch.contiguous_format, torch.channels_last):
        for loader in (lambda d: d.train, lambda d: d.val, lambda d: d.test):
            x, y = next(iter(loader(digits.as_format(format))))
            again, labels = next(iter(loader(digits)))
            assert x.stride()[1:] == (
                (64, 8, 1) if format == torch.contiguous_format else (1, 8, 1)
            )
            assert torch.equal(x, again) and torch.equal(y, labels)


@pytest.mark.slow
def test_contiguous_tensors_do_not_crash() -> None:
    """In a process of its own; the same loop in channels_last is what crashes."""
    code = (
        "import torch\n"
        "conv = torch.nn.Conv2d(5, 13, 1, 2, bias=False)\n"
        "for _ in range(300):\n"
        "    conv.zero_grad(); conv(torch.randn(64, 5, 8, 8)).square().sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0
