"""Saved networks and trees: the bits come back, and what is wrong is refused by name."""

from __future__ import annotations

import copy
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from pruner_nets import NETS, Chain, Shared, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import psap
from psap.models import resnet20
from psap.recipe import check_is_result, read_tree, write_tree

DATA = Path(__file__).parent / "data"


def shrunk(model: nn.Module, x: Tensor | None = None, ratio: float = 0.5) -> psap.Result:
    graph = psap.trace(model, inputs() if x is None else x)
    return psap.apply(model, psap.plan(graph, ratio=ratio))


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and tensor.shape == two[name].shape, name
        assert bits(tensor) == bits(two[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    psap.save(shrunk(Chain()), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


# Round trips


@pytest.mark.parametrize("name", NETS)
def test_a_network_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    result = shrunk(NETS[name]().train())
    psap.save(result, tmp_path / "small.safetensors")
    torch.manual_seed(1)
    small = psap.load(tmp_path / "small.safetensors", lambda: NETS[name]().eval())
    assert_same_state(result.model, small)
    assert not small.training and result.model.training
    x = inputs()
    with torch.no_grad():
        assert torch.equal(small(x), result.model.eval()(x))
    assert os.listdir(tmp_path) == ["small.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    result = shrunk(Chain())
    result.model.to(dtype)
    psap.save(result, tmp_path / "a.safetensors")
    small = psap.load(tmp_path / "a.safetensors", Chain)
    assert_same_state(result.model, small)
    assert small.bn1.running_mean.dtype == dtype
    assert small.bn1.num_batches_tracked.dtype == torch.int64


def test_odd_values_and_channels_last_come_back(tmp_path: Path) -> None:
    result = shrunk(Chain().to(memory_format=torch.channels_last))
    with torch.no_grad():
        result.model.conv2.weight.view(torch.int32)[:, 0, 0, 0] = 0x7FC01234  # a NaN with a payload
        result.model.bn1.weight[0] = -0.0
        result.model.bn1.bias[0] = math.inf
    assert not result.model.conv2.weight.is_contiguous()
    psap.save(result, tmp_path / "a.safetensors")
    last = psap.load(
        tmp_path / "a.safetensors", lambda: Chain().to(memory_format=torch.channels_last)
    )
    for small in (last, psap.load(tmp_path / "a.safetensors", Chain)):
        assert_same_state(result.model, small)
    assert last.conv2.weight.is_contiguous(memory_format=torch.channels_last)


class Tied(Shared):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.again.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Viewed(Chain):
    """A buffer that is a part of another, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("part", self.table[:3])
        self.register_buffer("twice", self.table.view(2, 3))
        self.register_buffer("hidden", torch.ones(2), persistent=False)


def test_shared_and_overlapping_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    result = shrunk(Tied())
    psap.save(result, path)
    assert "again.weight" not in load_file(path)
    small = psap.load(path, Tied)
    assert small.again.weight is small.conv.weight
    assert_same_state(result.model, small)
    result = shrunk(Viewed())
    psap.save(result, path)
    assert_same_state(result.model, psap.load(path, Viewed))


def test_graph_mode_comes_back(tmp_path: Path) -> None:
    """The option-A ResNet, whose forward pads channels by numbers written down in Python."""
    result = shrunk(resnet20(), torch.randn(2, 3, 16, 16))
    assert result.mode == "graph"
    psap.save(result, tmp_path / "a.safetensors")
    small = psap.load(tmp_path / "a.safetensors", resnet20)
    assert_same_state(result.model, small)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(small.eval()(x), result.model.eval()(x))


def test_a_network_that_trained_on_comes_back(tmp_path: Path) -> None:
    result = shrunk(Chain())
    opt = torch.optim.SGD(result.model.parameters(), 0.1)
    result.model(inputs()).sum().backward()
    opt.step()
    psap.save(result, tmp_path / "a.safetensors")
    assert_same_state(result.model, psap.load(tmp_path / "a.safetensors", Chain))


def golden() -> nn.Module:
    return Chain(4, 6)


GOLDEN_OUTPUTS = [
    [0.1592943, 0.0842194, -0.1202591, 0.3062372, -0.2760049],
    [0.1333193, 0.116429, -0.0978692, 0.2603793, -0.269582],
]


def test_the_golden_file_still_loads() -> None:
    """Written by version 0.1.0; if this fails, the format changed and needs a new version."""
    small = psap.load(DATA / "golden_v1.safetensors", golden).eval()
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(x), torch.tensor(GOLDEN_OUTPUTS), rtol=1e-5, atol=1e-6)
    assert [small.conv1.out_channels, small.conv2.out_channels] == [2, 3]


# Hostile files


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Change the recipe or the tensors of a saved file."""
    with safetensors.safe_open(path, framework="pt") as opened:
        body = json.loads(opened.metadata()["psap"])
    tensors = load_file(path)
    changed = change(body, tensors)
    body = body if changed is None else changed
    text = body if isinstance(body, str) else json.dumps(body)
    save_file(tensors, path, metadata={"psap": text})


@pytest.mark.parametrize("part", range(16))
def test_a_file_cut_short_is_refused(part: int, saved: Path) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) * part // 16])
    with pytest.raises(psap.FileError, match=r"cannot be read: .*damaged or cut short"):
        psap.load(saved, Chain)


def test_flipped_bytes_never_pass_unnoticed_or_as_another_error(saved: Path) -> None:
    content = saved.read_bytes()
    reference = psap.load(saved, Chain)
    size = 8 + struct.unpack("<Q", content[:8])[0]
    refused = 0
    places = [*range(8), *np.random.default_rng(0).integers(8, size, 150).tolist()]
    for place in places:
        for flip in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[place] ^= flip
            saved.write_bytes(damaged)
            try:
                small = psap.load(saved, Chain)
            except psap.PsapError:
                refused += 1
            else:  # a word in an explanation, a cost: the network is the same
                assert_same_state(small, reference)
    assert refused > len(places)


def test_a_header_that_claims_to_be_huge_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for claim in (1 << 27, 1 << 40, (1 << 64) - 1):
        saved.write_bytes(struct.pack("<Q", claim) + content[8:])
        with pytest.raises(psap.FileError, match=r"cannot be read: .*[Hh]eader"):
            psap.load(saved, Chain)


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for reader in (lambda: psap.load(path, Chain), lambda: read_tree(path)):
        path.unlink(missing_ok=True)
        with pytest.raises(psap.FileError, match=r"a\.safetensors does not exist"):
            reader()
        path.write_bytes(b"")
        with pytest.raises(psap.FileError, match="cannot be read"):
            reader()
        torch.save({"a": 1}, path)
        with pytest.raises(psap.FileError, match="cannot be read"):
            reader()
        save_file({"a": torch.ones(1)}, path)
        with pytest.raises(psap.FileError, match="it was not written by psap"):
            reader()
    write_tree(path, {"a": 1})
    with pytest.raises(psap.FileError, match="holds 'psap-tree', and is no network"):
        psap.load(path, Chain)
    psap.save(shrunk(Chain()), path)
    with pytest.raises(psap.FileError, match="holds 'psap-recipe', and is no tree"):
        read_tree(path)
    with pytest.raises(psap.FileError, match="is no regular file; pass the path of a network"):
        psap.load(tmp_path, Chain)


def _plan(**changes: Any) -> Callable[..., None]:
    return lambda body, _: body["plan"].update(changes)


def _side(**changes: Any) -> Callable[..., None]:
    return lambda body, _: body["plan"]["sides"][0].update(changes)


BOMB = "[" * 900 + "]" * 900
RECIPES: dict[str, tuple[Callable[..., Any], str]] = {
    "version": (lambda b, _: b.update(version=2), "format version 2, this psap reads 1; upgrade"),
    "no version": (lambda b, _: b.pop("version"), "format version None"),
    "format": (lambda b, _: b.update(format="x"), "holds 'x', and is no network"),
    "mode": (lambda b, _: b.update(mode="pickle"), "damaged: its recipe has no mode"),
    "mode type": (lambda b, _: b.update(mode=[]), "damaged: its recipe has no mode"),
    "aliases type": (lambda b, _: b.update(aliases=[1]), "damaged"),
    "alias of nothing": (lambda b, _: b.update(aliases={"x": "y"}), "which is missing"),
    "alias type": (lambda b, _: b.update(aliases={"x": ["y"]}), "which is missing"),
    "alias too much": (lambda b, _: b.update(aliases={"x": "bn1.bias"}), "'x' is too much"),
    "alias of another shape": (
        lambda b, t: (b.update(aliases={"bn1.bias": "bn2.bias"}), t.pop("bn1.bias"))[2:] or None,
        r"'bn1.bias' has shape \(6,\)",
    ),
    "body type": (lambda b, _: "[1]", "was not written by psap"),
    "not JSON": (lambda b, _: "{", "cannot be read"),
    "deep": (lambda b, _: "[" * 100_000, "cannot be read"),
    "deep plan": (lambda b, _: json.dumps({**b, "plan": 0})[:-2] + BOMB + "}", "no plan|deep"),
    "long number": (lambda b, _: '{"version": ' + "9" * 10_000 + "}", "cannot be read"),
    "no plan": (lambda b, _: b.pop("plan"), "no plan"),
    "plan type": (lambda b, _: b.update(plan=[1]), "no plan"),
    "plan version": (_plan(version=99), "plan has format version 99"),
    "no sides": (lambda b, _: b["plan"].pop("sides"), "plan is damaged"),
    "sides type": (_plan(sides=3), "plan is damaged"),
    "kept bomb": (_side(kept="0-99999999999", size=10**12), "damaged"),
    "kept order": (_side(kept="3,1"), "out of order or range"),
    "kept range": (_side(kept="0-8"), "out of order or range"),
    "kept text": (_side(kept="a-b"), "no index range"),
    "kept type": (_side(kept=[0, 1]), "damaged"),
    "kept others": (_side(kept="0-4"), "does not fit its recipe"),
    "dim": (_side(dim=7), "does not build|damaged"),
    "dim type": (_side(dim="x"), "damaged"),
    "inputs type": (_plan(inputs=[{"shape": "x", "dtype": 1}]), "damaged"),
    "tensor missing": (lambda _, t: t.pop("bn1.bias"), "does not fit.*'bn1.bias' is missing"),
    "tensor too much": (lambda _, t: t.update(x=torch.ones(1)), "does not fit.*'x' is too much"),
    "tensor shape": (
        lambda _, t: t.update({"bn1.bias": torch.ones(5)}),
        r"'bn1.bias' has shape \(5,\), the recipe makes \(4,\)",
    ),
    "tensor dtype": (
        lambda _, t: t.update({"bn1.bias": torch.ones(4, dtype=torch.int64)}),
        r"'bn1.bias' is torch.int64, the recipe makes torch.float32",
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe_is_refused(case: str, saved: Path) -> None:
    change, message = RECIPES[case]

    def quietly(body: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
        changed = change(body, tensors)
        return changed if isinstance(changed, str) else None

    rewrite(saved, quietly)
    with pytest.raises(psap.PsapError, match=message):
        psap.load(saved, Chain)


INPUTS = [
    {"shape": [1, 3, 8, 8], "dtype": "load"},
    {"shape": [1, 3, 8, 8], "dtype": "nn"},
    {"shape": [1, 3, 8, 8], "dtype": "float99"},
    {"shape": [1 << 20, 3, 1 << 20, 8], "dtype": "float32"},
    {"shape": [0, 3, 8, 8], "dtype": "float32"},
    {"shape": [-1, 3, -8, 8], "dtype": "float32"},
    None,
]


@pytest.mark.parametrize("spec", INPUTS)
def test_a_hostile_input_of_a_graph_recipe_is_refused(spec: Any, saved: Path) -> None:
    def change(body: dict[str, Any], _: Any) -> None:
        body["mode"] = "graph"
        body["plan"]["inputs"] = [spec]

    rewrite(saved, change)
    with pytest.raises(psap.FileError, match=r"damaged|that no file can hold"):
        psap.load(saved, Chain)


def test_the_factory_must_build_the_dense_network(saved: Path) -> None:
    cases: list[tuple[Any, type[psap.PsapError], str]] = [
        (Chain(), psap.ArgumentTypeError, "factory must build the dense model"),
        (None, psap.ArgumentTypeError, "factory must build the dense model"),
        ("Chain", psap.ArgumentTypeError, "factory must build the dense model"),
        (lambda: None, psap.ArgumentTypeError, "factory returned a NoneType"),
        (lambda: Chain, psap.ArgumentTypeError, "factory returned a type"),
        (lambda: Chain().state_dict(), psap.ArgumentTypeError, "factory returned a OrderedDict"),
        (NETS["residual"], psap.ArgumentError, "cut from: it has stem.weight, which is not"),
        (lambda: Chain(8, 16), psap.ArgumentError, r"bn2.*has shape|conv2.*has shape"),
        (lambda: psap.load(saved, Chain), psap.ArgumentError, r"small\.\w+ was cut from: .*twice"),
        (nn.Identity, psap.ArgumentError, "no parameters"),
    ]
    for factory, error, message in cases:
        with pytest.raises(error, match=message):
            psap.load(saved, factory)

    def fails() -> nn.Module:
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        psap.load(saved, fails)


@pytest.mark.parametrize("thing", [None, Chain(), "x", {"model": 1}])
def test_only_results_are_saved(thing: Any, tmp_path: Path) -> None:
    with pytest.raises(psap.ArgumentTypeError, match=r"pass what psap\.apply or Pruner\.finish"):
        psap.save(thing, tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    result = shrunk(Chain())
    result.model.get_extra_state = lambda: {"a": 1}  # type: ignore[method-assign]
    type(result.model).get_extra_state = lambda self: {"a": 1}  # type: ignore[method-assign]
    try:
        with pytest.raises(psap.ArgumentTypeError, match="'_extra_state' is a dict"):
            psap.save(result, tmp_path / "a.safetensors")
    finally:
        type(result.model).get_extra_state = nn.Module.get_extra_state  # type: ignore[method-assign]
    assert os.listdir(tmp_path) == []


def test_only_modules_and_results_are_models() -> None:
    model = Chain()
    assert check_is_result(model) is model
    result = shrunk(model)
    assert check_is_result(result) is result.model
    with pytest.raises(psap.ArgumentTypeError, match="got a str; pass a psap Result"):
        check_is_result("x")
    with pytest.raises(psap.ArgumentError, match="no parameters"):
        check_is_result(nn.ReLU())


def test_loading_and_training_on_do_not_touch_the_result(tmp_path: Path) -> None:
    result = shrunk(Chain())
    before = copy.deepcopy(result.model.state_dict())
    psap.save(result, tmp_path / "a")
    nn.init.zeros_(psap.load(tmp_path / "a", Chain).conv1.weight)
    assert all(torch.equal(t, before[n]) for n, t in result.model.state_dict().items())
