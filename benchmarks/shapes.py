"""Shapes of the convolutions and batch norms of known networks, without building them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """What the ops see of a network: its convolutions and the widths of its batch norms."""

    name: str
    convs: tuple[Shape, ...]
    norms: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Weights of all convolutions."""
        return sum(map(prod, self.convs))


def _normed(convs: list[Shape]) -> tuple[list[Shape], list[int]]:
    """Every convolution is followed by a batch norm of its width."""
    return convs, [shape[0] for shape in convs]


def _resnet18() -> tuple[list[Shape], list[int]]:
    convs, width = [(64, 3, 7, 7)], 64
    for stage, out in enumerate((64, 128, 256, 512)):
        convs += [(out, width, 3, 3), (out, out, 3, 3)]
        convs += [(out, width, 1, 1)] if stage else []
        convs += [(out, out, 3, 3)] * 2
        width = out
    return _normed(convs)


def _resnet50() -> tuple[list[Shape], list[int]]:
    convs, width = [(64, 3, 7, 7)], 64
    for blocks, inner in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            convs += [(inner, width, 1, 1), (inner, inner, 3, 3), (4 * inner, inner, 1, 1)]
            convs += [] if block else [(4 * inner, width, 1, 1)]
            width = 4 * inner
    return _normed(convs)


def _vgg16() -> tuple[list[Shape], list[int]]:
    widths = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    return _normed([(o, i, 3, 3) for i, o in pairwise(widths)])


def _resnet56() -> tuple[list[Shape], list[int]]:
    widths = [3, 16, *[16] * 18, *[32] * 18, *[64] * 18]
    return _normed([(o, i, 3, 3) for i, o in pairwise(widths)])


def _mobilenet_v2() -> tuple[list[Shape], list[int]]:
    convs, width = [(32, 3, 3, 3)], 32
    stages = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
    for expansion, out, blocks in stages:
        for _ in range(blocks):
            inner = width * expansion
            convs += [(inner, width, 1, 1)] if expansion > 1 else []
            convs += [(inner, 1, 3, 3), (out, inner, 1, 1)]
            width = out
    return _normed([*convs, (1280, width, 1, 1)])


def _densenet121() -> tuple[list[Shape], list[int]]:
    convs, norms, width = [(64, 3, 7, 7)], [64], 64
    for stage, layers in enumerate((6, 12, 24, 16)):
        for _ in range(layers):
            convs += [(128, width, 1, 1), (32, 128, 3, 3)]
            norms += [width, 128]
            width += 32
        norms.append(width)  # of the transition, or the last one
        if stage < 3:
            convs.append((width // 2, width, 1, 1))
            width //= 2
    return convs, norms


_MAKERS: dict[str, Callable[[], tuple[list[Shape], list[int]]]] = {
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "vgg16": _vgg16,
    "resnet56": _resnet56,
    "mobilenet_v2": _mobilenet_v2,
    "densenet121": _densenet121,
}
NAMES = tuple(_MAKERS)
# 1e9 parameters with gradients take 8 GB: it runs only if it is named.
SCALING = (
    *(f"params-1e{n}" for n in (5, 6, 7, 8)),
    *(f"layers-{n}" for n in (1, 10, 100, 1000, 10000)),
)


def network(name: str) -> Network:
    """Return a network by name.

    Args:
        name: one of `NAMES`; "params-1e7" (that many weights in 50 layers of 3x3 kernels); or
            "layers-1000" (10 million weights in that many layers).

    Raises:
        ValueError: there is no such network.
    """
    kind, _, number = name.partition("-")
    if name in _MAKERS:
        convs, norms = _MAKERS[name]()
    elif kind in ("params", "layers") and number:
        total = float(number) if kind == "params" else 1e7
        layers = 50 if kind == "params" else int(float(number))
        width = max(1, round((total / layers / 9) ** 0.5))
        convs, norms = _normed([(width, width, 3, 3)] * layers)
    else:
        raise ValueError(f"network {name!r}: wanted {', '.join(NAMES)}, params-1eN or layers-N")
    return Network(name, tuple(convs), tuple(norms))
