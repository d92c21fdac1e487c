"""zero_filters_ and restore_filters_: rows written in place."""

from __future__ import annotations

import math

import pytest
import threads
import torch

from psap_kernels import restore_filters_, zero_filters_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def layouts(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of 1 to 5 dimensions with 6 filters each, in memory of all sorts."""
    x = (torch.arange(6 * 5 * 9).reshape(6, 5, 3, 3) % 113 + 1).to(dtype)
    return [
        x.clone(),
        x.to(memory_format=torch.channels_last),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        x.repeat(1, 1, 1, 2)[..., ::2],
        x[:, 0, 0, 0].clone(),
        x.flatten(1)[:, 1:].clone(),
        x[:, :, None].clone(),
        x[:, :0].clone(),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", ["mixed", "none", "all"])
def test_zero(backend, dtype, keep):
    mask = {
        "mixed": torch.tensor([True, False, True, True, False, True]),
        "none": torch.zeros(6, dtype=torch.bool),
        "all": torch.ones(6, dtype=torch.bool),
    }[keep]
    tensors = layouts(dtype)
    before = [t.clone() for t in tensors]
    assert zero_filters_(tensors, [mask] * len(tensors)) is None
    for got, was in zip(tensors, before, strict=True):
        assert torch.equal(got[mask], was[mask])
        assert torch.equal(got[~mask], torch.zeros_like(was[~mask]))


def test_zero_clears_nan_and_inf_to_positive_zero(backend):
    x = torch.tensor([[math.nan, math.inf, -1.0], [math.nan, -math.inf, -0.0]])
    zero_filters_([x], [torch.tensor([False, True])])
    assert torch.equal(x[0], torch.zeros(3))
    assert not x[0].signbit().any()
    assert x[1].isnan().tolist() == [True, False, False]
    assert x[1].signbit()[1:].tolist() == [True, True]


def test_zero_stays_inside_a_view(backend):
    base = torch.ones(6, 10)
    zero_filters_([base[1:5, 2:7]], [torch.tensor([False, True, False, True])])
    want = torch.ones(6, 10)
    want[[1, 3], 2:7] = 0
    assert torch.equal(base, want)


def test_zero_mask_may_be_strided(backend):
    x, mask = torch.ones(3, 2), torch.tensor([True, False, False, True, True, False])[::2]
    zero_filters_([x], [mask])
    assert x[:, 0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [[4, 0, 3], [2], []], ids=str)
def test_restore(backend, dtype, rows):
    index = torch.tensor(rows, dtype=torch.int64)
    tensors = layouts(dtype)
    originals = [t.clone() for t in tensors]
    saved = [t[index] for t in tensors]
    saved[0] = saved[0].to(memory_format=torch.channels_last)
    for t in tensors:
        t.zero_()
    assert restore_filters_(tensors, [index] * len(tensors), saved) is None
    others = torch.ones(6, dtype=torch.bool)
    others[index] = False
    for got, want in zip(tensors, originals, strict=True):
        assert torch.equal(got[index], want[index])
        assert not got[others].any()


def test_restore_keeps_every_bit(backend):
    bits = torch.tensor([[0x7FC12345, -(2**31), 1]], dtype=torch.int32)
    x = torch.zeros(2, 3)
    restore_filters_([x], [torch.tensor([1])], [bits.view(torch.float32)])
    assert torch.equal(x[1:].view(torch.int32), bits)


def test_zero_then_restore_is_the_identity(backend):
    tensors = layouts(torch.float32)
    before = [t.clone() for t in tensors]
    keep = torch.tensor([True, False, True, False, False, True])
    rows = (~keep).nonzero()[:, 0]
    saved = [t[rows] for t in tensors]
    zero_filters_(tensors, [keep] * len(tensors))
    restore_filters_(tensors, [rows] * len(tensors), saved)
    for got, want in zip(tensors, before, strict=True):
        assert torch.equal(got, want)


def test_many_rows_on_several_threads(compiled):
    keep = torch.arange(900) % 3 > 0
    rows = (~keep).nonzero()[:, 0]
    for n in (1, 2, 5):
        with threads.using(n):
            x, bias = torch.ones(900, 130, 3, 3), torch.ones(900)
            saved = [x[rows], bias[rows]]
            zero_filters_([x, bias], [keep, keep])
            assert torch.equal(x.amax((1, 2, 3)), keep.float())
            assert torch.equal(bias, keep.float())
            restore_filters_([x, bias], [rows, rows], saved)
            assert x.min() == bias.min() == 1


def test_parameters_need_no_no_grad_and_their_version_counts(backend):
    """Autograd must notice: a graph that saved the old values may not go backward."""
    w = torch.nn.Parameter(torch.ones(2, 3))
    loss = (w * w).sum()
    version = w._version
    zero_filters_([w], [torch.tensor([True, False])])
    assert w._version > version
    assert w.requires_grad and w.is_leaf and w.grad_fn is None
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()
    version = w._version
    restore_filters_([w], [torch.tensor([1])], [torch.ones(1, 3)])
    assert w._version > version
    assert torch.equal(w, torch.ones(2, 3))


def test_one_filter_and_nothing(backend):
    zero_filters_([], [])
    restore_filters_([], [], [])
    x = torch.ones(1, 7)
    zero_filters_([x, torch.empty(0, 3)], [torch.tensor([False]), torch.empty(0).bool()])
    assert not x.any()
    restore_filters_([x], [torch.tensor([0])], [torch.ones(1, 7)])
    assert x.all()


X = torch.ones(2, 3)
KEEP = torch.tensor([True, False])
ROW = torch.tensor([1])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((X, [KEEP]), TypeError, r"tensors is a Tensor, wanted a list"),
        (([X], []), ValueError, r"keep has 0 entries, wanted 1"),
        (([X], [KEEP.int()]), TypeError, r"keep\[0\] is torch.int32, wanted torch.bool"),
        (([X], [KEEP[:1]]), ValueError, r"keep\[0\] has shape \[1\], wanted \[2\]"),
        (([X], [KEEP.to("meta")]), ValueError, r"keep\[0\] is on meta, wanted cpu"),
        (([torch.tensor(1.0)], [KEEP]), ValueError, r"tensors\[0\] has no dimension"),
        (([X[:1].expand(2, 3)], [KEEP]), ValueError, r"tensors\[0\] is an expanded.*clone"),
    ],
)
def test_wrong_arguments_of_zero(arguments, error, match):
    with pytest.raises(error, match=match):
        zero_filters_(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([X], [], [X[:1]]), ValueError, r"rows has 0 entries, wanted 1"),
        (([X], [ROW], []), ValueError, r"saved has 0 entries, wanted 1"),
        (([X], [ROW.int()], [X[:1]]), TypeError, r"rows\[0\] is torch.int32, wanted torch.int64"),
        (([X], [ROW + 1], [X[:1]]), ValueError, r"rows\[0\] has index 2, wanted 0 <= index < 2"),
        (([X], [ROW - 2], [X[:1]]), ValueError, r"rows\[0\] has index -1, wanted 0 <= index < 2"),
        (([X], [ROW[None]], [X[:1]]), ValueError, r"rows\[0\] has shape \[1, 1\], wanted one"),
        (([X], [ROW.repeat(2)], [X]), ValueError, r"rows\[0\] names a row twice, wanted unique"),
        (([X], [ROW], [X]), ValueError, r"saved\[0\] has shape \[2, 3\], wanted \[1, 3\]"),
        (([X], [ROW], [X[:1].half()]), TypeError, r"saved\[0\] is torch.float16, wanted torch.fl"),
        (([X], [ROW], [X[:1].to("meta")]), ValueError, r"saved\[0\] is on meta, wanted cpu"),
        (([X[:1].expand(2, 3)], [ROW], [X[:1]]), ValueError, r"tensors\[0\] is an expanded"),
    ],
)
def test_wrong_arguments_of_restore(arguments, error, match):
    with pytest.raises(error, match=match):
        restore_filters_(*arguments)


def test_the_kernels_check_too(compiled):
    zero, restore = torch.ops.psap.zero_filters_, torch.ops.psap.restore_filters_
    with pytest.raises(RuntimeError, match=r"as many keep masks as tensors"):
        zero([X], [])
    with pytest.raises(RuntimeError, match=r"keep must be a bool CPU tensor \[O\]"):
        zero([X], [KEEP[:1]])
    with pytest.raises(RuntimeError, match=r"keep must be a bool CPU tensor"):
        zero([X], [KEEP.int()])
    with pytest.raises(RuntimeError, match=r"row 2 of tensor 0 is out of range \[0, 2\)"):
        restore([X], [ROW + 1], [X[:1]])
    with pytest.raises(RuntimeError, match=r"rows of tensor 0 name a row twice"):
        restore([X], [ROW.repeat(2)], [X])
    with pytest.raises(RuntimeError, match=r"a tensor to write to is expanded"):
        restore([X[:1].expand(2, 3)], [ROW], [X[:1]])
    with pytest.raises(RuntimeError, match=r"a tensor to write to is expanded"):
        zero([X[:1].expand(2, 3)], [KEEP])
    with pytest.raises(RuntimeError, match=r"saved must be \[len\(rows\), ...\]"):
        restore([X], [ROW], [X])
    with pytest.raises(RuntimeError, match=r"as many rows and saved tensors"):
        restore([X], [ROW], [])


def test_what_is_refused_has_no_new_version(compiled):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"keep\[0\] has shape"):
        zero_filters_([x], [KEEP[:1]])
    assert x._version == 0
    zero_filters_([x], [KEEP])
    restore_filters_([x], [ROW], [X[:1]])
    assert x._version == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_neighbours_are_written_as_one_block_and_no_further(backend, layout):
    base = torch.arange(1.0, 8 * 6 * 4 + 1).reshape(8, 6, 2, 2).to(memory_format=layout)
    wide = base.repeat(1, 1, 1, 2)[..., :2]
    keep = torch.tensor([True, False, False, True, False, False, False, True])
    rows = torch.tensor([1, 2, 6, 4, 5])
    for x in (base.clone(memory_format=torch.preserve_format), wide, base[:, 1:3]):
        before = x.clone()
        saved = x[rows]
        zero_filters_([x], [keep])
        assert torch.equal(x, before * keep[:, None, None, None])
        restore_filters_([x], [rows], [saved])
        assert torch.equal(x, before)
