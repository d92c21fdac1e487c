"""Configuration: frozen dataclasses, validated once when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from psap.calling import called
from psap.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from psap.shrink import Result

Protect = Literal["gate", "price", "pulse", "none"]
Schedule = Literal["cubic", "linear"]
Adapt = Literal["sparsity", "uniform"]
Threshold = Literal["std", "quantile"]


def _real(owner: str, name: str, value: Any, low: float, high: float, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{owner}.{name} is {value!r}; pass a number {wanted}")
    if not low <= value <= high:  # false for NaN, too
        raise ArgumentError(f"{owner}.{name} is {value!r}; pass a number {wanted}")


def _whole(owner: str, name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{owner}.{name} is {value!r}; pass a whole number >= {low}")
    if value < low:
        raise ArgumentError(f"{owner}.{name} is {value!r}; pass a whole number >= {low}")


def _choice(owner: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{owner}.{name} is {value!r}; pass one of {', '.join(allowed)}")


def checked_floors(owner: str, value: Any) -> dict[str, float]:
    """Least kept shares by name, as a dict of its own.

    Raises:
        ArgumentError: a share is outside [0, 1].
        ArgumentTypeError: it is no mapping of names to numbers.
    """
    if not isinstance(value, Mapping):
        wanted = 'pass names and shares: {"layer1": 0.5}'
        raise ArgumentTypeError(f"{owner}.floors is {value!r}; {wanted}")
    for name, share in value.items():
        if not isinstance(name, str):
            raise ArgumentTypeError(
                f"{owner}.floors has the key {name!r}; pass the name of a layer"
            )
        _real(owner, f"floors[{name!r}]", share, 0.0, 1.0, "in [0, 1]")
    return dict(value)


@called("psap.Target(macs=0.3)")
@dataclass(frozen=True, kw_only=True)
class Target:
    """What the small network may cost, as shares of the dense network; give one or several.

    Attributes:
        macs: kept share of the multiply-accumulates, in (0, 1].
        parameters: kept share of the parameters, in (0, 1].
        activations: kept share of the elements that convolutions and linear layers give out, a
            measure of activation memory, in (0, 1].
        latency: kept share of the time of a pass as a table predicts it, in (0, 1]; needs what
            `psap.measure_latency` returns.

    Raises:
        ArgumentError: none is given, or one is outside (0, 1].
        ArgumentTypeError: one is not a number.
    """

    macs: float | None = None
    parameters: float | None = None
    activations: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, item.name) is None for item in fields(self)):
            raise ArgumentError("Target has no bound; pass macs=0.3 or parameters=0.3, for example")
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None:
                wanted = "in (0, 1]: the share that is kept"
                _real("Target", item.name, value, math.nextafter(0.0, 1.0), 1.0, wanted)

    def after(self, result: Result) -> Target:
        """What is left of this target, for a network that was made smaller before.

        ``Target(macs=0.5)`` of the network that `psap.drop_blocks` or `psap.apply` was given is
        ``Target(macs=0.5).after(result)`` of ``result.model``; at most everything that it has.

        Raises:
            ArgumentError: the plan of the result does not say the cost of what is bounded.
            ArgumentTypeError: it is no result.
        """
        plan: Any = getattr(result, "plan", None)
        if not hasattr(plan, "before"):
            raise ArgumentTypeError(
                f"result is a {type(result).__name__}; pass what psap.drop_blocks or psap.apply "
                "returned"
            )
        shares = {}
        for item in fields(self):
            share = getattr(self, item.name)
            if share is None:
                continue
            key = "latency_ms" if item.name == "latency" else item.name
            before, after = (getattr(cost, key) for cost in (plan.before, plan.after))
            if not before or not after:
                raise ArgumentError(
                    f"the plan of the result does not say its {item.name}; bound what it does"
                )
            shares[item.name] = min(1.0, share * before / after)
        return Target(**shares)


@called("psap.Config(target=psap.Target(macs=0.3))")
@dataclass(frozen=True, kw_only=True)
class Config:
    """How a `Pruner` prunes. The symbols are those of docs/method.md.

    Attributes:
        target: what the small network may cost.
        prune_steps: n, how many `Pruner.step()` calls prune (the last one reaches the target).
        warmup: `Pruner.step()` calls before the first one that prunes.
        interval: one in this many `Pruner.step()` calls prunes.
        schedule: how the kept share falls over the prune steps.
        adapt: layer ratios from the weight sparsity ratio, or the same ratio everywhere.
        threshold: when a weight counts as sparse. "std": if ``|w| < sparsity_alpha * std(layer)``;
            "quantile": if ``|w| / sqrt(2 / fan_in)`` is below its quantile over all layers.
        sparsity_alpha: the factor of threshold="std".
        sparsity_quantile: q, the quantile of threshold="quantile".
        sparsity_power: exponent of the sparsity ratio in the pruning ratio.
        sparsity_ema: weight of the past in the moving average of the sparsity ratio.
        stream_power: rho; the pruning ratio of a group whose channels M layers make together (a
            residual stream) is divided by ``M ** rho``; 0 treats it like any other, at most 4.
        max_ratio: no group loses a larger share of its channels.
        min_channels: no group keeps fewer channels.
        floors: least kept share of the channels that a layer makes, in [0, 1], by name: of a layer,
            of a module that holds it, or a pattern such as ``"*.downsample"``; 1 leaves it whole.
            Where several match, and where layers share their channels, the largest holds.
        round_to: kept widths are multiples of this where the group allows.
        score: importance of a filter, layer-normalised.
        protect: "price" keeps saved copies behind an epsilon gate and supervises gradients after
            each prune step, to keep more where pruned filters turn out to be useful for their cost;
            "gate" does not supervise; "pulse" supervises to restore filters at once; "none" zeroes
            the filters.
        gate_eps: factor of the gate.
        window: K, optimizer steps of supervision after a prune step (protect="price", "pulse"), in
            which pruned channels are held; at most half of those between two prune steps is best.
        price_power: how strongly prices act on the widths (protect="price").
        price_limit: prices change no width by more than this factor (protect="price").
        z_threshold: significance that a restored filter must reach (protect="pulse").
        restore_share: largest share of freshly pruned filters that one window restores ("pulse").
        restore_bonus: added to the score of a restored filter (protect="pulse").
        progressive: remove pruned channels from the model and the optimizer, in place, already
            while it is pruned, so that the rest of the training is faster: after each prune step
            (or its window) those that were pruned at an earlier one; after the last one, all. What
            is removed cannot return. Copies of the model (an EMA) must be passed as ``friends``, or
            they no longer fit it. Implies ``gated``. Not inside of ``DistributedDataParallel``.
        gated: prune only what every module can lose while it stays what it is, as in `psap.trace`:
            not, for example, channels that a layer norm counts, for which programs with slower
            norms take the place of modules.
        verify: prove shrunk == masked in float64 before channels are removed.

    Raises:
        ArgumentError: a value is out of range.
        ArgumentTypeError: a value has the wrong type.
    """

    target: Target = field(default_factory=lambda: Target(macs=0.5))
    prune_steps: int = 5
    warmup: int = 0
    interval: int = 1
    schedule: Schedule = "cubic"
    adapt: Adapt = "sparsity"
    threshold: Threshold = "std"
    sparsity_alpha: float = 0.5
    sparsity_quantile: float = 0.5
    sparsity_power: float = 2.0
    sparsity_ema: float = 0.5
    stream_power: float = 0.5
    max_ratio: float = 0.9
    min_channels: int = 2
    floors: Mapping[str, float] = field(default_factory=dict, hash=False)
    round_to: int = 1
    score: Literal["l1", "l2"] = "l2"
    protect: Protect = "price"
    gate_eps: float = 1e-3
    window: int = 32
    price_power: float = 0.25
    price_limit: float = 2.0
    z_threshold: float = 3.0
    restore_share: float = 0.1
    restore_bonus: float = 0.3
    progressive: bool = False
    gated: bool = False
    verify: bool = True

    @property
    def closed(self) -> float:
        """Factor of a closed gate; without protection nothing gets through."""
        return 0.0 if self.protect == "none" else self.gate_eps

    def __post_init__(self) -> None:
        if not isinstance(self.target, Target):
            raise ArgumentTypeError(
                f"Config.target is {self.target!r}; pass psap.Target(macs=0.3), for example"
            )
        for name, low in (("prune_steps", 1), ("warmup", 0), ("interval", 1), ("window", 1)):
            _whole("Config", name, getattr(self, name), low)
        for name in ("min_channels", "round_to"):
            _whole("Config", name, getattr(self, name), 1)
        share = "in [0, 1]"
        for name in (
            "sparsity_quantile",
            "sparsity_ema",
            "max_ratio",
            "restore_share",
            "gate_eps",
        ):
            _real("Config", name, getattr(self, name), 0.0, 1.0, share)
        not_negative = ("sparsity_alpha", "sparsity_power", "price_power")
        for name in (*not_negative, "z_threshold", "restore_bonus"):
            _real("Config", name, getattr(self, name), 0.0, 1e6, ">= 0")
        _real("Config", "stream_power", self.stream_power, 0.0, 4.0, "in [0, 4]")
        _real("Config", "price_limit", self.price_limit, 1.0, 1e6, ">= 1")
        for name in ("progressive", "gated", "verify"):
            if not isinstance(value := getattr(self, name), bool):
                raise ArgumentTypeError(f"Config.{name} is {value!r}; pass True or False")
        object.__setattr__(self, "floors", checked_floors("Config", self.floors))
        _choice("Config", "schedule", self.schedule, ("cubic", "linear"))
        _choice("Config", "adapt", self.adapt, ("sparsity", "uniform"))
        _choice("Config", "threshold", self.threshold, ("std", "quantile"))
        _choice("Config", "protect", self.protect, ("gate", "price", "pulse", "none"))
        _choice("Config", "score", self.score, ("l1", "l2"))
