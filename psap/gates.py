"""Gates and saved copies: how a channel is pruned without losing it.

A pruned channel is not erased at once. Its *gate* is nearly closed: what scales its output (the
affine pairs of its batch norms, or its filters where no batch norm follows) is multiplied by a
small epsilon, so that gradients still flow, and everything that makes the channel is saved. The
derivative of the loss with respect to a gate z on the channel,

    d_i = sum over what the gate scales of <saved_i, gradient_i>,

says how much opening the gate would change the loss (docs/method.md, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import psap_kernels
from psap.errors import StateError
from psap.graph import Graph, Side

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Saved:
    """Rows of a tensor as they were before they were pruned.

    Attributes:
        rows: int64 [R], positions along the side.
        values: [R, ...], the tensor there, with the side's dimension moved to the front.
    """

    rows: Tensor
    values: Tensor


class Gates:
    """Opens and closes the gates of channels in a model, in place.

    Args:
        graph: the channel graph of the model.
        optimizer: the optimizer; its state is cleared where a gate moves.
        eps: factor of a closed gate; 0 closes for good.
    """

    def __init__(self, graph: Graph, optimizer: torch.optim.Optimizer, eps: float) -> None:
        self.graph = graph
        self.eps = eps
        self._optimizer = optimizer
        self._parameters = dict(graph.model.named_parameters())
        self._buffers = dict(graph.model.named_buffers())
        self._weights = {call.weight for call in graph.calls}
        self.makers = [
            side for side, role in graph.roles.items() if role == "out" and self._lives(side)
        ]
        self.states = [
            side for side, role in graph.roles.items() if role == "state" and self._lives(side)
        ]
        self.gates = [side for side in self.makers if self._scales(side[0])]
        self.saved: dict[Side, Saved] = {}

    def _lives(self, side: Side) -> bool:
        return bool((self.graph.channels[side] >= 0).any())

    def _scales(self, name: str) -> bool:
        """Whether a tensor scales its channels: affine pairs, or filters that no norm rescales."""
        if name in self.graph.affine:
            return True
        weight = name if name in self._weights else f"{name.rpartition('.')[0]}.weight".lstrip(".")
        return (
            name in self._parameters
            and weight in self._weights
            and weight not in self.graph.normalised
        )

    def front(self, side: Side) -> Tensor:
        """The tensor of a side, detached, with the side's dimension first."""
        name, dim = side
        tensor = self._parameters.get(name, self._buffers.get(name))
        if tensor is None:
            raise StateError(f"{name} is gone from the model; do not replace modules while pruning")
        return tensor.detach().movedim(dim, 0)

    def weights(self) -> dict[str, Tensor]:
        """All parameters, with saved rows in the place of gated ones, for scores."""
        result: dict[str, Tensor] = dict(self._parameters)
        for side in self.gates:
            saved = self.saved.get(side)
            if saved is not None and side[0] in self._weights:
                whole = self._parameters[side[0]].detach().clone()
                psap_kernels.restore_filters_(
                    [whole.movedim(side[1], 0)], [saved.rows], [saved.values]
                )
                result[side[0]] = whole
        return result

    # Closing and opening

    @torch.no_grad()
    def close(self, alive: Bools) -> None:
        """Save what makes the pruned channels and close their gates.

        Channels that were pruned before keep their older saved copies.

        Args:
            alive: bool [channels], False for every pruned channel.
        """
        for side in (*self.makers, *self.states):
            rows = np.flatnonzero(self._dead(side, alive))
            self._save(side, torch.from_numpy(rows))
        self.hold(whole=False)
        self.forget(alive)

    def _dead(self, side: Side, alive: Bools) -> Bools:
        channels = self.graph.channels[side]
        result: Bools = (channels >= 0) & ~alive[channels]
        return result

    def _save(self, side: Side, rows: Tensor) -> None:
        old = self.saved.pop(side, None)
        if rows.numel() == 0:
            return
        tensor = self.front(side)
        rows = rows.to(tensor.device)
        values = psap_kernels.shrink([tensor], [rows])[0]
        if old is not None:
            both = torch.isin(rows, old.rows)
            source = torch.searchsorted(old.rows, rows[both])
            values[both] = old.values[source]
        self.saved[side] = Saved(rows, values)

    @torch.no_grad()
    def hold(self, *, whole: bool) -> None:
        """Put gated rows back to eps times their saved values.

        Args:
            whole: also put back what the gate does not scale (the filters themselves), so that
                nothing of a pruned channel moves.
        """
        sides = [s for s in (self.makers if whole else self.gates) if s in self.saved]
        values = [
            self.saved[s].values * self.eps if s in self.gates else self.saved[s].values
            for s in sides
        ]
        psap_kernels.restore_filters_(
            [self.front(s) for s in sides], [self.saved[s].rows for s in sides], values
        )

    @torch.no_grad()
    def open(self, returned: Bools) -> None:
        """Bring channels back from their saved copies, bit for bit, with cleared momentum.

        Args:
            returned: bool [channels].
        """
        for side in (*self.makers, *self.states):
            saved = self.saved.get(side)
            if saved is None:
                continue
            chosen = torch.from_numpy(returned[self.graph.channels[side][saved.rows.cpu().numpy()]])
            if not bool(chosen.any()):
                continue
            chosen = chosen.to(saved.rows.device)
            rows, values = saved.rows[chosen], saved.values[chosen]
            psap_kernels.restore_filters_([self.front(side)], [rows], [values])
            stays = ~chosen
            self.saved[side] = Saved(saved.rows[stays], saved.values[stays])
        self.forget(~returned)

    @torch.no_grad()
    def erase(self, alive: Bools) -> None:
        """Set everything that makes a pruned channel to exact zero."""
        sides = [s for s in self.makers if self._dead(s, alive).any()]
        tensors = [self.front(s) for s in sides]
        keeps = [
            torch.from_numpy(~self._dead(s, alive)).to(t.device)
            for s, t in zip(sides, tensors, strict=True)
        ]
        psap_kernels.zero_filters_(tensors, keeps)

    @torch.no_grad()
    def forget(self, alive: Bools) -> None:
        """Clear the optimizer's state (momentum, moments) of channels that are not alive."""
        tensors, keeps = [], []
        for side in self.makers:
            name, dim = side
            parameter = self._parameters.get(name)
            dead = self._dead(side, alive)
            if parameter is None or not dead.any():
                continue
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                    tensors.append(value.movedim(dim, 0))
                    keeps.append(torch.from_numpy(~dead).to(value.device))
        psap_kernels.zero_filters_(tensors, keeps)

    # Supervision

    @torch.no_grad()
    def derivative(self) -> Floats | None:
        """D of every channel from the gradients as they stand, float64 [channels].

        Returns:
            None if a gradient is not finite or none is there.
        """
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if not gradients or not _finite(gradients):
            return None
        total = np.zeros(len(self.graph.group_of))
        for side in self.gates:
            name, dim = side
            gradient = self._parameters[name].grad
            if gradient is None:
                continue
            gradient = (
                gradient.movedim(dim, 0).flatten(1) if gradient.dim() > 1 else gradient[:, None]
            )
            value = (
                self.front(side).flatten(1)
                if self.front(side).dim() > 1
                else self.front(side)[:, None]
            )
            each = (value.double() * gradient.double()).sum(1)
            saved = self.saved.get(side)
            if saved is not None:
                kept = saved.values.flatten(1) if saved.values.dim() > 1 else saved.values[:, None]
                each[saved.rows] = (kept.double() * gradient[saved.rows].double()).sum(1)
            channels = self.graph.channels[side]
            inside = channels >= 0
            np.add.at(total, channels[inside], each.cpu().numpy()[inside])
        scale = getattr(self._optimizer, "grad_scale", None)  # a GradScaler and a fused optimizer
        return total if scale is None else total / float(scale)

    @torch.no_grad()
    def still_gradients(self, alive: Bools) -> None:
        """Clear the gradients of pruned channels, so that momentum does not gather them."""
        tensors, keeps = [], []
        for side in self.makers:
            gradient = self._parameters[side[0]].grad if side[0] in self._parameters else None
            dead = self._dead(side, alive)
            if gradient is not None and dead.any():
                tensors.append(gradient.movedim(side[1], 0))
                keeps.append(torch.from_numpy(~dead).to(gradient.device))
        psap_kernels.zero_filters_(tensors, keeps)

    # State

    def state_dict(self) -> dict[str, Any]:
        """The saved copies."""
        return {
            f"{name}:{dim}": {"rows": saved.rows, "values": saved.values}
            for (name, dim), saved in self.saved.items()
        }

    def read_state(
        self, state: Mapping[str, Any], alive: Bools, *, empty: bool
    ) -> dict[Side, Saved]:
        """Check what `state_dict` gave; nothing is changed.

        Args:
            state: the saved copies.
            alive: bool [channels], the masks they belong to.
            empty: the masks are final, so that there must be no copies.

        Raises:
            StateError: a saved copy does not fit the model or the masks.
        """
        saved: dict[Side, Saved] = {}
        for side in (*self.makers, *self.states):
            entry = state.get(f"{side[0]}:{side[1]}")
            wanted = torch.from_numpy(np.flatnonzero(self._dead(side, alive) & (not empty)))
            if entry is None and not wanted.numel():
                continue
            if entry is None or not torch.equal(entry["rows"].cpu(), wanted):
                raise StateError(f"the saved copy of {side[0]} does not fit the masks")
            tensor, values = self.front(side), entry["values"]
            if values.shape != (len(wanted), *tensor.shape[1:]) or values.dtype != tensor.dtype:
                raise StateError(f"the saved copy of {side[0]} does not fit this model")
            saved[side] = Saved(wanted.to(tensor.device), values.to(tensor.device, copy=True))
        if len(saved) != len(state):
            raise StateError("the saved copies belong to another model")
        return saved


def _finite(tensors: Iterable[Tensor]) -> bool:
    norms = torch._foreach_norm([t for t in tensors if t.numel()], float("inf"))
    return bool(torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().all())
