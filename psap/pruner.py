"""The state machine of PSAP: prune steps, supervision windows, the end (docs/method.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from psap import optim, prices, scores, selection
from psap.calling import called
from psap.config import Config
from psap.errors import PsapError, StateError
from psap.events import PruneEvent, WindowEvent, event_to_json
from psap.friends import listed
from psap.gates import Bools, Floats, Gates
from psap.graph import Graph
from psap.hooktime import HookTime
from psap.latency import LatencyTable
from psap.protect import Window, check_trainable
from psap.prunable import prunable
from psap.pruner_state import (
    ARRAYS,
    COPIED,
    COUNTERS,
    FINISHED,
    Pace,
    Pruned,
    configured,
    progress,
    prune_event,
    read_state,
    require_inplace,
    require_progressive,
    run_report,
    target_at,
    warn_due,
    window_event,
)
from psap.ranks import Ranks
from psap.shrink import Result, apply


@called("psap.Pruner(model, example_inputs, optimizer=optimizer, config=config)")
class Pruner:
    """Prunes a model while it trains.

    Call `step` once per epoch, like a learning rate scheduler; the rest happens in hooks of
    ``optimizer.step()``. The first calls prune (``config.prune_steps`` of them, after
    ``config.warmup``); then the masks are final, and the pruned channels are held at exact zero
    until `finish` removes them.

    Under ``DistributedDataParallel`` pass the wrapped model, on every rank, and call everything on
    every rank; all get the same masks. Wrap ``finish().model`` anew.

    Args:
        model: the model; on its final device, with the parameters that shall train unfrozen.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of inputs by keyword, on
            the model's device.
        optimizer: the model's optimizer.
        config: what to prune to, and how.
        keep_optimizer: False for an optimizer whose state cannot be cut by channel (LBFGS,
            Adafactor): `finish` then gives none.
        friends: what else belongs to the training, as for `psap.apply`.
        latency: what `psap.measure_latency` returned, for Target(latency=...).

    Raises:
        ArgumentTypeError: an argument has the wrong type.
        ArgumentError: the optimizer trains another model, or the model cannot be used.
        StateError: every parameter is frozen, or another pruner works on the optimizer.
        TraceError: the model failed on the inputs.
        TargetError: nothing can be pruned, or the target cannot be met.
        VerificationError: the model could not be shrunk exactly (checked with nearly half of the
            channels, before any training is spent).

    Warns:
        PsapWarning: layers would be pruned that the optimizer does not train.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        optimizer: torch.optim.Optimizer,
        config: Config | None = None,
        keep_optimizer: bool = True,
        friends: Sequence[Any] = (),
        latency: LatencyTable | None = None,
    ) -> None:
        config = configured(config)
        if isinstance(model, nn.Module):
            check_trainable(model)
        self.config, self._friends = config, listed(friends)
        self._ranks = Ranks(model)
        if config.progressive:
            require_progressive(self._ranks, keep_optimizer)
        self._lineage = prunable(model, example_inputs, config, latency, optimizer, self._friends)
        self.graph: Graph = self._lineage.graph
        self.cost = self._lineage.cost
        self._bounds = selection.bounds(self.graph, config)
        self._optimizer = optimizer
        self.gates = Gates(self.graph, optimizer, config.closed)
        count = len(self.graph.group_of)
        self._alive: Bools = np.ones(count, dtype=bool)
        self._fresh: Bools = np.zeros(count, dtype=bool)
        self._bonus: Floats = np.zeros(count)
        self._window = Window(len(self._alive), self.gates.device)
        self._sparsity: Floats | None = None
        self._factors: Floats = np.ones(len(self.graph.groups))
        self._step = self._calls = self._iteration = self._left = 0
        self._final = self._finished = self._closed = False
        self._keep_optimizer, self._checked = keep_optimizer, not keep_optimizer
        self._pace = Pace()
        self.events: list[PruneEvent | WindowEvent] = []
        self._times, hooks = HookTime(), (self._before_optimizer, self._after_optimizer)
        self._hooks = optim.attach(optimizer, *hooks, self._times)

    def __repr__(self) -> str:
        return progress(self.graph, self._step, self.config.prune_steps, self.events)

    def __reduce_ex__(self, _: Any) -> Any:
        raise StateError(COPIED)

    @property
    def done(self) -> bool:
        """Whether the last prune step is behind and the masks are final."""
        return self._final

    def masks(self) -> dict[str, Tensor]:
        """For every group a bool tensor [C_g], True where the channel is kept."""
        return self._lineage.masks(self._alive)

    # Prune steps

    def step(self) -> None:
        """One epoch is over: prune if it is time to.

        Raises:
            StateError: after `finish` or `close`, or parameters of the model were replaced or
                have another dtype.
            PsapError: a weight is not finite, or the optimizer's state cannot be cut by channel:
                nothing was pruned; or what was pruned cannot be removed: the next cut tries again.

        Warns:
            PsapWarning: it is called too often for the network to train in between.
        """
        self._require_ready("step")
        if not self._checked and self._optimizer.state:
            optim.check_state(self._optimizer, self.graph.model)
            self._checked = True
        if self._step < self.config.prune_steps:
            self._pace.called(self._iteration)
        self._calls += 1
        since = self._calls - self.config.warmup - 1
        due, made = since >= 0 and since % self.config.interval == 0, self._step
        if due and self._step < self.config.prune_steps:
            try:
                if self._left:
                    self._close_window()
                self._times.pruning(self._prune, self._step + 1)
            except PsapError:
                self._calls -= self._step == made  # if it pruned nothing, the next call is due
                raise

    def _prune(self, step: int) -> None:
        """Prune step ``step``: ratios, masks, gates; then a window opens or the masks are final."""
        config = self.config
        stats = self._measure()
        sparsity = np.array([entry.sparsity for entry in stats])
        past, ema = self._sparsity, config.sparsity_ema
        mean = sparsity if past is None else ema * past + (1 - ema) * sparsity
        mean = self._ranks.agree(mean, "sparsity ratios")
        target = target_at(step, config)
        widths = selection.widths(
            self.graph, self.cost, self._bounds, mean, self._factors, target, config
        )
        before = self._alive
        alive = selection.strongest(self.graph, stats, widths, before, self._bonus, config)
        alive = self._ranks.agree(alive, "masks")
        self.gates.open(alive & ~before)
        self._alive = alive
        self.gates.close(alive)
        self._sparsity, self._step = mean, step
        self._fresh = before & ~alive
        done = Pruned(target, sparsity, mean, alive, self._fresh, alive & ~before)
        when = {"step": step, "call": self._calls, "iteration": self._iteration}
        self.events.append(prune_event(self._lineage, done, **when))
        last = step == config.prune_steps
        if config.protect == "pulse" or (config.protect == "price" and not last):
            self._window = Window(len(self._alive), self.gates.device)
            self._left = config.window
        elif last:
            self._finalise()
        else:
            self._cut(alive | self._fresh)

    def _measure(self) -> list[scores.GroupStats]:
        weights = self.gates.weights()
        return self._lineage.whole(selection.measure(self.graph, weights, self.config))

    def _finalise(self) -> None:
        """The masks are final: erase the pruned channels and hold them at zero from now on."""
        self._final = True
        self.gates.saved = {}
        self.gates.erase(self._alive)
        self.gates.forget(self._alive)
        self._cut(self._alive)

    def _cut(self, stays: Bools) -> None:
        """If the network shrinks progressively, remove what does not stay, in place."""
        if not self.config.progressive or stays.all():
            return
        before, saved = self._lineage.left(self._measure(), stays), self.gates.left(stays)
        self._lineage.cut(stays, self._optimizer, self._friends, check=self.config.verify)
        self._adopt(self._alive[stays], self._fresh[stays], self._bonus[stays])
        self.gates.saved = saved
        self._lineage.remember(before, self._measure())

    def _adopt(self, alive: Bools, fresh: Bools, bonus: Floats) -> None:
        """The model has been cut: what speaks of its channels is made anew."""
        self.graph = self._lineage.graph
        self.gates = Gates(self.graph, self._optimizer, self.gates.eps)
        self._alive, self._fresh, self._bonus = alive, fresh, bonus
        self._window = Window(len(alive), self.gates.device)
        sizes = [group.size for group in self.graph.groups]
        self._bounds = [b.without(n) for b, n in zip(self._bounds, sizes, strict=True)]

    # Supervision

    def _before_optimizer(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.gates.require_same(quick=True)
        return optim.reading(args, kwargs, self._read_gradients) if self._left else None

    def _read_gradients(self, observe: bool) -> None:
        if observe:  # once per optimizer step
            self._window.move(self.gates.device)
            self.gates.observe(self._window.sums, self._window.seen)
        self.gates.still_gradients(self._alive)

    def _after_optimizer(self, *_: Any) -> None:
        """Weights have moved: put back what must not move."""
        self._iteration += 1
        if self._final:
            self.gates.erase(self._alive)
        elif self._left:
            self.gates.hold(whole=True)
            self._left -= 1
            if not self._left:
                self._close_window()
        elif self.config.protect == "none" and self._step:
            self.gates.hold(whole=False)

    def _close_window(self) -> None:
        """Act on what supervision found: on the ratios to come, or by restoring channels."""
        self._left = 0
        last = self._step == self.config.prune_steps
        self._window.agree(self._ranks)
        verdict = self._window.judge(self._lineage, self._alive, self._fresh, self.config, last)
        if verdict.restored.any():
            self.gates.open(verdict.restored)
            self._alive = (self._alive | verdict.restored) & ~verdict.dropped
            self._bonus[verdict.restored] += self.config.restore_bonus
            self.gates.close(self._alive)
        priced = None
        if self.config.protect == "price":
            priced = prices.adjusted(
                self._lineage, self._window, self._alive, self._factors, self.config
            )
            self._factors = priced[1]
        when = {"step": self._step, "iteration": self._iteration}
        event = window_event(self._lineage, self._window, verdict, self._fresh, priced, **when)
        self.events.append(event)
        stays, self._fresh = self._alive | self._fresh, np.zeros_like(self._alive)
        if last:
            self._finalise()
        else:
            self._cut(stays)

    # The end

    def finish(
        self, *, keep_optimizer: bool = True, friends: Sequence[Any] = (), inplace: bool = False
    ) -> Result:
        """Remove the pruned channels physically.

        If prune steps are still due, they are made up for at once, so that the target always holds.

        Args:
            keep_optimizer: False, here or for the `Pruner`: the result has no optimizer.
            friends: more of what belongs to the training.
            inplace: change the model, the optimizer and the friends, instead of making new ones.

        Returns:
            The small network, its optimizer with all state, the plan, and the record of the run.

        Raises:
            ArgumentError: ``inplace`` without the optimizer.
            StateError: it was called before, or after `close`, or parameters were replaced.
            PsapError: the optimizer's state cannot be cut by channel, or a friend not be carried.
            VerificationError: the small network would not equal the masked one; model and optimizer
                stay usable, and `finish` may be called again.

        Warns:
            PsapWarning: prune steps were still due. And later, if an optimizer that is not in the
                result makes a step, or is what a scheduler drives.
        """
        self._require_ready("finish")
        keep = keep_optimizer and self._keep_optimizer
        if inplace:
            require_inplace(self._ranks, keep)
        if self._step < self.config.prune_steps:
            warn_due(self.config.prune_steps - self._step, self.config.prune_steps)
        self._catch_up()
        whole, friends = self._lineage.plan(self._alive), (*self._friends, *listed(friends))
        result = apply(
            self.graph.model,
            self._lineage.step(self._alive),
            optimizer=self._optimizer if keep else None,
            friends=friends,
            check=self.config.verify,
            inplace=inplace,
        )
        self._finished = True
        self.close()
        if not inplace:
            optim.leave(self._optimizer, result.optimizer, friends)
        result = replace(result, plan=whole, mode=self._lineage.proven(result))
        result.report.update(run_report(self.events, self.config, self._times))
        return result

    def _catch_up(self) -> None:
        """Make the masks final now."""
        if self._left:
            self._close_window()
        if self._step < self.config.prune_steps:
            self._prune(self.config.prune_steps)
        if self._left:
            self._close_window()

    def close(self) -> None:
        """Give the optimizer up, so that another `Pruner` can use it; `finish` does this itself.

        Weights stay as they are; the channels that were pruned are no longer held. It may be
        called again.
        """
        self._closed = True
        optim.detach(self._hooks)

    def _require_ready(self, call: str) -> None:
        if self._finished:
            raise StateError(FINISHED[call])
        if self._closed:
            raise StateError(f"{call}() after close(); make a new Pruner for the model")
        self.gates.require_same()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact resumption needs, beside the model and the optimizer.

        Returns:
            A nest of dicts with tensors and JSON scalars; loads with ``weights_only=True``.
        """
        return {
            "version": 1,
            "architecture": self._lineage.architecture,
            "config": asdict(self.config),
            "counters": {name: getattr(self, f"_{name}") for name in COUNTERS},
            **{key: torch.from_numpy(getattr(self, f"_{key}").copy()) for key in ARRAYS},
            "window": self._window.state_dict(),
            "sparsity": None if self._sparsity is None else torch.from_numpy(self._sparsity.copy()),
            "saved": self.gates.state_dict(),
            "events": [event_to_json(event) for event in self.events],
            **(self._lineage.state_dict() if self.config.progressive else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; load model and optimizer as well.

        With ``progressive`` load the model and the optimizer afterwards: this cuts the dense ones,
        so that theirs fit.

        Raises:
            StateError: the state belongs to another model or configuration, or is damaged.
        """
        self._require_ready("load_state_dict")
        rest, found = read_state(state, self.config, self._lineage, self._optimizer)
        if not rest.all():
            self._lineage.cut(rest, self._optimizer, self._friends, check=self.config.verify)
        self._adopt(found.alive, found.fresh, found.bonus)
        self.gates.saved = found.saved
        self._window, self._sparsity, self.events = found.window, found.sparsity, found.events
        self._factors, self._lineage.gone = found.factors, found.gone
        for name, value in found.counters.items():
            setattr(self, f"_{name}", value)
        self._pace = Pace(None)
