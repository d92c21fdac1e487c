"""Which modules graph mode must look into: those whose forward() counts channels that go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from psap.errors import TraceError
from psap.graph.groups import met, run_auxiliary
from psap.graph.inputs import Inputs
from psap.graph.labels import Ints
from psap.graph.rules import RULES
from psap.graph.trace import Tracer, run
from psap.plans import Plan
from psap.untouched import untouched

Bools = NDArray[np.bool_]


def openings(
    model: nn.Module,
    plan: Plan,
    gone: Bools | None,
    inputs: Inputs,
    alive: Callable[[Tracer], Ints],
) -> dict[str, Mapping[str, Any]]:
    """The modules in whose own forward() a call with sizes meets a channel that goes.

    A plan that holds its graph knows them; else the model is run once.

    Args:
        model: the dense model; it is not changed.
        plan: the plan.
        gone: what `removed` says of the plan.
        inputs: inputs of the model's dtype.
        alive: for a finished trace 1 for every label whose channel stays, else 0.

    Returns:
        For the name of each module the arguments that it was called with and that are no tensors;
        the model itself if there is no such module.
    """
    if plan.graph is not None and gone is not None:
        names = [name for name, channels in plan.graph.sizes.items() if gone[channels].any()]
        given = plan.graph.given
    else:
        tracer = Tracer(model, RULES)
        with untouched(model):
            run(tracer, model, inputs, training=False)
            if not tracer.reached.issuperset(tracer.parameters):
                with contextlib.suppress(TraceError):  # what differs there the proof will find
                    run_auxiliary(tracer, model, inputs)
        stays = alive(tracer)
        names = [name for name, labels in met(tracer).items() if not stays[labels].all()]
        given = tracer.sizes.given
    return {name: given.get(name, {}) for name in sorted(names)} or {"": {}}


def removed(plan: Plan) -> Bools | None:
    """For every channel of the plan's graph whether it goes, and False for -1, or None."""
    if plan.graph is None:
        return None
    gone = np.zeros(plan.graph.group_of.size + 1, dtype=np.bool_)
    seen: set[tuple[int, int]] = set()
    for side in plan.sides:
        channels = plan.graph.channels.get((side.name, side.dim))
        if channels is None or channels.size != side.size:
            return None
        if (id(channels), id(side.kept)) not in seen:  # many sides share both
            seen.add((id(channels), id(side.kept)))
            rest = np.ones(side.size, dtype=np.bool_)
            rest[np.array(side.kept, dtype=np.int64)] = False
            gone[channels[rest]] = True
    return None if gone[-1] else gone
