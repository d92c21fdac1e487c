"""Blocks in which forward() goes without gradients or in another precision, as calls in a program.

torch.fx records calls of functions, and forgets the ``with`` statement around them. So each block
that forward() enters while it is traced is recorded as two calls, `entered` and `left`; the code of
a program has a ``with`` statement in their place again, which an exception leaves, too.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx

from psap.custom import whole

GRADIENTS = (torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)
"""Blocks that say whether gradients are computed."""

_MADE_BY: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "torch.set_grad_enabled": torch.set_grad_enabled,
    "torch.inference_mode": torch.inference_mode,
    "torch.autocast": torch.autocast,
}


def entered(kind: str, *given: Any) -> AbstractContextManager[Any]:
    """Enter a block.

    Args:
        kind: the name of what makes it, such as "torch.autocast".
        given: the arguments of that.

    Returns:
        The block, for `left`.
    """
    block = _MADE_BY[kind](*given)
    block.__enter__()
    return block


def left(block: AbstractContextManager[Any]) -> None:
    """Leave a block that `entered` gave."""
    block.__exit__(None, None, None)


for _call in (entered, left):
    fx.node.has_side_effect(_call)


@contextmanager
def interpreting() -> Iterator[Callable[[fx.Node, Any], None]]:
    """Leave the blocks that the nodes of a program have entered, if an error stops them.

    Yields:
        What to tell of every node that has run, and of its value.
    """
    inside: list[Any] = []

    def note(node: fx.Node, value: Any) -> None:
        if node.target is entered:
            inside.append(value)
        elif node.target is left:
            inside.pop()

    try:
        yield note
    finally:
        for block in reversed(inside):
            left(block)


class _Open(NamedTuple):
    """A block that forward() is in; without a node if it is none of the program's."""

    block: Any
    node: fx.Node | None
    grad: bool


class _Notes:
    """The blocks that forward() enters during a trace."""

    def __init__(self, tracer: fx.Tracer) -> None:
        self._tracer = tracer
        self._thread = threading.get_ident()
        self._given: dict[int, tuple[Any, ...]] = {}
        self._open: list[_Open] = []
        self._loose: Any = None  # a torch.set_grad_enabled() that may be no block
        self._made_after: fx.Node | None = None  # what was recorded before it
        self._grad = True

    def made(self, make: Callable[..., None], block: Any, *args: Any, **kwargs: Any) -> None:
        """Note what a block is made of: what it takes from its surroundings may change."""
        if threading.get_ident() != self._thread:
            make(block, *args, **kwargs)
        elif isinstance(block, torch.autocast):
            given = _autocast(*args, **kwargs)
            self._given[id(block)] = (block, *given)  # which keeps the identity, too
            make(block, *(("cpu", None, False) if isinstance(given[0], fx.Proxy) else given))
        else:
            self._require_block(block)
            make(block, *args, **kwargs)
            self._loose, self._made_after = block, self._last()

    def enter(self, enter: Callable[..., Any], block: Any) -> Any:
        """Enter a block, and record it.

        An autograd function goes without gradients and says itself what they are (checkpoints):
        its forward() is a part of the program, but not its blocks.
        """
        if threading.get_ident() != self._thread:
            return enter(block)
        self._require_block(block)
        before, kind, given = self._grad, _kind(block), self._arguments(block)
        now = block.prev if isinstance(block, torch.set_grad_enabled) else torch.is_grad_enabled()
        node = None
        if not isinstance(block, GRADIENTS) or now == before:
            args = tuple(self._tracer.create_arg(value) for value in (kind, *given))
            node = self._tracer.create_node("call_function", entered, args, {})
        entered_as = enter(block)
        if node is not None and isinstance(block, GRADIENTS):
            self._grad = torch.is_grad_enabled()
        self._loose = None
        self._open.append(_Open(block, node, before))
        return entered_as

    def leave(self, leave: Callable[..., Any], block: Any, *error: Any) -> Any:
        """Leave a block, and record it.

        Raises:
            RuntimeError: it is not the last that was entered.
        """
        if threading.get_ident() != self._thread:
            return leave(block, *error)
        loose = self._loose
        swallowed = leave(block, *error)
        self._loose = loose
        at = max((at for at, (held, *_) in enumerate(self._open) if held is block), default=None)
        last, node = at == len(self._open) - 1, None
        if at is not None:  # `close` must not leave it once more
            _, node, self._grad = self._open.pop(at)
        self._require_block(None)
        if not last:
            raise RuntimeError(f"forward() leaves {_kind(block)} before what it entered later")
        if node is None:
            return swallowed
        if node.next.op == "root":
            self._tracer.graph.erase_node(node)  # there is nothing in it
        else:
            self._tracer.create_node("call_function", left, (node,), {})
        return swallowed

    def _arguments(self, block: Any) -> tuple[Any, ...]:
        if isinstance(block, torch.autocast):
            own = block.device, block.fast_dtype, block._enabled, block._cache_enabled
            return self._given.get(id(block), (block, *own))[1:]
        return (getattr(block, "mode", isinstance(block, torch.enable_grad)),)

    def _last(self) -> fx.Node | None:
        return next(iter(reversed(self._tracer.graph.nodes)), None)

    def _require_block(self, block: Any) -> None:
        """Check that what switches gradients is a block, and was entered as soon as it was made."""
        if self._loose is None:
            return
        if self._loose is not block or self._last() is not self._made_after:
            raise RuntimeError(
                "forward() calls torch.set_grad_enabled() outside of a with statement"
            )

    def finish(self) -> None:
        """Check that the trace is over.

        Raises:
            RuntimeError: forward() is in a block yet.
        """
        self._require_block(None)
        if self._open:
            raise RuntimeError(
                f"forward() enters {_kind(self._open[-1].block)} and does not leave it"
            )

    def close(self) -> None:
        """Leave what an error has left open."""
        while self._open:
            self._open.pop().block.__exit__(None, None, None)


def _autocast(
    device_type: Any, dtype: Any = None, enabled: Any = True, cache_enabled: Any = None
) -> tuple[Any, ...]:
    """The arguments of `torch.autocast`, in order."""
    return device_type, dtype, enabled, cache_enabled


def _kind(block: Any) -> str:
    """The name of what makes such a block."""
    if isinstance(block, torch.autocast):
        return "torch.autocast"
    inference = isinstance(block, torch.inference_mode)
    return "torch.inference_mode" if inference else "torch.set_grad_enabled"


@contextmanager
def noted(tracer: fx.Tracer) -> Iterator[None]:
    """Record the blocks of what is traced, with gradients enabled, as when it trains.

    Args:
        tracer: what traces.

    Raises:
        RuntimeError: forward() switches gradients or autocast other than in blocks.
    """
    notes = _Notes(tracer)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # checkpoints
        try:
            with ExitStack() as undo:
                for kind in (*GRADIENTS, torch.autocast):
                    _replace(kind, "__enter__", notes.enter, undo)
                    _replace(kind, "__exit__", notes.leave, undo)
                for kind in (torch.set_grad_enabled, torch.autocast):
                    _replace(kind, "__init__", notes.made, undo)
                yield
            notes.finish()
        finally:
            notes.close()


def _replace(kind: Any, name: str, by: Callable[..., Any], undo: ExitStack) -> None:
    """Let another function have the calls of a method, which it gets before the arguments."""
    own = vars(kind)[name]

    def method(*args: Any, **kwargs: Any) -> Any:
        return by(own, *args, **kwargs)

    setattr(kind, name, method)
    undo.callback(setattr, kind, name, own)


class Retracer(fx.Tracer):
    """Traces the code of a program again, as unpickling does it, without changing its buffers."""

    proxy_buffer_attributes = True

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """What ``torch.fx.Tracer.trace`` gives, with blocks and autograd functions."""
        with noted(self), whole(self):
            return super().trace(root, concrete_args)


def blocks(body: list[str]) -> list[str]:
    """The code of a graph with ``with`` statements in the place of `entered` and `left`.

    Args:
        body: what torch.fx generates; it stays as it is if the calls are not in pairs.
    """
    lines: list[str] = []
    depth, empty = 0, False
    for line in "".join(body).splitlines(keepends=True):
        entering, leaving = _ENTERED.match(line), _LEFT.match(line)
        if entering:
            line = "with {}({}):\n".format(*entering.groups())
        elif leaving:
            line = "pass\n" if empty else "\n"
        lines.append("    " * depth + line)
        if not line.startswith(("#", "\n")):
            empty = entering is not None
        depth += (entering is not None) - (leaving is not None)
    return lines if depth == 0 else body


_ENTERED = re.compile(r"\w+ = psap_contexts_entered\('([\w.]+)', (.*?)\)(?:;  .*)?$")
_LEFT = re.compile(r"\w+ = psap_contexts_left\(\w+\)")
