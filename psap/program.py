"""Graph mode: a copy of the model in which modules with fixed sizes are `torch.fx` programs.

Where forward() fixes widths in Python (``F.pad`` of channels, ``view`` to a size, ``split`` in
pieces, slices), editing tensors is not enough. The modules that do so (`psap.openings`) are traced
symbolically; the model is run once under the label tracer; every constant that counts channels is
then replaced by the number of those that stay. All other modules stay what they are. Modules keep
their names, so parameters do too, and the result trains.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from psap.commit import TABLES
from psap.errors import VerificationError
from psap.examples import example_of, examples
from psap.generated import Generator
from psap.graph.groups import no_collection
from psap.graph.inputs import Inputs, forward
from psap.graph.labels import Ints
from psap.members import named_modules
from psap.openings import openings, removed
from psap.plans import Plan
from psap.recording import ADDED, living, recorded
from psap.rewriting import rewrite
from psap.shared import together
from psap.sizes import Record
from psap.symbolic import traced
from psap.twins import twins
from psap.untouched import untouched


@no_collection()
def program(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    small_copy: Callable[[nn.Module, Plan], nn.Module],
    notes: list[str] | None = None,
) -> nn.Module:
    """The small network of a plan, with programs where forward() fixes sizes.

    A module that torch.fx cannot trace stays as it is: the proof says whether that was right.

    Args:
        model: the dense model; it is not changed.
        plan: the plan.
        inputs: example inputs.
        small_copy: cuts the tensors of a copy of the model.
        notes: gets the reason for every module that fixes sizes, but stays as it is.

    Returns:
        A ``torch.fx.GraphModule`` if the model's own forward() fixes sizes, else a copy of the
        model in which some modules are such programs.

    Raises:
        VerificationError: no module with fixed sizes can be made a program.
    """
    cast = cast_to(model, inputs)
    failures: list[str] = [] if notes is None else notes
    gone = removed(plan)
    opened = openings(model, plan, gone, cast, lambda tracer: living(tracer, plan))
    dense = _traced(model, opened, cast, failures)
    same = plan.graph is not None and inputs is plan.graph.inputs
    records = recorded(model, dense, cast, plan, gone if same else None)
    small = small_copy(model, plan)
    made = 0
    where, bodies, generator = places(small), dict(named_modules(small)), Generator()
    for name in sorted(dense, key=lambda n: (n != "", n.count(".")), reverse=True):
        body = bodies[name]
        try:
            part = _small(dense[name], body, *records[name], generator)
        except VerificationError as error:
            failures.append(str(error))
            continue
        for children, key in where.get(id(body), ()):
            children[key] = part
        small = small if name else part
        made += 1
    if not made:
        raise VerificationError("; ".join(failures))
    return small


def _traced(
    model: nn.Module,
    opened: Mapping[str, Mapping[str, Any]],
    inputs: Inputs,
    failures: list[str],
) -> dict[str, fx.GraphModule]:
    """Programs of modules; those that ask for sizes get what one more run of the model shows."""
    dense: dict[str, fx.GraphModule] = {}

    def trace_all(known: Mapping[str, Mapping[str, Any]], whole: bool = False) -> dict[str, str]:
        errors: dict[str, str] = {}
        for names in twins(model, known):
            module, given = model.get_submodule(names[0]), known[names[0]]
            try:
                dense.update(dict.fromkeys(names, traced(module, given, whole=whole)))
            except VerificationError as error:
                errors.update(dict.fromkeys(names, str(error)))
        return errors

    errors = together(lambda: trace_all(opened))
    if errors:
        with untouched(model), examples(model) as given:
            model.eval()
            forward(model, inputs)
        known = {name: {**opened[name], **example_of(name, given)} for name in errors}
        errors = together(lambda: trace_all(known))
        last = {name: known[name] for name in errors}
        failures += together(lambda: trace_all(last, whole=True)).values()
    return dense


def _small(
    dense: fx.GraphModule, body: nn.Module, record: Record, alive: Ints, generator: Generator
) -> fx.GraphModule:
    """The program of one module, on the small tensors of ``body``."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(dense.graph, copied))
    for node, twin in copied.items():
        if node in record.values:
            rewrite(node, twin, record, alive)
    return standing(dense, body, graph, record.constants, generator)


def standing(
    dense: fx.GraphModule,
    body: nn.Module,
    graph: fx.Graph,
    constants: Mapping[str, Tensor],
    generator: Generator,
) -> fx.GraphModule:
    """A program that stands for a module.

    Args:
        dense: the program of the dense module.
        body: the small module, whose tensors and children it takes.
        graph: what it does.
        constants: tensors that only it has.
        generator: makes it.
    """
    for node in graph.nodes:
        node.type = None  # torch.fx cannot pickle annotations that are text
    if isinstance(body, nn.MultiheadAttention):
        body._qkv_same_embed_dim = False  # nn.TransformerEncoder would call a fused kernel
    used = {str(node.target) for node in graph.nodes}
    for name, module in dense.named_children():
        if name.startswith(ADDED) and name in used:
            body.add_module(name, copy.deepcopy(module).train(body.training))
    for name, constant in dense.named_buffers(recurse=False):
        if name.startswith(ADDED) and name in used:
            body.register_buffer(name, constant.clone(), persistent=False)
    device = next((x.device for x in body.parameters()), torch.device("cpu"))
    for name, constant in constants.items():
        body.register_buffer(name, constant.to(device), persistent=False)
    small = generator.module(body, graph, type(body).__name__)
    for kind, value in vars(body).items():
        if kind in TABLES or kind == "training" or kind.endswith(_HOOKS):
            vars(small)[kind] = value  # all of them, in the order of the model
    small.stand_for(vars(body), body.__class__)
    return small


_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def places(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """For every module, by identity, the dictionaries that hold it, and under which names."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent._modules, key))
    return found


def cast_to(model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs of the dtype of a model, where they are floating numbers."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    cast: Inputs = tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
    return cast
