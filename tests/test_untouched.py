"""What forward() binds anew or adds to while psap runs the model is as it was afterwards."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import psap
from psap import measure


class Remembering(nn.Module):
    """Keeps an average that it binds anew, its last output, a count, histories, and a cache."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)
        self.register_buffer("center", torch.zeros(5))
        self.seen = torch.zeros(5)
        self.mixing = torch.eye(5).to_sparse()
        self.calls = 0
        self.last: Tensor | None = None
        self.history: list[int] = [7]
        self.recent: deque[int] = deque([1, 2], maxlen=3)
        self.cache: dict[str, Any] = {"old": 1}
        self.names = {"a"}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).relu().mean((2, 3)))
        self.center = 0.9 * self.center + 0.1 * y.detach().mean(0)
        self.seen += 1
        self.calls += 1
        self.last = y.detach()
        self.late = y.shape
        self.history.append(len(self.history))
        self.recent.append(3)
        self.recent.append(4)
        self.cache["old"] = self.cache["new"] = 2
        self.names.add("b")
        return y - self.center


def remembered(model: Remembering) -> tuple[Any, ...]:
    """All that a `Remembering` keeps, with the identity of its buffer."""
    lists = list(model.history), list(model.recent), dict(model.cache), set(model.names)
    numbers = model.center.tolist(), model.seen.tolist(), id(model.center)
    return *lists, *numbers, model.calls, model.last, hasattr(model, "late"), model.training


@pytest.mark.parametrize("call", ["trace", "apply", "Pruner", "latency", "time"])
def test_a_model_that_remembers_calls_remembers_none_of_those_of_psap(call: str) -> None:
    model, x = Remembering(), torch.randn(2, 3, 8, 8)
    before = remembered(model)
    if call == "time":
        measure.latency_ms(model, x, repeats=1, warmup=0)
    elif call == "Pruner":
        opt = torch.optim.SGD(model.parameters(), 0.1)
        psap.Pruner(model, x, optimizer=opt, config=psap.Config(target=psap.Target(macs=0.5)))
    else:
        graph = psap.trace(model, x)
        if call == "latency":
            psap.measure_latency(graph)
        elif call == "apply":
            small = psap.apply(model, psap.plan(graph, ratio=0.5)).model
            assert small.calls == 0
    assert remembered(model) == before
    model(x).sum().backward()  # and nothing of it was made in inference mode


def test_layers_that_a_first_call_builds_stay_with_what_belongs_to_them() -> None:
    class Building(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.built = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.built:
                self.head, self.built = nn.Conv2d(8, 4, 1), True
            y: Tensor = self.head(self.conv(x))
            return y

    model = Building()
    psap.trace(model, torch.randn(1, 3, 8, 8))
    assert model.built
    assert hasattr(model, "head")


def test_what_a_hook_binds_is_forgotten() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    model[0].register_forward_hook(lambda module, _, out: setattr(module, "seen", out))
    psap.trace(model, torch.randn(1, 3, 8, 8))
    assert not hasattr(model[0], "seen")
