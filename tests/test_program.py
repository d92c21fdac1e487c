"""Graph mode: the option-A ResNets, fixed sizes of every kind, and what is refused."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, assert_exact, assert_same, conv, head, image, randomise, snapshot
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES
from zoo_nets import block

import psap
from psap.models import resnet20
from psap.program import program


def _apply(model: nn.Module, mode: Any = "auto", ratio: float = 0.5) -> psap.Result:
    return psap.apply(model, psap.plan(psap.trace(model, image()), ratio=ratio), mode=mode)


@pytest.mark.parametrize("source", ["fresh", "trained"])
def test_resnet20_with_padded_shortcuts(source: str, request: pytest.FixtureRequest) -> None:
    model = resnet20(num_classes=10)
    if source == "trained":
        folder: Path = request.getfixturevalue("data_dir")
        model.load_state_dict(load_file(folder / "cifar-resnets" / "resnet20.safetensors"))
        model.double()
    else:
        randomise(model)
    inputs = (image(2, 3, 16, 16),)
    graph = psap.trace(model, inputs)
    sizes = {group.name: group.size for group in graph.groups}
    blocks = {f"layer{s}.{b}.conv1": 8 * 2**s for s in (1, 2, 3) for b in range(3)}
    assert {name: size for name, size in sizes.items() if name in blocks} == blocks
    # a channel of stage 3 that the shortcuts carry is one of stage 1, padded twice
    assert {n: s for n, s in sizes.items() if n not in blocks} == {
        "conv1": 16, "layer2.0.conv2": 16, "layer3.0.conv2": 32
    }  # fmt: skip
    assert graph.left_alone == {"linear": "output of the model"}
    plan = psap.plan(graph, ratio=0.5)
    result = psap.apply(model, plan)
    assert result.mode == "graph"
    assert any(isinstance(m, torch.fx.GraphModule) for m in result.model.modules())
    assert result.report["verification"]["max_relative_error"] < 1e-9
    assert_exact(model, plan, result.model, inputs)
    assert list(result.model.state_dict()) == list(model.state_dict())
    with pytest.raises(
        psap.VerificationError, match="module mode: the small network fails in eval"
    ):
        psap.apply(model, plan, mode="module")


def test_a_program_trains_and_keeps_its_optimizer() -> None:
    model = randomise(resnet20(num_classes=4)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = image(4, 3, 8, 8)
    model(inputs).square().mean().backward()
    optimizer.step()
    plan = psap.plan(psap.trace(model, inputs), target=psap.Target(macs=0.4))
    result = psap.apply(model, plan, optimizer=optimizer)
    small, fresh = result.model, result.optimizer
    assert result.mode == "graph" and small.training and fresh is not None
    assert len(fresh.state) == len(optimizer.state)
    losses = []
    for _ in range(6):
        fresh.zero_grad()
        loss = F.cross_entropy(small(inputs), torch.arange(4))
        loss.backward()
        fresh.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_functional_dropout_knows_its_mode() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = F.dropout(m.one(x).view(-1, 8, 8, 8), 0.5, training=m.training)
        return F.dropout2d(x, p=0.25, training=m.training)

    model = randomise(block(8, body, one=conv(8, 8))).eval()
    small = _apply(model).model
    assert isinstance(small, torch.fx.GraphModule)
    assert {k: v.p for k, v in small.named_children() if k.startswith("psap_")} == {
        "psap_dropout": 0.5,
        "psap_dropout2d": 0.25,
    }
    x = image()
    assert torch.equal(small(x), small(x))
    small.train()
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))
    assert small.state_dict().keys() == model.state_dict().keys()


FIXED: dict[str, Any] = {
    "view, packed": lambda m, x: m.one(x).view((-1, 8, 64)).view(-1, 8, 8, 8),
    "reshape of an image": lambda m, x: m.one(x).reshape(x.shape[0], 8, 64).reshape(x.shape),
    "expand": lambda m, x: m.one(x) * x.mean((2, 3), keepdim=True).expand(-1, 8, 8, 8),
    "stride": lambda m, x: torch.cat([m.one(x)[:, ::2], x[:, 1::2]], 1),
    "ellipsis": lambda m, x: torch.cat([m.one(x)[:, :3, ...], x[:, 3:]], 1),
    "negative": lambda m, x: torch.cat([m.one(x)[:, :-2], x[:, -2:]], 1),
    "split by size": lambda m, x: torch.cat(m.one(x).split(3, 1)[::-1], 1),
    "split by function": lambda m, x: torch.cat(torch.split(m.one(x), [5, 3], dim=1)[::-1], 1),
    "slice of a slice": lambda m, x: torch.cat([m.one(x)[:, :3][:, :1], x[:, 1:]], 1),
    "chunk": lambda m, x: torch.cat(m.one(x).chunk(3, dim=1)[::-1], 1),
    "tensor_split": lambda m, x: torch.cat(torch.tensor_split(m.one(x), 3, dim=1)[::-1], 1),
    "select": lambda m, x: m.one(x) * m.one(x)[:, 5].unsqueeze(1) + x,
    "pad, keyword": lambda m, x: F.pad(m.one(x)[:, :4], pad=(0, 0, 0, 0, 1, 3)) + x,
    "pad, all sides": lambda m, x: F.max_pool2d(
        F.pad(m.one(x)[:, 2:], (1, 1, 1, 1, 2, 0)), 3, 1
    ) + x,
    "shuffle": lambda m, x: m.one(x).view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_fixed_sizes_are_rewritten(name: str, ratio: float) -> None:
    model = randomise(block(8, FIXED[name], one=conv(8, 8)))
    plan = psap.plan(psap.trace(model, image()), ratio=ratio, score="random", seed=3)
    assert any(side.name == "one.weight" for side in plan.sides)
    result = psap.apply(model, plan, mode="graph")
    assert result.mode == "graph"
    assert_exact(model, plan, result.model, (image(),))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda m, x: m.one(x).view(-1, 8, 8, 8) if x.sum() > 0 else x, "torch.fx"),
        (lambda m, x: m.one(x).view(x.shape) + (m.training and x), "different things"),
        (lambda m, x: m.one(x) * torch.tensor(2.0 if m.training else 1.0), "different things"),
        (lambda m, x: m.one(x).narrow(1, 0, 4).repeat(1, 2, 1, 1), "narrow at narrow"),
    ],
)  # fmt: skip
def test_what_cannot_be_rewritten_is_refused(body: Any, match: str) -> None:
    model = randomise(block(8, body, one=conv(8, 8)))
    before = snapshot(model)
    with pytest.raises(psap.VerificationError, match=f"graph mode: .*{match}"):
        _apply(model, "graph")
    assert_same(before, snapshot(model))


class _Gated(nn.Module):
    """Branches on an argument, and fixes a width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        return x.view(-1, 8, 64).relu().view(-1, 8, 8, 8)


def _around(inner: nn.Module) -> nn.Module:
    """A model whose own forward() torch.fx cannot trace."""

    def body(m: Any, x: Tensor) -> Tensor:
        return m.inner(x) if bool(x.detach().sum() > -1e9) else x

    return randomise(block(8, body, inner=inner))


def test_only_the_module_that_fixes_sizes_becomes_a_program() -> None:
    model = _around(_Gated())
    result = _apply(model, "auto")
    assert result.mode == "graph"
    assert type(result.model) is type(model)
    assert isinstance(result.model.inner, torch.fx.GraphModule)
    assert list(result.model.state_dict()) == list(model.state_dict())


def test_a_program_refuses_an_argument_that_it_was_not_made_for() -> None:
    small = _apply(_around(_Gated()), "auto").model
    x = torch.rand(1, small.inner.conv.in_channels, 8, 8, dtype=torch.float64)
    small.inner(x, None)
    with pytest.raises(psap.ArgumentError, match=r"mask is .*made for mask=None"):
        small.inner(x, torch.ones(()))


def test_a_pickled_program_still_checks_its_arguments() -> None:
    part = _apply(_around(_Gated()), "auto").model.inner
    x = torch.rand(1, part.conv.in_channels, 8, 8, dtype=torch.float64)
    again = ForkingPickler.loads(ForkingPickler.dumps(part))  # as for another process
    assert torch.equal(again(x), part(x))
    with pytest.raises(psap.ArgumentError, match=r"mask is .*made for mask=None"):
        again(x, torch.ones(()))


def test_dimensions_are_counted_off_the_example() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.conv(x).view(-1, 8, 64).mean(2)
            while len(gate.shape) < len(x.shape):
                gate = gate[..., None]
            return x * gate

    assert _apply(_around(Wide())).mode == "graph"


def test_a_shared_module_becomes_one_program() -> None:
    inner = _Gated()

    def body(m: Any, x: Tensor) -> Tensor:
        return m.again(m.inner(x))

    model = randomise(block(8, body, inner=inner, again=inner))
    small = _apply(model, "auto").model
    assert small.inner is small.again
    assert isinstance(small.inner, torch.fx.GraphModule)


def test_constants_of_forward_are_not_hung_on_the_model() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.one(x).view(-1, 8, 8, 8) * torch.tensor(0.5)

    model = randomise(block(8, body, one=conv(8, 8)))
    names = set(vars(model))
    result = _apply(model, "graph")
    assert set(vars(model)) == names
    assert result.model.state_dict().keys() == model.state_dict().keys()


def test_train_flags_and_unused_layers_are_kept() -> None:
    model = randomise(
        block(8, FIXED["view, packed"], one=conv(8, 8), unused=nn.Linear(2, 2))
    ).train()
    model.bn.eval()  # type: ignore[union-attr,operator]
    model.one.weight.requires_grad_(True)
    model.unused.weight.requires_grad_(False)  # type: ignore[union-attr]
    small = _apply(model, "graph").model
    dense = dict(model.named_modules())
    for name, module in small.named_modules():
        assert module.training == dense[name].training, name
    assert not small.unused.weight.requires_grad
    assert list(small.state_dict()) == list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert psap.apply(model, plan, optimizer=optimizer, mode="graph").optimizer is not None


def test_a_parameter_of_two_modules_in_a_program() -> None:
    a, b = conv(8, 8, bias=False), conv(8, 8, bias=False)
    b.weight = a.weight
    model = randomise(block(8, lambda m, x: m.a(m.b(x).view(-1, 8, 8, 8)), a=a, b=b))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(image()).sum().backward()
    optimizer.step()
    result = psap.apply(model, plan, optimizer=optimizer, mode="graph")
    assert_exact(model, plan, result.model, (image(),))
    assert result.model.a.weight is result.model.b.weight


def test_module_mode_is_taken_where_it_holds() -> None:
    model = randomise(CASES["residual"].make())
    assert _apply(model).mode == "module"
    assert _apply(model, "graph").mode == "graph"


def test_several_inputs_and_outputs_in_a_program() -> None:
    case = CASES["two inputs, dict output"]
    model = randomise(case.make())
    plan = psap.plan(psap.trace(model, case.inputs), ratio=0.5)
    small = psap.apply(model, plan, mode="graph").model
    out = small(*case.inputs)
    assert out.keys() == {"logits", "maps"}
    assert_exact(model, plan, small, case.inputs)


def test_the_program_can_be_built_directly() -> None:
    from psap.shrink import small_copy

    net = Net(lambda m, x: m.head(F.relu(m.a(x)).view(-1, 6, 8, 8)), a=conv(3, 6), head=head(6))
    model = randomise(net)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = program(model, plan, (image(),), small_copy)
    assert "view(-1, 3, 8, 8)" in small.code
    assert_exact(model, plan, small, (image(),))


class _Padded(nn.Module):
    """Padding fixes the width in Python, so that graph mode is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(12, 6, 3, padding=1)
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("ema", torch.zeros(6, 1, 1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - self.mean.view(1, 3, 1, 1)
        x = F.pad(F.relu(self.a(x)), (0, 0, 0, 0, 2, 2)) * torch.tensor(2.0)
        x = self.b(x)
        self.calls.add_(1)
        self.ema.mul_(0.9).add_(x.detach().mean((0, 2, 3)).view(6, 1, 1), alpha=0.1)
        return x - self.ema


def test_buffers_that_forward_changes_are_changed_by_the_program():
    model, x = _Padded(), torch.randn(2, 3, 5, 5)
    plan = psap.plan(psap.trace(model, x), ratio=0.5)
    result = psap.apply(model, plan, mode="graph")
    masked = psap.mask(model, plan)
    for turn in range(1, 4):
        torch.testing.assert_close(result.model(x), masked(x))
        assert int(result.model.calls) == int(masked.calls) == turn


class _Chosen(nn.Module):
    """A constructor that chooses forward() (FasterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.part = conv(3, 3)
        self.forward = self.parts  # type: ignore[method-assign]

    def parts(self, x: Tensor) -> Tensor:
        first, rest = x.split([3, 5], 1)
        return torch.cat([self.part(first), rest], 1)


def test_a_forward_that_the_constructor_has_chosen() -> None:
    model = randomise(block(8, lambda m, x: F.relu(m.one(x)), one=_Chosen()))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan)
    assert result.mode == "graph"
    assert_exact(model, plan, result.model, (image(),))


class _Fixed(nn.Module):
    """A residual block with a size in its forward()."""

    def __init__(self) -> None:
        super().__init__()
        self.one = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.one(x).view(-1, 8, 64)).view(-1, 8, 8, 8)


@pytest.mark.parametrize("stored", [False, True])
def test_many_blocks_cost_one_pass_and_one_change_of_torch(
    stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise(nn.Sequential(conv(3, 8), *(_Fixed() for _ in range(5)), head(8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    passes: list[nn.Module] = []
    model[0].register_forward_hook(lambda m, x, y: passes.append(m))
    changes: list[Any] = []
    patch = torch.fx._symbolic_trace._Patcher.patch_method

    def counted(self: Any, cls: type, name: str, *rest: Any, **options: Any) -> None:
        changes.append(name)
        patch(self, cls, name, *rest, **options)

    monkeypatch.setattr(torch.fx._symbolic_trace._Patcher, "patch_method", counted)
    if stored:
        plan = psap.Plan.from_json(plan.to_json())
    small = psap.apply(model, plan, example_inputs=image(), mode="graph", check=False).model
    assert sum(isinstance(m, torch.fx.GraphModule) for m in small.modules()) == 5
    assert changes == ["__getattr__", "__call__"]
    assert len(passes) == (2 if stored else 1)  # a plan with its graph knows what counts channels
    assert_exact(model, plan, small, (image(),))


class _Scaled(nn.Module):
    """A block whose only size is right for any number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.gamma = conv(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one(x) * self.gamma.reshape(1, -1, 1, 1)


def test_rows_of_all_that_there_is_count_no_channels() -> None:
    model = randomise(nn.Sequential(conv(3, 8), _Scaled(), _Fixed(), head(8)))
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = psap.apply(model, plan, mode="graph").model
    assert type(small[1]) is _Scaled
    assert isinstance(small[2], torch.fx.GraphModule)
    assert_exact(model, plan, small, (image(),))
