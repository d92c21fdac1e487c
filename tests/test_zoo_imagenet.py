"""The recipe for ImageNet, on a folder in its layout: two ranks, one rank, and resumed runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from psap.data.digits import digits_images

SCRIPT = Path(__file__).parents[1] / "examples" / "imagenet.py"
OPTIONS = "--arch resnet18 --size 32 --epochs 4 --prune-steps 2 --interval 1 --batch 8 --lr 0.02"
pytestmark = [pytest.mark.zoo, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images each of a 0 and of a 1, and 8 each in val."""
    root = tmp_path_factory.mktemp("images")
    images = digits_images()
    for label, name in ((0, "n01"), (1, "n02")):
        found = images.images[images.labels == label][:32, 0] * 15
        for index, image in enumerate(found):
            place = root / ("train" if index < 24 else "val") / name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).resize((40, 36)).save(place / f"{index}.JPEG")
    return root


def run(folder: Path, out: Path, *more: str, ranks: int) -> list[str]:
    start = [sys.executable, str(SCRIPT)]
    if ranks > 1:
        distributed = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        start[1:1] = distributed
    command = [*start, "--data", str(folder), "--out", str(out), "--workers", "0", *OPTIONS.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PsapWarning" not in done.stderr, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_was_stopped_gives_the_same_network(
    ranks: int, folder: Path, tmp_path: Path
) -> None:
    whole = run(folder, tmp_path / "whole", ranks=ranks)
    assert [line.split(":")[0] for line in whole[:4]] == [f"epoch {i}" for i in (1, 2, 3, 4)]
    assert any(line.startswith("MACs") for line in whole), whole
    for stop in ("1", "3"):  # before the masks are final, and after the cut
        more = ["--resume"] if stop == "3" else []
        run(folder, tmp_path / "parts", "--stop", stop, *more, ranks=ranks)
    run(folder, tmp_path / "parts", "--resume", ranks=ranks)
    one, two = (load_file(tmp_path / name / "small.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["layer1.0.conv1.weight"].shape[0] < 64


def test_progressive(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, "--progressive", "--stop", "1", ranks=1)
    run(folder, tmp_path, "--progressive", "--resume", ranks=1)
    small = load_file(tmp_path / "small.safetensors")
    assert small["layer1.0.conv1.weight"].shape[0] < 64
