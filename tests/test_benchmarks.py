from __future__ import annotations

import dataclasses
import json
import sys
import time

import pytest
import torch

import psap_kernels
from benchmarks import __main__ as command
from benchmarks import (
    gpu,
    host,
    limits,
    overhead,
    plot,
    registry,
    roofline,
    rows,
    shapes,
    stats,
    timing,
)
from psap.models import create


def quick(folder) -> registry.Options:
    return registry.Options(quick=True, out=folder)


@pytest.mark.parametrize(
    ("name", "model"),
    [("resnet56", "resnet56"), ("vgg16", "vgg16_bn"), ("mobilenet_v2", "mobilenet_v2")],
)
def test_shapes_are_those_of_the_models(name, model):
    modules = list(create(model, num_classes=10, in_channels=3).modules())
    convs = [tuple(m.weight.shape) for m in modules if isinstance(m, torch.nn.Conv2d)]
    norms = [m.num_features for m in modules if isinstance(m, torch.nn.BatchNorm2d)]
    network = shapes.network(name)
    assert list(network.convs) == convs
    assert list(network.norms) == norms


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in shapes.NAMES if name != "resnet56"])
def test_shapes_are_those_of_torchvision(name):
    import torchvision

    arch = "vgg16_bn" if name == "vgg16" else name
    with torch.device("meta"):
        modules = list(getattr(torchvision.models, arch)().modules())
    convs = [tuple(m.weight.shape) for m in modules if isinstance(m, torch.nn.Conv2d)]
    norms = [m.num_features for m in modules if isinstance(m, torch.nn.BatchNorm2d)]
    network = shapes.network(name)
    assert sorted(network.convs) == sorted(convs)
    assert sorted(network.norms) == sorted(norms)


def test_sizes_of_the_sweeps():
    assert shapes.network("params-1e9").parameters == pytest.approx(1e9, rel=1e-3)
    assert len(shapes.network("layers-10000").convs) == 10_000
    assert shapes.network("layers-10").parameters == pytest.approx(1e7, rel=0.01)
    with pytest.raises(ValueError, match=r"network 'alexnet': wanted resnet18, "):
        shapes.network("alexnet")


@pytest.mark.parametrize("name", ["stats", "shrink", "supervise", "histogram", "host"])
def test_every_benchmark_verifies_and_writes_whole_rows(name, tmp_path, capsys):
    found = registry.run(name, quick(tmp_path))
    assert found and rows.faults(tmp_path) == []
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    for row in found:
        assert row["median_ms"] > 0
        assert all(other["ratio"] > 0 for other in row["baselines"].values())


@pytest.mark.parametrize("dtype", ["channels_last", "bfloat16", "float16"])
def test_other_dtypes(dtype, tmp_path):
    options = dataclasses.replace(quick(tmp_path), dtype=(dtype,), threads=(1, 2))
    found = registry.run("stats", options)
    assert [row["clock"] for row in found] == ["process_time", "perf_counter"]
    assert found[0]["layout"] == ("channels_last" if dtype == "channels_last" else "contiguous")


def test_a_red_check_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stats.psap_kernels, "layer_stats", wrong_stats)
    with pytest.raises(SystemExit, match="1"):
        command.main(["stats", "--quick", "--out", str(tmp_path)])
    assert "error: layer_stats on resnet56, backend auto: a sum of layer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_host_checks_what_it_times(tmp_path, monkeypatch):
    zero = host.psap_kernels.zero_filters_

    def forgetful(weights, keep):
        if psap_kernels._backend._forced == "reference":
            zero(weights, keep)

    monkeypatch.setattr(host.psap_kernels, "zero_filters_", forgetful)
    with pytest.raises(registry.CheckFailed, match=r"zero_filters_ on 55 tiny layers.* result 0 "):
        registry.run("host", quick(tmp_path))


real_stats = stats.psap_kernels.layer_stats


def wrong_stats(*arguments, **options):
    result = real_stats(*arguments, **options)
    result.filter_sums[5, 0] += 1e-3
    return result


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = ["--out", str(tmp_path)]
    for arguments in (
        ["stats", "--device", "cuda", *out],
        ["gpu", *out],
        ["gpu-ready"],
        ["sanitize"],
    ):
        with pytest.raises(SystemExit, match="1"):
            command.main(arguments)
        assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_first_day_on_a_gpu_as_far_as_a_cpu_goes(tmp_path, capsys):
    options = dataclasses.replace(gpu.DEFAULTS, device="cpu", quick=True, compile=False,
                                  dtype=("float32",), out=tmp_path)  # fmt: skip
    gpu.run(options)
    table = (tmp_path / "gpu" / "table.md").read_text()
    assert "| `layer_stats` | resnet56 | float32 |" in table
    assert rows.faults(tmp_path / "gpu") == []
    gpu.run(options, deadline_s=0)
    assert "left out after" in capsys.readouterr().err


def test_the_driver_of_the_sanitizer(capfd):
    gpu.sanitize("cpu")
    assert "every op, auto on cpu: equal to the reference" in capfd.readouterr().out
    with pytest.raises(registry.CheckFailed, match=r"exit code 3"):
        gpu._require_success([sys.executable, "-c", "raise SystemExit(3)"], 60)


def test_without_the_sanitizer_nothing_passes(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu, "require", lambda device: None)
    monkeypatch.setattr(gpu, "backends", lambda device: ("cuda", "triton"))
    monkeypatch.setattr(gpu, "_require_success", lambda command, timeout_s: ran.append(command))
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: None)
    with pytest.raises(registry.NoDevice, match="compute-sanitizer was not found, so nothing was"):
        gpu.sanitize()
    assert ran == []
    gpu.sanitize(skip="the image has no toolkit")
    assert [command[-2:] for command in ran] == [["cuda", "cuda"], ["cuda", "triton"]]
    assert "WITHOUT compute-sanitizer: the image has no toolkit" in capsys.readouterr().err
    ran.clear()
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: f"/bin/{name}")
    gpu.sanitize()
    assert [command[:3] for command in ran] == [
        ["/bin/compute-sanitizer", "--tool", tool] for tool in (*gpu.TOOLS, gpu.TOOLS[0])
    ]


def test_roofline_counts_launches_and_bytes(tmp_path, capsys):
    x = torch.empty(1000, device="meta")
    assert roofline.count(lambda: (x.view(10, 100) * x.view(10, 100)).abs()) == (2, 20_000)
    assert roofline.h100_us(1000, 8) == 4000
    assert roofline.h100_us(1, 3_350_000) == pytest.approx(5)
    found = roofline.run(quick(tmp_path))
    assert {row["op"] for row in found} == {"bandwidth", "layer_stats", "shrink", "gate_stats_"}
    assert "| resnet56 | `layer_stats` | fused | 1 | 0.00686 | 6 |" in capsys.readouterr().out
    assert rows.faults(tmp_path) == []


def test_the_limits_touch_every_byte():
    if limits.library() is None:
        pytest.skip("no C compiler")
    x = [torch.arange(101), torch.arange(3)]
    name, read = limits.read(x, 1)
    assert (name, read()) == ("read loop in C", 5053)
    assert sum(limits.read(x, 2)[1]()) == 5053
    assert limits.copy(x)[0] == "memcpy"


def test_without_a_compiler_the_limit_has_another_name(monkeypatch):
    monkeypatch.setattr(limits, "library", lambda: None)
    assert limits.read([torch.ones(3)], 1)[0] == "torch.sum"
    assert limits.copy([torch.ones(3)])[0] == "copy_"
    assert limits.clear([torch.ones(3)])[0] == "zero_"


def test_times():
    times = timing.Times.of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (times.median_ms, times.p20_ms, times.p80_ms) == (3.0, 1.8, 4.2)
    slept = timing.measure({"sleep": lambda: time.sleep(0.02)}, torch.device("cpu"), repeats=3)
    assert slept["sleep"].median_ms < 10  # CPU time does not pass while nothing runs


@pytest.mark.slow
def test_overhead(tmp_path):
    found = overhead.run(quick(tmp_path), batch=8)
    assert found[-1]["backend"] == "reference"
    for row in found:
        assert row["window_ms"] > 0 and 0 < row["percent_of_schedule"] < 100
    assert rows.faults(tmp_path) == []


def test_committed_rows_are_whole():
    assert rows.faults() == []


def test_faults_are_found(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"benchmark": "x", "median_ms": 1}\nnot json\n')
    faults = rows.faults(tmp_path)
    assert faults[0].startswith("x.jsonl:1: without torch, psap, commit, date")
    assert faults[1].startswith("x.jsonl:2: not JSON")
    with pytest.raises(SystemExit, match="1"):
        command.main(["check", str(tmp_path)])
    assert "x.jsonl:1: without" in capsys.readouterr().out


def test_the_picture(tmp_path):
    with pytest.raises(ValueError, match=r"no rows of layer_stats on the CPU"):
        plot.draw([])
    pytest.importorskip("matplotlib", reason="needs the extra psap[report]")
    registry.run("stats", quick(tmp_path))
    found = [{**row, "backend": "cpu"} for row in rows.read(tmp_path)]
    svg = plot.draw(plot.chosen(found))
    assert svg == plot.draw(plot.chosen(found))
    assert "resnet56" in svg and "prefers-color-scheme:dark" in svg and "var(--ink)" in svg
    assert "#010101" not in svg
