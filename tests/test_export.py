"""ONNX and torch.export files: they compute what PyTorch does, and hold plain operators only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from pruner_nets import NETS, Chain, inputs
from torch import Tensor, nn

import psap
from psap.models import resnet20


def shrunk(model: nn.Module, x: Any = None) -> psap.Result:
    graph = psap.trace(model, inputs() if x is None else x)
    return psap.apply(model, psap.plan(graph, ratio=0.5))


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """With running statistics that are not those of a fresh net."""
    for _ in range(3):
        model.train()(x)
    return model


def as_list(output: Any) -> list[Tensor]:
    if isinstance(output, dict):
        output = list(output.values())
    return list(output) if isinstance(output, (tuple, list)) else [output]


def run_onnx(path: Path, *x: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {i.name: v.numpy() for i, v in zip(session.get_inputs(), x, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


def run_pt2(path: Path, *x: Tensor) -> list[Tensor]:
    return as_list(torch.export.load(path).module()(*x))


EXPORTS: dict[str, tuple[Callable[..., Any], Callable[..., list[Tensor]]]] = {
    "onnx": (psap.export_onnx, run_onnx),
    "pt2": (psap.export_pt2, run_pt2),
}
BOTH = pytest.mark.parametrize("kind", EXPORTS)


class Two(nn.Module):
    """Two inputs, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        self.side = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"a": self.chain(x), "b": (self.side(y).mean((2, 3)), y + 1)}


def check(kind: str, model: Any, module: nn.Module, path: Path, *x: Tensor) -> None:
    export, run = EXPORTS[kind]
    difference = export(model, path)
    assert isinstance(difference, float) and 0 <= difference <= 1e-4
    flags = [m.training for m in module.modules()]
    module.eval()
    for batch in (1, 2, 5):
        part = [v[:batch] for v in x]
        with torch.no_grad():
            wanted = module(*part)
        wanted = [*as_list(wanted)[:1], *wanted["b"]] if isinstance(wanted, dict) else [wanted]
        got = run(path, *part) if kind == "onnx" else pt2_flat(path, *part)
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for m, flag in zip(module.modules(), flags, strict=True):
        m.training = flag
    assert os.listdir(path.parent) == [path.name]


def pt2_flat(path: Path, *x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(torch.utils._pytree.tree_leaves(torch.export.load(path).module()(*x)))


@BOTH
def test_a_small_network_runs_at_any_batch(kind: str, tmp_path: Path) -> None:
    x = torch.randn(5, 3, 8, 8)
    result = shrunk(trained(NETS["residual"](), x), x[:1])  # traced with a batch of one
    result.model.bn1.eval()
    flags = [m.training for m in result.model.modules()]
    grads = [p.requires_grad for p in result.model.parameters()]
    before = {n: t.clone() for n, t in result.model.state_dict().items()}
    check(kind, result, result.model, tmp_path / f"net.{kind}", x)
    assert [m.training for m in result.model.modules()] == flags and True in flags
    assert [p.requires_grad for p in result.model.parameters()] == grads
    assert all(torch.equal(t, before[n]) for n, t in result.model.state_dict().items())


@BOTH
def test_graph_mode_exports(kind: str, tmp_path: Path) -> None:
    x = torch.randn(5, 3, 16, 16)
    result = shrunk(trained(resnet20(), x), x[:2])
    assert result.mode == "graph"
    check(kind, result, result.model, tmp_path / f"net.{kind}", x)


@BOTH
def test_several_inputs_and_nested_outputs(kind: str, tmp_path: Path) -> None:
    x, y = torch.randn(5, 3, 8, 8), torch.randn(5, 3, 4, 4)
    result = shrunk(Two(), (x[:2], y[:2]))
    check(kind, result, result.model, tmp_path / f"net.{kind}", x, y)


@BOTH
def test_a_plain_module_and_a_fixed_batch_of_one(kind: str, tmp_path: Path) -> None:
    export, run = EXPORTS[kind]
    model, path = Chain(), tmp_path / f"net.{kind}"
    with pytest.raises(psap.ArgumentTypeError, match="example_inputs is a NoneType"):
        export(model, path)
    x = torch.randn(2, 3, 8, 8)
    assert export(model, path, x[:1], dynamic_batch=False, check=False) is None
    with torch.no_grad():
        torch.testing.assert_close(run(path, x[:1])[0], model.eval()(x[:1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match=r"(?i)invalid dimensions|guard failed|expected"):
        run(path, x)
    assert not path.with_suffix(".data").exists()


def test_nothing_of_psap_is_inside(tmp_path: Path) -> None:
    result = shrunk(Chain())
    psap.export_onnx(result, tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    kinds = {node.op_type for node in model.graph.node}
    assert "Conv" in kinds and b"psap" not in (tmp_path / "a.onnx").read_bytes()
    weights = {w.name: tuple(w.dims) for w in model.graph.initializer}
    assert (4, 3, 3, 3) in weights.values() and (6, 4, 3, 3) in weights.values()
    psap.export_pt2(result, tmp_path / "a.pt2")
    exported = torch.export.load(tmp_path / "a.pt2")
    calls = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert calls and all(str(t).startswith("aten.") for t in calls)


# What fails


class Branching(nn.Module):
    """Control flow by values cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.detach().sum()) > 0 else self.conv(-x)


@BOTH
def test_an_export_that_fails_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    export = EXPORTS[kind][0]
    path = tmp_path / "net"
    path.write_text("old")
    model = Branching().train()
    with pytest.raises(
        psap.PsapError, match=r"(?s)torch\.export failed on Branching: .*try dynamic_batch=False"
    ):
        export(model, path, inputs())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["net"]
    assert all(m.training for m in model.modules())


@BOTH
def test_a_file_that_computes_something_else_is_not_kept(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net"
    path.write_text("old")
    wrong = torch.full((4, 5), 3.0)
    monkeypatch.setattr("psap.export._expected", lambda *_: [wrong])
    with pytest.raises(psap.VerificationError, match=r"differs from PyTorch by .*nothing was writ"):
        EXPORTS[kind][0](Chain(), path, inputs())
    if kind == "pt2":
        for other in ([wrong[:2]], [wrong, wrong], [wrong * float("nan")]):
            monkeypatch.setattr("psap.export._expected", lambda *_, other=other: other)
            with pytest.raises(psap.VerificationError, match="nothing was written"):
                EXPORTS[kind][0](Chain(), path, inputs())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["net"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_dtype_that_onnx_runtime_does_not_know(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x, path = Chain().to(dtype), inputs().to(dtype), tmp_path / "a.onnx"
    with pytest.raises(psap.PsapError, match=rf"run the file of this {dtype} .*\.float\(\) with"):
        psap.export_onnx(model, path, x)
    assert os.listdir(tmp_path) == []
    assert psap.export_onnx(model, path, x, check=False) is None
    assert path.exists()


def test_half_precision_is_compared_in_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, path = Chain().half(), inputs().half(), tmp_path / "a.onnx"
    assert psap.export_onnx(model, path, x) is not None
    outputs = run_onnx(path, x)
    for off, fits in ((4, True), (40, False)):
        other = [y + off * torch.finfo(y.dtype).eps for y in outputs]
        monkeypatch.setattr("psap.export._expected", lambda *_, other=other: other)
        if fits:
            assert psap.export_onnx(model, path, x) > 1e-4
        else:
            with pytest.raises(psap.VerificationError, match="differs from PyTorch"):
                psap.export_onnx(model, path, x)


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(psap.PsapError, match=rf"{package} is missing; pip install 'psap\[onnx\]'"):
        psap.export_onnx(Chain(), tmp_path / "a.onnx", inputs())
    assert os.listdir(tmp_path) == []


@BOTH
def test_arguments(kind: str, tmp_path: Path) -> None:
    export = EXPORTS[kind][0]
    cases: list[tuple[tuple[Any, ...], type[psap.PsapError], str]] = [
        (("x", tmp_path / "a", inputs()), psap.ArgumentTypeError, "got a str; pass a psap Result"),
        ((nn.ReLU(), tmp_path / "a", inputs()), psap.ArgumentError, "no parameters"),
        ((Chain(), tmp_path / "a", "x"), psap.ArgumentTypeError, "example_inputs is a str"),
        ((Chain(), tmp_path / "a", ()), psap.ArgumentError, "holds no tensor"),
        ((Chain(), tmp_path / "a", torch.ones(1, 9, 8, 8)), psap.PsapError, "export failed"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            export(*arguments)
    assert os.listdir(tmp_path) == []


class Segmenting(nn.Module):
    """Gives two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mask, self.edge = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(x).relu()
        return {"mask": self.mask(x), "edge": self.edge(x).sigmoid()}


def test_outputs_in_a_dict_keep_their_names(tmp_path: Path) -> None:
    result = shrunk(Segmenting(), torch.randn(2, 3, 8, 8))
    assert psap.export_onnx(result, tmp_path / "small.onnx") < 1e-5
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    assert [(o.name, o.shape[1]) for o in session.get_outputs()] == [("mask", 4), ("edge", 1)]


@pytest.mark.parametrize("export", [psap.export_onnx, psap.export_pt2])
def test_a_missing_folder_is_told_before_the_export(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psap.export._program", lambda *_: pytest.fail("it was exported"))
    with pytest.raises(psap.FileError, match="No such file or directory; choose a folder"):
        export(nn.Linear(2, 2), tmp_path / "none" / "model", torch.randn(1, 2))
