"""What a pruner costs its training: wall-clock times, measured as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class HookTime:
    """Time in the hooks of an optimizer and in prune steps, beside the time of the training.

    On a GPU that is what the host waits for; kernels run on behind it.
    """

    def __init__(self) -> None:
        self._hooks_s = self._pruning_s = self._until = 0.0
        self._since: float | None = None
        self._calls = 0

    def hook(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run a hook."""
        began = time.perf_counter()
        if self._since is None:
            self._since = began
        found = call(*args)
        self._until = time.perf_counter()
        self._hooks_s += self._until - began
        self._calls += 1
        return found

    def pruning(self, call: Callable[..., Any], *args: Any) -> None:
        """Run a prune step."""
        began = time.perf_counter()
        call(*args)
        self._pruning_s += time.perf_counter() - began

    def to_json(self) -> dict[str, float]:
        """The times in seconds, since the `psap.Pruner` was made; a resumed run begins anew.

        ``training_s`` goes from the first optimizer step to the last one, evaluation included.
        """
        training = 0.0 if self._since is None else self._until - self._since
        return {
            "optimizer_steps": self._calls // 2,
            "training_s": training,
            "hooks_s": self._hooks_s,
            "hooks_share": self._hooks_s / training if training else 0.0,
            "prune_steps_s": self._pruning_s,
        }
