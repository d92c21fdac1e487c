"""The accuracy benchmark: every method in a tiny run, on budget, resumable."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import psap
from benchmarks import accuracy, accuracy_plot, rows, settings
from benchmarks.methods import METHODS, oneshot
from benchmarks.settings import SETTINGS, Setting
from psap.cost import CostModel
from psap.models import create

TINY = Setting(images=280, val_share=0.8, epochs=2, pretrain=1, batch=16)
PEERS = [name for name in METHODS if name.startswith("tp-")]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> accuracy.Bench:
    return accuracy.Bench(TINY, 0, cache=tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
def test_every_method_ends_on_budget(method: str, bench: accuracy.Bench) -> None:
    if method in PEERS:
        pytest.importorskip("torch_pruning", reason="needs torch-pruning==1.6.1")
    row = bench.run(METHODS[method](), 0.3, test=method == "psap")
    assert row["macs_share"] > (0.2 if "multiples" in method or "fours" in method else 0.25)
    assert row["macs_share"] <= 0.3
    assert 0 < row["val_accuracy"] <= 1
    assert (row["test_accuracy"] is None) == (method != "psap")
    assert len(row["widths"]) == 6 - len(row.get("dropped", [])) and min(row["widths"]) >= 2


def test_the_same_seed_gives_the_same_row(bench: accuracy.Bench) -> None:
    one, two = (bench.run(METHODS["psap"](), 0.15) for _ in range(2))
    del one["cpu_seconds"], two["cpu_seconds"]
    assert one == two


def test_blocks_go_first_and_the_file_rebuilds_the_network(
    bench: accuracy.Bench, tmp_path: Path
) -> None:
    method = METHODS["psap-blocks"]()
    method.tolerance = 10.0  # type: ignore[attr-defined]
    row = bench.run(method, 0.3, save=tmp_path / "made" / "small.safetensors")
    assert row["dropped"] and row["macs_share"] <= 0.3
    file = tmp_path / "made" / "small.safetensors"
    small = psap.load(file, lambda: create("digits_resnet", in_channels=1))
    assert accuracy.accuracy(small, bench.val) == row["val_accuracy"]


def test_dense_is_the_reference(bench: accuracy.Bench) -> None:
    row = bench.run(METHODS["dense"](), 1.0)
    assert row["macs_share"] == row["parameter_share"] == 1


def test_a_method_that_cannot_refuses_in_its_row(bench: accuracy.Bench) -> None:
    row = bench.run(METHODS["psap"](), 1e-4)
    assert list(row) == ["refused"] and "cannot be met" in row["refused"]


def test_images_of_training_validation_and_test_are_apart() -> None:
    bench = accuracy.Bench(TINY, 3)
    train, val = bench.train.images, bench.val.images
    whole, kept = train.source.source.indices, train.source.indices[train.indices]
    assert len(train) == TINY.images and train.source.source is val.source
    assert not set(whole[kept].tolist()) & set(whole[val.indices].tolist())
    assert not set(whole.tolist()) & set(bench.spec.test.images.indices.tolist())


def test_rows_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(SETTINGS, "tiny", dataclasses.replace(TINY, epochs=1))
    monkeypatch.setitem(settings.SUITES, "tiny", ("tiny",))
    options: dict[str, Any] = {"methods": ("dense", "l1"), "out": tmp_path, "cache": tmp_path}
    accuracy.run("tiny", seeds=(0,), keeps=(0.5, 0.3), **options, test=False)
    file = tmp_path / "accuracy-tiny.jsonl"
    first = file.read_text()
    found = [json.loads(line) for line in first.splitlines()]
    assert [(r["method"], r["keep"]) for r in found] == [("dense", 1.0), ("l1", 0.5), ("l1", 0.3)]
    assert rows.faults(tmp_path) == [] and all(r["command"] for r in found)
    accuracy.run("tiny", seeds=(0,), keeps=(0.5, 0.3), **options, test=False)
    assert file.read_text() == first
    accuracy.run("tiny", seeds=(0,), keeps=(0.3,), **options)  # now the test images are read
    more = [json.loads(line) for line in file.read_text()[len(first) :].splitlines()]
    assert [r["test_accuracy"] is None for r in more] == [False, False]
    with pytest.raises(ValueError, match=r"suite is 'x'; pass one of digits, "):
        accuracy.run("x")
    with pytest.raises(ValueError, match=r"methods are \['y'\]; pass some of dense, "):
        accuracy.run("tiny", methods=("y",))


def test_an_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 2)):
        for name in ("a", "b"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{i}.png")
    setting = dataclasses.replace(
        SETTINGS["imagefolder"], network="digits_resnet", start="scratch", epochs=2, batch=2,
        val_share=0.25, lr=0.01,
    )  # fmt: skip
    bench = accuracy.Bench(setting, 0, folder=tmp_path)
    assert bench.run(METHODS["psap"](), 0.3)["macs_share"] <= 0.3


@pytest.fixture(scope="module")
def graph() -> Any:
    torch.manual_seed(0)
    return psap.trace(create("digits_resnet", in_channels=1), torch.randn(4, 1, 8, 8))


@pytest.mark.parametrize("keep", [0.7, 0.3, 0.1])
def test_the_global_ranking_keeps_the_strongest_and_spends_the_budget(
    keep: float, graph: Any
) -> None:
    rng = np.random.default_rng(1)
    values = [rng.random(g.size) * (1 + i) for i, g in enumerate(graph.groups)]
    kept = oneshot.ranked(graph, values, keep)
    cost, target = CostModel(graph), psap.Target(macs=keep)
    widths = np.array([len(k) for k in kept])
    assert cost.fits(widths, target)
    for i, group in enumerate(graph.groups):
        more = widths + (np.arange(len(widths)) == i)
        assert more[i] > group.size or not cost.fits(more, target)
        rest = np.delete(values[i], kept[i])
        assert not len(rest) or values[i][kept[i]].min() >= rest.max()


def test_fpgm_is_the_sum_of_distances(graph: Any) -> None:
    group = next(g for g in graph.groups if len(g.producers) == 1)
    weight = dict(graph.model.named_parameters())[group.producers[0]].detach().flatten(1)
    sums = np.array([sum(float((a - b).norm()) for b in weight) for a in weight])
    found = oneshot.median(graph, None)[graph.groups.index(group)]
    assert found == pytest.approx(sums / sums.mean(), rel=1e-4)


def test_the_derivative_of_a_gate(graph: Any) -> None:
    """Against a finite difference of the loss when the affine pair of one channel is scaled."""
    model = graph.model.double().train()
    try:
        x, y = torch.randn(8, 1, 8, 8).double(), torch.arange(8)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found = oneshot.gate_derivatives(graph)
        name = "stage2.bn1"
        norm = model.get_submodule(name)
        channel = int(graph.channels[f"{name}.weight", 0][5])
        losses = []
        for scale in (1 + 1e-6, 1 - 1e-6):
            with torch.no_grad():
                pair = norm.weight[5].clone(), norm.bias[5].clone()
                norm.weight[5] *= scale
                norm.bias[5] *= scale
                losses.append(float(F.cross_entropy(model(x), y)))
                norm.weight[5], norm.bias[5] = pair
        assert found[channel] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)
    finally:
        model.float().zero_grad(set_to_none=True)


def plotted(**changes: Any) -> dict[str, Any]:
    return {"suite": "digits-scratch", "method": "psap", "keep": 0.3, "macs_share": 0.3, "seed": 0,
            "test_accuracy": 0.9, "cpu": "x", "torch": "2", "date": "today", **changes}  # fmt: skip


def test_means_and_standard_errors() -> None:
    found = [
        plotted(test_accuracy=0.9),
        plotted(test_accuracy=0.8, seed=1),
        plotted(method="l1", test_accuracy=0.5),
        plotted(method="sfp", test_accuracy=None),
        {"suite": "digits-scratch", "method": "taylor", "keep": 0.3, "refused": "cannot"},
    ]
    points = accuracy_plot.means(found, "digits-scratch")
    assert points["psap"] == [(0.3, pytest.approx(85.0), pytest.approx(5.0), 2)]
    assert points["l1"] == [(0.3, 50.0, 0.0, 1)]
    assert set(points) == {"psap", "l1"}
    assert "| psap | 85.0 ± 5.0 (2) |" in accuracy_plot.table(found)


def test_the_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows of accuracy"):
        accuracy_plot.draw([])
    pytest.importorskip("matplotlib", reason="needs the extra psap[report]")
    found = [
        plotted(keep=k, macs_share=k, seed=s, test_accuracy=k) for k in (0.1, 0.3) for s in (0, 1)
    ]
    found += [plotted(suite="cifar-short", keep=k, macs_share=k) for k in (0.1, 0.3)]
    found += [plotted(suite="cifar56"), plotted(method="dense", keep=1.0)]
    svg = accuracy_plot.draw(found)
    assert svg == accuracy_plot.draw(found)
    assert "digits-scratch" in svg and "cifar-short" in svg and "var(--ink)" in svg
    assert "cifar56" not in svg  # one budget makes no curve
