"""CIFAR-10, from a folder of parquet files or of the binary batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from psap.data.loader import Augment, Normalise, TensorImages
from psap.data.pictures import decode, missing
from psap.data.spec import DataSpec, Options
from psap.errors import FileError

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
# ImageNet's figures: those of the pretrained CIFAR ResNets.
NORMALISE = Normalise(scale=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# Where the usual releases unpack to.
SUBFOLDERS = ("", "plain_text", "cifar-10-batches-bin", "cifar-10-batches-py")


def load_cifar10(
    folder: str | Path, *, seed: int = 0, batch_size: int = 128, val_share: float = 0.1
) -> DataSpec:
    """CIFAR-10: 50,000 training images, ``val_share`` of them for validation, 10,000 for the test.

    Training images are mirrored and shifted by up to 4 pixels.

    Args:
        folder: holds ``train.parquet`` or ``train-*.parquet``, and the same for ``test``, with the
            columns ``img`` (``bytes``, ``path``) and ``label``; or ``data_batch_1.bin`` to ``_5``
            and ``test_batch.bin``.
        seed: of the validation split, the order and the augmentation.
        batch_size: images per batch.
        val_share: share of the training images that is held out, in [0, 1).

    Raises:
        ArgumentError: an option is out of range.
        FileError: the files are missing, damaged or of the pickled release.
        PsapError: pyarrow or Pillow is needed and not installed.
    """
    train, test = _read(Path(folder))
    options = Options(seed=seed, batch_size=batch_size, val_share=val_share)
    loaders = options.loaders(
        train, None, test, normalise=NORMALISE, augment=Augment(flip=True, shift=4)
    )
    return DataSpec(
        name="cifar10",
        classes=CLASSES,
        channels=3,
        size=SIDE,
        train=loaders[0],
        val=loaders[1],
        test=loaders[2],
    )


def _read(folder: Path) -> tuple[TensorImages, TensorImages]:
    for place in (folder / name for name in SUBFOLDERS):
        parquet = {part: _shards(place, part) for part in ("train", "test")}
        if all(parquet.values()):
            return _from_parquet(parquet["train"]), _from_parquet(parquet["test"])
        binary = sorted(place.glob("data_batch_[1-5].bin"))
        if binary and (place / "test_batch.bin").is_file():
            return _from_binary(binary), _from_binary([place / "test_batch.bin"])
        if (place / "data_batch_1").is_file():
            raise FileError(
                f"{place} holds the pickled release of CIFAR-10, and loading a pickle runs code; "
                "use the binary release (data_batch_1.bin) or parquet files"
            )
    raise FileError(
        f"{folder} holds no CIFAR-10; wanted train.parquet and test.parquet (or shards "
        "train-*.parquet, test-*.parquet), or data_batch_1.bin to data_batch_5.bin and "
        "test_batch.bin"
    )


def _shards(folder: Path, part: str) -> list[Path]:
    whole = folder / f"{part}.parquet"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{part}-*.parquet"))


def _from_parquet(files: list[Path]) -> TensorImages:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing("pyarrow") from error
    parts = []
    for file in files:
        try:
            table = parquet.read_table(file, columns=["img", "label"])
            encoded = [row["bytes"] for row in table.column("img").to_pylist()]
            labels = table.column("label").to_numpy().astype(np.int64)
        except Exception as error:  # pyarrow raises many types for a damaged file
            raise FileError(
                f"{file} is no parquet file with the columns img (bytes, path) and label ({error})"
            ) from error
        if not encoded:
            raise FileError(f"{file} holds no image; it is not of CIFAR-10")
        images = [_image(item, f"{file}, row {row}") for row, item in enumerate(encoded)]
        parts.append(_checked(file, torch.stack(images), torch.from_numpy(labels)))
    return _joined(parts)


def _image(encoded: bytes, name: str) -> Tensor:
    image = decode(encoded, name)
    if image.shape != (3, SIDE, SIDE):
        raise FileError(f"{name} has shape {list(image.shape)}; wanted [3, {SIDE}, {SIDE}]")
    return image


def _from_binary(files: list[Path]) -> TensorImages:
    parts = []
    for file in files:
        raw = np.fromfile(file, dtype=np.uint8)
        if raw.size == 0 or raw.size % RECORD:
            raise FileError(
                f"{file} has {raw.size} bytes, not a positive multiple of {RECORD}; it is damaged"
            )
        records = torch.from_numpy(raw.reshape(-1, RECORD))
        images = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
        parts.append(_checked(file, images, records[:, 0].long()))
    return _joined(parts)


def _checked(file: Path, images: Tensor, labels: Tensor) -> TensorImages:
    wrong = (labels < 0) | (labels >= len(CLASSES))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise FileError(f"{file}, row {row}: the label is {int(labels[row])}; wanted 0 to 9")
    return TensorImages(images=images, labels=labels)


def _joined(parts: list[TensorImages]) -> TensorImages:
    return TensorImages(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
    )
