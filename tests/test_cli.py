"""The command line: each command, exit codes, messages."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors
import torch
from rich.console import Console
from torch import nn

import psap
from psap import data, record
from psap.cli import main
from psap.models import digits_resnet
from psap.run_config import RunConfig

ROOT = Path(__file__).parents[1]
TINY = ["--target-macs", "0.5", "--epochs", "3", "--dense-epochs", "0", "--prune-epochs", "2"]
TINY += ["--batch-size", "512", "--threads", "1"]


def takes_arguments(width: int) -> nn.Module:
    return nn.Linear(width, width)


def heard() -> nn.Module:
    """A network in one dimension: 64 * (8 * 3 + 2 * 8 * 3) MACs for inputs [N, 1, 64]."""
    return nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 2, 3, padding=1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert main(["prune", *TINY, "--out", str(out)]) == 0
    return out


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command prints."""
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("psap: ") and error.count("\n") == 1
    return error.removeprefix("psap: ").strip()


def test_prune_writes_everything(run: Path) -> None:
    wanted = {"checkpoint.safetensors", "small.safetensors", "model.onnx", "plan.json"}
    wanted |= {"history.jsonl", "record.json", "report.html"}
    assert {path.name for path in run.iterdir()} == wanted
    record = json.loads((run / "record.json").read_text())
    assert record["onnx"]["max_abs_difference"] < 1e-4
    assert record["compare"]["small"]["latency_ms"]["median"] > 0
    small = psap.load(run / "small.safetensors", digits_resnet)
    count = sum(p.numel() for p in small.parameters())
    assert count == record["compare"]["small"]["parameters"]


def test_prune_prints_lines_and_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", *TINY, "--out", str(run), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "% kept" in out and "report.html" in out


def test_export_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = str(tmp_path / "nothing")
    assert fails(["export", nothing], capsys) == (
        f"there is no run or file {nothing}; pass the folder of a finished run, or a file written "
        "by psap.save"
    )


def test_export_chooses_a_place(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("record.json", "plan.json", "small.safetensors")
    for name in names:
        shutil.copy(run / name, tmp_path)
    assert main(["export", str(tmp_path), "--format", "pt2"]) == 0
    file = str(tmp_path / "small.safetensors")
    assert main(["export", file, "--format", "pt2", "--arch", "digits_resnet"]) == 0
    capsys.readouterr()
    written = {path.name for path in tmp_path.iterdir()} - set(names)
    assert written == {"model.pt2", "small.pt2"}


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_export_of_a_run(
    form: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"model.{form}"
    assert main(["export", str(run), "--format", form, "--out", str(path)]) == 0
    assert f"wrote {path}; it differs from PyTorch by at most" in capsys.readouterr().out
    x = torch.randn(5, 1, 8, 8)
    small = psap.load(run / "small.safetensors", digits_resnet).eval()
    if form == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), small(x), atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(torch.export.load(path).module()(x), small(x))


def test_export_of_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = str(run / "small.safetensors"), str(tmp_path / "a.pt2")
    command = ["export", file, "--format", "pt2", "--out", out]
    assert main(command) == 0  # the file says inputs and classes; the architecture is one of psap's
    assert Path(out).is_file()
    assert main([*command, "--arch", "digits_resnet", "--input", "1,9,9"]) == 0
    program = torch.export.load(out).module()
    assert program(torch.zeros(3, 1, 9, 9)).shape == (3, 10)
    for more, told in (
        (["--num-classes", "7"], "not made from digits_resnet with 7 classes and 1 input channels"),
        (["--input", "3,8,8"], "not made from digits_resnet with 10 classes and 3 input channels"),
    ):
        assert told in fails([*command, "--arch", "digits_resnet", *more], capsys)
    error = fails([*command, "--arch", "resnet20"], capsys)
    assert "names or shapes of parameters differ; pass --arch and --num-classes of" in error


@pytest.mark.parametrize("whole", [True, False])
def test_export_reads_its_file_once(
    whole: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, before = [], safetensors.safe_open

    def counted(path: Path, **options: Any) -> Any:
        opened.append(path)
        return before(path, **options)

    monkeypatch.setattr(safetensors, "safe_open", counted)
    file = run / "small.safetensors"
    source = str(run if whole else file)
    assert main(["export", source, "--format", "pt2", "--out", str(tmp_path / "a.pt2")]) == 0
    assert opened == [file]


def test_report_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    assert (run / "report.html").read_text() == before


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["report", str(tmp_path)], capsys) == (
        f"{tmp_path / 'record.json'} cannot be read (No such file or directory); pass the folder "
        "of a finished run"
    )
    (tmp_path / "record.json").write_text("{")
    assert "record.json is damaged: " in fails(["report", str(tmp_path)], capsys)
    (tmp_path / "record.json").write_text("[]")
    assert fails(["report", str(tmp_path)], capsys).endswith("is no record of a run")
    (tmp_path / "record.json").write_text("{}")
    error = fails(["export", str(tmp_path), "--out", str(tmp_path / "x.onnx")], capsys)
    assert "does not say arch and num_classes" in error


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--arch", "digits_resnet"]) == 0
    out = capsys.readouterr().out
    assert "6 channel groups, 763,520 MACs, 77,754 parameters" in out
    assert "stage3.conv1" in out
    assert "left alone: 1" in out and "output of the model" in out


def test_inspect_names_the_groups_of_padded_shortcuts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--arch", "resnet20", "--input", "3,16,16"]) == 0
    out = capsys.readouterr().out
    assert "12 channel groups" in out
    assert "9 residual branches, each for psap.drop_blocks: layer1.0.conv1, " in out


def test_inspect_takes_a_network_in_one_dimension(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--arch", "test_cli:heard", "--input", "1,64"]) == 0
    assert "1 channel groups, 4,608 MACs" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["3,x", "3", "0,8,8", "1,2,3,4,5"])
def test_inspect_refuses_a_shape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["inspect", "--arch", "resnet20", "--input", text], capsys) == (
        f"input is {text!r}; pass channels,height,width, such as 3,32,32 (channels,length for a "
        "network in 1d)"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "pass one, such as target_macs=0.3 (on the command line --target-macs 0.3;"),
        (
            ["--target-macs", "1.5"],
            "Target.macs is 1.5; pass a number in (0, 1]: the share that is kept",
        ),
        (["--target-macs", "0.001"], "the smallest network that these limits allow keeps 1."),
        (
            ["--target-macs", "0.3", "--arch", "resnet21"],
            "model is 'resnet21'; pass one of digits_resnet, resnet20, ",
        ),
        (["--target-macs", "0.3", "--arch", "no.such:thing"], "no.such cannot be imported: "),
        (
            ["--target-macs", "0.3", "--arch", "test_cli:takes_arguments"],
            "test_cli:takes_arguments cannot be called with {}: ",
        ),
        (
            ["--target-macs", "0.3", "--data", "cifar10"],
            "data_dir is None; pass the folder that holds cifar10",
        ),
        (
            ["--target-macs", "0.3", "--data", "cifar10", "--data-dir", "/no/such"],
            "/no/such holds no CIFAR-10; wanted train.parquet and test.parquet",
        ),
        (["--target-macs", "0.3", "--weights", "a.pt"], "weights is 'a.pt', no .safetensors file"),
        (["--target-macs", "0.3", "--resume"], "so there is no run to resume; start one first"),
    ],
)
def test_prune_refuses(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(["prune", *args, "--out", str(tmp_path / "run")], capsys)


def test_a_dense_network_that_trained_for_less_time_is_no_reference(run: Path) -> None:
    found = json.loads((run / "record.json").read_text())
    assert found["compare"]["dense"]["accuracy"] is None
    found["compare"]["accuracy_when_pruning_began"] = 0.5
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(record.summary(found))
    shown = console.export_text()
    (line,) = [line for line in shown.splitlines() if "accuracy, dense, when pruning began" in line]
    assert "50.00%" in line
    assert "points" not in shown
    found["compare"]["dense"]["accuracy"] = found["compare"]["small"]["accuracy"]
    console.print(record.summary(found))
    assert "+0.00 points" in console.export_text()


@pytest.mark.parametrize("more", [["--weights", "a.pt"], ["--device", "abacus"], ["--resume"]])
def test_a_refused_run_leaves_no_empty_folder(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    for folder in ("mine", "full", "new", "new/run"):
        fails(["prune", *TINY, *more, "--out", str(tmp_path / folder)], capsys)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine", "notes"]


def test_digits_take_one_thread_unless_told_otherwise() -> None:
    assert RunConfig(target_macs=0.5).cpu_threads() == 1
    assert RunConfig(target_macs=0.5, threads=2).cpu_threads() == 2
    assert RunConfig(target_macs=0.5, data="cifar10").cpu_threads() is None


def test_repr_of_data_is_short() -> None:
    assert repr(data.load("digits")) == (
        "DataSpec('digits', num_classes=10, channels=1, size=8, train=1294, val=144, test=359)"
    )


def test_prune_refuses_a_folder_that_is_not_writable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "run")
    error = fails(["prune", *TINY, "--out", out], capsys)
    assert error == (
        f"out is {out!r}, which cannot be written: Not a directory; choose another folder"
    )


def test_prune_refuses_to_resume_with_other_settings(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(["prune", *TINY, "--out", str(run), "--resume", "--seed", "7"], capsys)
    assert error == (
        f"{run / 'checkpoint.safetensors'} belongs to a run with other settings: seed was 0 and is "
        "7; resume with the same ones"
    )


def test_demo_trains_both_networks_for_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "digits.py")
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    plain, calls = demo.fit, []

    def fit(model: nn.Module, optimizer: object, digits: object, log: list, **how: Any) -> None:
        calls.append((how["phase"], how["epochs"], how["lr"], len(log)))
        plain(model, optimizer, digits, log, **how)

    monkeypatch.setattr(demo, "fit", fit)
    for name, epochs in (("DENSE", 1), ("PRUNE", 6), ("FINETUNE", 2)):
        monkeypatch.setattr(demo, name, epochs)
    log: list[dict[str, Any]] = []
    dense, result = demo.train(data.load("digits", batch_size=512), log)
    unpruned = [call[1:] for call in calls if call[0] == "unpruned"]
    assert unpruned == [call[1:] for call in calls if call[0] in ("prune", "finetune")]
    assert sum(epochs for epochs, _, _ in unpruned) == 8
    assert [entry["phase"] for entry in log] == ["dense", *["prune"] * 6, *["finetune"] * 2]
    assert psap.trace(dense, torch.zeros(1, 1, 8, 8)).groups[0].size == 16
    assert result.plan.after.macs <= 0.25 * result.plan.before.macs


def test_speed_is_said_in_words() -> None:
    assert (record.speed(2.0), record.speed(0.8)) == ("2.00x faster", "1.25x slower")


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "inspect" in capsys.readouterr().out
    assert main(["prune", "--target-macs", "much"]) == 2
    assert main(["prun"]) == 2
    assert main([]) == 2
    capsys.readouterr()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSAP_DEBUG", "1")
    with pytest.raises(psap.ArgumentError, match="target_macs and target_parameters are None"):
        main(["prune"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"psap {psap.__version__}\n"


@pytest.mark.parametrize(("given", "wanted"), [(None, "passive"), ("active", "active")])
def test_idle_threads_wait_passively_unless_told_otherwise(given: str | None, wanted: str) -> None:
    code = "import os, sys, psap.cli; assert 'torch' not in sys.modules; "
    code += "print(os.environ['OMP_WAIT_POLICY'])"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == wanted, done.stderr


def test_help_is_quick_because_torch_is_not_imported() -> None:
    code = "import sys; from psap.cli import main; main(['prune', '--help']); "
    code += "assert 'torch' not in sys.modules and 'psap_kernels' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--target-macs" in done.stdout


def test_ctrl_c_says_how_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    args = ["prune", *TINY, "--epochs", "400", "--out", str(out)]
    history = out / "history.jsonl"
    limit = time.monotonic() + 60
    with subprocess.Popen(
        [sys.executable, "-m", "psap", *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (history.exists() and history.read_text()):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "epoch   1/400  prune" in printed
    assert error == (
        "\nstopping after this step; press Ctrl-C again to stop at once\n"
        f"interrupted; go on with: psap {' '.join(args[:-1])} '{out}' --resume\n"
    )
