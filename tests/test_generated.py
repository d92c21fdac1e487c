"""Graph modules that share their code, and nothing else."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from psap.generated import Generator


class Scaled(nn.Module):
    """Has a tensor, a child and a plain attribute."""

    def __init__(self, scale: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.scale, self.weight, self.inner = scale, nn.Parameter(torch.randn(3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.weight


class Other(Scaled):
    """Computes the same under another name."""


def _graph(body: nn.Module, asked: str = "weight") -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("inner", (x,))
    with torch.no_grad():
        scale = graph.create_node("get_attr", asked)
    graph.output(graph.call_function(torch.mul, (y, scale)))
    return graph


def _made(generator: Generator, body: nn.Module, asked: str = "weight") -> fx.GraphModule:
    made = generator.module(body, _graph(body, asked), type(body).__name__)
    for table in ("_parameters", "_modules"):  # which is left to the caller
        vars(made)[table] = vars(body)[table]
    return made


def test_graphs_that_say_the_same_share_their_code() -> None:
    generator, x = Generator(), torch.randn(2, 3)
    bodies = [Scaled(2, 0), Scaled(2, 1), Other(2, 2)]
    programs = [_made(generator, body) for body in bodies]
    assert len({program.forward.__func__ for program in programs}) == 1
    assert [type(program).__name__ for program in programs] == ["Scaled", "Scaled", "Other"]
    for body, program in zip(bodies, programs, strict=True):
        assert program.graph.owning_module is program
        torch.testing.assert_close(program(x), body(x), rtol=0, atol=0)
    other = _made(generator, bodies[0], "scale")
    assert other.forward.__func__ is not programs[0].forward.__func__
    torch.testing.assert_close(other(x), bodies[0].inner(x) * 2)


def test_plain_attributes_are_those_of_each_body() -> None:
    generator, x = Generator(), torch.randn(2, 3)
    bodies = [Scaled(2, 0), Scaled(5, 1)]
    programs = [_made(generator, body, "scale") for body in bodies]
    for body, program in zip(bodies, programs, strict=True):
        torch.testing.assert_close(program(x), body.inner(x) * body.scale)


def test_a_program_is_changed_and_copied_alone() -> None:
    generator, x = Generator(), torch.randn(2, 3)
    bodies = [Scaled(2, seed) for seed in range(3)]
    programs = [_made(generator, body) for body in bodies]
    before = [program(x) for program in programs]
    for changed in (0, 1):
        (call,) = programs[changed].graph.find_nodes(op="call_function", target=torch.mul)
        call.target = torch.add
        programs[changed].recompile()
    wanted = [bodies[0].inner(x) + bodies[0].weight, bodies[1].inner(x) + bodies[1].weight]
    for program, result in zip(programs, [*wanted, before[2]], strict=True):
        torch.testing.assert_close(program(x), result)
        torch.testing.assert_close(copy.deepcopy(program)(x), result)
