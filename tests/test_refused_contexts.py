"""What is no block is refused while tracing, and leaves gradients and autocast as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_program_contexts import _fixed, _net
from torch import Tensor, nn

import psap
from psap.symbolic import traced


def _functions_in_an_island(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        torch.set_grad_enabled(False)
        y = m.stem(x)
    return m.last(_fixed(m.one(y)))


def _precision_first(m: Any, x: Tensor) -> Tensor:
    precision = torch.autocast("cpu", enabled=False)
    precision.__enter__()
    with torch.no_grad():
        y = m.stem(x)
        precision.__exit__(None, None, None)
    return m.last(_fixed(m.one(y)))


def _made_early(m: Any, x: Tensor) -> Tensor:
    block = torch.set_grad_enabled(False)
    y = m.one(m.stem(x))
    with block:
        scale = y.mean()
    return m.last(_fixed(y) * scale)


OUTSIDE = r"calls torch\.set_grad_enabled\(\) outside of a with statement"


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (_functions_in_an_island, OUTSIDE),
        (_precision_first, r"leaves torch\.autocast before what it entered later"),
        (_made_early, OUTSIDE),
    ],
)
def test_every_block_is_left_once(body: Any, match: str) -> None:
    linear, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with pytest.raises(psap.VerificationError, match=match):
        traced(_net(body), {})
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    for value in (1.0, 2.0):  # outside of all blocks, autocast forgets the weights that it has cast
        with torch.no_grad():
            linear.weight.fill_(value)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x).tolist() == [[2 * value] * 2]
