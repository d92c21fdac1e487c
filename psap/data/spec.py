"""The description of a data set that is ready to train on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from psap.data.loader import Augment, Images, Loader, Normalise, Subset, split


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DataSpec:
    """A data set for image classification.

    Attributes:
        name: "digits", "cifar10" or "imagefolder".
        classes: names of the classes; a label is a position here.
        channels: C of the inputs [N, C, H, W].
        size: H and W of the inputs.
        train: shuffled and augmented, by epoch.
        val: held out of the training images; None if nothing was held out.
        test: for the figure that is reported.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    size: int
    train: Loader
    val: Loader | None
    test: Loader

    def __repr__(self) -> str:
        parts = {"train": self.train, "val": self.val, "test": self.test}
        counts = ", ".join(f"{k}={len(v.images)}" for k, v in parts.items() if v is not None)
        shape = f"channels={self.channels}, size={self.size}"
        return f"DataSpec({self.name!r}, num_classes={self.num_classes}, {shape}, {counts})"

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def as_format(self, memory_format: torch.memory_format) -> DataSpec:
        """The same data, with inputs in this memory format (channels_last unless set)."""
        return replace(
            self,
            train=replace(self.train, memory_format=memory_format),
            val=None if self.val is None else replace(self.val, memory_format=memory_format),
            test=replace(self.test, memory_format=memory_format),
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a data set is read; the same for all of them.

    Attributes:
        seed: of the splits, of the order and of the augmentation.
        batch_size: images per batch.
        val_share: share of the training images that is held out, in [0, 1).
    """

    seed: int = 0
    batch_size: int = 128
    val_share: float = 0.1

    def loaders(
        self,
        train: Images,
        val: Images | None,
        test: Images,
        *,
        normalise: Normalise,
        augment: Augment,
    ) -> tuple[Loader, Loader | None, Loader]:
        """Training, validation and test loaders; without ``val`` it is held out of ``train``."""
        if val is None:
            rest, part = split(len(train), self.val_share, self.seed)
            if len(part):
                val = Subset(source=train, indices=part)
                train = Subset(source=train, indices=rest)

        def plain(images: Images) -> Loader:
            return Loader(images=images, batch_size=self.batch_size, normalise=normalise)

        shuffled = Loader(
            images=train,
            batch_size=self.batch_size,
            normalise=normalise,
            augment=augment,
            shuffle=True,
            seed=self.seed,
        )
        return shuffled, None if val is None else plain(val), plain(test)
