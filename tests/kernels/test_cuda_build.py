"""The CUDA part in a CUDA build of PyTorch, without a GPU: it loads, and its ops can be traced."""

from __future__ import annotations

import os

import compile_gate
import pytest
import torch
from test_library import op_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import psap_kernels
from psap_kernels import _library, _load

pytestmark = pytest.mark.zoo


@pytest.fixture(autouse=True)
def cuda_part() -> object:
    """Skip where nothing could build the CUDA part; fail where it is missing all the same."""
    if torch.version.cuda is None:
        pytest.skip("needs a PyTorch built with CUDA")
    part = _load.part("_C_cuda")
    if part.module is None and compile_gate.nvcc() is None and os.environ.get("PSAP_CUDA") != "1":
        pytest.skip("the CUDA part was not built: no nvcc")
    assert part.module is not None, part.why_missing
    return part.module


def test_it_loads_and_touches_no_device(cuda_part):
    assert cuda_part.torch_version.split(".")[0].isdigit()
    assert cuda_part.architectures
    assert not torch.cuda.is_initialized() or torch.cuda.is_available()


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_every_op_has_a_cuda_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"psap::{name}", "CUDA")


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_fake_cuda_tensors_get_what_the_reference_returns(name):
    op = getattr(torch.ops.psap, name).default
    for arguments in op_arguments()[name]:
        with FakeTensorMode() as mode:
            on_gpu = pytree.tree_map_only(
                torch.Tensor, lambda x: mode.from_tensor(x).to("cuda"), arguments
            )
            got = pytree.tree_leaves(op(*on_gpu))
        with psap_kernels.use_backend("reference"):
            want = pytree.tree_leaves(op(*arguments))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            if b is None:
                assert a is None
                continue
            assert a.device.type == "cuda"
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.filterwarnings("ignore:.*opcheck:UserWarning")
@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_opcheck_with_fake_cuda_tensors(name):
    """Schema, registration for autograd, fake kernel and AOT dispatch; no kernel runs."""
    op = getattr(torch.ops.psap, name).default
    for arguments in op_arguments()[name]:
        with FakeTensorMode() as mode:
            on_gpu = pytree.tree_map_only(
                torch.Tensor, lambda x: mode.from_tensor(x).to("cuda"), arguments
            )
            results = torch.library.opcheck(op, on_gpu)
        assert set(results.values()) == {"SUCCESS"}
