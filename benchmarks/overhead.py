"""What pruning adds to training: ResNet-56, batch 128, channels_last, on synthetic images.

The time inside the pruner is read by hooks around its own hooks, in real training steps, so that
caches are as cold as they are in training and no two step times have to be subtracted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import tyro
from torch.nn import functional as F

import psap
import psap_kernels
from benchmarks import registry, rows, timing
from psap.models import create

STEPS_PER_EPOCH = 391  # CIFAR-10, batch 128
EPOCHS, PRUNE_STEPS, WINDOW = 40, 5, 8  # of the schedule that the last figure is for


@dataclass
class Stopwatch:
    """CPU milliseconds (on a GPU: elapsed, synchronised) of parts of a training step, by phase."""

    device: torch.device
    times: dict[str, list[float]] = field(default_factory=dict)
    inside: float = 0.0
    start: float = 0.0

    def now(self) -> float:
        """Milliseconds on the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter() * 1e3
        return time.process_time() * 1e3

    def begin(self, *_: Any) -> None:
        """A hook before the pruner's."""
        self.start = self.now()

    def end(self, *_: Any) -> None:
        """A hook after the pruner's."""
        self.inside += self.now() - self.start

    def note(self, phase: str, elapsed_ms: float) -> None:
        """Keep one time."""
        self.times.setdefault(phase, []).append(elapsed_ms)

    def median(self, phase: str) -> float:
        """The middle time of a phase."""
        return statistics.median(self.times[phase])


class Arm:
    """A model in training with a pruner, on one backend."""

    def __init__(self, backend: str, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.backend = backend
        model = create("resnet56", num_classes=10, in_channels=3).to(device)
        self.model = model.to(memory_format=torch.channels_last).train()
        self.x = torch.randn(batch, 3, 32, 32, device=device)
        self.x = self.x.to(memory_format=torch.channels_last)
        self.y = torch.randint(10, (batch,), device=device)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.watch = Stopwatch(device)
        config = psap.Config(
            target=psap.Target(macs=0.3),
            prune_steps=2,
            window=WINDOW,
            protect="pulse",
            verify=False,
        )
        # Hooks run in the order they were added: ours stand on both sides of the pruner's.
        self.optimizer.register_step_pre_hook(self.watch.begin)
        self.optimizer.register_step_post_hook(self.watch.begin)
        with self.using():
            self.pruner = psap.Pruner(
                self.model, self.x[:2], optimizer=self.optimizer, config=config
            )
        self.optimizer.register_step_pre_hook(self.watch.end)
        self.optimizer.register_step_post_hook(self.watch.end)

    def using(self) -> AbstractContextManager[None]:
        """The backend, for a while."""
        return psap_kernels.use_backend(self.backend)  # type: ignore[return-value]

    def train(self, phase: str) -> None:
        """One step: its time without the pruner, and the pruner's."""
        with self.using():
            watch, start = self.watch, self.watch.now()
            watch.inside = 0.0
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            self.optimizer.step()
            total = watch.now() - start
            watch.note("step", total - watch.inside)
            watch.note(phase, watch.inside)

    def prune(self) -> None:
        """The call at the end of an epoch."""
        with self.using():
            start = self.watch.now()
            self.pruner.step()
            self.watch.note("prune", self.watch.now() - start)


def run(
    options: Annotated[registry.Options, tyro.conf.arg(name="")] = registry.Options(),  # noqa: B008
    batch: int = 128,
) -> list[dict[str, Any]]:
    """Train with a pruner on the chosen backend and on the reference, in turn; write a row each."""
    device = registry.device_of(options)
    backends = dict.fromkeys((*options.backend, "reference"))
    written, before = [], torch.get_num_threads()
    torch.set_num_threads(options.threads[0])
    try:
        arms = [Arm(backend, 8 if options.quick else batch, device) for backend in backends]
        _train(arms, 2 if options.quick else 3)
        _agree(arms)
        for arm in arms:
            written.append(rows.write("overhead", _row(arm, options, device), options.out))
    finally:
        torch.set_num_threads(before)
    return written


def _train(arms: list[Arm], steps: int) -> None:
    """Before the first prune step; in two windows; with the final masks."""

    def each(call: Callable[[Arm], None]) -> None:
        for arm in arms:
            call(arm)

    each(lambda arm: arm.train("warm-up"))
    for _ in range(steps):
        each(lambda arm: arm.train("outside"))
    for _ in range(2):
        each(Arm.prune)
        for _ in range(WINDOW - 1):
            each(lambda arm: arm.train("window"))
        each(lambda arm: arm.train("last of the window"))
    for _ in range(steps):
        each(lambda arm: arm.train("final"))


def _agree(arms: list[Arm]) -> None:
    """All arms saw the same data: in the first prune step they must have measured the same."""
    first = [arm.pruner.events[0].to_json()["sparsity"] for arm in arms]
    for other in first[1:]:
        if any(abs(first[0][group] - value) > 1e-3 for group, value in other.items()):
            raise registry.CheckFailed("the backends measured another sparsity")
    if not all(arm.pruner.done for arm in arms):
        raise registry.CheckFailed("the masks are not final after both windows")


def _row(arm: Arm, options: registry.Options, device: torch.device) -> dict[str, Any]:
    watch = arm.watch
    step, window = watch.median("step"), watch.median("window")
    prune, closing = watch.median("prune"), watch.median("last of the window")
    epoch = STEPS_PER_EPOCH * step
    each_step = STEPS_PER_EPOCH * window + prune
    steps = STEPS_PER_EPOCH * EPOCHS
    supervised = PRUNE_STEPS * WINDOW
    pruned = PRUNE_STEPS * (prune + (WINDOW - 1) * window + closing)
    rest = (steps - supervised) * max(watch.median("final"), watch.median("outside"))
    return {
        "op": "Pruner",
        "case": "resnet56",
        "shape": f"batch {len(arm.x)}, [3, 32, 32], channels_last, SGD with momentum",
        "dtype": "float32",
        "device": str(device),
        "threads": options.threads[0],
        "clock": timing.clock(device, options.threads[0]),
        "backend": arm.backend,  # "auto" mixes: each op has its own
        "step_ms": step,
        "outside_ms": watch.median("outside"),
        "window_ms": window,
        "last_of_window_ms": closing,
        "final_ms": watch.median("final"),
        "prune_ms": prune,
        "percent_supervised_every_step": 100 * each_step / epoch,
        "schedule": f"{EPOCHS} epochs of {STEPS_PER_EPOCH}, {PRUNE_STEPS} prunes, window {WINDOW}",
        "percent_of_schedule": 100 * (pruned + rest) / (steps * step),
    }
