"""Residual branches of a model: where they are, and the model without some of them.

A residual branch is what a forward() adds to a shortcut that has no weights: the two convolutions
of a ResNet block, the attention or the MLP of a transformer block. The module that adds is traced
by torch.fx; without the branch it becomes a program in which the shortcut takes the place of the
sum, and what only the branch used is gone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from psap.copying import copied
from psap.errors import ArgumentError, VerificationError
from psap.examples import example_of, examples
from psap.generated import Generator
from psap.graph.groups import no_collection
from psap.graph.inputs import Inputs, forward
from psap.members import named_modules
from psap.plans import DROPPED, Block
from psap.program import cast_to, places, standing
from psap.recording import ADDED
from psap.shared import together
from psap.symbolic import traced
from psap.twins import twins
from psap.untouched import untouched

ADDITIONS = (operator.add, operator.iadd, torch.add)
Nodes = set[fx.Node]


@dataclass(frozen=True)
class Branch:
    """A residual branch, where forward() of one module adds it.

    Attributes:
        block: its name, and the tensors that only it uses.
        owner: name of the module that adds.
        program: forward() of that module.
        total: the sum.
        skip: the shortcut.
        dead: what only the branch computes.
    """

    block: Block
    owner: str
    program: fx.GraphModule
    total: fx.Node
    skip: fx.Node
    dead: frozenset[fx.Node]


@no_collection()
def branches(model: nn.Module, inputs: Inputs) -> list[Branch]:
    """All residual branches of a model, in the order of its modules.

    Modules that torch.fx cannot trace have none.

    Args:
        model: the model; it is not changed.
        inputs: example inputs.
    """
    inputs = cast_to(model, inputs)
    with untouched(model), torch.no_grad(), examples(model) as given:
        forward(model.eval(), inputs)
    held = dict(named_modules(model))
    asked = {
        name: example_of(name, given)
        for name, module in held.items()
        if name in given and module._modules and type(module) is not nn.Sequential
    }
    programs = together(lambda: _programs(model, asked))
    found = [b for name in asked if name in programs for b in _of(model, name, programs[name])]
    names = [branch.block.name for branch in found]
    return [branch for branch in found if names.count(branch.block.name) == 1]


def _programs(
    model: nn.Module, asked: Mapping[str, Mapping[str, Any]]
) -> dict[str, fx.GraphModule]:
    programs: dict[str, fx.GraphModule] = {}
    for names in twins(model, asked):
        try:
            program = traced(model.get_submodule(names[0]), asked[names[0]])
        except VerificationError:
            continue
        programs.update(dict.fromkeys(names, program))
    return programs


def _of(model: nn.Module, owner: str, program: fx.GraphModule) -> Iterator[Branch]:
    body = model.get_submodule(owner)
    for total in program.graph.nodes:
        if not _adds(total):
            continue
        without = [_dead(program.graph, total, x) for x in total.args]
        shortcut = [_is_shortcut(body, *pair) for pair in zip(without, total.args, strict=True)]
        for at, (dead, skip) in enumerate(zip(without, reversed(total.args), strict=True)):
            children = _weights(body, dead)
            if not children or not _reads(dead) or not _computed(skip):
                continue
            if shortcut[at] or not shortcut[1 - at]:
                continue  # it may be a shortcut with a branch of its own
            largest = max(children, key=lambda child: children[child])
            tensors = tuple(_tensors(model, owner, body, program.graph, dead))
            if not tensors:
                continue  # every layer of it is used elsewhere
            block = Block(_join(owner, largest), tensors)
            yield Branch(block, owner, program, total, skip, frozenset(dead))


def _is_shortcut(body: nn.Module, dead: Nodes, value: fx.Node) -> bool:
    """Whether one of two values that are added has no weights of its own, but those of branches.

    In ``x + a(x) + b(x)``, ``x`` is the shortcut of ``a``, and their sum is that of ``b``.

    Args:
        body: the module that adds.
        dead: what nobody needs if the value is not added.
        value: the value.
    """
    if not _weights(body, dead):
        return True
    firsts = (x for x in _terms(value) if x is not value and _computed(x))
    return any(not _weights(body, dead & _before([first], set())) for first in firsts)


def _terms(value: fx.Node) -> Nodes:
    """A value, and if it is a sum, all that is added."""
    found: Nodes = set()
    left = [value]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes if _adds(node) else []
    return found


def _adds(node: fx.Node) -> bool:
    """Whether a node is the sum of two values."""
    added = node.op == "call_function" and node.target in ADDITIONS
    added = added or (node.op == "call_method" and node.target in ("add", "add_"))
    two = added and len(node.args) == 2 and not node.kwargs
    return two and all(isinstance(x, fx.Node) for x in node.args) and node.args[0] != node.args[1]


def _dead(graph: fx.Graph, total: fx.Node, branch: fx.Node) -> Nodes:
    """What nobody needs if the branch is not added.

    What is called for its effect (a check of sizes, an update of a buffer) goes with the branch if
    it looks at a layer or a parameter of it.
    """
    alive: Nodes = set()

    def need(start: Iterable[fx.Node]) -> None:
        alive.update(_before(start, alive, (total, branch)))

    need(node for node in graph.nodes if node.op in ("output", "placeholder"))
    own = {node for node in _before([branch], alive) if node.op in ("call_module", "get_attr")}
    for node in graph.nodes:
        if not node.users and own.isdisjoint(_before([node], alive)):
            need([node])
    return set(graph.nodes) - alive


def _before(
    start: Iterable[fx.Node], known: Nodes, edge: tuple[fx.Node, fx.Node] | None = None
) -> Nodes:
    """Nodes and all that they are computed from, but for what is known already.

    Args:
        start: the nodes.
        known: where not to go.
        edge: a node, and the input of it that does not count.
    """
    found: Nodes = set()
    left = [node for node in start if node not in known]
    while left:
        node = left.pop()
        if node in found:
            continue
        found.add(node)
        spared = edge[1] if edge and node is edge[0] else None
        left += [u for u in node.all_input_nodes if u is not spared and u not in known]
    return found


def _reads(dead: Nodes) -> bool:
    """Whether a branch is computed from something, and is not a parameter that is added."""
    return any(used not in dead for node in dead for used in node.all_input_nodes)


def _computed(node: fx.Node) -> bool:
    """Whether a value depends on what the module is called with."""
    return any(found.op == "placeholder" for found in _before([node], set()))


def _weights(body: nn.Module, dead: Nodes) -> dict[str, int]:
    """Parameters of the modules that are called among some nodes, by name, where there are any."""
    counts = {
        str(node.target): sum(p.numel() for p in body.get_submodule(str(node.target)).parameters())
        for node in sorted(dead)
        if node.op == "call_module" and not str(node.target).startswith(ADDED)
    }
    return {name: count for name, count in counts.items() if count}


def _used(nodes: Iterable[fx.Node]) -> set[str]:
    """Names of the modules and tensors that nodes use."""
    return {str(node.target) for node in nodes if node.op in ("call_module", "get_attr")}


def _tensors(
    model: nn.Module, owner: str, body: nn.Module, graph: fx.Graph, dead: Nodes
) -> Iterator[str]:
    """Parameters and buffers that only dead nodes use, by their first names."""
    gone = _used(dead) - _used(set(graph.nodes) - dead)
    start = [_join(owner, name) for name in gone]

    def inside(name: str) -> bool:
        return any(name == s or name.startswith(f"{s}.") for s in start)

    everywhere: list[tuple[str, Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    others = {id(tensor) for name, tensor in everywhere if not inside(name)}
    seen: set[int] = set()
    for name, tensor in everywhere:
        if id(tensor) not in others and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name


@no_collection()
def without(model: nn.Module, names: Iterable[str], inputs: Inputs) -> nn.Module:
    """A copy of a model that has lost residual branches.

    Args:
        model: the model; it is not changed.
        names: names of branches.
        inputs: example inputs.

    Raises:
        ArgumentError: there is no such branch.
    """
    names = tuple(names)
    known = {branch.block.name: branch for branch in branches(model, inputs)}
    if lost := [name for name in names if name not in known]:
        raise ArgumentError(
            f"{type(model).__name__} has no residual branch {lost[0]!r}; it has "
            f"{', '.join(known) or 'none'}"
        )
    small = copied(model)
    where, bodies, generator = places(small), dict(named_modules(small)), Generator()
    by_owner: dict[str, list[Branch]] = {}
    for name in names:
        by_owner.setdefault(known[name].owner, []).append(known[name])
    for owner in sorted(by_owner, key=lambda n: (n != "", n.count(".")), reverse=True):
        body = bodies[owner]
        part = _shortened(body, by_owner[owner], generator)
        for children, key in where.get(id(body), ()):
            children[key] = part
        small = small if owner else part
    vars(small)[DROPPED] = (*vars(model).get(DROPPED, ()), names)
    _require_whole(small, names)
    return small


def _require_whole(small: nn.Module, names: tuple[str, ...]) -> None:
    """Check that a network that has lost branches has parameters, and can be trained."""
    what = f"without the residual branches {', '.join(names)} "
    if next(small.parameters(), None) is None:
        raise VerificationError(f"{what}the model has no parameters; leave one")
    modes = {module: module.training for module in small.modules()}
    try:
        for training in (True, False):
            small.train(training)
    except Exception as error:
        raise VerificationError(
            f"{what}train() of the model fails ({type(error).__name__}: {error}): it names a layer "
            "that goes; leave that branch, or change train()"
        ) from error
    for module, training in modes.items():
        module.training = training


def _shortened(body: nn.Module, gone: list[Branch], generator: Generator) -> nn.Module:
    """The program of a module that adds some branches no more."""
    program = gone[0].program
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copies))
    before = _used(graph.nodes)
    acts = {node for node in graph.nodes if not node.users}
    for branch in sorted(gone, key=lambda found: found.total, reverse=True):
        acts -= {copies[node] for node in branch.dead if node in copies}
        skip, total = copies[branch.skip], copies[branch.total]
        if not all(_makes_anew(body, user) for user in total.users):
            with graph.inserting_before(total):
                skip = graph.call_function(torch.clone, (skip,))
        total.replace_all_uses_with(skip)
    acts -= {copies[branch.total] for branch in gone}
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op != "placeholder" and node not in acts:
            graph.erase_node(node)
    holders = dict(body.named_modules(remove_duplicate=False))
    for name in before - _used(graph.nodes):
        if name.startswith(ADDED):
            continue
        holder, _, key = name.rpartition(".")
        for table in (holders[holder]._modules, holders[holder]._parameters):
            table.pop(key, None)
        holders[holder]._buffers.pop(key, None)
    return standing(program, body, graph, {}, generator)


def _makes_anew(body: nn.Module, user: fx.Node) -> bool:
    """Whether a call gives a new tensor and leaves those that it is given as they are."""
    if user.op == "call_function":
        return user.target in _ANEW and not user.kwargs.get("inplace") and len(user.args) < 3
    layer = body.get_submodule(str(user.target)) if user.op == "call_module" else None
    if isinstance(layer, (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU)):
        return not getattr(layer, "inplace", False)
    return isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase))


_ANEW = (F.relu, torch.relu, F.gelu, F.silu, operator.add, operator.mul, torch.add, torch.cat)
