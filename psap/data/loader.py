"""Batches as a pure function of (seed, epoch, position): shuffling, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from psap.errors import ArgumentError

Batch = tuple[Tensor, Tensor]


class Images(Protocol):
    """Where a `Loader` takes its images from."""

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def take(self, indices: Tensor) -> Batch:
        """The images and labels at ``indices`` (int64 [N]): uint8 [N, C, H, W], int64 [N]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorImages:
    """Images that are all in memory.

    Attributes:
        images: uint8 [M, C, H, W].
        labels: int64 [M].
    """

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Batch:
        """The images and labels at ``indices`` (int64 [N]): uint8 [N, C, H, W], int64 [N]."""
        return self.images[indices], self.labels[indices]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subset:
    """Some images of another source.

    Attributes:
        source: where they come from.
        indices: int64 [M], their positions there.
    """

    source: Images
    indices: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Tensor) -> Batch:
        """The images and labels at ``indices`` (int64 [N]): uint8 [N, C, H, W], int64 [N]."""
        return self.source.take(self.indices[indices])


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """``(raw / scale - mean) / std`` per channel.

    Attributes:
        scale: the raw value that stands for 1.
        mean: one value per channel.
        std: one value per channel, positive.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, raw: Tensor, memory_format: torch.memory_format = torch.channels_last
    ) -> Tensor:
        """Uint8 [N, C, H, W] to float32 [N, C, H, W], in the given format."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        x = (raw.to(torch.float32) / self.scale - mean) / std
        # A tensor with one channel looks contiguous in either format; an empty copy settles it.
        out = torch.empty_like(x, memory_format=memory_format)
        return out.copy_(x)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes to training images; the default changes nothing.

    Attributes:
        flip: mirror each image left to right with probability 1/2.
        shift: move each image by up to this many pixels in both directions; zeros come in.
    """

    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ArgumentError(f"Augment.shift is {self.shift}; pass a number of pixels >= 0")

    def draw(self, count: int, rng: np.random.Generator) -> Tensor:
        """What to do with each of ``count`` images: int64 [count, 3] (flip, rows, columns)."""
        flip = rng.integers(0, 1 + self.flip, size=(count, 1))
        shift = rng.integers(0, 2 * self.shift + 1, size=(count, 2))
        return torch.from_numpy(np.concatenate([flip, shift], axis=1))

    def apply(self, raw: Tensor, draws: Tensor) -> Tensor:
        """Carry out ``draws`` (int64 [N, 3]) on ``raw`` (uint8 [N, C, H, W])."""
        flip, top, left = draws.unbind(1)
        if self.flip:
            raw = torch.where(flip.bool().view(-1, 1, 1, 1), raw.flip(3), raw)
        if self.shift:
            count, channels, height, width = raw.shape
            padded = F.pad(raw, (self.shift,) * 4)
            rows = (top[:, None] + torch.arange(height)).view(count, 1, height, 1)
            columns = (left[:, None] + torch.arange(width)).view(count, 1, 1, width)
            image = torch.arange(count).view(-1, 1, 1, 1)
            channel = torch.arange(channels).view(1, -1, 1, 1)
            raw = padded[image, channel, rows, columns]
        return raw


@dataclass(frozen=True, kw_only=True, eq=False)
class Loader:
    """Batches ``(x, y)``: x float32 [N, C, H, W], y int64 [N].

    Every batch depends on seed, epoch and position alone, never on what was read before: an
    interrupted run goes on bit-exactly with ``epoch(e, start=batches_done)``.

    Attributes:
        images: the source.
        batch_size: images per batch; the last batch may be smaller.
        normalise: raw values to network inputs.
        augment: random changes, drawn anew in every epoch.
        shuffle: a new order in every epoch.
        seed: of the order and of the random changes.
        memory_format: of x.

    Raises:
        ArgumentError: the batch size is below 1, the seed is negative or there is no image.
    """

    images: Images
    batch_size: int
    normalise: Normalise
    augment: Augment = field(default_factory=Augment)
    shuffle: bool = False
    seed: int = 0
    memory_format: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ArgumentError(f"batch_size is {self.batch_size}; pass a whole number >= 1")
        _check_seed(self.seed)
        if len(self.images) == 0:
            raise ArgumentError("there is no image to load; pass data with at least one")

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch 0."""
        return self.epoch(0)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch ``start`` on.

        Raises:
            ArgumentError: ``epoch`` or ``start`` is negative.
        """
        if epoch < 0 or start < 0:
            raise ArgumentError(f"epoch {epoch} and start {start}: pass whole numbers >= 0")
        return self._batches(epoch, start)

    def sample(self, most: int) -> Loader:
        """At most so many of the images, the same ones each time, in a fixed order, unchanged.

        They are read at once, and kept in memory.
        """
        order = np.random.default_rng([self.seed, len(self.images)]).permutation(len(self.images))
        images, labels = self.images.take(torch.from_numpy(np.sort(order[:most])))
        source = TensorImages(images=images, labels=labels)
        return replace(self, images=source, augment=Augment(), shuffle=False)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        rng = np.random.default_rng([self.seed, epoch])
        count = len(self.images)
        order = torch.from_numpy(rng.permutation(count) if self.shuffle else np.arange(count))
        draws = self.augment.draw(count, rng)
        for first in range(start * self.batch_size, count, self.batch_size):
            part = slice(first, first + self.batch_size)
            raw, labels = self.images.take(order[part])
            raw = self.augment.apply(raw, draws[part])
            yield self.normalise(raw, self.memory_format), labels


def split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random positions of ``count`` items: (the rest, ``share`` of them), both int64 and sorted.

    Raises:
        ArgumentError: ``share`` is outside [0, 1), nothing would be left, or the seed is negative.
    """
    _check_seed(seed)
    if not 0 <= share < 1:
        raise ArgumentError(f"share is {share}; pass a number in [0, 1)")
    taken = round(count * share)
    if taken >= count:
        raise ArgumentError(f"share is {share} of {count} items; leave at least one")
    order = np.random.default_rng([seed, count]).permutation(count)
    rest, part = np.sort(order[taken:]), np.sort(order[:taken])
    return torch.from_numpy(rest), torch.from_numpy(part)


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ArgumentError(f"seed is {seed}; pass a whole number >= 0")
