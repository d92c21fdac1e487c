"""What a saved network says of itself is enough to export it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import psap
from psap.cli import main
from psap.cost import LayerCost
from psap.models import create
from psap.models.factory import FACTORIES
from psap.rebuilding import dense_factory, recorded_classes, recorded_inputs

FILE = Path("small.safetensors")


class Own(nn.Module):
    """A user's architecture: two inputs, and a head that is no linear layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        out: Tensor = self.head(self.stem(x).relu()).mean((2, 3)) + shift[:, None]
        return out


def cut(model: nn.Module, *inputs: Tensor) -> psap.Result:
    return psap.apply(model, psap.plan(psap.trace(model, inputs), ratio=0.5))


def test_export_of_a_file_of_ones_own_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = (torch.randn(2, 2, 5, 7), torch.arange(2))
    small, file = cut(Own(6), *inputs), str(tmp_path / "small.safetensors")
    psap.save(small, file)
    assert main(["export", file, "--format", "pt2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"psap: arch is not given, and {file} was made from none of psap's own")
    assert "with 6 classes and 2 input channels; pass --arch package.module:factory" in error
    assert main(["export", file, "--format", "pt2", "--arch", "test_rebuilding:Own"]) == 0
    got = torch.export.load(tmp_path / "small.pt2").module()(*inputs)
    torch.testing.assert_close(got, small.model.eval()(*inputs))


@pytest.mark.parametrize("name", FACTORIES)
def test_the_architectures_of_psap_are_known_by_their_shapes(name: str) -> None:
    channels = 1 if name == "digits_resnet" else 3
    dense = create(name, num_classes=7, in_channels=channels)
    plan = psap.plan(psap.trace(dense, torch.zeros(1, channels, 32, 32)), ratio=0.5)
    assert recorded_classes(plan) == 7
    (example,) = recorded_inputs(plan, FILE)
    options: Any = {"num_classes": None, "in_channels": example.shape[1]}
    for arch in (None, name):
        found = dense_factory(plan, FILE, arch, **options)()
        assert type(found) is type(dense)
        assert {p.device.type for p in found.parameters()} == {"cpu"}
        assert [p.shape for p in found.parameters()] == [p.shape for p in dense.parameters()]


def test_what_a_plan_does_not_say_is_asked_for() -> None:
    plan = cut(Own(6), torch.zeros(2, 2, 5, 7), torch.arange(2)).plan
    for inputs in ((), (None,), (plan.inputs[0], None)):
        with pytest.raises(psap.ArgumentError, match=r"small.* of its inputs; pass --input 3,32"):
            recorded_inputs(replace(plan, inputs=inputs), FILE)
    assert recorded_classes(replace(plan, left_alone={})) is None
    huge = [replace(before, shape=(1 << 40, 8, 1, 1)) for before, _ in plan.layers]
    assert recorded_classes(replace(plan, layers=tuple((x, x) for x in huge))) is None
    two = LayerCost("other.weight", (3, 8), 1)
    ends = {**plan.left_alone, "other": "output of the model"}
    assert (
        recorded_classes(replace(plan, left_alone=ends, layers=(*plan.layers, (two, two)))) is None
    )
