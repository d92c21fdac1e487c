"""Carry out a plan: plan, check, commit. The caller's objects change only if everything holds."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import psap_kernels
from psap import branches, hazards, optim
from psap import friends as friends_
from psap.calling import called
from psap.commit import commit
from psap.copying import copied
from psap.errors import ArgumentError, ArgumentTypeError, VerificationError
from psap.graph.groups import no_collection
from psap.graph.inputs import Inputs, as_inputs, check_model
from psap.inputspec import zeros
from psap.members import all_tensors, named_modules
from psap.plans import Block, Plan, fingerprint
from psap.program import program
from psap.ranks import Ranks
from psap.refitting import refit, refit_bare
from psap.untouched import trainable
from psap.verify import Verification, require_finite, verify

Mode = Literal["auto", "module", "graph"]


@dataclass(frozen=True)
class Result:
    """What `psap.apply` and `Pruner.finish` return.

    Attributes:
        model: the small network.
        optimizer: the optimizer of the small network, with all of its state, or None.
        plan: what was carried out.
        mode: "module" or "graph", how the small network was made.
        inputs: the example inputs, for exporting.
        report: facts about the run as JSON values: verification, and the events of a `Pruner`.
        friends: what was given as ``friends``, for the small network, in the same order.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    plan: Plan
    mode: Literal["module", "graph"]
    inputs: Inputs | None
    report: dict[str, Any]
    friends: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        optimizer = "no optimizer" if self.optimizer is None else type(self.optimizer).__name__
        return f"Result({type(self.model).__name__}, {optimizer}, {self.mode} mode, {self.plan})"


def check_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Check that a plan was made for this architecture.

    Returns:
        The model, without the wrapper of ``torch.compile``.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        ArgumentError: the plan belongs to another model; names the first difference.
    """
    model = check_model(model)
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(f"plan is a {type(plan).__name__}; pass what psap.plan returned")
    difference = other_model(model, plan)
    if difference:
        raise ArgumentError(
            f"the plan was made for another model: {difference}; make a new plan with "
            "psap.plan(psap.trace(model, example_inputs), ...)"
        )
    return model


def other_model(model: nn.Module, plan: Plan) -> str:
    """The first difference between a model and that of a plan, in words; "" if there is none."""
    tensors = all_tensors(model)
    for side in plan.sides:
        tensor = tensors.get(side.name)
        if tensor is None:
            return f"this {type(model).__name__} has no {side.name!r}"
        if not 0 <= side.dim < tensor.dim() or tensor.shape[side.dim] != side.size:
            return (
                f"{side.name} has shape {tuple(tensor.shape)}, the plan expects {side.size} along "
                f"dimension {side.dim}"
            )
    for block in plan.dropped:
        if lost := [name for name in block.tensors if name not in tensors]:
            return f"this {type(model).__name__} has no {lost[0]!r}"
    same = plan.architecture == fingerprint(model, tensors)
    return "" if same else "the names or shapes of its parameters differ"


def gather(tensor: Tensor, kept: Mapping[int, tuple[int, ...]]) -> Tensor:
    """The kept positions of a tensor, along any of its dimensions.

    Args:
        tensor: any shape and dtype.
        kept: positions that stay, by dimension.

    Returns:
        A new contiguous or channels_last tensor; a copy if nothing goes.
    """
    return gather_all([tensor], [kept])[0]


@torch.no_grad()
def gather_all(
    tensors: Sequence[Tensor], kept: Sequence[Mapping[int, tuple[int, ...]]]
) -> list[Tensor]:
    """The same for many tensors at once: one call of the kernel per device and dtype."""
    indices: dict[tuple[Any, ...], Tensor] = {}

    def index(positions: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
        if positions is None:
            return None
        key = (positions, device)
        if key not in indices:
            indices[key] = torch.tensor(positions, dtype=torch.int64, device=device)
        return indices[key]

    small = [t.detach().clone() if t.dim() == 0 else t.detach() for t in tensors]
    alike: dict[tuple[Any, ...], list[int]] = {}
    for at, tensor in enumerate(small):
        if tensor.dim():
            alike.setdefault((tensor.device, tensor.dtype), []).append(at)
    for (device, _), members in alike.items():
        cut = psap_kernels.shrink(
            [small[at] for at in members],
            [index(kept[at].get(0), device) for at in members],
            [index(kept[at].get(1), device) for at in members],
        )
        for at, tensor in zip(members, cut, strict=True):
            for dim in sorted(d for d in kept[at] if d > 1):
                tensor = tensor.index_select(dim, index(kept[at][dim], device))  # type: ignore[arg-type]
            small[at] = tensor
    return small


@called("psap.mask(model, plan)")
@trainable
def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """The dense network with the plan's channels set to zero: what the small one must equal.

    What *makes* a channel is zeroed (filters, biases, affine pairs of norms, running means). What
    reads it is not, so the comparison proves that pruned channels really are silent; except what
    reads a channel that does not stay zero on its way (after a sigmoid). Of a residual branch that
    goes, all parameters are zeroed.

    Args:
        model: the dense model; it is not changed.
        plan: what `psap.plan` returned.

    Returns:
        A copy of the model.

    Raises:
        ArgumentError: the plan belongs to another model.
    """
    model = check_plan(model, plan)
    masked = copied(model)
    zero_(masked, plan)
    return masked


@torch.no_grad()
def zero_(model: nn.Module, plan: Plan) -> None:
    """Set what makes the plan's pruned channels to exact zero, in place."""
    tensors = all_tensors(model)
    targets, keeps = [], []
    for side in plan.sides:
        if side.role in ("out", "cut"):
            keep = torch.zeros(side.size, dtype=torch.bool)
            keep[list(side.kept)] = True
            target = tensors[side.name].detach()
            targets.append(target.movedim(side.dim, 0))
            keeps.append(keep.to(target.device))
    psap_kernels.zero_filters_(targets, keeps)
    silence(tensors, plan.dropped)


@torch.no_grad()
def silence(tensors: Mapping[str, Tensor], blocks: Sequence[Block]) -> None:
    """Set the weights of residual branches to zero, in place.

    Args:
        tensors: those of the model, by name.
        blocks: the branches.
    """
    for name in (name for block in blocks for name in block.tensors):
        kind = name.rpartition(".")[2]
        zeroed = isinstance(tensors[name], nn.Parameter) and kind not in _DIRECTIONS
        if zeroed or kind == "running_mean":
            tensors[name].zero_()


_DIRECTIONS = ("weight_v", "original1")
"""Of a weight norm: what it divides by."""


@no_collection()
def small_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model with the plan's channels removed from every tensor.

    Pruned tensors are never copied at full size. Parameters keep ``requires_grad``, their gradient,
    and their names; shared ones stay shared; module attributes such as ``in_channels`` follow.
    """
    kept = plan.kept()
    tensors = all_tensors(model)
    sides = [kept.get(name, {}) for name in tensors]
    grads = [(at, t.grad) for at, t in enumerate(tensors.values()) if t.grad is not None]
    parts = gather_all(
        [*tensors.values(), *(grad for _, grad in grads)], [*sides, *(sides[at] for at, _ in grads)]
    )
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(part, tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else part
        for tensor, part in zip(tensors.values(), parts, strict=False)
    }
    names = list(tensors)
    for (at, _), part in zip(grads, parts[len(tensors) :], strict=True):
        memo[id(tensors[names[at]])].grad = part
    small = copied(model, memo)
    for _, module in named_modules(small):
        refit(module)
    return small


@called("psap.apply(model, plan, optimizer=optimizer)")
@trainable
def apply(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    friends: Sequence[Any] = (),
    example_inputs: Any = None,
    mode: Mode = "auto",
    check: bool = True,
    inplace: bool = False,
) -> Result:
    """Make the small network of a plan, and prove that it equals the masked dense one.

    The caller's model and optimizer stay as they are; the result holds new ones. With ``inplace``
    they are changed instead, after the proof, so that schedulers, scalers and other holders of
    references go on working.

    Args:
        model: the dense model that the plan was made for.
        plan: what `psap.plan` returned.
        optimizer: its optimizer; momentum and all other state goes with the channels.
        friends: what else belongs to the training: further optimizers, LR schedulers, a
            ``GradScaler``, averaged copies (``AveragedModel``, timm's ``ModelEmaV3``, any module
            that is or wraps a copy of the model). ``result.friends`` holds those of the small
            network; with ``inplace`` they are the same objects.
        example_inputs: inputs for the proof; by default what the model was traced with.
        mode: "module" cuts the tensors of the user's own modules; "graph" also rewrites sizes that
            forward() fixes in Python, and gives a ``torch.fx.GraphModule``; "auto" tries the first
            and takes the second if it must.
        check: prove shrunk == masked in float64, in evaluation and in train mode. Without it, a
            forward that fixes sizes goes unnoticed. ``report["verification"]["silent"]`` names
            layers that gave the same for all random inputs: of those the proof says little.
        inplace: change the caller's model and optimizer. A module whose forward() becomes a program
            stays the same object, but its class is then ``torch.fx.GraphModule``.

    Returns:
        The small model, its optimizer, the plan, and the proof.

    Raises:
        ArgumentError: the plan, the optimizer or a friend belongs to another model, a value is
            unknown, or a copy of the model still runs parts of it.
        ArgumentTypeError: an argument has the wrong type.
        PsapError: state of an optimizer cannot be cut by channel, or a friend cannot be copied.
        VerificationError: the small network differs; names the first layer that does. Or the dense
            network gives the same for all inputs, so that nothing can be proved.

    Warns:
        PsapWarning: PyTorch may crash when it trains the small network further on this CPU.
    """
    if inplace:
        Ranks(model).refuse_inplace("inplace=True")
    model = check_plan(model, plan)
    if plan.dropped and (inplace or mode == "module"):
        raise ArgumentError(
            "a network loses residual branches in a copy, and in graph mode; go without "
            "inplace=True and mode='module'"
        )
    if mode not in ("auto", "module", "graph"):
        raise ArgumentError(f"mode is {mode!r}; pass 'auto', 'module' or 'graph'")
    around = friends_.sort(model, plan, optimizer, friends)
    inputs = _inputs(plan, example_inputs, model)
    small, way, proof = _build(model, plan, inputs, mode, check)
    report = {"verification": None if proof is None else vars(proof)}
    hazards.warn_unsafe(small)
    done = replace(plan, graph=None)  # the result must not keep the dense model alive
    networks = [(model, small)]
    for dense in around.copies:
        networks.append((dense, made(dense, plan, way, inputs)))
    states = [optim.shrink_state(o, around.names, _gatherer(plan)) for o in around.optimizers]
    if inplace:
        commit(networks, list(zip(around.optimizers, states, strict=True)), around.names)
        return Result(model, optimizer, done, way, inputs, report, around.given)
    gone = {name for block in plan.dropped for name in block.tensors}
    fresh = [
        optim.rebuild(o, around.names, small, state, gone)
        for o, state in zip(around.optimizers, states, strict=True)
    ]
    others = friends_.carried(around, networks, fresh)
    first = None if optimizer is None else fresh[0]
    return Result(small, first, done, way, inputs, report, others)


def made(
    dense: nn.Module,
    plan: Plan,
    mode: str,
    inputs: Inputs | None,
    notes: list[str] | None = None,
) -> nn.Module:
    """The small network of the model of a plan, or of one that is built alike, on its own device.

    Args:
        dense: the dense network; it is not changed.
        plan: the plan.
        mode: "module" or "graph".
        inputs: example inputs, on any device.
        notes: gets what `program` has to say.
    """
    if mode == "module":
        small = small_copy(dense, plan)
        return refit_bare(small, inputs)
    device = next(dense.parameters()).device
    if any(x.device != device for x in tree_leaves(inputs) if isinstance(x, Tensor)):
        # only then: `program` knows the inputs of the trace by their identity
        inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)
    assert inputs is not None
    if plan.dropped:
        return branches.without(dense, [block.name for block in plan.dropped], inputs)
    return refit_bare(program(dense, plan, inputs, small_copy, notes), inputs)


def _gatherer(plan: Plan) -> optim.Gather:
    kept = plan.kept()
    return lambda names, tensors: gather_all(tensors, [kept.get(name, {}) for name in names])


def _inputs(plan: Plan, example_inputs: Any, model: nn.Module) -> Inputs | None:
    if example_inputs is not None:
        return as_inputs(example_inputs)
    if plan.graph is not None:
        return plan.graph.inputs
    return zeros(plan.inputs, next(model.parameters()).device)


def _build(
    model: nn.Module, plan: Plan, inputs: Inputs | None, mode: Mode, check: bool
) -> tuple[nn.Module, Literal["module", "graph"], Verification | None]:
    """The small network in the first mode whose proof holds."""
    if inputs is None and (check or mode == "graph" or plan.dropped):
        raise ArgumentError("the plan does not hold example inputs; pass example_inputs=...")
    notes: list[str] = []
    if plan.counted and mode == "module":
        raise VerificationError(
            "a norm counts channels that go: use mode='graph', or "
            "psap.trace(model, example_inputs, gated=True), which leaves them alone"
        )
    modes: list[Literal["module", "graph"]] = []
    if mode in ("auto", "module") and not plan.counted and not plan.dropped:
        modes.append("module")
    if mode in ("auto", "graph") and inputs is not None:
        modes.append("graph")
    failures = []
    if check:
        require_finite(model)
    for name in modes:
        make = functools.partial(made, plan=plan, mode=name, inputs=inputs, notes=notes)
        try:
            proof = verify(model, plan, inputs or (), make, zero_, name) if check else None
            return make(model), name, proof
        except VerificationError as error:
            left = [note for note in dict.fromkeys(notes) if note not in str(error)]
            failures.append("; ".join([f"{name} mode: {error}", *left]))
    if plan.counted:
        failures.append(
            "psap.trace(model, example_inputs, gated=True) leaves alone what norms count, so that "
            "no graph mode is needed"
        )
    raise VerificationError("the small network was refused. " + "; ".join(failures))
