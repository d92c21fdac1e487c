"""Depth pruning: a network that loses whole residual branches before it loses channels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from psap.branches import branches
from psap.calling import called
from psap.choices import check_whole, within
from psap.copying import copied
from psap.cost import CostModel, LayerCost
from psap.errors import ArgumentError, ArgumentTypeError, PsapWarning, VerificationError
from psap.graph import Graph, trace
from psap.graph.inputs import Inputs, as_inputs, check_model
from psap.inputspec import specs
from psap.members import all_tensors
from psap.plans import DROPPED, Block, Plan, fingerprint
from psap.ranks import Ranks
from psap.shrink import Result, apply, made, silence
from psap.untouched import trainable, untouched

Loss = Callable[[nn.Module], float]


@called("psap.drop_blocks(model, example_inputs, evaluate=loss)")
@trainable
def drop_blocks(
    model: nn.Module,
    example_inputs: Any,
    *,
    evaluate: Loss | None = None,
    blocks: Sequence[str] | None = None,
    tolerance: float = 0.5,
    most: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    friends: Sequence[Any] = (),
    check: bool = True,
) -> Result:
    """Remove residual branches, whole: the network gets less deep, hence faster at any batch size.

    A residual branch is what a forward() adds to a shortcut that has no weights: the convolutions
    of a ResNet block, the attention or the MLP of a transformer block. Do this before a `Pruner` is
    made, then prune the channels of ``result.model``, train, and it recovers (docs/method.md,
    section 7); ``config.target.after(result)`` is what is left of a target.

    Give either a loss, or names. With a loss, the branch whose removal costs least loss per share
    of the MACs goes first, as long as the loss stays below ``1 + tolerance`` times that of the
    whole network: where every branch matters (ResNet-20) none goes.

    Args:
        model: an eager ``nn.Module``; it is not changed.
        example_inputs: as for `psap.trace`.
        evaluate: called with a copy of the model in evaluation mode, returns a positive loss, lower
            is better: the mean loss over a thousand training images, for example. It is called
            about once for each branch, and a few times more for each one that goes.
        blocks: names of branches, or of modules that hold them, or patterns such as "layer3.*".
        tolerance: how much the loss may rise, as a share of that of the whole network, >= 0.
        most: no more than so many branches go.
        optimizer: as for `psap.apply`; state of what goes is forgotten.
        friends: as for `psap.apply`.
        check: prove that the network equals the whole one whose branches have zeros as weights.

    Returns:
        The smaller network. ``report["blocks"]`` tells the loss without any branch gone, and after
        each; the plan, what went.

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        ArgumentError: a value is out of range, a name is that of no branch, or the loss is not
            positive and finite.
        TraceError: the model failed on the inputs.
        VerificationError: without a branch the network is not what it shall be.

    Warns:
        PsapWarning: the model has no residual branch, or one that the loss has chosen cannot go.
    """
    _check(model, evaluate, blocks, tolerance, most)
    model = check_model(model)
    inputs = as_inputs(example_inputs)
    graph = trace(model, inputs)
    cost = CostModel(graph)
    known = [branch.block for branch in branches(model, inputs)]
    report: list[dict[str, Any]] = []
    if evaluate is None:
        chosen = _named(known, blocks or ())
    else:
        _warn_if_none(model, known)
        macs = {x.weight: x.macs / max(1, cost.dense.macs) for x in cost.layers(cost.sizes)}
        measured = _Measured(model, evaluate)
        chosen = _least(measured, known, macs, tolerance, most, report) if known else []

    def result_of(going: Sequence[Block]) -> Result:
        plan = _plan(graph, cost, going, inputs)
        return apply(
            model, plan, optimizer=optimizer, friends=friends, example_inputs=inputs, check=check
        )

    try:
        result = result_of(chosen)
    except VerificationError:
        held = [block for block in chosen if _holds(graph, cost, block, inputs)]
        if evaluate is None or len(held) == len(chosen):
            raise
        refused = {block.name for block in chosen} - {block.name for block in held}
        warnings.warn(
            f"{', '.join(sorted(refused))} cannot go: without it the network is not the one whose "
            "weights there are zeros; psap.drop_blocks(model, x, blocks=[...]) says why",
            PsapWarning,
            stacklevel=4,
        )
        report = [entry for entry in report if entry["block"] not in refused]
        result = result_of(held)
    result.report["blocks"] = report
    return result


def _warn_if_none(model: nn.Module, known: Sequence[Block]) -> None:
    if not known:
        warnings.warn(
            f"{type(model).__name__} has no residual branch that can be dropped: nothing is added "
            "to a shortcut without weights in a forward() that torch.fx can trace",
            PsapWarning,
            stacklevel=6,
        )


def _holds(graph: Graph, cost: CostModel, block: Block, inputs: Inputs) -> bool:
    """Whether a network without one branch is proved."""
    try:
        apply(graph.model, _plan(graph, cost, [block], inputs), example_inputs=inputs)
    except VerificationError:
        return False
    return True


def _plan(graph: Graph, cost: CostModel, chosen: Sequence[Block], inputs: Inputs) -> Plan:
    """The plan that drops blocks; what is left is traced for its cost."""
    layers = cost.layers(cost.sizes)
    plan = Plan(
        architecture=fingerprint(graph.model),
        groups=(),
        sides=(),
        before=cost.dense,
        after=cost.dense,
        layers=tuple(zip(layers, layers, strict=True)),
        left_alone={},
        inputs=specs(graph.inputs),
        dropped=tuple(chosen),
        without=vars(graph.model).get(DROPPED, ()),
    )
    if not chosen:
        return plan
    small = CostModel(trace(made(graph.model, plan, "graph", inputs), inputs))
    left = {layer.weight: layer for layer in small.layers(small.sizes)}
    after = [left.get(a.weight, LayerCost(a.weight, (0,) * len(a.shape), 0)) for a in layers]
    return replace(plan, after=small.dense, layers=tuple(zip(layers, after, strict=True)))


def _check(model: Any, evaluate: Any, blocks: Any, tolerance: Any, most: Any) -> None:
    if (evaluate is None) == (blocks is None):
        raise ArgumentError("give either evaluate=loss or blocks=['layer1.3'], and not both")
    if blocks is not None and most is not None:
        raise ArgumentError("most is for evaluate=loss; of blocks all go that are named")
    if evaluate is not None and (not callable(evaluate) or isinstance(evaluate, nn.Module)):
        raise ArgumentTypeError("evaluate must be a function that takes a model and returns a loss")
    named = isinstance(blocks, Sequence) and not isinstance(blocks, str)
    if blocks is not None and not (named and all(isinstance(name, str) for name in blocks)):
        raise ArgumentTypeError(f"blocks is {blocks!r}; pass a list of names: ['layer1.3']")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise ArgumentTypeError(f"tolerance is {tolerance!r}; pass a number >= 0")
    if not 0 <= tolerance < math.inf:
        raise ArgumentError(f"tolerance is {tolerance!r}; pass a number >= 0")
    if most is not None:
        check_whole("most", most, 0)
    if evaluate is not None and Ranks(model).distributed:
        raise ArgumentError(
            "every process would measure another loss; drop blocks before the model is wrapped in "
            "DistributedDataParallel, by names (blocks=[...])"
        )


def _named(known: Sequence[Block], wanted: Sequence[str]) -> list[Block]:
    """The branches that names and patterns mean, in the order of the model."""
    found: set[str] = set()
    for pattern in wanted:
        hit = {b.name for b in known if any(fnmatchcase(p, pattern) for p in within(b.name))}
        if not hit:
            names = ", ".join(block.name for block in known) or "none that can be dropped"
            raise ArgumentError(f"blocks names {pattern!r}, which is no residual branch: {names}")
        found |= hit
    return [block for block in known if block.name in found]


class _Measured:
    """Losses of a copy of a model in which branches are silenced.

    Args:
        model: the model.
        evaluate: gives the loss.
    """

    def __init__(self, model: nn.Module, evaluate: Loss) -> None:
        self._model, self._evaluate = copied(model), evaluate

    def __call__(self, silenced: Sequence[Block]) -> float:
        """The loss without some branches; infinite where it is no number.

        Raises:
            ArgumentTypeError: it is no number by its type.
        """
        with _silenced(self._model, silenced), untouched(self._model):
            before = [p._version for p in self._model.parameters()]
            value = self._evaluate(self._model.eval())
            if before != [p._version for p in self._model.parameters()]:
                raise ArgumentError("evaluate has changed the weights of the model; only measure")
        try:
            loss = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentTypeError(
                f"evaluate returned a {type(value).__name__}; return the loss as a number"
            ) from error
        return loss if math.isfinite(loss) else math.inf


@contextmanager
def _silenced(model: nn.Module, blocks: Sequence[Block]) -> Iterator[None]:
    """A model whose branches have zeros as weights, while the block runs."""
    tensors = all_tensors(model)
    held = {name: tensors[name].detach().clone() for block in blocks for name in block.tensors}
    try:
        silence(tensors, blocks)
        yield
    finally:
        with torch.no_grad():
            for name, value in held.items():
                tensors[name].copy_(value)


def _least(
    measured: _Measured,
    known: Sequence[Block],
    macs: Mapping[str, float],
    tolerance: float,
    most: int | None,
    report: list[dict[str, Any]],
) -> list[Block]:
    """Branches that cost least loss per share of the MACs, one after the other.

    Branches are measured again only if they come up first by their last measurement: what one costs
    seldom falls when others are gone.

    Args:
        measured: the loss without some branches.
        known: all branches.
        macs: share of the MACs by the name of the weight.
        tolerance: how much the loss may rise.
        most: how many may go.
        report: gets an entry for each step.

    Raises:
        ArgumentError: the loss is none.
    """
    whole = now = measured([])
    if not 0 < whole < math.inf:
        raise ArgumentError(
            f"evaluate gave {whole} for the model as it is; return a positive, finite loss"
        )
    report.append({"block": None, "loss": whole, "macs_share": 1.0})
    chosen: list[Block] = []
    losses: dict[str, float] = {}
    gone: set[str] = set()
    price = {block.name: -math.inf for block in known}
    fresh: set[str] = set()
    while price and (most is None or len(chosen) < most):
        block = min((b for b in known if b.name in price), key=lambda b: price[b.name])
        share = sum(macs.get(name, 0) for name in block.tensors if name not in gone)
        if block.name not in fresh:
            loss = losses[block.name] = measured([*chosen, block])
            rise = loss - now
            price[block.name] = rise / max(share, 1e-9) if rise > 0 else rise
            if loss > (1 + tolerance) * whole:
                price[block.name] = math.inf
            fresh.add(block.name)
            if len(fresh) == len(known) and set(losses.values()) == {whole}:
                raise ArgumentError(
                    f"evaluate gave {whole} without any of the {len(known)} residual branches, as "
                    "for the whole model; let it run the model that it is given"
                )
            continue
        if price[block.name] == math.inf:
            break
        chosen.append(block)
        gone.update(block.tensors)
        now = losses[block.name]
        report.append(
            {"block": block.name, "loss": now, "macs_share": report[-1]["macs_share"] - share}
        )
        inside = {b.name for b in known if gone.issuperset(b.tensors)}  # of one that is gone
        price = {name: value for name, value in price.items() if name not in inside}
        fresh.clear()
    return chosen
