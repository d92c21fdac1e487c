"""The settings of a training run; cheap to import, so that the command line can show them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from psap.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from psap.config import Config
    from psap.data import Pictures


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run: dense epochs, pruning epochs, then fine-tuning of the small network.

    Attributes:
        arch: digits_resnet, resnet20, resnet32, resnet44, resnet56, vgg16_bn, mobilenet_v2, or
            package.module:factory.
        weights: a .safetensors file with the weights to start from; none trains from scratch.
        data: which data set.
        data_dir: where its files are (digits are shipped with psap).
        image_size: height and width of the inputs (imagefolder).
        crop: side of the middle square that is scaled to image_size, as a share of the image's
            shorter side, in (0, 1] (imagefolder).
        grey: inputs have one channel instead of three (imagefolder).
        flip: whether training images are mirrored at random; --no-flip for letters and digits
            (imagefolder).
        shift: training images are moved by up to this many pixels; by default an eighth of
            image_size (imagefolder).
        out: the folder that everything is written to.
        target_macs: kept share of the multiply-accumulates, in (0, 1].
        target_parameters: kept share of the parameters, in (0, 1].
        epochs: all of them together.
        dense_epochs: before pruning begins; by default a third of the epochs, or none with weights.
        prune_epochs: in which the network is pruned; by default half of the others, at least 2. The
            rest trains the small network.
        prune_steps: how often channels are pruned; by default 5, or one less than ``prune_epochs``
            if those are few.
        drop_blocks: at most so many residual branches go before channels do, those that cost least
            loss on 1,000 training images: the network gets less deep. Targets are shares of the
            dense network, whose channels alone must be able to meet them; floors hold for the
            layers that are left.
        drop_tolerance: how much that loss may rise, as a share of that of the dense network.
        protect: "price" keeps copies of pruned filters, and more filters where gradients say that
            pruned ones are missed; "gate" just keeps copies, "pulse" also restores those that the
            gradients ask for, "none" just removes.
        progressive: cut the network between prune steps, too, instead of once, so that the
            training is faster.
        stream_power: the ratio of a residual stream of M layers is divided by M to this power.
        min_channels: no group of channels becomes smaller.
        floors: least kept share of the channels that a layer makes, by its name, that of a module
            around it, or a pattern: --floors conv1 1.0 "layer3.*" 0.5.
        round_to: widths are multiples of this.
        lr: peak learning rate of SGD with Nesterov momentum. It decays by a cosine over the dense
            epochs, and again over all others.
        lr_warmup: epochs over which it rises to the peak, each time.
        momentum: of SGD.
        weight_decay: of SGD.
        batch_size: images per step.
        val_share: share of the training images that is held out for validation.
        seed: of the initial weights, of the splits, of the order and of the augmentation.
        threads: CPU threads of one operator; by default 1 for the digits, whose images are too
            small to share among cores, and otherwise what PyTorch takes.
        device: "cpu", "cuda" or "cuda:1".

    Raises:
        ArgumentError: a value is out of range.
        ArgumentTypeError: a value has the wrong type.
    """

    arch: str = "digits_resnet"
    weights: str | None = None
    data: Literal["digits", "cifar10", "imagefolder"] = "digits"
    data_dir: str | None = None
    image_size: int = 224
    crop: float = 0.875
    grey: bool = False
    flip: bool = True
    shift: int | None = None
    out: str = "out/run"
    target_macs: float | None = None
    target_parameters: float | None = None
    epochs: int = 30
    dense_epochs: int | None = None
    prune_epochs: int | None = None
    prune_steps: int | None = None
    drop_blocks: int = 0
    drop_tolerance: float = 0.5
    protect: Literal["gate", "price", "pulse", "none"] = "price"
    progressive: bool = False
    stream_power: float = 0.5
    min_channels: int = 2
    floors: dict[str, float] = field(default_factory=dict)
    round_to: int = 1
    lr: float = 0.05
    lr_warmup: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    val_share: float = 0.1
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.target_macs is None and self.target_parameters is None:
            raise ArgumentError(
                "target_macs and target_parameters are None; pass one, such as target_macs=0.3 "
                "(on the command line --target-macs 0.3; with --resume repeat all options)"
            )
        for name, low in (("epochs", 2), ("batch_size", 2), ("seed", 0), ("drop_blocks", 0)):
            _at_least(name, getattr(self, name), low)
        for name, low in (("dense_epochs", 0), ("prune_epochs", 2), ("prune_steps", 1)):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), low)
        if self.threads is not None:
            _at_least("threads", self.threads, 1)
        for name in ("lr", "lr_warmup", "momentum", "weight_decay", "drop_tolerance"):
            _not_negative(name, getattr(self, name))
        if self.lr == 0 or self.momentum >= 1:
            raise ArgumentError(
                f"lr is {self.lr}, momentum is {self.momentum}; pass lr > 0 and momentum < 1"
            )
        dense, prune, _ = self.phases()
        if dense + prune > self.epochs:
            raise ArgumentError(
                f"dense_epochs and prune_epochs are {dense} and {prune}, together more than "
                f"epochs, which is {self.epochs}; raise epochs"
            )
        if self.steps() > prune - 1:
            raise ArgumentError(
                f"prune_steps is {self.steps()}, which needs prune_epochs >= {self.steps() + 1}, "
                f"not {prune}; raise prune_epochs or lower prune_steps"
            )
        self.pruning()

    def phases(self) -> tuple[int, int, int]:
        """Epochs of dense training, of pruning, and of fine-tuning."""
        dense = self.dense_epochs
        if dense is None:
            dense = 0 if self.weights else self.epochs // 3
        prune = self.prune_epochs
        if prune is None:
            prune = max(2, (self.epochs - dense) // 2)
        return dense, prune, self.epochs - dense - prune

    def steps(self) -> int:
        """How often channels are pruned."""
        return self.prune_steps or min(5, self.phases()[1] - 1)

    def cpu_threads(self) -> int | None:
        """CPU threads of one operator; None leaves PyTorch's number."""
        return 1 if self.threads is None and self.data == "digits" else self.threads

    def phase(self, epoch: int) -> str:
        """The phase of an epoch, counted from 0: "dense", "prune" or "finetune"."""
        dense, prune, _ = self.phases()
        return "dense" if epoch < dense else "prune" if epoch < dense + prune else "finetune"

    def pictures(self) -> Pictures:
        """What the images of a folder become."""
        from psap.data import Pictures

        return Pictures(
            size=self.image_size,
            crop=self.crop,
            grey=self.grey,
            flip=self.flip,
            shift=self.shift,
        )

    def pruning(self) -> Config:
        """The configuration of the `psap.Pruner`; a step follows each prune epoch but the last."""
        from psap.config import Config, Target

        return Config(
            target=Target(macs=self.target_macs, parameters=self.target_parameters),
            prune_steps=self.steps(),
            interval=(self.phases()[1] - 1) // self.steps(),
            protect=self.protect,
            progressive=self.progressive,
            stream_power=self.stream_power,
            min_channels=self.min_channels,
            floors=self.floors,
            round_to=self.round_to,
        )

    def lr_at(self, epoch: float) -> float:
        """Learning rate at a point of the run: linear rise, then cosine decay to 1 % of the peak.

        The dense epochs have a schedule of their own, so that the dense network is trained to the
        end and can be compared with; the second schedule goes on over the shrink.

        Args:
            epoch: epochs so far, with their fraction.
        """
        dense = self.phases()[0]
        length = dense if epoch < dense else self.epochs - dense
        at = epoch if epoch < dense else epoch - dense
        if at < self.lr_warmup:
            return self.lr * max(0.05, at / self.lr_warmup)
        done = (at - self.lr_warmup) / max(length - self.lr_warmup, 1e-9)
        return self.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * min(done, 1.0))) / 2)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


MAY_CHANGE = ("out", "data_dir")
"""Settings that a resumed run need not repeat: places of files."""


def difference(before: dict[str, Any], now: RunConfig) -> str | None:
    """The first setting that a resumed run would change, in words; None if there is none."""
    for name, value in now.to_json().items():
        was = before.get(name, getattr(RunConfig, name, {}))  # it may be younger than the run
        if name not in MAY_CHANGE and was != value:
            return f"{name} was {was!r} and is {value!r}"
    return None


def _at_least(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} is {value!r}; pass a whole number >= {low}")
    if value < low:
        raise ArgumentError(f"{name} is {value!r}; pass a whole number >= {low}")


def _not_negative(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} is {value!r}; pass a number >= 0")
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"{name} is {value!r}; pass a number >= 0")
