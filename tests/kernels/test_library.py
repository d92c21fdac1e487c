"""What holds for every op: schemas, fake kernels, torch.compile, backends, loading."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

import psap_kernels
from psap_kernels import _library, _load, build_info, use_backend

KEEP = torch.tensor([True, False, True])
ROWS = torch.tensor([2, 0])
COLUMNS = torch.tensor([1, 0])


def conv(*, channels_last: bool = False) -> torch.Tensor:
    x = torch.arange(3 * 5 * 2 * 2, dtype=torch.float32).reshape(3, 5, 2, 2) / 7
    return x.to(memory_format=torch.channels_last) if channels_last else x


def tensors() -> list[torch.Tensor]:
    return [conv(), conv(channels_last=True), conv()[:, 0], conv()[:, 0, 0, 0]]


def gate_arguments() -> tuple:
    terms = torch.tensor([[0, 0, 1], [1, 2, 2], [2, 1, 0]], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    values = tensors()[:3]
    grads = [v + 1 for v in values]
    sums, seen = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    return sums, seen, values, grads, terms, offsets, 0.5


def op_arguments() -> dict[str, list[tuple]]:
    x = tensors()
    return {
        "layer_stats": [(x, x, torch.ones(4)), (x, [], torch.ones(4)), ([], [], torch.ones(0))],
        "shrink": [(x, [ROWS] * 4, [COLUMNS] * 4), ([], [], [])],
        "zero_filters_": [(x, [KEEP] * 4)],
        "abs_histogram": [(x, torch.ones(4), 1 << 29, 20, 64), ([], torch.ones(0), 0, 20, 2048)],
        "gate_stats_": [gate_arguments()],
        "restore_filters_": [(x, [ROWS] * 4, [t[ROWS] for t in x])],
    }


@pytest.mark.parametrize("name", _library.SCHEMAS)
@pytest.mark.filterwarnings("ignore:.*opcheck:UserWarning")
def test_opcheck(name):
    for arguments in op_arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.psap, name).default, arguments)


def test_every_schema_has_a_public_function():
    assert set(_library.SCHEMAS) < set(psap_kernels.__all__)


def prune(weights, grads, tau, keep, rows, index):
    """All four ops in one graph."""
    stats = psap_kernels.layer_stats(weights, grads, tau=tau)
    saved = [w[rows] for w in weights]
    psap_kernels.zero_filters_(weights, [keep] * len(weights))
    small = psap_kernels.shrink(weights, [index] * len(weights), [None] * len(weights))
    psap_kernels.restore_filters_(weights, [rows] * len(weights), saved)
    return stats.weight_grad, stats.below_tau, stats.layer_std(), stats.layer(1).grad_sq, small


def check_compiled(backend: str, *, count: int) -> None:
    torch.compiler.reset()
    rows = (~KEEP).nonzero()[:, 0]
    eager, compiled = tensors()[:count], tensors()[:count]
    arguments = [torch.full((count,), 0.5), KEEP, rows, ROWS]
    want = prune(eager, eager, *arguments)
    got = torch.compile(prune, fullgraph=True, backend=backend)(compiled, compiled, *arguments)
    for a, b in zip(got[:4], want[:4], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got[4], want[4], strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(backend, compiler):
    check_compiled(compiler, count=4)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiles_with_inductor():
    check_compiled("inductor", count=2)


def test_use_backend_as_context_and_as_call():
    weights = [torch.ones(2, 3)]
    with use_backend("reference"):
        assert psap_kernels._backend._forced == "reference"
        psap_kernels.layer_stats(weights)
        with use_backend("auto"):
            assert psap_kernels._backend._forced == "auto"
        assert psap_kernels._backend._forced == "reference"
    assert psap_kernels._backend._forced == "auto"
    former = use_backend("reference")
    assert psap_kernels._backend._forced == "reference"
    former.__exit__(None, None, None)
    assert psap_kernels._backend._forced == "auto"


def test_the_backend_that_is_named_runs(compiled, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(psap_kernels.reference, "zero_filters_", refuse)
    with use_backend("cpu"):
        psap_kernels.zero_filters_([torch.ones(3, 2)], [KEEP])
    with use_backend("reference"), pytest.raises(AssertionError, match="the reference ran"):
        psap_kernels.zero_filters_([torch.ones(3, 2)], [KEEP])


def test_unknown_backend():
    with pytest.raises(
        ValueError, match=r"name is 'gpu', wanted one of auto, reference, cpu, cuda, triton"
    ):
        use_backend("gpu")


def test_missing_backend_says_what_mends_it(monkeypatch):
    monkeypatch.setattr(_load, "part", lambda name: _load.Part(None, f"{name} was not built"))
    with pytest.raises(RuntimeError, match=r"'cpu' is missing: _C was not built.*pip install"):
        use_backend("cpu")
    info = build_info()
    assert info["parts"]["_C"]["why_missing"] == "_C was not built"
    assert not info["parts"]["_C"]["available"]
    assert "--no-build-isolation" in info["mend"]


@pytest.mark.parametrize("version", [None, "13.0"])
def test_a_missing_cuda_backend_says_how_it_is_built(monkeypatch, version):
    monkeypatch.setattr(_load, "part", lambda name: _load.Part(None, f"{name} was not built"))
    monkeypatch.setattr(torch.version, "cuda", version)
    wanted = r"'cuda' is missing: _C_cuda was not built.*PSAP_CUDA=1 pip install --no-build.*nvcc"
    with pytest.raises(RuntimeError, match=wanted) as caught:
        use_backend("cuda")
    assert ("install a PyTorch that is built with CUDA" in str(caught.value)) == (version is None)
    # What builds the first missing part builds the rest too.
    assert "PSAP_CUDA" not in build_info()["mend"]


def test_cpu_backend_refuses_other_devices(compiled):
    meta = [torch.ones(3, 2, device="meta")]
    with use_backend("cpu"), pytest.raises(ValueError, match=r"the tensors are on meta: move them"):
        psap_kernels.layer_stats(meta)


def test_meta_tensors_give_shapes():
    stats = psap_kernels.layer_stats([torch.ones(3, 2, device="meta")])
    assert stats.filter_sums.shape == (6, 3)
    assert stats.filter_sums.is_meta


def test_part_that_does_not_load_is_remembered(monkeypatch):
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: x")

    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(_load.importlib, "import_module", broken)
    part = _load.part.__wrapped__("_C_broken")
    assert part.module is None
    assert part.why_missing == "psap_kernels._C_broken does not load: undefined symbol: x"


def test_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(_load.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    part = _load.part.__wrapped__("_C")
    assert part.why_missing == "psap_kernels._C needs torch >= 2.10, this is 2.9.1+cpu"


def test_build_info_of_a_built_part(compiled):
    part = build_info()["parts"]["_C"]
    assert part["path"].endswith("_C.abi3.so")
    assert part["capability"] in ("avx2", "default")
    assert part["torch_built"].split(".")[0].isdigit()
    assert build_info()["mend"] is None


def test_import_is_quiet_and_cheap():
    code = (
        "import sys, time, torch; before = set(sys.modules); start = time.process_time();"
        "import psap_kernels; took = time.process_time() - start;"
        "assert took < 0.05, took; assert not torch.cuda.is_initialized();"
        "assert 'triton' not in set(sys.modules) - before"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_build_info_names_the_cuda_part_where_torch_has_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert build_info()["parts"]["_C_cuda"]["available"] in (True, False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "_C_cuda" not in build_info()["parts"]
