"""Trees: nests of plain values and tensors come back bit for bit, or are refused by name."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import psap
from psap.recipe import read_tree, write_tree

DATA = Path(__file__).parent / "data"
BOMB = "[" * 900 + "]" * 900


def bits(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def test_the_golden_tree_still_loads() -> None:
    tree = read_tree(DATA / "golden_tree_v1.safetensors")
    assert list(tree) == ["a", 1, 2.5]
    assert tree["a"] == [None, True, -3, "ä", (1.5, -math.inf)]
    assert bits(tree[1]) == bits(torch.tensor([[1.0, -0.0], [math.inf, 2.0]]).bfloat16())
    assert tree[2.5]["x"].is_contiguous(memory_format=torch.channels_last)
    assert tree[2.5]["x"].flatten().tolist() == list(range(24))


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8]
DTYPES += [torch.uint8, torch.bool, torch.complex64]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=5))
    numbers = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape)
    raw = torch.as_tensor(numbers) * 3
    tensor = raw.to(draw(st.sampled_from(DTYPES)))
    if tensor.is_floating_point() and tensor.numel() and draw(st.booleans()):
        tensor.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -math.inf, -0.0]))
    layout = draw(st.sampled_from(["as it is", "transposed", "strided", "channels_last", "expand"]))
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if layout == "strided" and tensor.dim():
        return tensor.repeat_interleave(2, 0)[::2]
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor[None].expand(2, *tensor.shape) if layout == "expand" else tensor


KEYS = st.one_of(st.text(max_size=4), st.integers(-9, 9), st.floats(allow_nan=False))
TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(KEYS, st.sampled_from(["$tensor", "$dict"])), inner, max_size=4),
    ),
    max_leaves=12,
)


def assert_same_tree(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bits(a) == bits(b)
        if a.dim() == 4 and not a.is_contiguous():
            last = torch.channels_last
            assert a.is_contiguous(memory_format=last) == b.is_contiguous(memory_format=last)
    elif isinstance(a, dict):
        assert [(type(k), k) for k in a] == [(type(k), k) for k in b]
        for x, y in zip(a.values(), b.values(), strict=True):
            assert_same_tree(x, y)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_tree(x, y)
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    else:
        assert a == b


@given(tree=TREES)
def test_trees_come_back(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    write_tree(path, tree)
    assert_same_tree(tree, read_tree(path))


def test_shared_tensors_and_parameters_come_back_as_values(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    tree = {"a": base, "b": base, "c": base.view(2, 3), "d": base[2:], "e": nn.Parameter(base * 2)}
    write_tree(tmp_path / "t", tree)
    found = read_tree(tmp_path / "t")
    for key, value in tree.items():
        assert torch.equal(found[key], value.detach()) and not found[key].requires_grad
    found["a"][0] = 99
    assert found["b"][0] == 0 and base[0] == 0
    assert torch.equal(read_tree(tmp_path / "t")["a"], base)  # the file does not follow


def _cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


NO_TREES: dict[str, tuple[Callable[[], Any], str]] = {
    "object": (lambda: {"a": [object()]}, r"tree.a\[0\] is a object, which cannot be saved"),
    "array": (lambda: np.ones(2), "tree is a ndarray"),
    "set": (lambda: {1}, "tree is a set"),
    "function": (lambda: print, "tree is a builtin"),
    "key": (lambda: {"x": {(1, 2): 3}}, "tree.x has a key that is neither text nor number"),
    "no key": (lambda: {None: 3}, "has a key that is neither"),
    "cycle": (_cycle, "nested too deeply, or holds itself"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "tree is a tensor without plain values"),
    "meta": (lambda: [torch.ones(2, device="meta")], r"tree\[0\] is a tensor without plain"),
    "dtype": (lambda: torch.ones(2, dtype=torch.complex128), "cannot be written"),
    "number": (lambda: 10**5000, "cannot be written"),
}


@pytest.mark.parametrize("case", NO_TREES)
def test_what_cannot_be_saved_is_named_and_the_old_file_survives(case: str, tmp_path: Path) -> None:
    make_value, message = NO_TREES[case]
    write_tree(tmp_path / "t", "old")
    with pytest.raises(psap.ArgumentTypeError, match=message):
        write_tree(tmp_path / "t", make_value())
    assert read_tree(tmp_path / "t") == "old"
    assert os.listdir(tmp_path) == ["t"]


DAMAGED = [
    '"tree": {}',
    '"tree": {"$tensor": "9"}',
    '"tree": {"$tensor": []}',
    '"tree": {"$tensor": "0"}',
    '"tree": {"$tensor": "0", "last": true}',
    '"tree": {"$tuple": 5}',
    '"tree": {"$dict": 5}',
    '"tree": {"$dict": [[1]]}',
    '"tree": {"$dict": [[[1], 2]]}',
    '"tree": ' + BOMB,
    '"forest": 1',
]


@pytest.mark.parametrize("body", DAMAGED)
def test_a_damaged_tree_is_refused(body: str, tmp_path: Path) -> None:
    text = '{"format": "psap-tree", "version": 1, ' + body + "}"
    save_file({"0": torch.ones(1)}, tmp_path / "t", metadata={"psap": text})
    with pytest.raises(psap.FileError, match=r"is damaged|cannot be read"):
        read_tree(tmp_path / "t")
    text = text.replace('"version": 1', '"version": 7')
    save_file({"0": torch.ones(1)}, tmp_path / "t", metadata={"psap": text})
    with pytest.raises(psap.FileError, match=r"version 7, this psap reads 1|cannot be read"):
        read_tree(tmp_path / "t")
