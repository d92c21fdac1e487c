"""Decoding of compressed images, through Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from psap.errors import FileError, PsapError


def decode(source: bytes | Path, what: str, *, size: int | None = None) -> Tensor:
    """Decode one image into uint8 [3, H, W].

    Args:
        source: the compressed image, or the path of its file.
        what: how an error names it.
        size: take the middle square, 7/8 of the shorter side, scaled to [3, size, size]; None
            leaves the image as it is.

    Raises:
        FileError: the image cannot be decoded.
        PsapError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("Pillow") from error
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if size is not None:
                picture.draft("RGB", (size * 8 // 7,) * 2)  # JPEG: decodes at a lower resolution
            image = picture.convert("RGB")
        if size is not None:
            side = min(image.size) * 7 / 8
            left, top = ((length - side) / 2 for length in image.size)
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = np.array(image, dtype=np.uint8)
    except Exception as error:  # decoders raise many types for a damaged image
        raise FileError(
            f"{what} cannot be decoded ({type(error).__name__}: {error}); remove or replace it"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def missing(package: str) -> PsapError:
    """The error for a package that reads data and is not installed."""
    return PsapError(f"{package} is not installed; run: pip install psap[data]")
