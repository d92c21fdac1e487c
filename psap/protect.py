"""Supervision windows: what the gradients say of pruned channels, and which of them come back.

While a window is open, the gate derivative d of every channel (`psap.gates`) is accumulated over n
optimizer steps. The usefulness of a channel is ``v = -S1 / n`` with ``S1 = sum d``; its
significance is ``z = v / (sd / sqrt(n))`` with ``sd = sqrt(S2 / n - v^2)`` and ``S2 = sum d^2``
(docs/method.md, section 3e). Absolute or squared gradients were measured not to predict usefulness;
signed ones do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from psap.config import Config
from psap.errors import StateError
from psap.events import Candidate
from psap.gates import Bools, Floats
from psap.graph import Group
from psap.lineage import Ints, Lineage
from psap.ranks import Ranks


@dataclass(frozen=True)
class Verdict:
    """What a window decided.

    Attributes:
        restored: bool [channels], pruned channels that come back.
        dropped: bool [channels], kept channels that leave in exchange.
        candidates: every freshly pruned channel of positive usefulness, best first.
    """

    restored: Bools
    dropped: Bools
    candidates: tuple[Candidate, ...]


class Window:
    """Running sums of the gate derivatives of all channels.

    Args:
        channels: number of channels of the graph.
        device: where the sums are; nothing is brought to the host before the window closes.

    Attributes:
        sums: float64 [2, channels], S1 and S2.
        seen: int64 [2], optimizer steps added and left out.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(2, channels, dtype=torch.float64, device=device)
        self.seen = torch.zeros(2, dtype=torch.int64, device=device)

    def move(self, device: torch.device) -> None:
        """Go where the model is."""
        if self.sums.device != device:
            self.sums, self.seen = self.sums.to(device), self.seen.to(device)

    @property
    def observed(self) -> int:
        """Optimizer steps whose derivatives were added."""
        return int(self.seen[0])

    @property
    def skipped(self) -> int:
        """Optimizer steps that were left out, because a derivative was not finite."""
        return int(self.seen[1])

    def significance(self) -> tuple[Floats, Floats]:
        """Usefulness v and significance z of every channel, float64 [channels] each."""
        count = max(1, self.observed)
        first, second = self.sums.cpu().numpy()
        value = -first / count
        deviation = np.sqrt(np.maximum(0.0, second / count - value**2))
        return value, value / np.maximum(deviation / np.sqrt(count), 1e-12)

    def agree(self, ranks: Ranks) -> None:
        """Take the sums of rank 0."""
        for tensor, what in ((self.sums, "gate derivatives"), (self.seen, "numbers of steps")):
            tensor.copy_(torch.from_numpy(ranks.agree(tensor.cpu().numpy(), what)))

    def judge(
        self, lineage: Lineage, alive: Bools, fresh: Bools, config: Config, last: bool
    ) -> Verdict:
        """Decide which freshly pruned channels come back.

        Args:
            lineage: the channel graph, and what its channels are called.
            alive: bool [channels], kept channels.
            fresh: bool [channels], channels that the last prune step pruned.
            config: thresholds.
            last: the widths are final, so that a channel may only return in exchange for a kept one
                that is significantly harmful.
        """
        value, z = self.significance()
        verdict = Verdict(np.zeros_like(alive), np.zeros_like(alive), ())
        candidates: list[Candidate] = []
        for group in lineage.graph.groups:
            span = slice(group.start, group.start + group.size)
            names = lineage.original[span]
            candidates += self._judge_group(
                group, names, value[span], z[span], alive[span], fresh[span], config, last, verdict
            )
        candidates.sort(key=lambda c: (-c.value, c.group, c.channel))
        return Verdict(verdict.restored, verdict.dropped, tuple(candidates))

    def _judge_group(
        self,
        group: Group,
        names: Ints,
        value: Floats,
        z: Floats,
        alive: Bools,
        fresh: Bools,
        config: Config,
        last: bool,
        verdict: Verdict,
    ) -> list[Candidate]:
        order = np.argsort(-value, kind="stable")
        useful = [int(i) for i in order if fresh[i] and value[i] > 0]
        harmful = [int(i) for i in order[::-1] if alive[i] and z[i] < -config.z_threshold]
        allowed = int(np.ceil(config.restore_share * int(fresh.sum()))) if self.observed > 1 else 0
        found = []
        for i in useful:
            back = z[i] > config.z_threshold and allowed > 0
            if config.protect == "price":
                back, reason = False, "counts in the price of its group"
            elif z[i] <= config.z_threshold:
                reason = f"not significant: z = {z[i]:.1f}, needs more than {config.z_threshold:g}"
            elif not back:
                reason = "the share that one window restores went to more useful ones"
            elif not last:
                reason = f"opening its gate lowers the loss (z = {z[i]:.1f})"
            elif harmful:
                out = harmful.pop(0)
                verdict.dropped[group.start + out] = True
                reason = f"swapped with channel {names[out]}, which raises the loss"
            else:
                back, reason = False, "last step: no kept channel is harmful enough to swap with"
            allowed -= int(back)
            verdict.restored[group.start + i] = back
            found.append(
                Candidate(
                    group=group.name,
                    channel=int(names[i]),
                    value=float(value[i]),
                    z=float(z[i]),
                    restored=bool(back),
                    reason=reason,
                )
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums and counts."""
        return {"sums": self.sums.clone(), "observed": self.observed, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            StateError: it has another number of channels.
        """
        sums = state["sums"]
        if sums.shape != self.sums.shape or sums.dtype != self.sums.dtype:
            raise StateError(f"the state is damaged: the window has shape {tuple(sums.shape)}")
        observed, skipped = state["observed"], state["skipped"]
        if type(observed) is not int or type(skipped) is not int or min(observed, skipped) < 0:
            raise StateError(f"the state is damaged: the window observed {observed!r} steps")
        self.sums.copy_(sums)
        self.seen[0], self.seen[1] = observed, skipped


def check_trainable(model: nn.Module) -> None:
    """Refuse a model in which nothing trains.

    Raises:
        StateError: every parameter is frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise StateError(
            "every parameter of the model is frozen (requires_grad is False), so nothing can be "
            "pruned while it trains; call model.requires_grad_(True), or use "
            "psap.plan on an unfrozen copy"
        )
