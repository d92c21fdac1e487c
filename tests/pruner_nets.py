"""Small networks of every kind that the pruner meets, and a loop that trains them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import psap

CLASSES = 5


def inputs(batch: int = 4, *, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 8, generator=generator).to(dtype)


def labels(batch: int = 4, *, seed: int = 7) -> Tensor:
    return torch.randint(0, CLASSES, (batch,), generator=torch.Generator().manual_seed(seed))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Chain(nn.Module):
    """conv, BN, ReLU twice."""

    def __init__(self, a: int = 8, b: int = 12, *, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, a, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(a)
        self.conv2 = nn.Conv2d(a, b, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(b)
        self.head = Head(b)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(x))))


class Plain(nn.Module):
    """Convolutions with bias and no norm: the filters themselves are the gates."""

    def __init__(self, a: int = 8, b: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, a, 3, padding=1)
        self.conv2 = nn.Conv2d(a, b, 3, padding=1)
        self.head = Head(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))


class Residual(nn.Module):
    """A stem, one block with an identity shortcut, one with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3, 2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.down = nn.Conv2d(8, 12, 1, 2, bias=False)
        self.bn4 = nn.BatchNorm2d(12)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(y)) + x)
        return self.head(F.relu(self.bn3(self.conv3(x)) + self.bn4(self.down(x))))


class PreAct(nn.Module):
    """Pre-activation: the stream has no norm of its own, its readers begin with one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(y)))
        return self.head(F.relu(self.bn3(x)))


class Dense(nn.Module):
    """Every layer reads all earlier ones: conv, cat, BN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(14)
        self.conv2 = nn.Conv2d(14, 6, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(20)
        self.head = Head(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        return self.head(F.relu(self.bn3(x)))


class Mobile(nn.Module):
    """An inverted residual block: expansion, depthwise, linear projection, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.Conv2d(8, 16, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.stem(x)))
        y = F.relu6(self.bn2(self.depth(F.relu6(self.bn1(self.up(x))))))
        return self.head(x + self.bn3(self.down(y)))


class Shared(nn.Module):
    """One convolution used twice, each time with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(10)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.bn1(self.conv(x)))
        x = F.relu(self.bn2(self.conv(x)))
        return self.head(F.relu(self.bn3(self.conv2(x))))


class Grouped(nn.Module):
    """A grouped convolution between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 10, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(10)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(F.relu(self.bn3(self.conv3(x))))


class Smooth(nn.Module):
    """SiLU, whose slope at zero is not zero, and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.ConvTranspose2d(8, 10, 2, 2, bias=False)
        self.bn2 = nn.BatchNorm2d(10)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.conv1(x)))
        return self.head(F.silu(self.bn2(self.conv2(x))))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "bias_bn": lambda: Chain(bias=True),
    "plain": Plain,
    "residual": Residual,
    "preact": PreAct,
    "dense": Dense,
    "mobile": Mobile,
    "shared": Shared,
    "grouped": Grouped,
    "smooth": Smooth,
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-3),
    "adam": lambda p: torch.optim.Adam(p, 3e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
}


def make(
    name: str = "chain",
    *,
    optimizer: str = "sgd",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, psap.Pruner]:
    """A network in train mode, its optimizer and its pruner; MACs to 40 % in 3 steps."""
    torch.manual_seed(seed)
    model = NETS[name]().to(dtype).train()
    opt = OPTIMIZERS[optimizer](model.parameters())
    options = {"target": psap.Target(macs=0.4), "prune_steps": 3, "window": 3, **options}
    config = psap.Config(**options)
    return model, opt, psap.Pruner(model, inputs(dtype=dtype), optimizer=opt, config=config)


def backward(
    model: nn.Module, opt: torch.optim.Optimizer, seed: int, dtype: torch.dtype = torch.float32
) -> float:
    """Fresh gradients of one batch; the loss."""
    opt.zero_grad()
    loss = F.cross_entropy(model(inputs(seed=seed, dtype=dtype)), labels(seed=seed))
    loss.backward()
    return loss.item()


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    pruner: psap.Pruner | None = None,
    *,
    epochs: int = 1,
    iterations: int = 4,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Train on batches numbered from ``first``; `Pruner.step` after every epoch; the losses."""
    losses = []
    for epoch in range(epochs):
        for i in range(iterations):
            losses.append(backward(model, opt, 100 + first + epoch * iterations + i, dtype))
            opt.step()
        if pruner is not None:
            pruner.step()
    return losses
