"""float64 also where forward() asks for another dtype by name.

Embeddings of time steps, norms and attention are often computed in float32 on purpose. In a float64
copy of such a network some calls meet two dtypes and fail, others round, which hides errors. While
`Widening` is active, whatever is a floating number becomes float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from psap.graph.calls import QuietMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Widening(QuietMode):
    """Makes all calls give out float64 where they would give out another floating dtype.

    Attributes:
        changed: whether it has changed a call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the call on float64; what it writes to keeps its dtype."""
        schema = func._schema
        written = schema.arguments[0].name if schema.is_mutable else ""
        given = tuple(x if n == 0 and written else self._wide(x) for n, x in enumerate(args))
        options = {k: v if k == "out" else self._wide(v) for k, v in (kwargs or {}).items()}
        out = func(*given, **options)
        return out if written else self._wide(out)

    def _wide(self, value: Any) -> Any:
        return tree_map(self._one, value)

    def _one(self, value: Any) -> Any:
        narrow = value.dtype if isinstance(value, Tensor) else value
        if not isinstance(narrow, torch.dtype) or narrow not in NARROW:
            return value
        self.changed = True
        return value.double() if isinstance(value, Tensor) else torch.float64
