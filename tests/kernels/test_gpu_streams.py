"""What only a GPU can show: graphs, streams, a device that is not the current one, training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import psap
import psap_kernels
from psap.models import create
from psap_kernels import _load

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and _load.triton_missing():
        pytest.skip("triton is not installed")
    with psap_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def own_memory() -> Iterator[None]:
    """A graph cannot capture the fills of deterministic mode."""
    torch.use_deterministic_algorithms(False)
    yield


def weights(device: str = "cuda") -> list[torch.Tensor]:
    shapes = [(16, 3, 3, 3), (32, 16, 3, 3), (9, 32, 1, 1), (10, 9)]
    return [torch.randn(shape, device=device) for shape in shapes]


def test_graphs_replay_on_new_values(kernels):
    w, g = weights(), weights()
    tau = torch.full((4,), 0.5, device="cuda")
    keep = [torch.arange(len(t), device="cuda") % 2 == 0 for t in w]
    zeroed = [t.clone() for t in w]
    sums = torch.zeros(2, 16, dtype=torch.float64, device="cuda")
    seen = torch.zeros(2, dtype=torch.int64, device="cuda")
    terms = torch.tensor([(0, i, i) for i in range(16)], dtype=torch.int32, device="cuda")
    offsets = torch.arange(17, dtype=torch.int32, device="cuda")

    def everything():
        psap_kernels.zero_filters_(zeroed, keep)
        torch.ops.psap.gate_stats_(sums, seen, w, g, terms, offsets, 1.0)
        return psap_kernels.layer_stats(w, g, tau=tau), psap_kernels.abs_histogram(w)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        everything()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stats, counts = everything()
    for seed in range(2):
        torch.manual_seed(seed)
        for tensor in (*w, *g, *zeroed):
            tensor.normal_()
        sums.zero_()
        seen.zero_()
        graph.replay()
        torch.cuda.synchronize()
        want = psap_kernels.layer_stats(w, g, tau=tau)
        assert torch.equal(stats.filter_sums, want.filter_sums)
        assert torch.equal(stats.layer_counts, want.layer_counts)
        assert torch.equal(counts, psap_kernels.abs_histogram(w))
        assert not any(t[1::2].any() for t in zeroed)
        assert seen.tolist() == [1, 0]
        exact = (w[0].double() * g[0].double()).sum((1, 2, 3))
        torch.testing.assert_close(sums[0], exact, rtol=1e-5, atol=1e-5)


def test_calls_follow_the_current_stream(kernels):
    w = [torch.zeros(64, 64, 3, 3, device="cuda")]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        w[0].fill_(1.0)
        stats = psap_kernels.layer_stats(w)
    stream.synchronize()
    assert stats.weight_abs.tolist() == [576.0] * 64


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_the_current_one(kernels):
    w = weights("cuda:1")
    with torch.cuda.device(0):
        stats = psap_kernels.layer_stats(w)
        assert torch.cuda.current_device() == 0
    assert stats.filter_sums.device == torch.device("cuda:1")
    want = torch.cat([t.double().abs().flatten(1).sum(1) for t in w])
    torch.testing.assert_close(stats.weight_abs.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("protect", ["gate", "pulse", "none"])
def test_train_prune_finish(protect):
    model: nn.Module = create("digits_resnet", num_classes=10, in_channels=1).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(8, 1, 16, 16, device="cuda"), torch.randint(10, (8,), device="cuda")
    config = psap.Config(target=psap.Target(macs=0.5), prune_steps=2, window=2, protect=protect)
    pruner = psap.Pruner(model, x[:2], optimizer=optimizer, config=config)
    for _ in range(3):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        pruner.step()
    result = pruner.finish()
    assert next(result.model.parameters()).is_cuda
    small, dense = (sum(p.numel() for p in m.parameters()) for m in (result.model, model))
    assert small < 0.8 * dense
    model.eval()
    result.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-3, atol=1e-3)
