"""Gates and saved copies: how a channel is pruned without losing it.

A pruned channel is not erased at once. Its *gate* is nearly closed: what scales its output (the
affine pairs of its batch norms, or its filters where no batch norm follows) is multiplied by a
small epsilon, so that gradients still flow, and everything that makes the channel is saved. The
derivative of the loss with respect to a gate z on the channel,

    d_i = sum over what the gate scales of <saved_i, gradient_i>,

says how much opening the gate would change the loss (docs/method.md, section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import psap_kernels
from psap.errors import StateError
from psap.graph import Graph, Side
from psap.places import Places, Terms, block, owners_of, scales
from psap.steady import require_same

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Saved:
    """Rows of a tensor as they were before they were pruned.

    Attributes:
        rows: int64 [R], positions along the side.
        values: [R, ...], the tensor there, with the side's dimension moved to the front.
        held: what the rows are held at while they are pruned: eps times the values behind a gate.
    """

    rows: Tensor
    values: Tensor
    held: Tensor


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
        self.parameters = dict(graph.model.named_parameters())
        self.owners = owners_of(graph.model)
        self._first = next(iter(self.parameters.values()))
        self._weights = {call.weight for call in graph.calls}
        self.makers = [
            side
            for side, role in graph.roles.items()
            if role in ("out", "cut") and self._lives(side)
        ]
        self.states = [
            side for side, role in graph.roles.items() if role == "state" and self._lives(side)
        ]
        parameters = [side for side in self.makers if side[0] in self.parameters]
        self.gates = [side for side in parameters if scales(graph, self._weights, side)]
        self._gated = frozenset(self.gates)
        self._gates = Places(self.parameters, self.owners, self.gates)
        self._device = self.device
        self.saved = {}
        self._alive: Bools | None = None

    def _lives(self, side: Side) -> bool:
        return bool((self.graph.channels[side] >= 0).any())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._first.device

    @property
    def saved(self) -> dict[Side, Saved]:
        """The saved copies of pruned rows."""
        return self._saved

    @saved.setter
    def saved(self, saved: dict[Side, Saved]) -> None:
        self._saved = saved
        self._forget_plans()

    def _forget_plans(self) -> None:
        """Copies or masks have changed: what is prepared for every step is made anew."""
        self._held: dict[bool, tuple[Places, list[Tensor], list[Tensor]]] = {}
        self._terms: Terms | None = None
        self._kinds = [
            (*self.owners[name], self.parameters[name], saved.values.dtype)
            for (name, _), saved in self._saved.items()
            if name in self.parameters
        ]

    def _follow(self) -> None:
        """If the model has moved to another device, the copies and masks go with it."""
        device = self.device
        if device == self._device:
            return
        self._device, self._alive = device, None
        self.saved = {
            side: Saved(*(t.to(device) for t in (saved.rows, saved.values, saved.held)))
            for side, saved in self.saved.items()
        }

    def front(self, side: Side) -> Tensor:
        """The tensor of a side, detached, with the side's dimension first."""
        name, dim = side
        holder, key = self.owners[name]
        tensor: Tensor = holder[key]
        return tensor.detach().movedim(dim, 0) if dim else tensor.detach()

    def require_same(self, *, quick: bool = False) -> None:
        """Check that the model is the one that the gates lie on; ``quick``: where rows are saved.

        Raises:
            StateError: parameters were replaced, or are of another shape or dtype.
        """
        if quick and all(at[key] is p and p.dtype is kind for at, key, p, kind in self._kinds):
            return
        kinds = {name: saved.values.dtype for (name, _), saved in self.saved.items()}
        require_same(self.graph.model, self.parameters, self.graph.shapes, kinds)

    def weights(self) -> dict[str, Tensor]:
        """All parameters, with saved rows in the place of gated ones, for scores."""
        behind = dict.fromkeys(name for name, _ in self.gates if name in self._weights)
        return {**self.parameters, **{name: self._opened(name) for name in behind}}

    def _opened(self, name: str, but: int | None = None) -> Tensor:
        """A parameter as if its gates were open, but for those along one dimension."""
        holder, key = self.owners[name]
        whole: Tensor = holder[key].detach()
        for dim in range(whole.dim()):
            saved = self._saved.get((name, dim))
            if saved is not None and dim != but and (name, dim) in self._gated:
                whole = whole.clone()
                psap_kernels.restore_filters_([whole.movedim(dim, 0)], [saved.rows], [saved.values])
        return whole

    # Closing and opening

    @torch.no_grad()
    def close(self, alive: Bools) -> None:
        """Save what makes the pruned channels and close their gates.

        Channels that were pruned before keep their older saved copies.

        Args:
            alive: bool [channels], False for every pruned channel.
        """
        self.owners = owners_of(self.graph.model)
        self._follow()
        for side in (*self.makers, *self.states):
            self._save(side, torch.from_numpy(np.flatnonzero(self._dead(side, alive))))
        self.hold(whole=False)
        self.forget(alive)

    def _dead(self, side: Side, alive: Bools) -> Bools:
        channels = self.graph.channels[side]
        result: Bools = (channels >= 0) & ~alive[channels]
        return result

    def _masks(self, alive: Bools) -> tuple[Places, list[Tensor]]:
        """The makers with pruned rows, and bool masks of the rows that stay; made once per mask."""
        self._follow()
        if self._alive is not alive and (
            self._alive is None or not np.array_equal(alive, self._alive)
        ):
            dead = {side: self._dead(side, alive) for side in self.makers}
            some = [side for side, rows in dead.items() if rows.any()]
            self._rows = Places(self.parameters, self.owners, some)
            keeps = [torch.from_numpy(~dead[side]) for side in self._rows.sides]
            self._keeps = [keep.to(self._device) for keep in keeps]
            self._alive = alive.copy()
        return self._rows, self._keeps

    def _copy(self, side: Side, rows: Tensor, values: Tensor) -> Saved:
        return Saved(rows, values, values * self.eps if side in self._gated else values)

    def _save(self, side: Side, rows: Tensor) -> None:
        old = self.saved.pop(side, None)
        self._forget_plans()
        if rows.numel() == 0:
            return
        tensor = self._opened(side[0], but=side[1]).movedim(side[1], 0)
        rows = rows.to(tensor.device)
        values = psap_kernels.shrink([tensor], [rows])[0]
        if old is not None:
            both = torch.isin(rows, old.rows)
            source = torch.searchsorted(old.rows, rows[both])
            values[both] = old.values[source]
        self.saved[side] = self._copy(side, rows, values)

    @torch.no_grad()
    def hold(self, *, whole: bool) -> None:
        """Put gated rows back to eps times their saved values.

        Args:
            whole: also put back what the gate does not scale (the filters themselves), so that
                nothing of a pruned channel moves.
        """
        self._follow()
        if whole not in self._held:
            sides = [s for s in (self.makers if whole else self.gates) if s in self.saved]
            places = Places(self.parameters, self.owners, sides)
            saved = [self.saved[s] for s in places.sides]
            self._held[whole] = (places, [s.rows for s in saved], [s.held for s in saved])
        places, rows, held = self._held[whole]
        psap_kernels.restore_filters_(places.tensors(), rows, held)

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
            self.saved[side] = self._copy(side, saved.rows[~chosen], saved.values[~chosen])
        self._forget_plans()
        self.forget(~returned)

    @torch.no_grad()
    def erase(self, alive: Bools) -> None:
        """Set everything that makes a pruned channel to exact zero."""
        places, keeps = self._masks(alive)
        psap_kernels.zero_filters_(places.tensors(), keeps)

    @torch.no_grad()
    def forget(self, alive: Bools) -> None:
        """Clear the optimizer's state (momentum, moments) of channels that are not alive."""
        tensors, keeps = [], []
        places, masks = self._masks(alive)
        for (name, dim), keep in zip(places.sides, masks, strict=True):
            parameter = self.parameters.get(name)
            if parameter is None:
                continue
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                    tensors.append(value.movedim(dim, 0))
                    keeps.append(keep.to(value.device))
        psap_kernels.zero_filters_(tensors, keeps)

    def left(self, stays: Bools) -> dict[Side, Saved]:
        """The saved copies that a cut leaves, as the small tensors count; bool [channels]."""
        found, dims = {}, dict[str, dict[int, Tensor]]()
        for (name, dim), channels in self.graph.channels.items():
            dims.setdefault(name, {})[dim] = torch.from_numpy((channels < 0) | stays[channels])
        for (name, dim), saved in self.saved.items():
            keeps, rows = dims[name], saved.rows.cpu()
            inside = keeps[dim][rows]
            values = saved.values[inside.to(saved.values.device)]
            for other in keeps.keys() - {dim}:
                axis = other + (other < dim)  # the side's dimension is in front
                kept = keeps[other].nonzero().flatten()
                values = values.index_select(axis, kept.to(values.device))
            rows = (keeps[dim].cumsum(0) - 1)[rows[inside]]
            if rows.numel():
                found[name, dim] = self._copy((name, dim), rows.to(values.device), values)
        return found

    # Supervision

    @torch.no_grad()
    def observe(self, sums: Tensor, seen: Tensor) -> None:
        """Add the derivative d of every channel, from the gradients as they stand.

        Args:
            sums: float64 [2, channels], to which d and d^2 are added.
            seen: int64 [2]; the first counts, or the second if a derivative is not finite or no
                gradient is there.
        """
        self._follow()
        present = [gradient is not None for gradient in self._gates.gradients()]
        if not any(present):
            seen[1] += 1
            return
        if self._terms is None or self._terms.present != present:
            self._terms = self._make_terms(present)
        known = self._terms
        values = known.places.tensors()
        grads: list[Any] = known.places.gradients()  # none is missing
        grads += [grads[place] for place, _ in known.saved]
        values += [copy for _, copy in known.saved]
        scale = getattr(self._optimizer, "grad_scale", None)  # a GradScaler and a fused optimizer
        psap_kernels.gate_stats_(
            sums,
            seen,
            values,
            grads,
            known.terms,
            known.offsets,
            scale=1.0 if scale is None else 1.0 / float(scale),
        )

    def _make_terms(self, present: list[bool]) -> Terms:
        """One term for every row that a gate scales: of the tensor, or of its saved copy."""
        pairs = zip(self._gates.sides, present, strict=True)
        places = Places(self.parameters, self.owners, [side for side, there in pairs if there])
        copies: list[tuple[int, Tensor]] = []
        blocks = [np.zeros((0, 4), dtype=np.int64)]  # channel, pair, row of value, row of gradient
        for place, side in enumerate(places.sides):
            channels = self.graph.channels[side]
            rows = np.flatnonzero(channels >= 0)
            saved = self.saved.get(side)
            if saved is not None:
                gone = saved.rows.cpu().numpy()
                rows = np.setdiff1d(rows, gone)
                pair = len(places.sides) + len(copies)
                blocks.append(block(channels, pair, np.arange(len(gone)), gone))
                copies.append((place, saved.values))
            blocks.append(block(channels, place, rows, rows))
        table = np.concatenate(blocks)
        table = table[np.argsort(table[:, 0], kind="stable")]
        count = len(self.graph.group_of)
        offsets = np.searchsorted(table[:, 0], np.arange(count + 1)).astype(np.int32)
        terms = np.ascontiguousarray(table[:, 1:].astype(np.int32))
        return Terms(
            present,
            places,
            copies,
            torch.from_numpy(terms).to(self._device),
            torch.from_numpy(offsets).to(self._device),
        )

    @torch.no_grad()
    def still_gradients(self, alive: Bools) -> None:
        """Clear the gradients of pruned channels, so that momentum does not gather them."""
        places, keeps = self._masks(alive)
        found = [
            (gradient, keep)
            for gradient, keep in zip(places.gradients(), keeps, strict=False)  # then buffers
            if gradient is not None
        ]
        psap_kernels.zero_filters_([g for g, _ in found], [k for _, k in found])

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
            saved[side] = self._copy(
                side, wanted.to(tensor.device), values.to(tensor.device, copy=True)
            )
        if len(saved) != len(state):
            raise StateError("the saved copies belong to another model")
        return saved
