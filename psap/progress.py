"""How a run tells people and how people stop it: bars or lines, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Listener(Protocol):
    """Who is told how a run gets on."""

    def step(self, epoch: int, phase: str, done: int, total: int) -> None:
        """``done`` of ``total`` optimizer steps of an epoch (from 0) are taken."""
        ...

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """An epoch is over; ``entry`` is its line of the history."""
        ...

    def note(self, text: str) -> None:
        """Something else that people want to know."""
        ...


class Silent:
    """Says nothing."""

    def step(self, epoch: int, phase: str, done: int, total: int) -> None:
        """Ignored."""

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""


class Lines:
    """One line per epoch; for files and pipes.

    Args:
        console: where to.
        epochs: of the whole run.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console = console
        self.epochs = epochs

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, epoch: int, phase: str, done: int, total: int) -> None:
        """Not shown."""

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """One line."""
        accuracy = entry["val_accuracy"]
        self.console.print(
            f"epoch {entry['epoch']:>3}/{self.epochs}  {entry['phase']:<8}  "
            f"loss {entry['train_loss']:.4f}  "
            + (f"val {accuracy:7.2%}  " if accuracy is not None else "")
            + f"MACs {entry['macs_share']:6.1%}  lr {entry['lr']:.4f}  {entry['seconds']:.1f} s",
            highlight=False,
        )

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)


class Bars(Lines):
    """The lines, and below them how far the epoch and the run are; for terminals.

    Args:
        console: a terminal.
        epochs: of the whole run.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        super().__init__(console, epochs)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._run = self._bars.add_task("run", total=epochs)
        self._epoch = self._bars.add_task("epoch")

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, epoch: int, phase: str, done: int, total: int) -> None:
        """Moves both bars."""
        self._bars.update(self._epoch, description=phase, completed=done, total=total)
        self._bars.update(self._run, completed=epoch + done / total)


class Stop:
    """While it is entered, the first Ctrl-C only asks for a stop; the second is an interrupt.

    Where Ctrl-C is handled otherwise already (or ignored), that is left alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: Any = None

    def __enter__(self) -> Stop:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._former = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not through a stream: the interrupted code may be in the middle of printing.
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")

    def check(self) -> None:
        """End the run, whose checkpoint is written, if that was asked for.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self.requested:
            raise KeyboardInterrupt("stopped on request; the checkpoint is written")

    def release(self) -> None:
        """Ctrl-C interrupts again."""
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            self._former = None
