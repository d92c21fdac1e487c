"""Image folders: what becomes of files of every kind, and runs on real images."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import accuracy
from benchmarks.methods import METHODS
from benchmarks.settings import SETTINGS
from psap import cli, data
from psap import run as runs
from psap.data import Pictures
from psap.data import folder as folders
from psap.data.digits import digits_images
from psap.data.folder import FileImages
from psap.errors import ArgumentError, FileError
from psap.models import create, resnet20
from psap.run_config import difference as runs_difference

RNG = np.random.default_rng(0)
PLAIN = ("--crop", "1", "--no-flip", "--shift", "0")


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("val", 2)):
        for name in ("b", "a"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                picture(40 + index, 24).save(tmp_path / part / name / f"{index}.jpg")
    return tmp_path


def read(path: Path, **form: Any) -> torch.Tensor:
    images = FileImages(paths=(path,), labels=torch.tensor([0]), pictures=Pictures(**form))
    return images.take(torch.tensor([0]))[0][0]


def digit_folder(root: Path) -> Path:
    """The shipped digits as PNG files, every fifth one in val."""
    images = digits_images()
    for index, (image, label) in enumerate(zip(images.images[:, 0], images.labels, strict=True)):
        place = root / ("train" if index % 5 else "val") / str(int(label))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).numpy()).save(place / f"{index}.png")
    return root


# Layout


def test_classes_are_the_folders_in_name_order(folder: Path) -> None:
    (folder / "train" / "a" / "notes.txt").write_text("not an image")
    (folder / "train" / "a" / "._0.jpg").write_text("what another system left here")
    (folder / "train" / ".cache").mkdir()
    Image.new("L", (30, 50), 200).save(folder / "train" / "b" / "3.PNG")
    form = Pictures(size=16)
    spec = data.load_imagefolder(folder, pictures=form, batch_size=4, val_share=0.0)
    assert (spec.classes, spec.channels, spec.size, spec.val) == (("a", "b"), 3, 16, None)
    assert spec.train.images.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    x, y = next(iter(spec.test))
    assert (x.shape, y.tolist()) == ((4, 3, 16, 16), [0, 0, 1, 1])
    assert x.is_contiguous(memory_format=torch.channels_last)
    grey, _ = spec.train.images.take(torch.tensor([6]))
    assert grey.unique().tolist() == [200]
    one, two = (next(spec.train.epoch(1)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_validation_images_are_held_out_of_train(folder: Path) -> None:
    spec = data.load("imagefolder", data_dir=folder, val_share=0.5)
    assert [len(part.images) for part in (spec.train, spec.val, spec.test)] == [3, 3, 4]
    assert spec.train.augment == data.Augment(flip=True, shift=28)
    assert spec.val.augment == spec.test.augment == data.Augment()


def test_a_test_part(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "test" / name).mkdir(parents=True)
        picture(32, 32).save(folder / "test" / name / "0.png")
    spec = data.load_imagefolder(folder, pictures=Pictures(size=8))
    assert [len(part.images) for part in (spec.train, spec.val, spec.test)] == [6, 4, 2]


def test_folders_that_cannot_be_used(folder: Path) -> None:
    with pytest.raises(FileError, match=r"none/train is not a folder; wanted train/<class>"):
        data.load_imagefolder(folder / "none")
    with pytest.raises(FileError, match=r"train has no folder per class"):
        (folder / "empty" / "train").mkdir(parents=True)
        data.load_imagefolder(folder / "empty")
    (folder / "val" / "c").mkdir()
    with pytest.raises(FileError, match=r"val and train differ in their classes: c"):
        data.load_imagefolder(folder)
    (folder / "train" / "c").mkdir()
    with pytest.raises(FileError, match=r"train/c holds no image; wanted \.bmp, \.jpeg"):
        data.load_imagefolder(folder)


def test_a_folder_without_val(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    picture(9, 9).save(tmp_path / "train" / "a" / "0.png")
    with pytest.raises(FileError, match=r"val is not a folder; wanted train/<class>.* and val/"):
        data.load_imagefolder(tmp_path)


@pytest.mark.parametrize("in_memory", [2**28, 0])
def test_a_damaged_image_is_named(
    in_memory: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where the part is kept in memory, and otherwise in its batch."""
    monkeypatch.setattr(folders, "IN_MEMORY", in_memory)
    damaged = folder / "val" / "a" / "0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    message = r"val/a/0\.jpg cannot be decoded \(.*; remove or replace"
    if in_memory:
        with pytest.raises(FileError, match=message):
            data.load_imagefolder(folder, pictures=Pictures(size=8))
    else:
        spec = data.load_imagefolder(folder, pictures=Pictures(size=8))
        with pytest.raises(FileError, match=message):
            next(iter(spec.test))


def test_kept_in_memory_or_not_the_batches_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = data.load_imagefolder(folder, pictures=Pictures(size=16), val_share=0.2)
    monkeypatch.setattr(folders, "IN_MEMORY", 4 * 3 * 16 * 16)  # the four of val alone
    read = data.load_imagefolder(folder, pictures=Pictures(size=16), val_share=0.2)
    assert isinstance(read.train.images.source, FileImages)
    assert not isinstance(read.test.images, FileImages)
    for a, b in zip(kept.train.epoch(2), read.train.epoch(2), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# Images


def test_the_middle_square_is_taken(tmp_path: Path) -> None:
    pixels = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (32, 64, 3))
    Image.fromarray(pixels.copy()).save(tmp_path / "slope.png")
    raw = read(tmp_path / "slope.png", size=14)
    assert raw.shape == (3, 14, 14)
    # Columns 18 to 45, two by two: 18.5, 20.5, ... before rounding.
    assert (raw - (18.5 + 2 * torch.arange(14))).abs().max() <= 0.5
    whole = read(tmp_path / "slope.png", size=32, crop=1.0, grey=True)
    assert torch.equal(whole[0, 0].long(), torch.arange(16, 48))


@pytest.mark.parametrize("grey", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 7), (500, 375)])
def test_images_of_any_size(size: tuple[int, int], grey: bool, tmp_path: Path) -> None:
    for kind in ("png", "jpg"):
        Image.new("RGB", size, (250, 250, 250)).save(tmp_path / f"0.{kind}")
        raw = read(tmp_path / f"0.{kind}", size=32, grey=grey)
        assert raw.shape == (1 if grey else 3, 32, 32)
        assert raw.unique().tolist() == [250]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


COLOURS = Image.new("RGB", (8, 8), (10, 200, 60))
GREY = Image.new("L", (8, 8), 77)
DEEP = Image.fromarray(np.full((8, 8), 77 * 257, np.uint16))
FLAT = COLOURS.convert("P", palette=Image.Palette.ADAPTIVE)
KINDS = {
    "grey": (encoded(GREY, "PNG"), (77, 77, 77)),
    "grey and alpha": (encoded(GREY.convert("LA"), "PNG"), (77, 77, 77)),
    "16-bit grey": (encoded(DEEP, "PNG"), (77, 77, 77)),
    "two colours": (encoded(Image.new("1", (8, 8), 1), "PNG"), (255, 255, 255)),
    "palette": (encoded(FLAT, "PNG"), (10, 200, 60)),
    "RGBA": (encoded(COLOURS.convert("RGBA"), "PNG"), (10, 200, 60)),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (0, 255, 0, 0)), "JPEG"), (255, 0, 255)),
    "webp": (encoded(COLOURS, "WEBP", lossless=True), (10, 200, 60)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_mode(kind: str, tmp_path: Path) -> None:
    file, colour = KINDS[kind]
    path = tmp_path / "0.png"
    path.write_bytes(file)  # decoders look at the content, not at the name
    raw = read(path, size=8)
    assert (raw.long() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 1
    luminance = sum(a * b for a, b in zip((0.299, 0.587, 0.114), colour, strict=True))
    assert (read(path, size=8, grey=True).double() - luminance).abs().max() <= 1.5


def test_options_out_of_range() -> None:
    for form, message in (
        ({"size": 0}, r"size is 0; pass a whole number of pixels >= 1"),
        ({"crop": 0.0}, r"crop is 0\.0; pass a number in \(0, 1\]"),
        ({"crop": float("nan")}, r"crop is nan; pass a number in \(0, 1\]"),
        ({"shift": -1}, r"shift is -1; pass a number of pixels >= 0, or None"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Pictures(**form)


def test_small_grey_images_arrive_as_they_are(tmp_path: Path) -> None:
    root = digit_folder(tmp_path)
    form = Pictures(size=8, crop=1.0, grey=True, flip=False, shift=0)
    spec = data.load_imagefolder(root, pictures=form, val_share=0.0)
    assert (spec.channels, spec.classes) == (1, tuple("0123456789"))
    assert spec.train.augment == data.Augment()
    raw, labels = spec.test.images.take(torch.arange(len(spec.test.images)))
    wanted = digits_images()
    order = sorted(range(0, 1797, 5), key=lambda i: (int(wanted.labels[i]), str(i) + ".png"))
    assert torch.equal(raw, wanted.images[order] * 15)
    assert torch.equal(labels, wanted.labels[order])


# Runs


def test_a_run_on_a_folder_of_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way of a user with small grey images; it learns, and resumes with its options."""
    monkeypatch.setattr(runs.Run, "_export", lambda self, listener: None)
    root = digit_folder(tmp_path / "images")
    typed = ["prune", "--data", "imagefolder", "--data-dir", str(root), "--grey", *PLAIN]
    typed += ["--image-size", "8", "--target-macs", "0.5", "--epochs", "6", "--batch-size", "64"]
    typed += ["--threads", "1", "--out", str(tmp_path / "run")]
    assert cli.main(typed) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["compare"]["small"]["macs"] <= 0.5 * record["compare"]["dense"]["macs"]
    assert record["compare"]["small"]["accuracy"] > 0.9
    assert (record["config"]["in_channels"], record["config"]["grey"]) == (1, True)
    assert cli.main([*(x for x in typed if x != "--grey"), "--resume"]) == 2
    assert "grey was True and is False" in capsys.readouterr().err


def takes(channels: int) -> nn.Module:
    first = nn.Conv2d(channels, 8, 3, padding=1)
    return nn.Sequential(first, nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def takes_grey() -> nn.Module:
    return takes(1)


def takes_colour() -> nn.Module:
    return takes(3)


def takes_none() -> nn.Module:
    return takes(2)


GREYS = {
    "grey model": (["--arch", "test_imagefolder:takes_grey"], "takes images with 1 channel, and "
                   "those of imagefolder have 3; pass --grey"),
    "colour model": (["--arch", "test_imagefolder:takes_colour", "--grey"], "with 3 channels, and "
                     "those of imagefolder have 1; leave --grey out"),
    "digits": (["--arch", "test_imagefolder:takes_colour", "--data", "digits"], "with 3 channels, "
               "and those of digits have 1; pass an architecture for 1"),
    "neither": (["--arch", "test_imagefolder:takes_none"], "pass inputs that model(*example_inp"),
    "grey weights": (["--arch", "resnet20", "--weights", "grey.safetensors"],
                     "They are for grey images: with --data imagefolder pass --grey"),
    "colour weights": (["--arch", "resnet20", "--weights", "colour.safetensors", "--grey"],
                       "They are for colour images: leave --grey out"),
    "other weights": (["--arch", "resnet20", "--weights", "classes.safetensors"],
                      "the shape in current model is torch.Size([2, 64]).\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", GREYS)
def test_grey_and_colour_are_told_apart(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    for file, options in (("grey", (2, 1)), ("colour", (2, 3)), ("classes", (4, 3))):
        weights = resnet20(num_classes=options[0], in_channels=options[1]).state_dict()
        save_file(weights, f"{file}.safetensors")
    more, message = GREYS[name]
    typed = ["prune", "--data", "imagefolder", "--data-dir", ".", *PLAIN, "--image-size", "8"]
    typed += ["--target-macs", "0.5", "--epochs", "3", "--out", "run", *more]
    assert cli.main(typed) == 2
    assert message in capsys.readouterr().err


def test_inspect_says_how_the_shape_of_an_input_is_given(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arch = ["--arch", "test_imagefolder:takes_grey"]
    for typed in (["inspect", *arch], ["latency", *arch, "--table", str(tmp_path / "t")]):
        assert cli.main(typed) == 2
        assert "pass the shape of an input, such as --input 1,28,28 for" in capsys.readouterr().err
    assert cli.main(["inspect", *arch, "--input", "1,28,28"]) == 0


def test_an_older_run_has_the_defaults_of_options_that_it_does_not_know() -> None:
    config = runs.RunConfig(target_macs=0.5)
    older = {key: value for key, value in config.to_json().items() if key != "grey"}
    assert runs_difference(older, config) is None
    assert runs_difference(older, dataclasses.replace(config, grey=True)) is not None


@pytest.mark.parametrize("method", ["psap", "l1", "dense"])
def test_the_accuracy_benchmark_on_a_folder(method: str, tmp_path: Path) -> None:
    setting = dataclasses.replace(
        SETTINGS["imagefolder"], network="digits_resnet", start="scratch", epochs=2, batch=64,
        pictures=Pictures(size=8, crop=1.0, grey=True, flip=False, shift=0),
    )  # fmt: skip
    bench = accuracy.Bench(setting, 0, folder=digit_folder(tmp_path))
    assert bench.example.shape == (2, 1, 8, 8)
    row = bench.run(METHODS[method](), 0.3)
    assert row["test_accuracy"] > 0.5
    assert (row["macs_share"] <= 0.3) == (method != "dense")


@pytest.mark.slow
def test_a_folder_of_real_images_is_the_data_set(data_dir: Path, tmp_path: Path) -> None:
    """CIFAR-10's test images as files: a pretrained network is as right as on the parquet files."""
    cifar = data.load_cifar10(data_dir / "cifar10-jpeg")
    raw, labels = cifar.test.images.take(torch.arange(500))
    for part in ("train", "val"):
        for index, (image, label) in enumerate(zip(raw, labels.tolist(), strict=True)):
            place = tmp_path / part / cifar.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{index}.png")
    spec = data.load_imagefolder(tmp_path, pictures=Pictures(size=32, crop=1.0))
    assert spec.classes == cifar.classes
    model = create("resnet20")
    model.load_state_dict(load_file(next((data_dir / "cifar-resnets").glob("*20*.safetensors"))))
    right = runs.evaluate(model, spec.test)
    first = dataclasses.replace(
        cifar.test, images=data.loader.Subset(source=cifar.test.images, indices=torch.arange(500))
    )
    assert right == runs.evaluate(model, first) > 0.75
