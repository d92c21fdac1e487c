"""The training run: phases, files, bit-exact resumption, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from psap import run as runs
from psap.data import DataName, Loader
from psap.errors import ArgumentError, ArgumentTypeError, FileError, PsapError, StateError
from psap.models.resnet import PaddedBlock
from psap.run import train
from psap.run_config import RunConfig, difference

pytestmark = pytest.mark.usefixtures("no_export")

TINY: dict[str, Any] = {
    "target_macs": 0.5,
    "epochs": 5,
    "dense_epochs": 1,
    "prune_epochs": 3,
    "batch_size": 256,
    "threads": 1,
}


class Tiny(nn.Module):
    """Three layers and dropout, so that the random state matters."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(12, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def settings(out: Path, **changes: Any) -> RunConfig:
    return RunConfig(**{"arch": "test_run:Tiny", "out": str(out), **TINY, **changes})


class Interrupts:
    """A listener that interrupts at one optimizer step, as Ctrl-C would."""

    def __init__(self, at: int, *, politely: bool) -> None:
        self.left = at
        self.politely = politely

    def step(self, epoch: int, phase: str, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            if not self.politely:
                raise KeyboardInterrupt("at once")
            signal.raise_signal(signal.SIGINT)

    def epoch(self, entry: object) -> None:
        pass

    def note(self, text: str) -> None:
        raise AssertionError(text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    train(settings(out))
    return out


def same_weights(a: Path, b: Path) -> None:
    for name in ("small.safetensors", "checkpoint.safetensors"):
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]), f"{name}: {key}"


def without_times(path: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        del entry["seconds"]
    return entries


def test_writes_everything(finished: Path) -> None:
    wanted = {"small.safetensors", "plan.json", "history.jsonl", "record.json", "report.html"}
    assert {path.name for path in finished.iterdir()} == wanted | {"checkpoint.safetensors"}
    history = without_times(finished / "history.jsonl")
    assert [entry["phase"] for entry in history] == ["dense", *["prune"] * 3, "finetune"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3, 4, 5]
    shares = [entry["macs_share"] for entry in history]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True) and shares[-1] <= 0.5
    record = json.loads((finished / "record.json").read_text())
    assert record["verification"]["max_relative_error"] <= 1e-9
    assert record["compare"]["small"]["macs"] <= 0.5 * record["compare"]["dense"]["macs"]
    assert 0 < record["compare"]["accuracy_when_pruning_began"] <= 1
    assert record["compare"]["dense"]["accuracy"] is None
    assert record["config"]["num_classes"] == 10
    assert "Tiny on digits" in (finished / "report.html").read_text()


@pytest.mark.parametrize("politely", [True, False], ids=["ctrl-c", "abrupt"])
@pytest.mark.parametrize("step", [2, 7, 12, 18, 27])  # 6 steps an epoch
def test_resumes_bit_exactly(
    step: int, politely: bool, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = "^stopped on request; the checkpoint is written$" if politely else "^at once$"
    with pytest.raises(KeyboardInterrupt, match=message):
        train(settings(tmp_path), listener=Interrupts(step, politely=politely))
    assert ("stopping after this step" in capfd.readouterr().err) == politely
    assert not (tmp_path / "small.safetensors").exists()
    torch.manual_seed(1234)
    train(settings(tmp_path), resume=True)
    same_weights(finished, tmp_path)
    assert without_times(tmp_path / "history.jsonl") == without_times(finished / "history.jsonl")


def test_resumes_bit_exactly_twice_and_after_the_end(finished: Path, tmp_path: Path) -> None:
    for step, resume in ((9, False), (5, True), (8, True)):
        with pytest.raises(KeyboardInterrupt, match="stopped on request"):
            train(settings(tmp_path), resume=resume, listener=Interrupts(step, politely=True))
    train(settings(tmp_path), resume=True)
    same_weights(finished, tmp_path)
    (tmp_path / "report.html").unlink()
    train(settings(tmp_path), resume=True)
    same_weights(finished, tmp_path)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "options",
    [{"protect": "gate"}, {"protect": "none"}, {"protect": "pulse", "progressive": True}],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_resumes_bit_exactly_with_any_protection(options: dict[str, Any], tmp_path: Path) -> None:
    train(settings(tmp_path / "a", **options))
    with pytest.raises(KeyboardInterrupt, match="stopped on request"):
        train(settings(tmp_path / "b", **options), listener=Interrupts(15, politely=True))
    train(settings(tmp_path / "b", **options), resume=True)
    same_weights(tmp_path / "a", tmp_path / "b")


def test_resumes_bit_exactly_after_kill(finished: Path, tmp_path: Path) -> None:
    config = {**settings(tmp_path).to_json()}
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from psap.run import train; from psap.run_config import RunConfig\n"
        f"train(RunConfig(**{config!r}))"
    )
    here = str(Path(__file__).parent)
    history = tmp_path / "history.jsonl"
    limit = time.monotonic() + 60
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code, here], cwd=root) as process:
        while not (history.exists() and len(history.read_text().splitlines()) >= 2):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.002)
        process.kill()
    assert not (tmp_path / "report.html").exists()
    train(settings(tmp_path), resume=True)
    same_weights(finished, tmp_path)


def test_graph_mode_resumes_bit_exactly(tmp_path: Path) -> None:
    options = {"arch": "test_run:padded", "target_macs": 0.3}
    train(settings(tmp_path / "a", **options))
    with pytest.raises(KeyboardInterrupt, match="stopped on request"):
        train(settings(tmp_path / "b", **options), listener=Interrupts(14, politely=True))
    train(settings(tmp_path / "b", **options), resume=True)
    same_weights(tmp_path / "a", tmp_path / "b")
    record = json.loads((tmp_path / "b" / "record.json").read_text())
    assert record["verification"]["mode"] == "graph"


def padded(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A shortcut that pads channels fixes widths in Python."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        PaddedBlock(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def test_weights_skip_the_dense_phase(tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_file(Tiny().state_dict(), tmp_path / "w.safetensors")
    config = RunConfig(
        arch="test_run:Tiny",
        target_macs=0.5,
        epochs=3,
        weights=str(tmp_path / "w.safetensors"),
        out=str(tmp_path / "run"),
        batch_size=512,
    )
    assert config.phases() == (0, 2, 1)
    record = train(config)
    assert record["compare"]["accuracy_when_pruning_began"] is not None
    assert [entry["phase"] for entry in record["history"]] == ["prune", "prune", "finetune"]


# Refusals


def test_keeps_the_last_good_checkpoint_when_training_diverges(tmp_path: Path) -> None:
    with pytest.raises(
        PsapError,
        match=r"^the loss is nan in epoch 1, step \d+: the training diverged; begin again with a "
        r"lower lr \(it is 1e\+30\)\. .*checkpoint\.safetensors is as it was after epoch 0$",
    ):
        train(settings(tmp_path, lr=1e30))
    tree = runs.read_checkpoint(tmp_path, settings(tmp_path, lr=1e30))
    assert tree["epoch"] == 0
    assert all(tensor.isfinite().all() for tensor in tree["model"].values())


def test_a_weight_that_is_not_finite_never_reaches_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(Interrupts):
        def step(self, epoch: int, phase: str, done: int, total: int) -> None:
            if (epoch, done) == (1, total):
                next(model.parameters()).data.fill_(float("inf"))

    plain = runs.Run.__init__

    def keep(self: runs.Run, *args: Any) -> None:
        nonlocal model
        plain(self, *args)
        model = self.model

    model: nn.Module = Tiny()
    monkeypatch.setattr(runs.Run, "__init__", keep)
    with pytest.raises(PsapError, match=r"^a weight is not finite in epoch 2, "):
        train(settings(tmp_path), listener=Breaks(0, politely=True))
    assert runs.read_checkpoint(tmp_path, settings(tmp_path))["epoch"] == 1


def test_refuses_to_resume_with_other_settings(finished: Path) -> None:
    with pytest.raises(StateError, match=r"other settings: lr was 0\.05 and is 0\.1; resume with"):
        train(settings(finished, lr=0.1), resume=True)


def test_refuses_to_resume_with_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt, match="stopped on request"):
        train(settings(tmp_path), listener=Interrupts(3, politely=True))
    monkeypatch.setattr(sys.modules[__name__], "Tiny", padded)
    with pytest.raises(StateError, match=r"does not fit test_run:Tiny: .*resume with the code"):
        train(settings(tmp_path), resume=True)


def test_refuses_to_resume_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"does not exist, so there is no run to resume"):
        train(settings(tmp_path), resume=True)


def test_refuses_to_overwrite_a_run(finished: Path) -> None:
    before = (finished / "checkpoint.safetensors").read_bytes()
    with pytest.raises(FileError, match=r"holds a run already; resume it \(--resume\), or choose"):
        train(settings(finished))
    assert (finished / "checkpoint.safetensors").read_bytes() == before


def test_refuses_a_truncated_checkpoint(finished: Path, tmp_path: Path) -> None:
    whole = (finished / "checkpoint.safetensors").read_bytes()
    (tmp_path / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match=r"cannot be read: .*damaged or cut short"):
        train(settings(tmp_path), resume=True)


def test_refuses_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"which cannot be written: .*; choose another folder$"):
        train(settings(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w.pt", r"no \.safetensors file; psap reads no pickles \(\.pt, \.pth\)"),
        ("missing.safetensors", r"which does not exist$"),
        ("damaged.safetensors", r"which cannot be read: "),
    ],
)
def test_refuses_weights(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(FileError, match=message):
        runs.load_weights(Tiny(), str(tmp_path / name))


def test_refuses_weights_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(Tiny(in_channels=3).state_dict(), path)
    with pytest.raises(
        ArgumentError, match=r"does not fit Tiny: size mismatch for body\.0\.weight"
    ):
        runs.load_weights(Tiny(), str(path))


def test_refuses_an_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^device is 'abacus', which cannot be used: "):
        train(settings(tmp_path, device="abacus"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target_macs": None}, ArgumentError, "target_macs and target_parameters are None"),
        ({"target_macs": 1.5}, ArgumentError, r"Target\.macs is 1\.5; pass a number in \(0, 1\]"),
        ({"epochs": 1}, ArgumentError, "epochs is 1; pass a whole number >= 2"),
        ({"epochs": 2.5}, ArgumentTypeError, r"epochs is 2\.5; pass a whole number >= 2"),
        ({"lr": 0.0}, ArgumentError, r"lr is 0\.0, momentum is 0\.9; pass lr > 0"),
        ({"lr": float("nan")}, ArgumentError, "lr is nan; pass a number >= 0"),
        ({"prune_epochs": 9}, ArgumentError, "together more than epochs, which is 5"),
        ({"prune_steps": 4}, ArgumentError, "prune_steps is 4, which needs prune_epochs >= 5"),
        ({"protect": "luck"}, ArgumentError, "protect is 'luck'"),
        ({"threads": 0}, ArgumentError, "threads is 0; pass a whole number >= 1"),
    ],
)
def test_refuses_settings(
    changes: dict[str, Any], error: type[PsapError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        settings(tmp_path, **changes)


# Settings


def test_learning_rate_rises_and_decays_in_each_schedule() -> None:
    config = RunConfig(target_macs=0.5, epochs=30, lr=0.1)
    assert config.phases() == (10, 10, 10)
    rates = [config.lr_at(step / 10) for step in range(300)]
    assert max(rates) == pytest.approx(0.1)
    assert rates[0] == rates[100] == pytest.approx(0.005)
    assert rates[99] < 0.002 and rates[299] < 0.002
    assert rates[10:100] == sorted(rates[10:100], reverse=True)
    assert rates[110:] == sorted(rates[110:], reverse=True)


def test_pruning_leaves_the_last_prune_epoch_to_recover() -> None:
    config = RunConfig(target_macs=0.5, epochs=40, dense_epochs=0, prune_epochs=21)
    assert config.steps() == 5
    assert config.pruning().interval == 4


def test_difference_names_the_setting_but_not_places() -> None:
    config = RunConfig(target_macs=0.5)
    assert difference(config.to_json(), RunConfig(target_macs=0.5, out="elsewhere")) is None
    assert difference({"target_macs": 0.5}, config) is None  # from before there were the others
    changed = difference(config.to_json(), RunConfig(target_macs=0.5, seed=3))
    assert changed == "seed was 0 and is 3"


def test_knows_all_data_sets() -> None:
    assert get_type_hints(RunConfig)["data"] == DataName


def test_evaluate_counts_the_right_ones(finished: Path) -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(10)[3].expand(len(x), 10)

    loader: Loader = runs.data.load("digits").test
    share = sum(int((y == 3).sum()) for _, y in loader) / len(loader.images)
    assert runs.evaluate(Always(), loader) == share
