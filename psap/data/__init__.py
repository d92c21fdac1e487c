"""Small data sets for the command line, the demo and the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from psap.data.cifar import load_cifar10
from psap.data.digits import load_digits
from psap.data.folder import Pictures, load_imagefolder
from psap.data.loader import Augment, Loader, Normalise
from psap.data.spec import DataSpec
from psap.errors import ArgumentError

__all__ = [
    "Augment",
    "DataName",
    "DataSpec",
    "Loader",
    "Normalise",
    "Pictures",
    "load",
    "load_cifar10",
    "load_digits",
    "load_imagefolder",
]

DataName = Literal["digits", "cifar10", "imagefolder"]


def load(
    name: DataName,
    *,
    data_dir: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 128,
    val_share: float = 0.1,
    pictures: Pictures | None = None,
) -> DataSpec:
    """Load a data set by name.

    Args:
        name: "digits" (shipped with psap), "cifar10" or "imagefolder".
        data_dir: where the files are; not for "digits".
        seed: of the splits, the order and the augmentation.
        batch_size: images per batch.
        val_share: share of the training images that is held out for validation, in [0, 1).
        pictures: what the images become; only for "imagefolder".

    Raises:
        ArgumentError: the name is unknown, ``data_dir`` is missing or an option is out of range.
        FileError: the files are missing or damaged.
        PsapError: a package that reads them is not installed.
    """
    if name not in get_args(DataName):
        raise ArgumentError(f"data is {name!r}; pass one of {', '.join(get_args(DataName))}")
    if name == "digits":
        return load_digits(seed=seed, batch_size=batch_size, val_share=val_share)
    if data_dir is None:
        raise ArgumentError(f"data_dir is None; pass the folder that holds {name} (--data-dir)")
    if name == "cifar10":
        return load_cifar10(data_dir, seed=seed, batch_size=batch_size, val_share=val_share)
    return load_imagefolder(
        data_dir, pictures=pictures, seed=seed, batch_size=batch_size, val_share=val_share
    )
