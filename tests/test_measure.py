from __future__ import annotations

import pytest
import torch
from torch import nn

from psap import measure
from psap.errors import ArgumentError, FileError


class Recorder(nn.Module):
    """Notes its name, its mode and the threads at each call."""

    def __init__(self, name: str, calls: list[tuple], size: int = 4) -> None:
        super().__init__()
        self.name, self.note = name, calls.append  # a list of its own would be put back
        self.inner = nn.Linear(size, size)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        mode = (self.training, self.inner.training, torch.is_inference_mode_enabled())
        self.note((self.name, mode, torch.get_num_threads()))
        return self.inner(inputs[0])


@pytest.fixture
def calls() -> list[tuple]:
    return []


def test_latency(calls):
    model = Recorder("a", calls)
    found = measure.latency_ms(model, torch.randn(2, 4), repeats=7, warmup=2, threads=2)
    assert calls == [("a", (False, False, True), 2)] * 9
    assert 0 < found.p20_ms <= found.median_ms <= found.p80_ms < 1000
    assert (found.repeats, found.threads, found.device) == (7, 2, "cpu")


def test_everything_is_left_as_it_was(calls):
    model = Recorder("a", calls).train()
    model.inner.eval()
    threads = torch.get_num_threads()
    measure.latency_ms(model, (torch.randn(2, 4), torch.randn(1)), repeats=1, threads=threads + 1)
    assert (model.training, model.inner.training) == (True, False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure.latency_ms(model, torch.randn(2, 5), threads=threads + 1)
    assert (model.training, model.inner.training) == (True, False)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()


def test_comparison_takes_turns(calls):
    a, b = Recorder("a", calls), Recorder("b", calls)
    measure.compare_latency(a, b, torch.randn(2, 4), repeats=3, warmup=1)
    assert [name for name, *_ in calls] == ["a", "b"] * 4


def test_comparison_sees_the_larger_model():
    large, small = nn.Linear(1024, 1024), nn.Linear(1024, 8)
    found = measure.compare_latency(large, small, torch.randn(64, 1024), repeats=21)
    assert found.ratio == found.a.median_ms / found.b.median_ms
    assert found.ratio > 2


def test_percentiles(monkeypatch):
    times = iter(range(1, 100))
    monkeypatch.setattr(measure, "stopwatch", lambda *_, **__: lambda *_: float(next(times)))
    found = measure.latency_ms(nn.Identity(), torch.ones(1), repeats=11, warmup=0)
    assert (found.p20_ms, found.median_ms, found.p80_ms) == (3.0, 6.0, 9.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats is 0; pass a whole number >= 1"),
        ({"warmup": -1}, "warmup is -1; pass a whole number >= 0"),
        ({"threads": 0}, "threads is 0; pass a whole number >= 1, or None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        measure.latency_ms(nn.Identity(), torch.ones(1), **options)


def test_devices():
    with pytest.raises(ArgumentError, match="on cpu, meta; move all of them to the CPU or to one"):
        measure.latency_ms(nn.Linear(1, 1, device="meta"), torch.ones(1))
    with pytest.raises(ArgumentError, match="on meta; move"):
        measure.latency_ms(nn.Identity(), torch.ones(1, device="meta"))
    with pytest.raises(ArgumentError, match="on no device; move"):
        measure.latency_ms(nn.Identity(), ())


@pytest.mark.gpu
def test_latency_on_a_gpu():
    large, small = nn.Linear(8192, 8192).cuda(), nn.Linear(8192, 8).cuda()
    found = measure.compare_latency(large, small, torch.randn(4096, 8192, device="cuda"))
    assert found.a.device == "cuda:0"
    assert found.ratio > 2


def test_parameters_counts_shared_tensors_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert measure.parameters(model) == 9 + 3 + 6 + 3


def test_file_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert measure.file_size(path) == 5
    with pytest.raises(FileError, match=r"none cannot be read \(No such file"):
        measure.file_size(tmp_path / "none")
