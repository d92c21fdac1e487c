"""Configuration: what is accepted, what is refused and how."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import psap

TARGET = psap.Target(macs=0.5)


def test_defaults_are_those_of_the_method() -> None:
    config = psap.Config()
    assert dataclasses.asdict(config) == {
        "target": {"macs": 0.5, "parameters": None, "activations": None, "latency": None},
        "prune_steps": 5,
        "warmup": 0,
        "interval": 1,
        "schedule": "cubic",
        "adapt": "sparsity",
        "threshold": "std",
        "sparsity_alpha": 0.5,
        "sparsity_quantile": 0.5,
        "sparsity_power": 2.0,
        "sparsity_ema": 0.5,
        "stream_power": 0.5,
        "max_ratio": 0.9,
        "min_channels": 2,
        "floors": {},
        "round_to": 1,
        "score": "l2",
        "protect": "price",
        "gate_eps": 1e-3,
        "window": 32,
        "price_power": 0.25,
        "price_limit": 2.0,
        "z_threshold": 3.0,
        "restore_share": 0.1,
        "restore_bonus": 0.3,
        "progressive": False,
        "gated": False,
        "verify": True,
    }


def test_every_field_is_documented() -> None:
    for kind in (psap.Config, psap.Target):
        for item in dataclasses.fields(kind):
            assert f"        {item.name}: " in (kind.__doc__ or ""), item.name


def test_configurations_are_values() -> None:
    assert psap.Config(target=TARGET) == psap.Config()
    assert hash(psap.Config(target=TARGET)) == hash(psap.Config())
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        psap.Config().window = 3


def graph() -> psap.Graph:
    return psap.trace(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), torch.zeros(1, 2))


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "a share": (lambda: psap.Config(0.3), r"Config: too many positional arguments; call "
                r"psap\.Config\(target=psap\.Target\(macs=0\.3\)\)"),
    "a target": (lambda: psap.Target(0.5), r"Target: too many .*; call psap\.Target\(macs=0\.3\)"),
    "a bound": (lambda: psap.Config(macs=0.3), r"keyword argument 'macs'; call psap\.Config\(targ"),
    "a typo": (lambda: psap.Config(prune_step=3), r"'prune_step' \(is 'prune_steps' meant\?\); c"),
    "a copy": (lambda: dataclasses.replace(TARGET, mac=1), r"'mac' \(is 'macs' meant\?\); call"),
    "no optimizer": (lambda: psap.Pruner(nn.Linear(2, 2), torch.zeros(1, 2)), r"Pruner: missing a "
                     r"required.* argument: 'optimizer'; call psap\.Pruner\(model, example_inputs, "
                     r"optimizer=optimizer, config=config\)"),
    "no name": (lambda: psap.Pruner(nn.Linear(2, 2), torch.zeros(1, 2), 3), r"Pruner: too many p"),
    "a ratio": (lambda: psap.plan(graph(), 0.5), r"plan: too many .*; call psap\.plan\(graph, ra"),
    "a word": (lambda: psap.plan(graph(), ratios=0.5), r"'ratios' \(is 'ratio' meant\?\); call"),
    "an optimizer": (lambda: psap.apply(graph().model, psap.plan(graph(), ratio=0.5), 3),
                     r"apply: too many positional arguments; call psap\.apply\(model, plan, optim"),
    "nothing": (psap.Pruner, r"Pruner: missing a required argument: 'model'; call psap\.Pruner"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_shows_the_right_one(name: str) -> None:
    call, message = CALLS[name]
    with pytest.raises(psap.ArgumentTypeError, match=message):
        call()


def test_configurations_can_be_copied() -> None:
    config = psap.Config(target=TARGET, window=3)
    assert copy.deepcopy(config) == config == dataclasses.replace(config)
    assert list(inspect.signature(psap.Config).parameters) == [
        field.name for field in dataclasses.fields(config)
    ]


@pytest.mark.parametrize("value", [1, 1.0, 0.5, 5e-324])
@pytest.mark.parametrize("name", ["macs", "parameters"])
def test_targets_in_range(name: str, value: float) -> None:
    assert getattr(psap.Target(**{name: value}), name) == value


@pytest.mark.parametrize("value", [0, 0.0, 1.5, -0.1, math.nan, math.inf, -math.inf, 10**400])
@pytest.mark.parametrize("name", ["macs", "parameters"])
def test_targets_out_of_range(name: str, value: float) -> None:
    with pytest.raises(psap.ArgumentError, match=rf"Target.{name} is .*\(0, 1\]") as info:
        psap.Target(**{name: value})
    assert isinstance(info.value, ValueError)


@pytest.mark.parametrize("value", ["0.5", True, [0.5], 0.5j])
def test_targets_of_the_wrong_type(value: Any) -> None:
    with pytest.raises(psap.ArgumentTypeError, match=r"Target.macs is .*pass a number") as info:
        psap.Target(macs=value)
    assert isinstance(info.value, TypeError)


def test_a_target_needs_a_bound() -> None:
    with pytest.raises(psap.ArgumentError, match=r"no bound; pass macs=0\.3"):
        psap.Target()


SHARES = ("sparsity_quantile", "sparsity_ema", "max_ratio", "restore_share", "gate_eps")
REALS = ("sparsity_alpha", "sparsity_power", "price_power", "z_threshold", "restore_bonus")
COUNTS = ("prune_steps", "interval", "window", "min_channels", "round_to")
CHOICES = ("schedule", "adapt", "threshold", "protect", "score")

REFUSED: list[tuple[str, Any, type[Exception]]] = [
    *[(n, v, psap.ArgumentError) for n in SHARES for v in (-0.1, 1.1, math.nan, math.inf)],
    *[(n, v, psap.ArgumentError) for n in REALS for v in (-0.1, math.nan, math.inf)],
    *[(n, v, psap.ArgumentTypeError) for n in SHARES + REALS for v in ("1", None, True)],
    *[(n, v, psap.ArgumentError) for n in COUNTS for v in (0, -3)],
    *[(n, v, psap.ArgumentTypeError) for n in (*COUNTS, "warmup") for v in (1.0, "1", True, None)],
    ("warmup", -1, psap.ArgumentError),
    *[("price_limit", v, psap.ArgumentError) for v in (0.9, 0, -1, math.nan, math.inf)],
    *[(n, v, psap.ArgumentError) for n in CHOICES for v in ("x", None, "", ["l2"], 3)],
    *[("target", v, psap.ArgumentTypeError) for v in (0.5, None, {"macs": 0.5})],
    *[("stream_power", v, psap.ArgumentError) for v in (-0.1, 4.1, math.nan, math.inf)],
    *[("stream_power", v, psap.ArgumentTypeError) for v in ("1", None, True)],
    *[("floors", v, psap.ArgumentTypeError) for v in (0.5, None, ["conv1"], "conv1")],
    *[("verify", v, psap.ArgumentTypeError) for v in ("no", None, 1)],
]


@pytest.mark.parametrize(("name", "value", "error"), REFUSED)
def test_values_that_are_refused(name: str, value: Any, error: type[Exception]) -> None:
    """The message names the field, what it was, and what to pass."""
    with pytest.raises(error, match=rf"Config.{name} is .*pass ") as info:
        psap.Config(**{name: value})
    assert repr(value) in str(info.value)
    assert isinstance(info.value, psap.PsapError)


@pytest.mark.parametrize("name", SHARES)
def test_the_ends_of_the_ranges_are_allowed(name: str) -> None:
    for value in (0, 0.0, 1, 1.0):
        assert getattr(psap.Config(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [({"a": 1.5}, psap.ArgumentError, r"Config.floors\['a'\] is 1.5; pass a number in \[0, 1\]"),
     ({"a": math.nan}, psap.ArgumentError, r"Config.floors\['a'\] is nan; pass a number"),
     ({"a": True}, psap.ArgumentTypeError, r"Config.floors\['a'\] is True; pass a number"),
     ({3: 0.5}, psap.ArgumentTypeError, "Config.floors has the key 3; pass the name of a layer")],
)  # fmt: skip
def test_floors_that_are_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        psap.Config(floors=value)


def test_floors_are_a_copy() -> None:
    mine = {"layer1": 0.5}
    config = psap.Config(floors=mine)
    mine["layer1"] = 0.1
    assert config.floors == {"layer1": 0.5}
    assert hash(config) == hash(dataclasses.replace(config)) and config != psap.Config()
