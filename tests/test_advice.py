"""What errors and warnings say to do is what helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import chain, image
from pruner_nets import CLASSES, Chain, inputs
from torch import Tensor, nn

import psap
from psap.progress import Silent
from psap.run import Run, train
from psap.run_config import RunConfig


def build(model: nn.Module, **options: Any) -> psap.Pruner:
    opt = torch.optim.SGD(model.parameters(), 0.1)
    return psap.Pruner(model, inputs(), optimizer=opt, config=psap.Config(**options))


def test_a_target_that_frozen_parameters_forbid_says_so() -> None:
    model = Chain()
    model.bn2.requires_grad_(False)  # as in much transfer learning
    with pytest.raises(
        psap.TargetError, match=r"cannot be met.*; 1 layer stays because bn2.* is frozen .*_grad_\("
    ):
        build(model, target=psap.Target(macs=0.1))
    with pytest.raises(psap.TargetError, match=r"raise max_ratio; 1 layer stays, conv1 for one \("):
        build(_Cumulative(), target=psap.Target(macs=0.1))
    with pytest.raises(psap.TargetError, match=r"raise max_ratio$"):
        build(Chain(), target=psap.Target(macs=0.001))


class _Cumulative(nn.Module):
    """No rule follows the first layer; the second one can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, CLASSES, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).cumsum(1)).mean((2, 3))


def _more_classes() -> nn.Module:
    model = Chain()
    model.head.fc = nn.Linear(12, 7)
    return model


def _no_head() -> nn.Module:
    model = Chain()
    model.head.fc = nn.Linear(12, 5, bias=False)
    return model


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            lambda: Chain(bias=True),
            r"it has conv1\.bias, which is not in the file; build it with the",
        ),
        (_more_classes, r"its head\.fc\.weight has .* in the file it has \(5, .*num_classes"),
        (_no_head, r"it has no head\.fc\.bias"),
    ],
)
def test_a_file_names_what_of_a_factory_does_not_fit(
    factory: Any, message: str, tmp_path: Path
) -> None:
    model, path = Chain(), tmp_path / "small.safetensors"
    psap.save(psap.apply(model, psap.plan(psap.trace(model, inputs()), ratio=0.5)), path)
    with pytest.raises(psap.ArgumentError, match=message):
        psap.load(path, factory)


@pytest.mark.parametrize("mode", ["module", "graph"])
def test_in_inference_mode_too_the_small_network_can_be_trained(mode: str, tmp_path: Path) -> None:
    model = chain(8, 8).double()
    path = tmp_path / "small.safetensors"
    with torch.inference_mode():
        plan = psap.plan(psap.trace(model, image()), ratio=0.5)
        result = psap.apply(model, plan, mode=mode)  # type: ignore[arg-type]
        psap.save(result, path)
        made = [result.model, psap.mask(model, plan), psap.load(path, lambda: chain(8, 8))]
        assert torch.is_inference_mode_enabled()
    for network in made:
        assert not any(t.is_inference() for t in network.state_dict().values())
        network(image()).sum().backward()
        assert all(p.grad is not None for p in network.parameters())
    with torch.no_grad():
        psap.apply(model, plan)
        assert not torch.is_grad_enabled()


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, like that of sharpness-aware minimisation."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_an_optimizer_around_another_one_is_refused_and_the_inner_one_works() -> None:
    torch.manual_seed(0)
    model = Chain()
    opt = Wrapper(model.parameters())
    plan = psap.plan(psap.trace(model, inputs()), ratio=0.5)
    model(inputs()).square().mean().backward()
    opt.step()
    before = opt.inner.state_dict()
    with pytest.raises(
        psap.PsapError, match=r"Wrapper keeps a SGD in 'inner'.*wrap result.optimiz"
    ):
        psap.apply(model, plan, optimizer=opt)
    assert str(opt.inner.state_dict()) == str(before)
    result = psap.apply(model, plan, optimizer=opt.inner)
    held = result.model.conv1.weight.detach().clone()
    result.model(inputs()).square().mean().backward()
    result.optimizer.step()
    assert not torch.equal(result.model.conv1.weight, held)


class Hears(Silent):
    """Remembers what a run tells, in order."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def epoch(self, entry: Any) -> None:
        self.heard.append(entry["epoch"])

    def note(self, text: str) -> None:
        self.heard.append(text)


def test_what_comes_after_the_last_epoch_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "_export", lambda self, listener: None)
    settings = {"target_macs": 0.5, "epochs": 2, "dense_epochs": 0, "batch_size": 512}
    listener = Hears()
    train(RunConfig(**settings, out=str(tmp_path / "run")), listener=listener)  # type: ignore[arg-type]
    assert listener.heard == [1, 2, "testing, timing and exporting the small network"]
