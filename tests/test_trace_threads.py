"""Networks that other threads run while one is traced are none of its business."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from nets import conv, image
from test_program_contexts import _fixed, _net
from torch import Tensor, nn

from psap.shared import together
from psap.symbolic import traced


@pytest.mark.parametrize("shared", [False, True])
def test_other_threads_may_run_networks_meanwhile(shared: bool) -> None:
    other = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).double().requires_grad_(False)
    found: list[Tensor] = []

    def body(m: Any, x: Tensor) -> Tensor:
        for run in (other, lambda y: nn.functional.conv2d(y, m.stem.weight)):
            with ThreadPoolExecutor(1) as threads:
                found.append(threads.submit(run, image()).result())
        return m.last(_fixed(m.one(m.stem(x))))

    model = _net(body)
    program = together(lambda: traced(model, {})) if shared else traced(model, {})
    assert [str(n.target) for n in program.graph.nodes if n.op in ("call_module", "get_attr")] == [
        "stem", "one", "last",
    ]  # fmt: skip
    wanted = other(image()), nn.functional.conv2d(image(), model.stem.weight)
    assert len(found) == 4
    for got, expected in zip(found, wanted * 2, strict=True):
        torch.testing.assert_close(got, expected)
