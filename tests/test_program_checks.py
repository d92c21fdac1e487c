"""Modules whose forward() checks how many channels it gets, or scales by it: graph mode follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Net, assert_exact, conv, image, randomise
from torch import Tensor, nn

import psap


def _asserts(m: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == m.width, f"{x.shape[1]} channels instead of {m.width}"
    return m.inner(x)


def _raises(m: Any, x: Tensor) -> Tensor:
    if m.width != x.size(1):
        raise ValueError(f"{x.size(1)} channels instead of {m.width}")
    return m.inner(x)


def _asserts_by_function(m: Any, x: Tensor) -> Tensor:
    torch._assert(x.shape[1] == m.width, "another number of channels")
    return m.inner(x)


def _at_least(m: Any, x: Tensor) -> Tensor:
    _, channels, height, _ = x.shape
    assert channels >= m.width and height % 2 == 0
    return m.inner(x)


def _half(m: Any, x: Tensor) -> Tensor:
    assert x.shape[1] // 2 == m.width // 2
    return m.inner(x)


CHECKS = (_asserts, _raises, _asserts_by_function, _at_least, _half)


def _checked(check: Callable[[Any, Tensor], Tensor], width: int = 8, **parts: Any) -> nn.Module:
    inner = Net(check, **{"inner": conv(width, width), **parts})
    inner.width = width
    return randomise(nn.Sequential(conv(3, width), nn.ReLU(), inner, nn.ReLU(), conv(width, 4)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks_of_widths_ask_for_those_of_the_small_network(
    check: Callable[[Any, Tensor], Tensor],
) -> None:
    model = _checked(check)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = psap.apply(model, plan).model
    assert small[2].inner.in_channels == 4
    assert_exact(model, plan, small, (image(),))


def test_checks_still_refuse_other_sizes() -> None:
    model = _checked(_at_least)
    small = psap.apply(model, psap.plan(psap.trace(model, image()), ratio=0.5)).model
    for shape in ((1, 3, 8, 8), (1, 4, 7, 8)):
        with pytest.raises(psap.ArgumentError, match="something else for inputs of this size"):
            small[2](image(*shape))


def test_parts_of_a_width_that_is_a_fraction() -> None:
    def parts(m: Any, x: Tensor) -> Tensor:
        first = int(x.size(1) * 0.4)
        assert first == m.first
        return torch.cat([m.inner(x[:, :first]), x[:, first:]], 1)

    model = _checked(parts, inner=conv(3, 3))
    model[2].first = 3
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = psap.apply(model, plan).model
    assert isinstance(small[2], torch.fx.GraphModule)
    assert_exact(model, plan, small, (image(),))


def test_only_sizes_become_numbers() -> None:
    def value(m: Any, x: Tensor) -> Tensor:
        assert x.shape[1] == m.width
        return m.inner(x) * int(x.detach().new_ones(1).sum())

    model = _checked(value)
    with pytest.raises(psap.VerificationError, match=r"forward\(\) makes a number of a value"):
        psap.apply(model, psap.plan(psap.trace(model, image()), ratio=0.5))


def test_a_layer_that_is_chosen_by_a_width_stays_chosen() -> None:
    def fit(m: Any, x: Tensor) -> Tensor:
        return m.other(x) if x.size(1) != m.width else m.inner(x)

    model = _checked(fit, other=conv(8, 8))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = psap.apply(model, plan).model
    assert small[2].inner.in_channels == 4
    assert_exact(model, plan, small, (image(),))


def test_a_branch_on_a_width_stays_the_one_of_the_dense_network() -> None:
    def wide(m: Any, x: Tensor) -> Tensor:
        x = m.inner(x).view(-1, m.width, 8, 8)
        return x * 2 if x.shape[1] > 6 else x

    model = _checked(wide)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


def test_a_scale_that_is_the_root_of_a_width_stays_the_dense_one() -> None:
    def unit(m: Any, x: Tensor) -> Tensor:
        return m.inner(torch.nn.functional.normalize(x, dim=1) * x.shape[1] ** 0.5)

    model = _checked(unit)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert len(plan.groups[0].kept) == 4
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


@pytest.mark.zoo
def test_einops_in_modules_that_fix_widths() -> None:
    import einops

    def heads(m: Any, x: Tensor) -> Tensor:
        assert x.shape[1] == m.width
        y = einops.rearrange(m.inner(x), "b (heads c) x y -> b heads c (x y)", heads=2)
        mean = einops.reduce(y, "b heads c n -> b heads c 1", "mean")
        many = einops.repeat(mean, "b heads c 1 -> b heads c n", n=y.shape[-1])
        return einops.rearrange(y - many, "b heads c (x y) -> b (heads c) x y", x=x.shape[2])

    model = _checked(heads)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = psap.apply(model, plan).model
    assert isinstance(small[2], torch.fx.GraphModule)
    assert_exact(model, plan, small, (image(),))
