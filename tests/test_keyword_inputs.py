"""Models that are called by keyword, or with nested inputs, through everything that runs them."""

from __future__ import annotations

import json
from collections import UserDict, deque
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import psap
from psap import inputspec, measure


class Masked(nn.Module):
    """Takes its inputs by keyword only; the third is no tensor. Its own forward() fixes a width."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.gate, self.head = nn.Conv2d(1, 8, 1), nn.Linear(8, 5)
        self.fixed = fixed

    def forward(
        self, *, pixel_values: Tensor, mask: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        x = self.conv1(pixel_values).relu()
        if mask is not None:
            x = x * self.gate(mask).relu()
        x = self.conv2(x).relu()
        if self.fixed:
            x = x.view(-1, 8, 64).unflatten(2, (8, 8))
        y: Tensor = self.head(x.mean((2, 3))) * scale
        return y


def keywords() -> dict[str, Any]:
    return {"mask": torch.rand(2, 1, 8, 8), "pixel_values": torch.randn(2, 3, 8, 8), "scale": 2.0}


def half(model: nn.Module, inputs: Any) -> psap.Result:
    return psap.apply(model, psap.plan(psap.trace(model, inputs), ratio=0.5))


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("fixed", [False, True], ids=["module", "graph"])
def test_inputs_by_keyword(fixed: bool, kind: Any, tmp_path: Path) -> None:
    model, inputs = Masked(fixed), keywords()
    result = half(model, kind(inputs))
    assert result.mode == ("graph" if fixed else "module")
    assert [result.model.conv1.out_channels, result.model.conv2.out_channels] == [4, 4]
    masked = psap.mask(model, result.plan)
    torch.testing.assert_close(result.model(**inputs), masked(**inputs))
    psap.save(result, tmp_path / "small.safetensors")
    small = psap.load(tmp_path / "small.safetensors", lambda: Masked(fixed))
    torch.testing.assert_close(small(**inputs), result.model(**inputs))


def test_a_plan_says_what_its_inputs_were() -> None:
    model = Masked(fixed=True)
    plan = psap.plan(psap.trace(model, keywords()), ratio=0.5)
    read = psap.Plan.from_json(plan.to_json())
    assert read == plan and set(read.inputs) == {"pixel_values", "mask", "scale"}
    assert psap.apply(model, read).mode == "graph"


def test_a_pruner_takes_inputs_by_keyword() -> None:
    model, inputs = Masked(), keywords()
    opt = torch.optim.SGD(model.parameters(), 0.01)
    config = psap.Config(target=psap.Target(macs=0.5), prune_steps=2)
    pruner = psap.Pruner(model, inputs, optimizer=opt, config=config)
    for _ in range(2):
        for _ in range(2):
            opt.zero_grad()
            model(**inputs).pow(2).mean().backward()
            opt.step()
        pruner.step()
    result = pruner.finish()
    assert result.plan.after.macs <= result.plan.before.macs / 2


def test_files_that_are_exported_take_the_same_names(tmp_path: Path) -> None:
    inputs = {key: value for key, value in keywords().items() if key != "scale"}
    result = half(Masked(), inputs)
    assert psap.export_onnx(result, tmp_path / "small.onnx") < 1e-5  # type: ignore[operator]
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    assert {i.name for i in session.get_inputs()} == {"pixel_values", "mask"}
    assert psap.export_pt2(result, tmp_path / "small.pt2") < 1e-6  # type: ignore[operator]
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    three = {"pixel_values": torch.randn(3, 3, 8, 8), "mask": torch.rand(3, 1, 8, 8)}
    torch.testing.assert_close(loaded(**three), result.model.eval()(**three))


def test_times_of_models_that_are_called_by_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psap.latency.SECONDS", 0.0)
    model, inputs = Masked(), keywords()
    graph = psap.trace(model, inputs)
    table = psap.measure_latency(graph)
    plan = psap.plan(graph, ratio=0.5, latency=table)
    assert 0 < plan.after.latency_ms <= plan.before.latency_ms  # type: ignore[operator]
    assert psap.plan(graph, ratio=0.5, round_to="measured").groups
    assert measure.latency_ms(model, inputs, repeats=1).median_ms > 0


def test_costs_are_those_of_one_sample() -> None:
    one, four = ({"pixel_values": torch.randn(n, 3, 8, 8)} for n in (1, 4))
    macs = [psap.plan(psap.trace(Masked(), x), ratio=0.5).before.macs for x in (one, four)]
    assert macs[0] == macs[1]


class Nested(nn.Module):
    """Takes a dict of tensors, a list and a switch in one positional input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = self.conv(batch["image"]).relu().view(-1, 8, 64).unflatten(2, (8, 8))
        y: Tensor = self.head(x.mean((2, 3)))
        return y * batch["weights"][0] if batch["weighted"] else y


def test_nested_inputs_of_a_program_are_found_in_its_file(tmp_path: Path) -> None:
    batch = {"image": torch.randn(2, 3, 8, 8), "weights": [torch.ones(5), None], "weighted": True}
    result = half(Nested(), (batch,))
    assert result.mode == "graph"
    psap.save(result, tmp_path / "small.safetensors")
    small = psap.load(tmp_path / "small.safetensors", Nested)
    torch.testing.assert_close(small(batch), result.model(batch))


class Pair(NamedTuple):
    """A type of one's own, of which a file knows nothing."""

    image: Tensor
    weight: float


class Paired(Nested):
    """Takes such a pair."""

    def forward(self, pair: Any) -> Tensor:
        y: Tensor = self.head(self.conv(pair.image).mean((2, 3))) * pair.weight
        return y


@pytest.mark.parametrize("other", [Pair(torch.randn(2, 3, 8, 8), 2.0), {0: 1}, deque([1])])
def test_inputs_that_no_file_can_hold_stop_no_file(other: Any, tmp_path: Path) -> None:
    pair = Pair(torch.randn(2, 3, 8, 8), 2.0)
    plan = psap.plan(psap.trace(Paired(), (pair,)), ratio=0.5)
    plan = replace(plan, inputs=inputspec.specs((other, torch.ones(1))))
    read = psap.Plan.from_json(plan.to_json())
    assert read.inputs == (None, inputspec.InputSpec((1,), "float32"))
    with pytest.raises(psap.ArgumentError, match="does not hold example inputs"):
        psap.apply(Paired(), read)
    assert psap.apply(Paired(), read, example_inputs=(pair,)).model.conv.out_channels == 4


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(psap.ArgumentTypeError, match=r"keys that are no str; .* \(batch,\) where"):
        psap.trace(Masked(), {1: torch.randn(2, 3, 8, 8)})
    with pytest.raises(psap.TraceError, match=r"1 positional .*, or a dict of inputs by keyword"):
        psap.trace(Masked(), torch.randn(2, 3, 8, 8))
    with pytest.raises(psap.TraceError, match=r"keyword argument 'image'; .*batch,\) if it takes"):
        psap.trace(Nested(), {"image": torch.randn(2, 3, 8, 8)})


@pytest.mark.parametrize(
    "inputs",
    [
        {"dict": 3}, {"dict": {"x": {"value": [1]}}}, {"dict": {"x": 1}}, {"tuple": []}, 3, "abc",
        {"dict": {"x": {"shape": [1 << 40], "dtype": "float32"}}}, [{"list": 3}],
        {"dict": {"x": {"shape": [2, -1], "dtype": "float32"}}}, [{"shape": [2], "dtype": "nn"}],
    ],
)  # fmt: skip
def test_inputs_in_a_file_are_read_with_suspicion(inputs: Any) -> None:
    body = json.loads(psap.plan(psap.trace(Masked(), keywords()), ratio=0.5).to_json())
    body["inputs"] = inputs
    with pytest.raises(psap.FileError, match="the plan is damaged"):
        psap.Plan.from_json(json.dumps(body))
    for _ in range(30):
        inputs = {"list": [inputs]}
    body["inputs"] = [inputs]
    with pytest.raises(psap.FileError, match="nested too deeply"):
        psap.Plan.from_json(json.dumps(body))
