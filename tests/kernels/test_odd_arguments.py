"""Arguments that are easy to get wrong, tensors of odd kinds, odd defaults of the process."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Iterator

import pytest
import torch

from psap_kernels import (
    _checks,
    abs_histogram,
    abs_quantile,
    gate_stats_,
    layer_stats,
    reference,
    restore_filters_,
    shrink,
    zero_filters_,
)

KEEP = torch.tensor([True, False, True])
ROW = torch.tensor([1])


def x() -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4) + 1


def generator() -> Iterator[torch.Tensor]:
    """What model.parameters() is."""
    yield x()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: layer_stats(generator()), "weights"),
        (lambda: abs_histogram(generator()), "tensors"),
        (lambda: abs_quantile(generator(), 0.5), "tensors"),
        (lambda: shrink(generator(), [ROW]), "tensors"),
        (lambda: zero_filters_(generator(), [KEEP]), "tensors"),
        (lambda: restore_filters_(generator(), [ROW], [x()[:1]]), "tensors"),
    ],
)
def test_a_generator_is_refused_by_name(backend, call, name):
    with pytest.raises(TypeError, match=rf"{name} is a generator, wanted a list.*list\({name}\)"):
        call()


def test_numbers_and_flags_that_are_none(backend):
    with pytest.raises(TypeError, match=r"scales is a list, wanted a float32 tensor \[L\]: use"):
        abs_histogram([x()], scales=[1.0])
    with pytest.raises(TypeError, match=r"q is a str, wanted a number from 0 to 1"):
        abs_quantile([x()], "median")
    with pytest.raises(TypeError, match=r"per_input is a str, wanted True or False"):
        layer_stats([x()], [x()], per_input="yes")
    counters = torch.zeros(2, 0, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    terms, offsets = torch.zeros(0, 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"scale is None, wanted a number"):
        gate_stats_(*counters, [], [], terms, offsets, scale=None)


def test_too_many_dimensions(compiled):
    deep = torch.ones([2] * 11)
    match = r"dimensions: merge some with .flatten\(\)"
    for call in (
        lambda: layer_stats([deep]),
        lambda: abs_histogram([deep]),
        lambda: shrink([deep], [ROW]),
        lambda: zero_filters_([deep], [KEEP[:2]]),
        lambda: restore_filters_([deep], [ROW], [deep[:1].clone()]),
    ):
        with pytest.raises(RuntimeError, match=match):
            call()


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "mkldnn": lambda: torch.eye(3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|deprecated).*:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_one_odd_tensor_among_others_changes_nothing(backend, kind):
    """It takes the dispatcher past the kernel that would check all of them."""
    plain, odd = x(), ODD[kind]()
    with pytest.raises(TypeError, match=r"tensors\[1\] (has layout|is a nested or quantized)"):
        zero_filters_([plain, odd], [KEEP, KEEP])
    with pytest.raises(TypeError, match=r"tensors\[1\] (has layout|is a nested or quantized)"):
        restore_filters_([plain, odd], [ROW, ROW], [x()[:1], x()[:1, :3]])
    match = r"zero_filters_: a tensor is sparse or quant|AutogradNestedTensor"
    with pytest.raises((TypeError, NotImplementedError), match=match):
        torch.ops.psap.zero_filters_([plain, odd], [KEEP, KEEP])
    assert torch.equal(plain, x())


@pytest.fixture(params=[torch.float64, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_does_not_matter(backend, default_dtype):
    w = x().float()
    assert layer_stats([w]).weight_abs.tolist() == [10, 26, 42]
    assert abs_histogram([w]).sum() == 12
    assert abs_quantile([w], 0.5) == 6


def test_the_default_device_does_not_matter(backend):
    w, row = x(), ROW
    with torch.device("meta"):
        assert layer_stats([w]).weight_abs.tolist() == [10, 26, 42]
        assert abs_quantile([w], 0.5) == 6
        assert torch.equal(shrink([w], [row])[0], w[1:2])
        with pytest.raises(ValueError, match=r"keep_dim0\[0\] has index 10"):
            shrink([w], [row + 9])


def test_a_nan_weight_without_gradients(backend):
    stats = layer_stats([torch.tensor([[math.nan, 1.0], [math.inf, 2.0]])])
    assert not stats.filter_sums[2:].any()
    assert not stats.layer_sums[:, 2:6].any()


INTEGERS = [torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128]
FLOATS = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=str)
def test_dtypes_that_few_operations_know(backend, dtype):
    bits = torch.arange(3 * 32, dtype=torch.uint8).reshape(3, 32) + 1
    tensors = [torch.ones(3, 2), bits.clone().view(dtype)]
    saved = [tensor[1:2].clone() for tensor in tensors]
    (small,) = shrink(tensors[1:], [ROW])
    assert torch.equal(small.view(torch.uint8), bits[1:2])
    zero_filters_(tensors, [KEEP, KEEP])
    assert torch.equal(tensors[1].view(torch.uint8), bits * KEEP[:, None])
    restore_filters_(tensors, [ROW, ROW], saved)
    assert torch.equal(tensors[1].view(torch.uint8), bits)


def test_an_expanded_tensor_without_elements(backend):
    empty = torch.empty(3, 1, 0).expand(3, 5, 0)
    zero_filters_([empty], [KEEP])
    restore_filters_([empty], [ROW], [torch.empty(1, 5, 0)])


@pytest.mark.parametrize("shape", [(3, 8, 9, 1), (1, 17, 0, 17), (3, 4, 2, 3, 5)], ids=str)
def test_strides_of_empty_channels_last_are_those_of_the_fake_kernel(compiled, shape):
    format_ = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    tensor = torch.ones(shape).contiguous(memory_format=format_)
    assert reference.memory_format(tensor) == format_
    nothing = torch.empty(0, dtype=torch.int64)
    for keep0, keep1 in ((nothing, None), (None, nothing), (nothing, nothing)):
        real = shrink([tensor], [keep0], [keep1])[0]
        fake = shrink(
            [tensor.to("meta")], *([k if k is None else k.to("meta")] for k in (keep0, keep1))
        )
        assert real.shape == fake[0].shape
        assert real.stride() == fake[0].stride()


def test_rows_that_the_call_itself_overwrites(compiled):
    """They were checked as they were before: what is written into them must not be followed."""
    rows = torch.tensor([0, 1, 2])
    want = torch.arange(30.0).reshape(3, 10)
    target = torch.zeros(10, 10)
    far = torch.full((3,), 1 << 40)
    restore_filters_([rows, target], [torch.arange(3), rows], [far, want])
    assert torch.equal(rows, far)
    assert torch.equal(target[:3], want)


def test_stats_compare_by_identity():
    stats = layer_stats([x()])
    assert stats == stats
    assert stats != copy.deepcopy(stats)
    assert len({stats, stats}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", [144, 576, 2048, 4608, 70_000])
def test_equal_values_whose_roundings_all_go_one_way(compiled, dtype, length):
    """What an initialisation with a constant leaves; a random walk does not describe it."""
    for value in (0.01, 0.037, 1 / 3, 1 / 7, 123.456):
        w = torch.full((3, length), value, dtype=dtype)
        stats = layer_stats([w], [w])
        one = float(w[0, 0])
        for row in range(6):
            wanted = length * (one if row in (0, 2) else one * one)
            error = (stats.filter_sums[row].double() / wanted - 1).abs()
            assert float(error.max()) < 5e-7, row


def test_masks_and_positions_are_told_apart():
    weight, mask = torch.ones(4, 2), torch.tensor([False, True, True, False])
    with pytest.raises(TypeError, match=r"pass the positions, mask\.nonzero\(\)\.flatten\(\)"):
        shrink([weight], [mask])
    with pytest.raises(TypeError, match=r"pass a mask, torch\.isin\(torch\.arange\(n\), positions"):
        zero_filters_([weight], [mask.nonzero().flatten()])
    assert bool((weight == 1).all())


def test_values_are_not_read_while_a_graph_is_captured(monkeypatch):
    captured = types.SimpleNamespace(is_meta=False, is_cuda=True)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert _checks.readable(captured) is not capturing
        assert _checks.readable(x())
    assert not _checks.readable(x().to("meta"))
