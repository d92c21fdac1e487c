"""Runs that drop residual branches before they prune channels."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import psap
from psap import report, run_blocks
from psap import run as runs
from psap.cli import main
from psap.models import digits_resnet
from psap.models.resnet import PaddedBlock
from psap.run import train
from psap.run_config import RunConfig

pytestmark = pytest.mark.usefixtures("no_export")

TINY: dict[str, Any] = {
    "arch": "test_run_blocks:deep",
    "target_macs": 0.3,
    "epochs": 4,
    "dense_epochs": 1,
    "prune_epochs": 2,
    "batch_size": 512,
    "threads": 1,
    "drop_blocks": 2,
    "drop_tolerance": 5.0,
}
STEPS = 3
"""Optimizer steps of an epoch: 1,294 images in batches of 512."""


def deep(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Four residual branches, and dropout, so that the random state matters."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        PaddedBlock(8, 8, 1),
        PaddedBlock(8, 8, 1),
        PaddedBlock(8, 16, 2),
        PaddedBlock(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, num_classes),
    )


class Bare(nn.Module):
    """Without its two branches there is nothing that can be pruned."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        size = 64 * in_channels
        self.one = nn.Sequential(nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, size))
        self.two = nn.Sequential(nn.Linear(size, 16), nn.ReLU(), nn.Linear(16, size))
        self.last = nn.Linear(size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = x + self.one(x)
        out: Tensor = self.last(x + self.two(x))
        return out


def plain(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """No residual branch."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def settings(out: Path, **changes: Any) -> RunConfig:
    return RunConfig(**{**TINY, "out": str(out), **changes})


class Listener:
    """Keeps the notes; interrupts after an optimizer step, as Ctrl-C would."""

    def __init__(self, at: int = 0) -> None:
        self.left = at
        self.notes: list[str] = []

    def step(self, epoch: int, phase: str, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)

    def epoch(self, entry: object) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def silenced(net: nn.Module) -> int:
    """How many layers have zeros as weights."""
    return sum(not p.any() for p in net.parameters() if p.dim() > 1)


@pytest.fixture(scope="module")
def heard() -> Listener:
    return Listener()


@pytest.fixture(scope="module")
def finished(heard: Listener, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    train(settings(out), listener=heard)
    return out


def same(a: Path, b: Path, *, proof: bool = True) -> None:
    """Two runs have the same weights and tell the same, perhaps but for the proof."""
    for name in ("small.safetensors", "checkpoint.safetensors"):
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), f"{name}: {key}"
    assert (a / "plan.json").read_text() == (b / "plan.json").read_text()
    told = [json.loads((folder / "record.json").read_text()) for folder in (a, b)]
    for key in ("groups", "layers", "steps", "windows", "blocks", *["verification"] * proof):
        assert told[0][key] == told[1][key], key
    shares = [[entry["macs_share"] for entry in found["history"]] for found in told]
    assert shares[0] == shares[1]


def interrupted(out: Path, at: int, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Run until a step, and what the checkpoint holds then."""
    with pytest.raises(KeyboardInterrupt, match="stopped on request; the checkpoint is written"):
        train(settings(out, **changes), resume=resume, listener=Listener(at))
    return runs.read_checkpoint(out, settings(out, **changes))


def test_branches_go_first_and_the_target_is_that_of_the_whole(
    finished: Path, heard: Listener
) -> None:
    found = json.loads((finished / "record.json").read_text())
    dense = psap.trace(deep(), torch.zeros(2, 1, 8, 8))
    whole = psap.plan(dense, ratio=0.0).before
    assert found["compare"]["dense"]["macs"] == whole.macs
    assert found["compare"]["dense"]["parameters"] == whole.parameters
    share = found["compare"]["small"]["macs"] / whole.macs
    assert 0.25 < share <= 0.3
    shares = [entry["macs_share"] for entry in found["history"]]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True)
    assert shares[2:] == [share, share]
    first, *gone = found["blocks"]
    assert first["block"] is None and first["macs_share"] == 1.0 and len(gone) == 2
    assert all(0 < entry["loss"] <= 6 * first["loss"] for entry in found["blocks"])
    (step,) = found["steps"]
    assert step["macs_share"] == pytest.approx(share)
    assert step["target_share"] == pytest.approx(0.3)
    left = gone[-1]["macs_share"]
    assert 0 < sum(step["gave"].values()) < left
    names = [entry["block"] for entry in gone]
    note = next(note for note in heard.notes if "residual branches go: " in note)
    assert all(name in note for name in names)
    assert f"{left:.1%} of the MACs" in note and "1,000 training images" in note
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert set(layers) == {side[0].weight.rpartition(".")[0] for side in _layers(dense)}
    assert sum(layer["macs_before"] for layer in layers.values()) == whole.macs
    small = sum(layer["macs_after"] for layer in layers.values())
    assert small == found["compare"]["small"]["macs"]
    for name in names:
        assert layers[name]["after"] == [0, 0] and layers[name]["parameters_after"] == 0


def _layers(graph: psap.Graph) -> Any:
    return psap.plan(graph, ratio=0.0).layers


def test_files_hold_what_went(finished: Path) -> None:
    found = json.loads((finished / "record.json").read_text())
    names = tuple(entry["block"] for entry in found["blocks"][1:])
    plan = psap.Plan.from_json((finished / "plan.json").read_text())
    assert plan.without == (names,)
    assert plan.before.macs == found["compare"]["dense"]["macs"]
    assert all(f"dropped before: the residual branch of {name}" in plan.explain() for name in names)
    whole = psap.plan(psap.trace(deep(), torch.zeros(2, 1, 8, 8)), ratio=0.5)
    with pytest.raises(psap.ArgumentError, match=f"different residual branches .*{names[0]}"):
        plan.diff(whole)
    small = psap.load(finished / "small.safetensors", deep).eval()
    assert sum(p.numel() for p in small.parameters()) == plan.after.parameters
    images = psap.data.load("digits").test
    accuracy = runs.evaluate(small, images)
    assert accuracy == found["compare"]["small"]["accuracy"]


def test_the_report_tells_of_branches(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    found = json.loads((finished / "record.json").read_text())
    assert "Less depth" in page and "of the dropped branches" in page
    assert "with the same branches and channels switched off" in page
    for entry in found["blocks"][1:]:
        assert f"<code>{entry['block']}</code>" in page
    assert report.render({**found, "blocks": []}).count("branch") == 0
    with pytest.raises(psap.ArgumentError, match=r"blocks\[0\].* wanted an object"):
        report.render({**found, "blocks": [3]})


@pytest.mark.parametrize("step", [2, STEPS, STEPS + 1, 2 * STEPS + 1, 3 * STEPS + 1])
def test_resumes_bit_exactly(step: int, finished: Path, tmp_path: Path) -> None:
    tree = interrupted(tmp_path, step)
    assert (tree["dropped"] is None) == (step <= STEPS)
    if step > STEPS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_blocks, "mean_loss", None)  # nothing is measured anew
            train(settings(tmp_path), resume=True)
    else:
        train(settings(tmp_path), resume=True)
    same(finished, tmp_path)


def test_resumes_bit_exactly_after_a_stop_while_branches_are_measured_or_gone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_loss, calls = run_blocks.mean_loss, 0

    def third(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        return plain_loss(*args)

    monkeypatch.setattr(run_blocks, "mean_loss", third)
    tree = interrupted(tmp_path, 0)
    assert (calls, tree["epoch"], tree["dropped"]) == (3, 1, None)

    class Stops(Listener):
        def note(self, text: str) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped on request; the checkpoint is written"):
        train(settings(tmp_path), resume=True, listener=Stops())
    tree = runs.read_checkpoint(tmp_path, settings(tmp_path))
    assert (tree["epoch"], tree["batch"]) == (1, 0)
    assert len(psap.Plan.from_json(tree["dropped"]["plan"]).dropped) == 2
    train(settings(tmp_path), resume=True)
    same(finished, tmp_path)


def test_progressive_runs_resume_bit_exactly(tmp_path: Path) -> None:
    options = {"progressive": True, "epochs": 5, "prune_epochs": 3, "protect": "gate"}
    train(settings(tmp_path / "a", **options))
    interrupted(tmp_path / "b", 3 * STEPS + 1, **options)
    train(settings(tmp_path / "b", **options), resume=True)
    same(tmp_path / "a", tmp_path / "b", proof=False)  # a resumed one cuts all at once


def test_weights_lose_branches_at_once(tmp_path: Path) -> None:
    """Where the drop alone meets the target, no channel goes."""
    torch.manual_seed(5)
    save_file(digits_resnet().state_dict(), tmp_path / "w.safetensors")
    changes = {"arch": "digits_resnet", "weights": str(tmp_path / "w.safetensors")}
    changes |= {"dense_epochs": None, "epochs": 3, "target_macs": 0.7}
    out = tmp_path / "run"
    tree = interrupted(out, 1, **changes)
    assert tree["dropped"] is not None
    found = train(settings(out, **changes), resume=True)
    assert [entry["block"] for entry in found["blocks"]] == [None, "stage1.conv1"]
    shares = {entry["macs_share"] for entry in found["history"]}
    assert shares == {found["compare"]["small"]["macs"] / found["compare"]["dense"]["macs"]}
    assert max(shares) <= 0.7
    assert all(len(group["kept"]) == group["size"] for group in found["groups"])
    small = psap.load(out / "small.safetensors", digits_resnet)
    assert "stage1.conv1.weight" not in small.state_dict()


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"arch": "test_run_blocks:plain"},
            "Sequential has no residual branch that can be dropped",
        ),
        (
            {"drop_tolerance": 0.5},
            "without any one the loss on 1,000 training images rises by more",
        ),
        (
            {"arch": "test_run_blocks:Bare"},
            "no residual branch goes: what would be left is refused: no layer of this model",
        ),
    ],
    ids=["none", "tolerance", "left"],
)
def test_a_run_goes_on_whole(
    changes: dict[str, Any], note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_blocks, "mean_loss", lambda net, *_: 1.0 + silenced(net))
    heard, more = Listener(), {"epochs": 3, **changes}
    found = train(settings(tmp_path, **more), listener=heard)
    assert any(note in told for told in heard.notes), heard.notes
    assert found["compare"]["small"]["macs"] <= 0.5 * found["compare"]["dense"]["macs"]
    assert not [entry for entry in found["blocks"] if entry["block"]]
    assert psap.Plan.from_json((tmp_path / "plan.json").read_text()).without == ()
    tree = runs.read_checkpoint(tmp_path, settings(tmp_path, **more))
    assert tree["dropped"] is not None


def test_a_loss_that_tells_nothing_apart_keeps_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_blocks, "mean_loss", lambda *_: 0.0)
    heard = Listener()
    train(settings(tmp_path, epochs=2, dense_epochs=0), listener=heard)
    assert any("no residual branch goes: evaluate gave 0.0" in note for note in heard.notes)


def test_floors_and_parameters_are_of_what_is_left(tmp_path: Path) -> None:
    options = {"floors": {f"{at}.conv1": 0.5 for at in (3, 4, 5, 6)}, "epochs": 3}
    options |= {"target_macs": None, "target_parameters": 0.3}
    found = train(settings(tmp_path, **options))
    small, dense = found["compare"]["small"], found["compare"]["dense"]
    assert small["parameters"] <= 0.3 * dense["parameters"]
    (step,) = found["steps"]
    assert step["target_share"] == pytest.approx(0.3)
    share = small["parameters"] / dense["parameters"]
    assert step["parameters_share"] == pytest.approx(share)
    assert len(found["blocks"]) == 3


def test_checkpoints_of_runs_without_the_setting_resume(tmp_path: Path) -> None:
    changes = {"drop_blocks": 0, "drop_tolerance": 0.5}
    train(settings(tmp_path / "a", **changes))
    tree = interrupted(tmp_path / "b", STEPS + 1, **changes)
    del tree["dropped"], tree["config"]["drop_blocks"], tree["config"]["drop_tolerance"]
    psap.recipe.write_tree(tmp_path / "b" / "checkpoint.safetensors", tree)
    train(settings(tmp_path / "b", **changes), resume=True)
    same(tmp_path / "a", tmp_path / "b")


def test_the_images_are_the_same_each_time_and_only_those_of_the_training() -> None:
    images = psap.data.load("digits", batch_size=512).train
    batches = list(images.sample(1000))
    assert [len(y) for _, y in batches] == [512, 488]
    again = list(images.sample(1000).epoch(3))
    assert all(torch.equal(x, u) for (x, _), (u, _) in zip(batches, again, strict=True))
    plain = replace(images, augment=psap.data.Augment())
    whole = {image.numpy().tobytes() for x, _ in plain for image in x}
    assert {image.numpy().tobytes() for x, _ in batches for image in x} < whole
    assert len(images.sample(5000).images) == len(images.images) == 1294


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"drop_blocks": -1}, psap.ArgumentError, "drop_blocks is -1; pass a whole number >= 0"),
        ({"drop_blocks": 1.5}, psap.ArgumentTypeError, r"drop_blocks is 1\.5; pass a whole"),
        ({"drop_tolerance": -1.0}, psap.ArgumentError, r"drop_tolerance is -1\.0; pass a number"),
        ({"drop_tolerance": "x"}, psap.ArgumentTypeError, "drop_tolerance is 'x'; pass a number"),
    ],
)
def test_refuses_settings(
    changes: dict[str, Any], error: type[psap.PsapError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        settings(tmp_path, **changes)


def test_refuses_to_resume_with_another_number(finished: Path) -> None:
    with pytest.raises(psap.StateError, match="drop_blocks was 2 and is 1; resume with"):
        train(settings(finished, drop_blocks=1), resume=True)


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["prune", "--arch", "test_run_blocks:deep", "--target-macs", "0.5", "--epochs", "2"]
    args += ["--dense-epochs", "0", "--batch-size", "512", "--threads", "1"]
    args += ["--drop-blocks", "1", "--drop-tolerance", "5", "--out", str(tmp_path / "run")]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "1 residual branch goes: " in out and "% kept" in out
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 0
