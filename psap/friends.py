"""What else belongs to a training: other optimizers, schedulers, loss scalers, averaged copies."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from psap import optim
from psap.errors import ArgumentError, ArgumentTypeError, PsapError
from psap.plans import Plan, fingerprint

KINDS = (
    "another optimizer of the model, an LR scheduler, a GradScaler, or a module that is or wraps a "
    "copy of the model, such as torch.optim.swa_utils.AveragedModel"
)


@dataclass(frozen=True)
class Friends:
    """Friends of a model that is to be shrunk, sorted by kind.

    Attributes:
        given: all of them, as they were given.
        optimizers: every optimizer, that of the model first.
        names: names of the model's parameters by ``id``; empty without an optimizer.
        copies: networks of the model's architecture that friends are or wrap.
    """

    given: tuple[Any, ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    names: Mapping[int, str]
    copies: tuple[nn.Module, ...]


def sort(
    model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None, given: Any
) -> Friends:
    """Check friends, and say what of them must shrink.

    Args:
        model: the dense model that the plan was made for.
        plan: the plan.
        optimizer: the optimizer of the model, or None.
        given: its friends.

    Raises:
        ArgumentTypeError: one is nothing that can be carried along.
        ArgumentError: one belongs to another model or optimizer.
    """
    given = listed(given)
    found = [] if optimizer is None else [optimizer]
    found += [f for f in given if isinstance(f, torch.optim.Optimizer)]
    optimizers = tuple({id(o): o for o in found}.values())
    names: Mapping[int, str] = {}
    for one in optimizers:
        names = optim.check_optimizer(one, model)
    copies: dict[int, nn.Module] = {}
    for at, friend in enumerate(given):
        if isinstance(friend, nn.Module):
            inner = _inner(friend, model, plan, f"friends[{at}]")
            copies[id(inner)] = inner
        elif not isinstance(friend, (torch.optim.Optimizer, torch.amp.GradScaler)):
            _check_holder(friend, optimizers, f"friends[{at}]")
    return Friends(given, optimizers, names, tuple(copies.values()))


def listed(given: Any) -> tuple[Any, ...]:
    """What was given as ``friends``.

    Raises:
        ArgumentTypeError: it is no list.
    """
    if not isinstance(given, Sequence) or isinstance(given, (str, nn.Module)):
        raise ArgumentTypeError(f"friends is a {type(given).__name__}; pass a list of {KINDS}")
    return tuple(given)


def _inner(friend: nn.Module, model: nn.Module, plan: Plan, where: str) -> nn.Module:
    """The network in a friend that has the names and shapes of the model."""
    count = len(list(model.parameters()))
    for module in friend.modules():
        if len(list(module.parameters())) == count and fingerprint(module) == plan.architecture:
            if module is model:
                raise ArgumentError(
                    f"{where} is or wraps the model itself; it is shrunk anyway, so leave it out"
                )
            return module
    raise ArgumentError(
        f"{where}, a {type(friend).__name__}, holds no copy of the model: no module in it has the "
        "same parameters and buffers; pass copies of the very model that is shrunk (with "
        "Config(progressive=True), to Pruner(friends=[...]), before it is cut)"
    )


def _check_holder(friend: Any, optimizers: Iterable[torch.optim.Optimizer], where: str) -> None:
    """A scheduler of PyTorch or of any other library holds its optimizer."""
    held = getattr(friend, "optimizer", None)
    if not isinstance(held, torch.optim.Optimizer):
        raise ArgumentTypeError(f"{where} is a {type(friend).__name__}; pass {KINDS}")
    if not any(held is one for one in optimizers):
        raise ArgumentError(
            f"{where}, a {type(friend).__name__}, works on an optimizer that was not given; pass "
            "that as optimizer=, or among the friends"
        )


def carried(
    friends: Friends,
    networks: Sequence[tuple[nn.Module, nn.Module]],
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[Any, ...]:
    """Copies of friends that belong to small networks; the given ones stay as they are.

    Args:
        friends: what `sort` returned.
        networks: the model and every copy, each with its small network.
        optimizers: the new optimizers, in the order of ``friends.optimizers``.

    Raises:
        PsapError: a friend refuses to be copied.
    """
    if not friends.given:
        return ()
    memo: dict[int, Any] = {}
    for dense, small in networks:
        memo[id(dense)] = small
        parts = dict(small.named_parameters())
        memo |= {id(p): parts[n] for n, p in dense.named_parameters() if n in parts}
    memo |= {id(a): b for a, b in zip(friends.optimizers, optimizers, strict=True)}
    made = []
    for friend in friends.given:
        try:
            made.append(copy.deepcopy(friend, memo))
        except Exception as error:
            raise PsapError(
                f"a {type(friend).__name__} among the friends cannot be copied "
                f"({type(error).__name__}: {error}); call psap.apply between two training steps, "
                "or pass inplace=True"
            ) from error
    for friend in made:
        if isinstance(friend, torch.optim.lr_scheduler.LRScheduler):
            _tell_of_steps(friend.optimizer)
    return tuple(made)


def _tell_of_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer note that it was stepped: schedulers warn if it was not.

    Their constructor sees to that, but it would also set the learning rate.
    """
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    held = weakref.ref(optimizer)
    step: Callable[..., Any] = type(optimizer).step

    @functools.wraps(step)
    def noted(*args: Any, **options: Any) -> Any:
        own = held()
        own._opt_called = True  # type: ignore[union-attr]
        return step(own, *args, **options)

    noted._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = noted  # type: ignore[method-assign]
