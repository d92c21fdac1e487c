"""Image folders in ImageNet's layout: ``train/<class>/*``, ``val/<class>/*``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from psap.data.loader import Augment, Batch, Normalise
from psap.data.pictures import decode
from psap.data.spec import DataSpec, Options
from psap.errors import ArgumentError, FileError

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})
NORMALISE = Normalise(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True, eq=False)
class FileImages:
    """Images that are decoded when they are needed.

    Attributes:
        paths: their files.
        labels: int64 [M].
        size: H and W after scaling and cropping.
    """

    paths: tuple[Path, ...] = field(repr=False)
    labels: Tensor = field(repr=False)
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> Batch:
        """The images and labels at ``indices`` (int64 [N]): uint8 [N, 3, size, size], int64 [N].

        Raises:
            FileError: an image cannot be decoded; the message names its file.
        """
        paths = [self.paths[index] for index in indices.tolist()]
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            images = list(pool.map(lambda path: decode(path, str(path), size=self.size), paths))
        return torch.stack(images), self.labels[indices]


def load_imagefolder(
    folder: str | Path,
    *,
    size: int = 224,
    seed: int = 0,
    batch_size: int = 128,
    val_share: float = 0.1,
) -> DataSpec:
    """An image folder with ``train`` and ``val``, and perhaps ``test``; classes in name order.

    Without ``test`` the images of ``val`` are the test, and ``val_share`` of the training images is
    for validation. Training images are mirrored and shifted by up to an eighth of their size.

    Args:
        folder: holds one folder per part, with one folder per class.
        size: H and W of the inputs: the middle square, 7/8 of the shorter side, scaled.
        seed: of the validation split, the order and the augmentation.
        batch_size: images per batch.
        val_share: share of the training images that is held out, in [0, 1).

    Raises:
        ArgumentError: an option is out of range.
        FileError: a folder is missing or empty, or the parts differ in their classes.
        PsapError: Pillow is not installed (when the first batch is read).
    """
    if size < 1:
        raise ArgumentError(f"size is {size}; pass a whole number of pixels >= 1")
    root = Path(folder)
    classes = _classes(root / "train")
    train, val = (_images(root / part, classes, size) for part in ("train", "val"))
    has_test = (root / "test").is_dir()
    test = _images(root / "test", classes, size) if has_test else val
    options = Options(seed=seed, batch_size=batch_size, val_share=val_share)
    loaders = options.loaders(
        train,
        val if has_test else None,
        test,
        normalise=NORMALISE,
        augment=Augment(flip=True, shift=size // 8),
    )
    return DataSpec(
        name="imagefolder",
        classes=classes,
        channels=3,
        size=size,
        train=loaders[0],
        val=loaders[1],
        test=loaders[2],
    )


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise FileError(
            f"{folder} is not a folder; wanted train/<class>/*.jpg and val/<class>/*.jpg"
        )
    names = sorted(item.name for item in folder.iterdir() if item.is_dir())
    if not names:
        raise FileError(f"{folder} has no folder per class; wanted {folder.name}/<class>/*.jpg")
    return tuple(names)


def _images(folder: Path, classes: tuple[str, ...], size: int) -> FileImages:
    found = _classes(folder)
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise FileError(f"{folder} and train differ in their classes: {', '.join(odd)}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(
            item for item in (folder / name).iterdir() if item.suffix.lower() in SUFFIXES
        )
        if not files:
            raise FileError(f"{folder / name} holds no image; wanted {', '.join(sorted(SUFFIXES))}")
        paths.extend(files)
        labels.extend([label] * len(files))
    return FileImages(paths=tuple(paths), labels=torch.tensor(labels), size=size)
