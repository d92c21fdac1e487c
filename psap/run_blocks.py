"""Depth pruning in a run: which residual branches go before channels do, and what that changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psap.blocks import drop_blocks
from psap.choices import within
from psap.config import Config
from psap.data import Loader
from psap.errors import PsapError, PsapWarning, StateError
from psap.members import all_tensors
from psap.plans import Plan
from psap.run_config import RunConfig
from psap.shrink import Result, apply

IMAGES = 1000
"""Training images that decide which branches go."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """The residual branches that a run has dropped.

    Attributes:
        plan: from the dense network to what is left; None if no branch went.
        report: what `psap.drop_blocks` told: losses and proof.
    """

    plan: Plan | None
    report: Mapping[str, Any]

    @property
    def macs_share(self) -> float:
        """Share of the dense network's MACs that was left."""
        return 1.0 if self.plan is None else _shares(self.plan)["macs"]

    @staticmethod
    def of(left: Result | None) -> Dropped:
        """What `drop` gave."""
        if left is None:
            return Dropped(plan=None, report={"blocks": [], "verification": None})
        return Dropped(plan=left.plan, report=left.report)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        plan = None if self.plan is None else self.plan.to_json()
        return {"plan": plan, "report": dict(self.report)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Dropped:
        """What `state_dict` gave.

        Raises:
            StateError: it is something else; the end of the run would fail on it.
        """
        text, report = state["plan"], state["report"]
        plan = None if text is None else Plan.from_json(text)
        try:
            for entry in report["blocks"]:
                float(entry["loss"]), float(entry["macs_share"]), entry["block"]
            if plan is not None:
                _both(report["verification"], report["verification"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(
                "it does not tell which residual branches have gone, and what the losses were"
            ) from error
        return Dropped(plan=plan, report=report)

    def again(
        self, model: nn.Module, example: Tensor, optimizer: torch.optim.Optimizer
    ) -> Result | None:
        """What is left of a dense network without the same branches; None if no branch went."""
        if self.plan is None:
            return None
        left = apply(model, self.plan, optimizer=optimizer, example_inputs=example, check=False)
        return replace(left, report=dict(self.report))

    def whole(self, result: Result) -> Result:
        """What became of the network that was left, told as of the dense one.

        Costs, shares and layers are those of the dense network, and the proof is both proofs.
        """
        report = {**result.report, "blocks": list(self.report["blocks"])}
        if self.plan is None:
            return replace(result, report=report)
        last = {small.weight: small for _, small in result.plan.layers}
        layers = tuple((dense, last.get(dense.weight, left)) for dense, left in self.plan.layers)
        plan = replace(result.plan, before=self.plan.before, layers=layers)
        shares = _shares(self.plan)
        report["events"] = [_of_whole(event, shares, result) for event in report["events"]]
        report["verification"] = _both(self.report["verification"], report["verification"])
        return replace(result, plan=plan, report=report)


def drop(
    model: nn.Module,
    example: Tensor,
    optimizer: torch.optim.Optimizer,
    images: Loader,
    config: RunConfig,
    *,
    note: Callable[[str], None],
    check: Callable[[], None],
) -> Result | None:
    """Drop the branches that cost least loss on some training images.

    Args:
        model: the dense network; it is not changed.
        example: an input [N, C, H, W], on the device of the model.
        optimizer: its optimizer.
        images: those that train; at most `IMAGES` of them are used, as they are.
        config: how many branches may go, and what they may cost.
        note: told what went, or why nothing did.
        check: called before each measurement; may raise to stop.

    Returns:
        What is left; None if no branch goes.
    """
    sample = images.sample(IMAGES)

    def loss(net: nn.Module) -> float:
        check()
        return mean_loss(net, sample, example.device)

    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", PsapWarning)
            result = drop_blocks(
                model,
                example,
                evaluate=loss,
                tolerance=config.drop_tolerance,
                most=config.drop_blocks,
                optimizer=optimizer,
            )
    except PsapError as error:
        note(f"no residual branch goes: {error}")
        return None
    for warning in heard:
        note(str(warning.message))
    if result.plan.dropped:
        return result
    if not heard:
        note(
            f"no residual branch goes: without any one the loss on {_count(sample)} rises by more "
            f"than {config.drop_tolerance:g} times {result.report['blocks'][0]['loss']:.4g}"
        )
    return None


def told(result: Result, images: Loader) -> str:
    """What went, in words."""
    names = [block.name for block in result.plan.dropped]
    what = "residual branch goes" if len(names) == 1 else "residual branches go"
    first, last = (result.report["blocks"][at]["loss"] for at in (0, -1))
    return (
        f"{len(names)} {what}: {', '.join(names)}; {_shares(result.plan)['macs']:.1%} of the MACs "
        f"are left, and the loss on {_count(images)} is {last:.4g} instead of {first:.4g}"
    )


def _count(images: Loader) -> str:
    return f"{min(IMAGES, len(images.images)):,} training images"


@torch.inference_mode()
def mean_loss(model: nn.Module, images: Loader, device: torch.device) -> float:
    """Mean cross-entropy, in float64: it is not 0 where a network is merely sure."""
    total = sum(
        float(F.cross_entropy(model(x.to(device)).double(), y.to(device), reduction="sum"))
        for x, y in images
    )
    return total / len(images.images)


def pruning(config: RunConfig, left: Result) -> Config:
    """How channels are pruned of what is left: to the same cost, without floors of what went."""
    whole = config.pruning()
    names = {name for tensor in all_tensors(left.model) for name in within(tensor)}
    floors = {
        pattern: share
        for pattern, share in whole.floors.items()
        if any(fnmatchcase(name, pattern) for name in names)
    }
    return replace(whole, target=whole.target.after(left), floors=floors)


def _shares(plan: Plan) -> dict[str, float]:
    """Shares of the MACs and of the parameters that a plan keeps."""
    kinds = ("macs", "parameters")
    return {k: getattr(plan.after, k) / max(1, getattr(plan.before, k)) for k in kinds}


def _of_whole(
    event: Mapping[str, Any], shares: Mapping[str, float], result: Result
) -> dict[str, Any]:
    """An event whose shares are those of the dense network."""
    if event["kind"] != "prune":
        return dict(event)
    bound = "macs" if result.report["config"]["target"]["macs"] is not None else "parameters"
    return {
        **event,
        "target_share": event["target_share"] * shares[bound],
        "macs_share": event["macs_share"] * shares["macs"],
        "parameters_share": event["parameters_share"] * shares["parameters"],
        "gave": {name: share * shares["macs"] for name, share in event["gave"].items()},
    }


def _both(first: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """Two proofs, one after the other, as one."""
    return {
        **last,
        "max_relative_error": max(p["max_relative_error"] for p in (first, last)),
        "modes": [mode for mode in last["modes"] if mode in first["modes"]],
        "mode": "graph",
        "silent": list(dict.fromkeys((*first["silent"], *last["silent"]))),
    }
