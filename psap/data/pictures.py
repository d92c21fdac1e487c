"""Decoding of compressed images, through Pillow."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from psap.errors import FileError, PsapError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


def decode(
    source: bytes | Path,
    what: str,
    *,
    size: int | None = None,
    crop: float = 1.0,
    grey: bool = False,
) -> Tensor:
    """Decode one image into uint8 [C, H, W]; transparency is left out.

    Args:
        source: the compressed image, or the path of its file.
        what: how an error names it.
        size: take the middle square and scale it to [C, size, size]; None leaves the image as it
            is.
        crop: side of that square, as a share of the shorter side of the image.
        grey: C is 1 instead of 3.

    Raises:
        FileError: the image cannot be decoded.
        PsapError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("Pillow") from error
    mode = "L" if grey else "RGB"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if size is not None:  # JPEG: decodes at a lower resolution
                picture.draft(mode, (math.ceil(size / crop),) * 2)
            image = _eight_bits(picture).convert(mode)
        if size is not None:
            side = min(image.size) * crop
            left, top = ((length - side) / 2 for length in image.size)
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = np.array(image, dtype=np.uint8)
    except Exception as error:  # decoders raise many types for a damaged image
        raise FileError(
            f"{what} cannot be decoded ({type(error).__name__}: {error}); remove or replace it"
        ) from error
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1)


def _eight_bits(picture: Picture) -> Picture:
    """An image of 16-bit greys in 8 bits: Pillow's own conversion makes all above 255 white."""
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))


def missing(package: str) -> PsapError:
    """The error for a package that reads data and is not installed."""
    return PsapError(f"{package} is not installed; run: pip install psap[data]")
