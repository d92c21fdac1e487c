"""Programs keep the blocks in which forward() goes without gradients, or without autocast."""

from __future__ import annotations

import copy
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, assert_exact, conv, image, randomise
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import psap
from psap.branches import without
from psap.contexts import entered, left


def _fixed(x: Tensor) -> Tensor:
    """Fixes the width in Python, so that graph mode is needed."""
    return x.view(-1, 8, 64).relu().view(-1, 8, 8, 8)


def _net(body: Any, **parts: Any) -> nn.Module:
    parts = {"stem": conv(3, 8), "one": conv(8, 8), "last": conv(8, 4), **parts}
    return randomise(Net(body, **parts))


def _apply(model: nn.Module) -> tuple[psap.Plan, nn.Module]:
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    result = psap.apply(model, plan)
    assert result.mode == "graph" and isinstance(result.model, fx.GraphModule)
    return plan, result.model


def _gradients(model: nn.Module, steps: int = 1) -> dict[str, Tensor | None]:
    x = image().requires_grad_(True)
    model = copy.deepcopy(model).train()
    for _ in range(steps):
        model.zero_grad()
        out = model(x)
        if out.requires_grad:
            out.square().sum().backward()
    return {"input": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def _assert_same_gradients(
    model: nn.Module, plan: psap.Plan, small: nn.Module, steps: int = 1
) -> dict[str, Tensor | None]:
    wanted, got = _gradients(psap.mask(model, plan), steps), _gradients(small, steps)
    assert wanted.keys() == got.keys()
    for name, expected in wanted.items():
        assert (expected is None) == (got[name] is None), name
        if expected is not None:
            for dim, positions in plan.kept().get(name, {}).items():
                expected = expected.index_select(dim, torch.tensor(positions))
            torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-9)
    assert torch.is_grad_enabled()
    return got


def _frozen_stem(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.stem(x)
    return m.last(_fixed(m.one(y)))


def _gate(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    with torch.no_grad():
        gates, _ = y.abs(), None
        gates = gates / (1 + gates)
    return m.last(_fixed(m.one(y)) * gates)


def _set(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        y = m.stem(x)
    with torch.set_grad_enabled(True):
        return m.last(_fixed(m.one(y)))


def _by_mode(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(m.training):
        y = m.stem(x)
    return m.last(_fixed(m.one(y)))


def _if_enabled(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(torch.is_grad_enabled() and m.training):
        y = m.stem(x)
    return m.last(_fixed(m.one(y)))


def _nested(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.stem(x)
        with torch.enable_grad():
            y = m.one(y)
            with torch.no_grad():
                y = y * F.relu(m.one(y))
        z = y * 2
    return m.last(_fixed(y) + z)


@torch.no_grad()
def _stem_without(m: Any, x: Tensor) -> Tensor:
    return m.stem(x)


def _decorated(m: Any, x: Tensor) -> Tensor:
    return m.last(_fixed(m.one(_stem_without(m, x))))


def _nests(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.stem(x)
        parts = {"whole": [y, y * 2], "pieces": torch.split(y, 4, 1)}
    return m.last(_fixed(m.one(parts["whole"][1])) + torch.cat(parts["pieces"], 1))


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = m.one(m.stem(x))
    with torch.no_grad():
        y.mul_(2)
        m.shift.mul_(0.9).add_(y.mean(), alpha=0.1)
    return m.last(_fixed(y) + m.shift)


def _children(m: Any, x: Tensor) -> Tensor:
    y = m.one(m.stem(x))
    with torch.no_grad():
        m.average(y)
    return m.last(_fixed(y) + m.average.value)


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        y = checkpoint(m.stem, x, use_reentrant=True)
        return m.last(_fixed(checkpoint(m.one, y, use_reentrant=False)))
    return m.last(_fixed(m.one(m.stem(x))))


class _Average(nn.Module):
    """Keeps an average of its input, and trusts its caller to go without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(1))

    def forward(self, x: Tensor) -> None:
        self.value.mul_(0.9).add_(x.mean(), alpha=0.1)


BODIES = (
    _frozen_stem, _gate, _set, _by_mode, _if_enabled, _nested, _decorated, _nests, _in_place,
    _children, _checkpointed,
)  # fmt: skip


def _model(body: Any) -> nn.Module:
    return _net(body, shift=torch.zeros(1), average=_Average())


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_gradients_are_those_of_the_masked_network(body: Any) -> None:
    model = _model(body)
    plan, small = _apply(model)
    got = _assert_same_gradients(model, plan, small, steps=2)
    stopped = body in (_frozen_stem, _set, _nested, _decorated, _nests)
    assert (got["stem.weight"] is None) == stopped
    assert got["last.weight"] is not None
    assert_exact(model, plan, small.zero_grad() or small, (image(),))


class _WithoutGradients(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.last(_fixed(self.one(self.stem(x))))


def test_a_forward_that_is_decorated_as_a_whole() -> None:
    model = randomise(_WithoutGradients(None, stem=conv(3, 8), one=conv(8, 8), last=conv(8, 4)))
    _, small = _apply(model)
    assert not small(image()).requires_grad


def test_a_program_says_where_it_goes_without_gradients() -> None:
    _, small = _apply(_model(_nested))
    assert small.code.count("with torch.set_grad_enabled(False):") == 2
    assert small.code.count("        with torch.set_grad_enabled(True):") == 1
    assert "entered" not in small.code


def test_inference_mode() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = 1 + (x * 0).mean()
        return m.last(_fixed(m.one(m.stem(x))) * scale.clone())

    model = _net(body)
    plan, small = _apply(model)
    assert "with torch.inference_mode(True):" in small.code
    _assert_same_gradients(model, plan, small)
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_program_leaves_gradients_as_they_are(enabled: bool) -> None:
    _, small = _apply(_model(_nested))
    autocast = torch.is_autocast_enabled("cpu")
    with torch.set_grad_enabled(enabled):
        small(image())
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(RuntimeError, match="channels"):
            small(image(1, 5, 8, 8))
        assert torch.is_grad_enabled() == enabled
    assert torch.is_autocast_enabled("cpu") == autocast


def _functions(m: Any, x: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    y = m.stem(x)
    torch.set_grad_enabled(before)
    return m.last(_fixed(m.one(y)))


def _left_open(m: Any, x: Tensor) -> Tensor:
    torch.autocast("cpu", enabled=True).__enter__()
    return m.last(_fixed(m.one(m.stem(x))))


def _crossed(m: Any, x: Tensor) -> Tensor:
    gradients, precision = torch.no_grad(), torch.autocast("cpu", enabled=False)
    gradients.__enter__()
    precision.__enter__()
    y = m.stem(x)
    gradients.__exit__(None, None, None)
    y = m.one(y)
    precision.__exit__(None, None, None)
    return m.last(_fixed(y))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (_functions, r"calls torch\.set_grad_enabled\(\) outside of a with statement"),
        (_left_open, r"enters torch\.autocast and does not leave it"),
        (_crossed, r"leaves torch\.set_grad_enabled before what it entered later"),
    ],
)
def test_what_is_no_block_is_refused(body: Any, match: str) -> None:
    from psap.symbolic import traced

    model = _net(body)
    state = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    methods = [vars(torch.no_grad)["__enter__"], vars(torch.autocast)["__enter__"]]
    with pytest.raises(psap.VerificationError, match=match):
        traced(model, {})
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == state
    assert [vars(torch.no_grad)["__enter__"], vars(torch.autocast)["__enter__"]] == methods


def test_parameters_that_are_read_past_torch_fx_are_refused() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        total = sum(p.square().sum() for p in m.parameters())
        return m.last(_fixed(m.one(m.stem(x)))) * total

    from psap.symbolic import traced

    with pytest.raises(psap.VerificationError, match=r"torch\.fx does not see that parameters"):
        traced(_net(body), {})


@pytest.mark.parametrize("body", [_nested, _children, _by_mode], ids=lambda body: body.__name__)
def test_copies_and_pickles_keep_the_blocks(body: Any) -> None:
    model = _model(body)
    plan, small = _apply(model)
    loaded = ForkingPickler.loads(ForkingPickler.dumps(small))
    for again in (copy.deepcopy(small), loaded, ForkingPickler.loads(ForkingPickler.dumps(loaded))):
        assert again.code.count("with torch.") == small.code.count("with torch.") > 0
        _assert_same_gradients(model, plan, again, steps=2)


def test_files_keep_the_blocks(tmp_path: Path) -> None:
    model = _model(_nested)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    psap.save(psap.apply(model, plan), tmp_path / "small.safetensors")
    loaded = psap.load(tmp_path / "small.safetensors", lambda: _model(_nested))
    _assert_same_gradients(model, plan, loaded)


def test_programs_in_place_keep_the_blocks() -> None:
    model = _model(_nested)
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    before = copy.deepcopy(model)
    psap.apply(model, plan, inplace=True)
    _assert_same_gradients(before, plan, model)


@pytest.mark.parametrize("body", [_frozen_stem, _nested], ids=lambda body: body.__name__)
def test_torch_compile_keeps_the_gradients(body: Any) -> None:
    model = _model(body)
    small = _apply(model)[1]
    wanted = _gradients(copy.deepcopy(small))
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    x = image().requires_grad_(True)
    compiled(x).square().sum().backward()
    for name, parameter in small.named_parameters():
        assert (parameter.grad is None) == (wanted[name] is None), name
        if wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name])


def test_blocks_are_no_dead_code_and_can_be_interpreted() -> None:
    model = _model(_nested)
    plan, small = _apply(model)
    known = [node.target for node in small.graph.nodes if node.target in (entered, left)]
    small.graph.eliminate_dead_code()
    assert [node.target for node in small.graph.nodes if node.target in (entered, left)] == known
    small.recompile()
    _assert_same_gradients(model, plan, small)
    x = image().requires_grad_(True)
    wanted = small(x)
    torch.testing.assert_close(fx.Interpreter(small).run(x), wanted)
    plain = fx.GraphModule(small, copy.deepcopy(small.graph))
    torch.testing.assert_close(plain(x), wanted)
    assert torch.is_grad_enabled()


def test_blocks_of_other_threads_are_not_those_of_forward() -> None:
    def elsewhere() -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.zeros(1).add_(1)

    def body(m: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        y = m.stem(x)
        thread.join()
        return m.last(_fixed(m.one(y)))

    assert "with" not in _apply(_net(body))[1].code


class _Clipped(torch.autograd.Function):
    """Goes without gradients in its forward(), and says so itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_blocks_of_autograd_functions_are_not_those_of_forward() -> None:
    _, small = _apply(_net(lambda m, x: m.last(_Clipped.apply(_fixed(m.one(m.stem(x)))))))
    assert "with" not in small.code
    assert _gradients(small)["stem.weight"] is not None


def test_a_block_is_kept_without_the_residual_branch_in_it() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        with torch.set_grad_enabled(False):
            z = m.one(y)
        return m.last(y + z)

    small = without(_net(body), ["one"], (image(),))
    assert "with torch.set_grad_enabled(False):\n        pass" in small.code
    assert _gradients(small)["stem.weight"] is not None
