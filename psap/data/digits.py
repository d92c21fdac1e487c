"""The UCI handwritten digits: 1,797 real images of 8x8 pixels, shipped with psap.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, CC BY 4.0; see DATA_LICENSE.md beside this file.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch

from psap.data.loader import Augment, Normalise, Subset, TensorImages, split
from psap.data.spec import DataSpec, Options
from psap.errors import FileError

TEST_SHARE = 0.2


def digits_images() -> TensorImages:
    """All images, uint8 [1797, 1, 8, 8] with values 0 to 16, and their labels, int64 [1797].

    Raises:
        FileError: the file that ships with psap is missing or damaged.
    """
    file = files("psap.data").joinpath("digits.npz")
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except Exception as error:  # zipfile and NumPy raise many types for a damaged file
        raise FileError(f"{file} cannot be read ({error}); reinstall psap") from error
    return TensorImages(
        images=torch.from_numpy(images).unsqueeze(1), labels=torch.from_numpy(labels).long()
    )


def load_digits(*, seed: int = 0, batch_size: int = 128, val_share: float = 0.1) -> DataSpec:
    """The digits: one image in five is for the test, ``val_share`` of the others for validation.

    The seed sets the splits too. All images are by the same 13 writers, so the figures are easier
    than those for unseen writers.

    Raises:
        ArgumentError: an option is out of range.
        FileError: the file that ships with psap is missing or damaged.
    """
    images = digits_images()
    rest, part = split(len(images), TEST_SHARE, seed)
    options = Options(seed=seed, batch_size=batch_size, val_share=val_share)
    train, val, test = options.loaders(
        Subset(source=images, indices=rest),
        None,
        Subset(source=images, indices=part),
        # Mean and deviation of all pixels, in units of full ink.
        normalise=Normalise(scale=16.0, mean=(0.305,), std=(0.376,)),
        augment=Augment(shift=1),
    )
    return DataSpec(
        name="digits",
        classes=tuple("0123456789"),
        channels=1,
        size=8,
        train=train,
        val=val,
        test=test,
    )
