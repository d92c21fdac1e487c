"""Image folders in ImageNet's layout: ``train/<class>/*``, ``val/<class>/*``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from psap.data.loader import Augment, Batch, Images, Normalise, TensorImages
from psap.data.pictures import decode
from psap.data.spec import DataSpec, Options
from psap.errors import ArgumentError, FileError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})
COLOUR = Normalise(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
GREY = Normalise(scale=255.0, mean=(0.449,), std=(0.226,))
IN_MEMORY = 2**28
"""Bytes of decoded images up to which a part of a folder is kept in memory."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How the image files of a folder become inputs; the default suits photographs.

    Attributes:
        size: H and W of the inputs.
        crop: side of the middle square that is scaled to ``size``, as a share of the image's
            shorter side, in (0, 1].
        grey: inputs have one channel instead of three.
        flip: training images are mirrored with probability 1/2; not for letters and digits.
        shift: training images are moved by up to this many pixels; None is an eighth of the size.

    Raises:
        ArgumentError: a value is out of range.
    """

    size: int = 224
    crop: float = 0.875
    grey: bool = False
    flip: bool = True
    shift: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ArgumentError(f"size is {self.size}; pass a whole number of pixels >= 1")
        if not (isfinite(self.crop) and 0 < self.crop <= 1):
            raise ArgumentError(f"crop is {self.crop}; pass a number in (0, 1]")
        if self.shift is not None and self.shift < 0:
            raise ArgumentError(f"shift is {self.shift}; pass a number of pixels >= 0, or None")

    @property
    def channels(self) -> int:
        """C of the inputs."""
        return 1 if self.grey else 3

    def augment(self) -> Augment:
        """What is done to training images."""
        return Augment(flip=self.flip, shift=self.size // 8 if self.shift is None else self.shift)


@dataclass(frozen=True, kw_only=True, eq=False)
class FileImages:
    """Images that are decoded when they are needed.

    Attributes:
        paths: their files.
        labels: int64 [M].
        pictures: what they become.
    """

    paths: tuple[Path, ...] = field(repr=False)
    labels: Tensor = field(repr=False)
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> Batch:
        """The images and labels at ``indices`` (int64 [N]): uint8 [N, C, size, size], int64 [N].

        Raises:
            FileError: an image cannot be decoded; the message names its file.
            PsapError: Pillow is not installed.
        """
        paths = [self.paths[index] for index in indices.tolist()]
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            images = list(pool.map(self._decoded, paths))
        return torch.stack(images), self.labels[indices]

    def _decoded(self, path: Path) -> Tensor:
        form = self.pictures
        return decode(path, str(path), size=form.size, crop=form.crop, grey=form.grey)

    def kept(self) -> Images:
        """The same images, decoded once and for all where they fit into `IN_MEMORY`.

        Raises:
            FileError: an image cannot be decoded; the message names its file.
            PsapError: Pillow is not installed.
        """
        if len(self) * self.pictures.channels * self.pictures.size**2 > IN_MEMORY:
            return self
        images, labels = self.take(torch.arange(len(self)))
        return TensorImages(images=images, labels=labels)


def load_imagefolder(
    folder: str | Path,
    *,
    pictures: Pictures | None = None,
    seed: int = 0,
    batch_size: int = 128,
    val_share: float = 0.1,
) -> DataSpec:
    """An image folder with ``train`` and ``val``, and perhaps ``test``; classes in name order.

    Without ``test`` the images of ``val`` are the test, and ``val_share`` of the training images is
    for validation. A part that fits into 256 MiB is decoded at once and kept; a larger one is
    decoded batch by batch, in every epoch.

    Args:
        folder: holds one folder per part, with one folder per class.
        pictures: what the images become; by default `Pictures()`.
        seed: of the validation split, the order and the augmentation.
        batch_size: images per batch.
        val_share: share of the training images that is held out, in [0, 1).

    Raises:
        ArgumentError: an option is out of range.
        FileError: a folder is missing or empty, the parts differ in their classes, or an image
            cannot be decoded (large parts: when its batch is read).
        PsapError: Pillow is not installed (large parts: when the first batch is read).
    """
    form = Pictures() if pictures is None else pictures
    root = Path(folder)
    classes = _classes(root / "train")
    train, val = (_images(root / part, classes, form) for part in ("train", "val"))
    has_test = (root / "test").is_dir()
    test = _images(root / "test", classes, form) if has_test else val
    options = Options(seed=seed, batch_size=batch_size, val_share=val_share)
    loaders = options.loaders(
        train,
        val if has_test else None,
        test,
        normalise=GREY if form.grey else COLOUR,
        augment=form.augment(),
    )
    return DataSpec(
        name="imagefolder",
        classes=classes,
        channels=form.channels,
        size=form.size,
        train=loaders[0],
        val=loaders[1],
        test=loaders[2],
    )


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise FileError(
            f"{folder} is not a folder; wanted train/<class>/*.jpg and val/<class>/*.jpg"
        )
    names = sorted(item.name for item in folder.iterdir() if item.is_dir() and _seen(item))
    if not names:
        raise FileError(f"{folder} has no folder per class; wanted {folder.name}/<class>/*.jpg")
    return tuple(names)


def _seen(item: Path) -> bool:
    """Whether it is no hidden file: some systems leave their own beside every image."""
    return not item.name.startswith(".")


def _images(folder: Path, classes: tuple[str, ...], form: Pictures) -> Images:
    found = _classes(folder)
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise FileError(f"{folder} and train differ in their classes: {', '.join(odd)}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(
            item
            for item in (folder / name).iterdir()
            if item.suffix.lower() in SUFFIXES and _seen(item)
        )
        if not files:
            raise FileError(f"{folder / name} holds no image; wanted {', '.join(sorted(SUFFIXES))}")
        paths.extend(files)
        labels.extend([label] * len(files))
    return FileImages(paths=tuple(paths), labels=torch.tensor(labels), pictures=form).kept()
