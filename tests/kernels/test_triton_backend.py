"""use_backend("triton"), and what CUDA tensors take where the CUDA part is not built."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import psap_kernels
from psap_kernels import _library, _load, reference, use_backend

pytest.importorskip("triton", reason="triton is a test dependency on Linux")

KEEP = torch.tensor([True, False])


def test_every_op_has_a_kernel():
    for name in _library.SCHEMAS:
        assert _load.triton_op(name).__module__ == f"psap_kernels.triton.{name}"


def test_triton_runs_where_it_is_named(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "zero_filters_", refuse)
    x = torch.ones(2, 3)
    with use_backend("triton"):
        psap_kernels.zero_filters_([x], [KEEP])
    assert x.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_autograd_notices_what_is_written():
    x, index = torch.ones(2, 3), torch.tensor([1])
    with use_backend("triton"):
        psap_kernels.zero_filters_([x], [KEEP])
        assert x._version == 1
        psap_kernels.restore_filters_([x], [index], [torch.ones(1, 3)])
        assert x._version == 2


def test_python_checks_come_first():
    x = torch.ones(2, 3)
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"rows\[0\] has index 2, wanted 0 <= index < 2"):
            psap_kernels.restore_filters_([x], [torch.tensor([2])], [x[:1].clone()])
        with pytest.raises(TypeError, match=r"weights\[0\] is torch.int32"):
            psap_kernels.layer_stats([x.int()])


def test_cuda_tensors_take_triton_without_the_cuda_part(monkeypatch):
    run = _library._on_cuda("zero_filters_", reference.zero_filters_)
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="zero_filters_: tensors are on cpu, meta, wanted one"):
        run([x, x.to("meta")], [KEEP, KEEP])
    run([x], [KEEP])
    assert x[1].eq(0).all()
    monkeypatch.setattr(_load, "triton_op", lambda name: None)
    run([x], [~KEEP])
    assert x.eq(0).all()


def test_missing_triton_says_what_mends_it(monkeypatch):
    monkeypatch.setattr(_load, "triton_missing", lambda: "triton is not installed")
    with pytest.raises(RuntimeError, match=r"'triton' is missing: .*mend it: pip install triton"):
        use_backend("triton")


def test_tables_outlive_their_place_in_the_cache(monkeypatch):
    """As far as that can be seen without a GPU: which call holds them."""
    from psap_kernels.triton import _tables

    held: list[object] = []
    table = torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: held.append(stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tables, "_captured", [])
    _tables.on(torch.device("cuda", 1), table)
    assert held == ["stream of cuda:1"]
    assert _tables._captured == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    _tables.on(torch.device("cuda", 1), table)
    assert _tables._captured == [table]
    assert len(held) == 1


def compiled_process(code: str) -> str:
    """Run ``code`` where kernels are not interpreted; what it prints."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import torch, psap_kernels, os\n" + code],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors are refused in either case")
def test_cpu_tensors_are_refused_without_the_interpreter():
    said = compiled_process(
        "psap_kernels.use_backend('triton')\n"
        "x, keep = torch.ones(2, 3), torch.tensor([True, False])\n"
        "for late in ('0', '1'):\n"
        "    os.environ['TRITON_INTERPRET'] = late\n"
        "    psap_kernels._load.triton_op('zero_filters_')\n"
        "    try: psap_kernels.zero_filters_([x], [keep])\n"
        "    except (ValueError, RuntimeError) as error: print(error)\n"
        "assert x.eq(1).all()\n"
    )
    first, second = said.splitlines()
    assert first.startswith("backend 'triton' is forced, but the tensors are on cpu: move them")
    assert second == "zero_filters_: tensors are on cpu, wanted one cuda device"
