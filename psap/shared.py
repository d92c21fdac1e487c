"""Many traces of torch.fx under one change of ``nn.Module``.

`torch.fx.Tracer.trace` replaces two methods of ``nn.Module`` and puts them back. Python then drops
what it knows of the thousands of its subclasses, which takes longer than tracing a small module.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor, fx, nn

Result = TypeVar("Result")


class _Once(fx.Tracer):
    """Holds the change, and passes all questions to the tracer that is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.current: SharedTracer | None = None

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note a call of a child of the module that is traced."""
        tracer = self.current  # once: another thread may ask while this one ends a trace
        if tracer is None or not tracer.asked:
            return forward(*args, **kwargs)
        return tracer.follow() if m is tracer.root else tracer.call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read an attribute for the module that is traced."""
        tracer = self.current
        if tracer is None or not tracer.asked:
            return attr_val
        return tracer.getattr(attr, attr_val, tracer.proxies)


_ONCE: ContextVar[_Once | None] = ContextVar("_ONCE", default=None)


def together(work: Callable[[], Result]) -> Result:
    """Do some work in which every `SharedTracer` traces under the same change of ``nn.Module``."""
    once = _Once()
    results: list[Result] = []

    def inside() -> None:
        token = _ONCE.set(once)
        try:
            results.append(work())
        finally:
            _ONCE.reset(token)

    once.trace(inside)
    return results[0]


class SharedTracer(fx.Tracer):
    """A tracer of modules that is quick inside of `together`.

    It has nothing to do with the modules that other threads call meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    @property
    def asked(self) -> bool:
        """Whether the thread that runs is the one that traces."""
        return threading.get_ident() == self._thread

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note a call of a child of the module that is traced."""
        if not self.asked:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Read an attribute for the module that is traced."""
        return super().getattr(attr, attr_val, parameter_proxy_cache) if self.asked else attr_val

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """What ``torch.fx.Tracer.trace`` gives for a module."""
        once = _ONCE.get()
        if once is None or not isinstance(root, nn.Module) or concrete_args is not None:
            return super().trace(root, concrete_args)
        self.root = root
        self.root_module_name = root._get_name()
        self.graph = fx.Graph(tracer_cls=type(self))
        self.submodule_paths = {part: name for name, part in root.named_modules()}
        self.tensor_attrs = {
            value: f"{name}.{attribute}" if name else attribute
            for name, part in root.named_modules()
            for attribute, value in vars(part).items()
            if isinstance(value, Tensor)
        }
        self.proxies: dict[str, Any] = {}
        once.current = self
        try:
            nn.Module.__call__(root)  # by way of torch.fx, which looks at what forward() can see
        finally:
            once.current = None
        return self.graph

    def follow(self) -> None:
        """Run forward() on placeholders."""
        forward, args = self.create_args_for_root(
            getattr(type(self.root), self.traced_func_name), True
        )
        self.create_node("output", "output", (self.create_arg(forward(*args)),), {})


class Uncompiled(fx.GraphModule):
    """A graph module that is interpreted or copied, never called: it generates no code."""

    def recompile(self) -> Any:
        """Do nothing."""
        return None
