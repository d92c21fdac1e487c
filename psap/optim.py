"""Carry an optimizer's state through a change of widths; hooks of a pruner in an optimizer."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from psap.errors import ArgumentError, ArgumentTypeError, PsapError, PsapWarning, StateError
from psap.hooktime import HookTime

Gather = Callable[[Sequence[str], Sequence[Tensor]], Sequence[Tensor]]
"""Takes names of parameters and a tensor of the shape of each; returns their kept parts."""

_WAYS_OUT = (
    "use an optimizer whose state has the shapes of the parameters, such as SGD or AdamW; or go "
    "without (apply(optimizer=None), Pruner(keep_optimizer=False) or finish(keep_optimizer=False)) "
    "and make a new optimizer for result.model"
)


def check_optimizer(optimizer: Any, model: nn.Module) -> dict[int, str]:
    """Check that an optimizer trains this model.

    Returns:
        The names of the model's parameters by ``id``.

    Raises:
        ArgumentTypeError: it is no optimizer.
        ArgumentError: it trains none of the model's parameters, or foreign ones.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentTypeError(
            f"optimizer is a {type(optimizer).__name__}; pass the torch.optim.Optimizer "
            "of the model"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    known = [p for p in trained if id(p) in names]
    if not known:
        raise ArgumentError(
            "the optimizer trains none of this model's parameters; make it from model.parameters()"
        )
    if len(known) < len(trained):
        raise ArgumentError(
            f"the optimizer also trains {len(trained) - len(known)} parameters of another model; "
            "use one optimizer per model"
        )
    return names


def shrink_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], gather: Gather
) -> dict[str, Any]:
    """The optimizer's state of every parameter at its new shape, by parameter name.

    Tensors of the parameter's shape (momentum, moments, averages) are gathered like the parameter;
    single numbers (step counts) are copied.

    Raises:
        PsapError: a state tensor has another shape, so that nobody knows what belongs to a channel,
            or the optimizer keeps tensors that no parameter owns.
    """
    _own_attributes(optimizer)
    result: dict[str, Any] = {}
    places: list[tuple[str, str]] = []
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        result[name] = {k: _entry(name, k, v, parameter) for k, v in state.items()}
        places += [(name, k) for k, v in result[name].items() if v is None and state[k] is not None]
    owners = {names[id(p)]: state for p, state in optimizer.state.items()}
    cut = gather([name for name, _ in places], [owners[name][key] for name, key in places])
    for (name, key), part in zip(places, cut, strict=True):
        result[name][key] = part
    return result


def check_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Check that `shrink_state` will be able to cut the state that the optimizer has now.

    Raises:
        ArgumentError: the optimizer also trains another model.
        PsapError: it will not.
    """
    shrink_state(optimizer, check_optimizer(optimizer, model), lambda _, tensors: tensors)


def _entry(name: str, key: str, value: Any, parameter: Tensor) -> Any:
    """A copy of what does not shrink; None for a tensor of the parameter's shape, which does."""
    if not isinstance(value, Tensor):
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            raise PsapError(
                f"the optimizer keeps tensors inside {key!r} for {name}, and nobody knows what of "
                f"them belongs to a channel; {_WAYS_OUT}"
            )
        return copy.deepcopy(value)
    if value.shape == parameter.shape:
        return None
    if value.numel() == 1:
        return value.clone()
    raise PsapError(
        f"the optimizer keeps {key!r} of shape {tuple(value.shape)} for {name} of shape "
        f"{tuple(parameter.shape)}, which cannot be cut by channel; {_WAYS_OUT}"
    )


def rebuild(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    model: nn.Module,
    state: Mapping[str, Any],
    gone: Collection[str] = (),
) -> torch.optim.Optimizer:
    """A new optimizer of the same class, options and group order for the small model.

    Args:
        optimizer: the optimizer of the dense model; it is not changed.
        names: names of the dense parameters by ``id``.
        model: the small model.
        state: what `shrink_state` returned.
        gone: names of parameters that are trained no more.

    Raises:
        PsapError: the optimizer trains another parameter that the small model does not have.
    """
    small = dict(model.named_parameters(remove_duplicate=False))
    lost = [name for name in names.values() if name not in small and name not in gone]
    if lost and any(names[id(p)] in lost for g in optimizer.param_groups for p in g["params"]):
        raise PsapError(
            f"the optimizer trains {lost[0]}, which the small model does not use; go without "
            "(apply(optimizer=None) or finish(keep_optimizer=False)) and make a new optimizer for "
            "result.model"
        )
    fresh: torch.optim.Optimizer = type(optimizer).__new__(type(optimizer))
    groups = [
        {
            k: [small[names[id(p)]] for p in v if names[id(p)] not in gone]
            if k == "params"
            else copy.deepcopy(v)
            for k, v in group.items()
        }
        for group in optimizer.param_groups
    ]
    body = {**_own_attributes(optimizer), **optimizer.__getstate__()}
    body["param_groups"] = groups
    body["state"] = type(optimizer.state)(optimizer.state.default_factory)
    for name, entries in state.items():
        if name not in gone:
            body["state"][small[name]] = entries
    fresh.__setstate__(body)
    return fresh


def _own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a class of optimizer keeps besides state and groups; not hooks and wrapped methods.

    Raises:
        PsapError: it keeps tensors, or something that holds parameters: those of the dense model.
    """
    known = optimizer.__getstate__()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {}
    for key, value in vars(optimizer).items():
        if key in known or key.startswith("_optimizer_") or callable(value):
            continue
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            raise PsapError(
                f"{type(optimizer).__name__} keeps tensors in {key!r}, which cannot be cut by "
                f"channel; {_WAYS_OUT}"
            )
        memo: dict[int, Any] = {}
        own[key] = copy.deepcopy(value, memo)
        if not trained.isdisjoint(memo):
            raise PsapError(
                f"{type(optimizer).__name__} keeps a {type(value).__name__} in {key!r}, which "
                "would go on to hold the old parameters; pass that as the optimizer, if it is one, "
                f"and wrap result.optimizer anew; or {_WAYS_OUT}"
            )
    return own


class _WeakHook:
    """Calls a method as long as its object lives; does not keep the object alive."""

    def __init__(self, method: MethodType, times: HookTime) -> None:
        self.method, self.times = weakref.WeakMethod(method), times

    def __call__(self, *args: Any) -> Any:
        method = self.method()
        return None if method is None else self.times.hook(method, *args)


class _Left:
    """Before the first step of an optimizer that a small network has left behind: warns."""

    def __init__(self, optimizer: torch.optim.Optimizer, advice: str) -> None:
        self.advice = advice
        self.handle = optimizer.register_step_pre_hook(self)

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.handle.remove()
        warnings.warn(
            f"a step of the {type(optimizer).__name__} from before finish(), which trains the old "
            f"network: nothing of result.model changes. {self.advice}; finish(inplace=True) would "
            "have kept this one",
            PsapWarning,
            stacklevel=3,
        )


class _Scheduled:
    """Before steps of an optimizer: warns, once, if it is the one before it that is scheduled.

    Args:
        optimizer: the one whose place it has taken.
        kept: the optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, kept: torch.optim.Optimizer) -> None:
        self.former, self.rates = weakref.ref(optimizer), _rates(optimizer)
        self.handle = kept.register_step_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        former = self.former()
        if former is not None and _rates(former) == self.rates:
            return
        self.handle.remove()
        if former is not None:
            warnings.warn(
                f"the learning rate of the {type(former).__name__} from before finish() changes, "
                "and that of result.optimizer does not: a scheduler still drives the old one. Go "
                "on with result.friends[0] of finish(friends=[scheduler]), or make a new scheduler",
                PsapWarning,
                stacklevel=3,
            )


def _rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """The learning rates that are plain numbers: what a tensor holds, a GPU must be asked for."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return [rate for rate in rates if isinstance(rate, (int, float))]


def leave(
    optimizer: torch.optim.Optimizer, kept: torch.optim.Optimizer | None, friends: Sequence[Any]
) -> None:
    """Let optimizers warn, once, if they or their schedulers go on after small networks came.

    Args:
        optimizer: that of the model.
        kept: what goes on in its place.
        friends: what was carried along; optimizers among them warn too.
    """
    with_new = "Make a new optimizer from result.model.parameters()"
    _Left(optimizer, with_new if kept is None else "Go on with result.optimizer")
    if kept is not None:
        _Scheduled(optimizer, kept)
    for at, friend in enumerate(friends):
        if isinstance(friend, torch.optim.Optimizer) and friend is not optimizer:
            _Left(friend, f"Go on with result.friends[{at}]")


def require_alone(optimizer: torch.optim.Optimizer) -> None:
    """Check that no living object is attached.

    Raises:
        StateError: one is.
    """
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(hook, _WeakHook) and hook.method() is not None for hook in hooks):
        raise StateError(
            "another Pruner already works on this optimizer; call its finish(), or its close() to "
            "give it up (in a notebook: pruner.close(), then run the cell again), or make a new "
            "optimizer"
        )


def attach(
    optimizer: torch.optim.Optimizer,
    before: Callable[..., Any],
    after: Callable[..., Any],
    times: HookTime,
) -> list[RemovableHandle]:
    """Let an object's methods run before and after every step, until it is deleted.

    Args:
        optimizer: the optimizer.
        before: bound method, a hook before the step.
        after: bound method of the same object, a hook after the step.
        times: where their time is counted.

    Returns:
        Handles that remove the hooks.
    """
    assert isinstance(before, MethodType) and isinstance(after, MethodType)
    left = [h for h in optimizer._optimizer_step_pre_hooks.values() if isinstance(h, _Left)]
    detach([hook.handle for hook in left])  # its network is pruned once more
    handles = [
        optimizer.register_step_pre_hook(_WeakHook(before, times)),
        optimizer.register_step_post_hook(_WeakHook(after, times)),
    ]
    weakref.finalize(before.__self__, detach, handles).atexit = False
    return handles


def detach(handles: list[RemovableHandle]) -> None:
    """Remove the hooks that `attach` made."""
    for handle in handles:
        handle.remove()


def reading(
    args: tuple[Any, ...], kwargs: dict[str, Any], read: Callable[[bool], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """In a hook before a step: read the gradients once they are complete.

    Args:
        args: positional arguments of the step, the optimizer first.
        kwargs: its keyword arguments.
        read: called at once, or after every call of the step's closure; with True the first time.

    Returns:
        What the hook shall return: arguments with a closure that reads, or None.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        read(True)
        return None
    first = True

    def closed() -> Any:
        nonlocal first
        loss = closure()
        read(first)
        first = False
        return loss

    return args[:1], {**kwargs, "closure": closed}
