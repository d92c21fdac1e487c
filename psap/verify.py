"""The proof that the small network computes what the masked dense network computes.

Both are made from one float64 copy of the user's model whose norm statistics and affine pairs are
random, so that nothing passes by accident (fresh batch norms are the identity; many nets start a
residual branch with gamma = 0). They are compared in evaluation and in train mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from psap.copying import deep_copy
from psap.decisions import Decisions
from psap.errors import PsapError, VerificationError
from psap.graph.groups import no_collection
from psap.graph.outputs import NoDropout, output_tensors
from psap.plans import Plan
from psap.untouched import untouched

TOLERANCE = 1e-9
"""Largest relative error in float64."""


@dataclass(frozen=True)
class Verification:
    """The outcome of a proof.

    Attributes:
        max_relative_error: largest difference of an output over the largest output, float64.
        dtype: dtype of the comparison.
        modes: which modes of the model were compared.
        mode: "module" or "graph", how the small network was made.
    """

    max_relative_error: float
    dtype: str
    modes: tuple[str, ...]
    mode: str


def verify(
    model: nn.Module,
    plan: Plan,
    inputs: tuple[Any, ...],
    make: Callable[[nn.Module], nn.Module],
    zero_: Callable[[nn.Module, Plan], None],
    mode: str,
) -> Verification:
    """Compare the masked and the small network on copies.

    Args:
        model: the dense model; it is not changed.
        plan: the plan.
        inputs: example inputs; floating ones are replaced by random numbers of their shape.
        make: builds the small network from a dense one.
        zero_: masks a dense network in place.
        mode: how ``make`` works, for the record.

    Raises:
        VerificationError: the outputs differ, or the small network fails; names the first layer.
    """
    with untouched(model):
        generator = torch.Generator().manual_seed(0)
        masked = randomised(model, generator)
        small = _made(make, masked)
        zero_(masked, plan)
        batch = _random_inputs(inputs, generator)
        worst, modes, failure = 0.0, [], ""
        for training in (False, True):
            name = "train" if training else "eval"
            decided = Decisions(None, TOLERANCE)
            try:
                with decided:
                    wanted = _run(masked, batch, training)
            except Exception as error:  # the dense network itself cannot run in this mode
                failure = f"{type(error).__name__}: {error}"
                continue
            if not any(x.numel() for x in wanted):
                failure = failure or "it returns no number, so that there is nothing to compare"
                continue
            worst = max(worst, _compare(masked, small, plan, batch, training, wanted, decided))
            modes.append(name)
    if not modes:
        raise VerificationError(
            f"the dense network itself failed on random float64 inputs: {failure}; pass "
            "check=False to go without the proof"
        )
    return Verification(worst, "float64", tuple(modes), mode)


def require_finite(model: nn.Module) -> None:
    """Check that there is something to prove: every weight and running statistic is a number.

    Raises:
        VerificationError: one is not.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            tensors[name] = buffer
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta:
            total = float(tensor.detach().sum(dtype=torch.float64))  # a copy of no tensor
            if not math.isfinite(total):
                raise VerificationError(
                    f"{name} holds values that are not finite, so nothing can be proven of the "
                    "model; go back to a checkpoint from before"
                )


def _made(make: Callable[[nn.Module], nn.Module], dense: nn.Module) -> nn.Module:
    try:
        return make(dense)
    except VerificationError:
        raise
    except Exception as error:
        raise VerificationError(f"building failed with {type(error).__name__}: {error}") from error


@torch.no_grad()
def randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A float64 copy with random norms, and no parameter that is the same number everywhere."""
    dense = copied(model).double()
    for module in dense.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for name in ("weight", "bias", "running_mean", "running_var"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    _randomise(tensor, name in ("weight", "running_var"), generator)
    for parameter in dense.parameters():
        if parameter.is_floating_point() and parameter.numel():
            first = parameter.reshape(-1)[0]
            if bool((parameter == first).all()):
                _randomise(parameter, bool(first != 0), generator)
    return dense


def _randomise(tensor: Tensor, positive: bool, generator: torch.Generator) -> None:
    numbers = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    tensor.copy_(numbers + (0.5 if positive else -0.5))


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy.

    Args:
        model: the model.
        memo: replacements of objects by ``id``.

    Raises:
        PsapError: something in the model refuses to be copied.
    """
    memo = {} if memo is None else memo
    for module in model.modules():  # what an older weight norm left there; its hook makes it anew
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        with no_collection():  # which would look at all that is there again and again
            return deep_copy(model, memo)
    except Exception as error:
        raise PsapError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); remove "
            "what copy.deepcopy refuses, such as open files or tensors that were computed"
        ) from error


def _random_inputs(inputs: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    """Random float64 inputs, at least two of them where the inputs are a batch of one.

    Every other sample is large, so that no bias keeps an activation function on one of its sides.
    """
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()]
    single = bool(tensors) and all(x.shape[0] == 1 for x in tensors)

    def made(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = [2, *x.shape[1:]] if single and x.dim() else list(x.shape)
        if x.is_floating_point():
            numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
            if numbers.dim():
                numbers[1::2] *= 8
            return numbers.to(x.device)
        return x.expand(shape).clone()

    result: tuple[Any, ...] = tree_map(made, inputs)
    return result


def _run(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> list[Tensor]:
    """All outputs; of a second pass too, and its counters, where a pass changes buffers."""
    norms = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for key in module._buffers
    }
    with untouched(model), NoDropout():
        model.train(training)
        torch.manual_seed(0)
        own = {n: b.clone() for n, b in model.named_buffers() if n not in norms}
        outputs = output_tensors(model(*inputs))
        now = dict(model.named_buffers())
        moved = [n for n, before in own.items() if not torch.equal(now[n], before)]
        if moved:
            outputs += output_tensors(model(*inputs))
            outputs += [now[n].clone() for n in moved if not now[n].dim()]
        return outputs


def _forward(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> list[Tensor] | None:
    try:
        return _run(model, inputs, training)
    except Exception:
        return None


def _compare(
    masked: nn.Module,
    small: nn.Module,
    plan: Plan,
    inputs: tuple[Any, ...],
    training: bool,
    wanted: list[Tensor],
    decided: Decisions,
) -> float:
    mode = "train" if training else "eval"
    try:
        with Decisions(decided.made, TOLERANCE):
            got = _run(small, inputs, training)
    except Exception as error:
        where = _first_difference(masked, small, plan, inputs, training)
        raise VerificationError(
            f"the small network fails in {mode} mode with {type(error).__name__}: "
            f"{str(error).splitlines()[0]}{where}"
        ) from error
    off = _relative_error(wanted, got)
    if not off <= TOLERANCE:
        where = _first_difference(masked, small, plan, inputs, training)
        raise VerificationError(
            f"the small network differs from the masked one by {off:.2e} (relative, {mode} mode, "
            f"float64; at most {TOLERANCE:.0e} is allowed){where}"
        )
    return off


def _relative_error(wanted: list[Tensor], got: list[Tensor]) -> float:
    if not wanted or [x.shape for x in wanted] != [x.shape for x in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        if a.is_floating_point() and a.numel():
            scale = float(a.abs().max())
            difference = float((a - b).abs().max())
            if difference != 0:  # NaN counts as a difference
                worst = max(worst, difference / scale if scale else float("inf"), key=_nan_last)
        elif not torch.equal(a, b):
            return float("inf")
    return worst


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Outputs of all leaf modules while the block runs, in order of execution."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if not list(module.children()):

            def record(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
                if isinstance(out, Tensor):
                    outputs[name] = out

            handles.append(module.register_forward_hook(record))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(
    masked: nn.Module, small: nn.Module, plan: Plan, inputs: tuple[Any, ...], training: bool
) -> str:
    """Name the first layer whose kept outputs differ, or at which the small network stops."""
    kept = {s.name.rpartition(".")[0]: s.kept for s in plan.sides if s.role == "out"}
    with _recorded(masked) as wanted:
        _forward(masked, inputs, training)
    with _recorded(small) as got:
        _forward(small, inputs, training)
    for name, output in wanted.items():
        other = got.get(name)
        if other is None:
            return f"; it stops at {name}"
        output = _kept_part(output, other, kept.get(name, ()))
        own = next(masked.get_submodule(name).parameters(recurse=False), None)
        if output.shape != other.shape and own is None:
            continue  # nobody knows which of its channels stay
        if output.shape != other.shape or not _relative_error([output], [other]) <= TOLERANCE:
            return f"; the first layer that differs is {name}"
    return "; the difference comes after the last layer"


def _kept_part(output: Tensor, other: Tensor, kept: tuple[int, ...]) -> Tensor:
    """The kept channels of a layer's output, in the one dimension that became smaller."""
    sizes = list(zip(output.shape, other.shape, strict=False))
    smaller = [dim for dim, (a, b) in enumerate(sizes) if a != b]
    if not kept or len(smaller) != 1 or output.dim() != other.dim():
        return output
    dim = smaller[0]
    if other.shape[dim] != len(kept) or output.shape[dim] <= kept[-1]:
        return output
    return output.index_select(dim, torch.tensor(kept, device=output.device))
