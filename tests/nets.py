"""Small networks of every construct that the channel graph knows, and the comparison of two nets.

A network is a few named modules and parameters and a function of (self, inputs).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import psap
from psap.graph.trace import output_tensors

Body = Callable[..., Any]


class Net(nn.Module):
    """Named parts, and a body that uses them."""

    def __init__(self, body: Body, **parts: nn.Module | nn.Parameter | Tensor | int) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Net2(Net):
    """The same for two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps the size of its input."""
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def head(width: int, classes: int = 5) -> nn.Sequential:
    """Pooling and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def chain(*widths: int, bias: bool = False) -> nn.Sequential:
    """conv, BN, ReLU for every width, then a classifier."""
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [conv(before, width, bias=bias), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, head(before))


def image(*shape: int, seed: int = 1) -> Tensor:
    """Random float64 input, [4, 3, 8, 8] by default."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4, 3, 8, 8), generator=generator, dtype=torch.float64)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, and every parameter and every statistic random, so that nothing hides an error."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            numbers = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var") or tensor.dim() == 1:
                tensor.copy_(0.5 + numbers)
            else:
                tensor.copy_((numbers - 0.5) * 2 / max(1, tensor[0].numel()) ** 0.5)
    return model


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, inputs: Any) -> float:
    """One step towards a fixed target on inputs that the seed changes; returns the loss."""
    optimizer.zero_grad()
    out = model(inputs[0] + 0.1 * image(*inputs[0].shape, seed=seed))
    target = torch.arange(out.numel(), dtype=out.dtype).sin().view_as(out)
    loss = (out - target).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def outputs(model: nn.Module, inputs: Any, training: bool) -> list[Tensor]:
    """All output tensors of a run of a copy, followed by nothing else."""
    model = copy.deepcopy(model).train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        return output_tensors(model(*inputs))


def difference(masked: nn.Module, small: nn.Module, inputs: Any, training: bool) -> float:
    """Largest relative difference of any output."""
    wanted, got = outputs(masked, inputs, training), outputs(small, inputs, training)
    assert wanted, "the model returned no tensor"
    assert [x.shape for x in wanted] == [x.shape for x in got]
    return max(
        float((a.double() - b.double()).abs().max()) / max(1e-12, float(a.double().abs().max()))
        for a, b in zip(wanted, got, strict=True)
    )


def assert_exact(model: nn.Module, plan: psap.Plan, small: nn.Module, inputs: Any) -> None:
    """The small network equals the masked one in both modes; the plan removed something real."""
    assert plan.sides
    masked = psap.mask(model, plan)
    for training in (False, True):
        assert difference(masked, small, inputs, training) < 1e-9, f"training={training}"
    kept = plan.kept()
    dense = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    cut = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for name, tensor in cut.items():
        for dim, positions in kept.get(name, {}).items():
            assert tensor.shape[dim] == len(positions) > 0
        if "_tensor_constant" in name:
            continue  # of a program
        expected = dense[name]
        for dim, positions in kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(positions))
        assert torch.equal(tensor, expected), name


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that psap must leave as it is, and the random state."""
    return {
        "tensors": {
            name: (id(t), t._version if not t.is_inference() else 0, t.detach().clone())
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        },
        "grads": {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        },
        "requires": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
            )
            for name, module in model.named_modules()
        },
        "global": (
            len(nn.modules.module._global_forward_hooks),
            len(nn.modules.module._global_forward_pre_hooks),
        ),
        "rng": torch.get_rng_state(),
        "grad": torch.is_grad_enabled(),
    }


def assert_same(before: Any, after: Any, where: str = "") -> None:
    """Two snapshots are the same, bit for bit (versions of buffers aside: they are put back)."""
    if isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same(before[key], after[key], f"{where}/{key}")
    elif isinstance(before, tuple) and len(before) == 3 and isinstance(before[2], Tensor):
        assert before[0] == after[0], where
        assert_same(before[2], after[2], where)
    elif isinstance(before, Tensor):
        assert before.dtype == after.dtype and before.shape == after.shape, where
        assert torch.equal(before, after) or bool(before.isnan().any()), where
    else:
        assert before == after, where
