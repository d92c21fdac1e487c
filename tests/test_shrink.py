"""Applying plans: exact or refused, never wrong; and all or nothing for the caller's objects."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from nets import (
    Net,
    assert_exact,
    assert_same,
    chain,
    conv,
    difference,
    head,
    image,
    randomise,
    snapshot,
)
from random_nets import networks
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

import psap
from psap import commit, shrink, sloping


@given(
    networks(),
    st.integers(0, 99),
    st.floats(0.2, 0.95),
    st.sampled_from(["ratio", "target"]),
    st.booleans(),
)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_random_networks_are_exact_or_refused(
    model: nn.Module, seed: int, share: float, kind: str, training: bool
) -> None:
    model = randomise(model, seed).train(training)
    inputs = (image(2, 3, 8, 8, seed=seed + 1),)
    before = snapshot(model)
    options: dict[str, Any] = {"ratio": share}
    if kind == "target":
        options = {"target": psap.Target(macs=1 - share)}
    try:
        plan = psap.plan(psap.trace(model, inputs), score="random", seed=seed, **options)
        result = psap.apply(model, plan)
    except psap.PsapError as error:
        event(type(error).__name__)
        assert str(error)
        assert_same(before, snapshot(model))
        return
    event(result.mode)
    assert_same(before, snapshot(model))
    if plan.sides:
        assert_exact(model, plan, result.model, inputs)
        masked = psap.mask(model, plan)
        with sloping.Sloping():  # no closed ReLU hides a difference; roots of negatives give NaN
            for mode in (False, True):
                assert not difference(masked, result.model, inputs, mode) > 1e-9


def _planned(model: nn.Module, ratio: float = 0.5, **options: Any) -> psap.Plan:
    return psap.plan(psap.trace(model, image()), ratio=ratio, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 5, 3), (6, 5, 3, 4), (6, 5, 2, 2, 2)])
def test_gather_is_indexing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(-99, 99, shape).to(dtype)
    kept = {dim: tuple(range(dim % 2, size, 2)) for dim, size in enumerate(shape)}
    expected = tensor
    for dim, positions in kept.items():
        expected = expected.index_select(dim, torch.tensor(positions))
    assert torch.equal(shrink.gather(tensor, kept), expected)
    assert torch.equal(shrink.gather(tensor, {}), tensor)
    assert shrink.gather(tensor, {}).data_ptr() != tensor.data_ptr()


def test_gather_of_a_number() -> None:
    assert shrink.gather(torch.tensor(3.0), {}) == 3


def test_mask_zeroes_what_makes_a_channel_and_nothing_else() -> None:
    model = randomise(CASES["residual"].make())
    plan = _planned(model)
    masked = psap.mask(model, plan)
    dense, tensors = dict(model.named_parameters()), dict(masked.named_parameters())
    tensors.update(masked.named_buffers())
    dense.update(model.named_buffers())  # type: ignore[arg-type]
    roles = {(s.name, s.dim): s for s in plan.sides}
    for name, tensor in tensors.items():
        expected = dense[name].detach().clone()
        side = roles.get((name, 0))
        if side is not None and side.role == "out":
            gone = [i for i in range(side.size) if i not in side.kept]
            expected[gone] = 0
        assert torch.equal(tensor, expected), name
    assert roles["bn.running_mean", 0].role == "out"
    assert roles["bn.running_var", 0].role == "state"
    assert roles["one.weight", 1].role == "in"


def test_attributes_follow() -> None:
    model = randomise(CASES["depthwise, multiplier 3"].make())
    small = psap.apply(model, _planned(model)).model
    layer = small.dw
    assert (layer.in_channels, layer.out_channels, layer.groups) == (4, 12, 4)
    assert small.bn1.num_features == 12
    assert small.head[2].in_features == 3
    model = randomise(CASES["group norm, one channel each"].make())
    norm = psap.apply(model, _planned(model)).model.norm
    assert (norm.num_groups, norm.num_channels) == (5, 5)
    model = randomise(CASES["prelu, a slope per channel"].make())
    assert psap.apply(model, _planned(model)).model.act.num_parameters == 5
    model = randomise(CASES["transposed"].make())
    up = psap.apply(model, _planned(model)).model.up
    assert (up.in_channels, up.out_channels) == (4, 5)


def test_what_a_copy_keeps() -> None:
    model = randomise(chain(8, 8)).train()
    model[1].eval()
    model[6][2].weight.requires_grad_(False)
    model[4].weight.requires_grad_(True)
    calls: list[int] = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    plan = _planned(model, 0.5)
    model(image()).sum().backward()
    calls.clear()
    small = psap.apply(model, plan, check=False).model
    assert type(small) is type(model)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    small(image())
    assert calls == [1]
    dense = dict(model.named_parameters())
    kept = plan.kept()
    for name, parameter in small.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.is_leaf
        assert parameter.requires_grad == dense[name].requires_grad
        if dense[name].grad is None:
            assert parameter.grad is None
        else:
            expected = shrink.gather(dense[name].grad, kept.get(name, {}))  # type: ignore[arg-type]
            assert torch.equal(parameter.grad, expected)  # type: ignore[arg-type]


def test_memory_format_and_dtype_are_kept() -> None:
    model = chain(8, 8).to(memory_format=torch.channels_last).to(torch.bfloat16)
    plan = psap.plan(psap.trace(model, image().to(torch.bfloat16)), ratio=0.5)
    small = psap.apply(model, plan).model
    assert small[3].weight.dtype == torch.bfloat16
    assert small[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_shared_parameters_stay_shared() -> None:
    model = randomise(CASES["parameter of two modules"].make())
    small = psap.apply(model, _planned(model)).model
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (4, 4, 3, 3)


def test_the_result_does_not_hold_the_dense_model() -> None:
    import weakref

    model = randomise(chain(8))
    result = psap.apply(model, _planned(model))
    reference = weakref.ref(model[0].weight)
    del model
    assert reference() is None
    assert result.plan.graph is None


# In place


def _training(net: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = randomise(net).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for seed in range(2):
        optimizer.zero_grad()
        model(image(seed=seed)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_in_place_changes_the_same_objects() -> None:
    model, optimizer = _training(chain(8, 6))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    parameters = list(model.parameters())
    plan = _planned(model)
    elsewhere = psap.apply(model, plan, optimizer=optimizer)
    result = psap.apply(model, plan, optimizer=optimizer, inplace=True)
    assert result.model is model and result.optimizer is optimizer
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert_exact_copy(elsewhere.model, model)
    assert_exact_copy(elsewhere.optimizer, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(image()).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert model[0].out_channels == 4


def assert_exact_copy(one: Any, two: Any) -> None:
    a, b = one.state_dict(), two.state_dict()
    assert str(a) == str(b)
    assert a.keys() == b.keys()


def test_an_old_loss_does_not_stand_in_the_way() -> None:
    model, _ = _training(chain(8, 6))
    loss = model(image()).sum()
    loss.backward()
    psap.apply(model, _planned(model), inplace=True)
    model(image()).sum().backward()  # autograd remembered the old shapes
    assert model[0].weight.grad.shape == (4, 3, 3, 3)
    assert loss.grad_fn is not None


class _Bomb(Exception):
    pass


def _refusing(state: Any, error: type[BaseException]) -> Any:
    """A copy of an optimizer's state that fails at the fifth entry that is written."""

    class Refusing(type(state)):  # type: ignore[misc]
        writes = 0

        def __setitem__(self, key: Any, value: Any) -> None:
            self.writes += 1
            if self.writes == 5:
                raise error("injected")
            super().__setitem__(key, value)

    entries = Refusing(dict)
    dict.update(entries, state)
    return entries


@pytest.mark.parametrize("error", [_Bomb, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", ["first tensor", "last tensor", "attribute", "optimizer"])
def test_a_failed_commit_is_undone(
    at: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = _training(CASES["depthwise"].make())
    plan = _planned(model)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    shapes = {n: (m.__dict__.get("groups"), m.__dict__.get("num_features"),
                  m.__dict__.get("in_channels")) for n, m in model.named_modules()}  # fmt: skip
    count = sum(1 for _ in [*model.parameters(), *model.buffers()])
    calls = {"set": 0, "move": 0}
    inner_set, inner_move = commit._set, commit._move

    def set_(*args: Any) -> None:
        calls["set"] += 1
        inner_set(*args)
        if calls["set"] == {"first tensor": 1, "last tensor": count}.get(at):
            raise error("injected")

    def move(*args: Any) -> None:
        calls["move"] += 1
        inner_move(*args)
        if at == "attribute" and calls["move"] == 40:
            raise error("injected")

    monkeypatch.setattr(commit, "_set", set_)
    monkeypatch.setattr(commit, "_move", move)
    if at == "optimizer":
        optimizer.state = _refusing(optimizer.state, error)
    with pytest.raises(error, match="injected"):
        psap.apply(model, plan, optimizer=optimizer, inplace=True)
    assert_same(before, snapshot(model))
    assert str(optimizer.state_dict()) == str(state)
    assert shapes == {
        n: (m.__dict__.get("groups"), m.__dict__.get("num_features"), m.__dict__.get("in_channels"))
        for n, m in model.named_modules()
    }
    model(image()).square().mean().backward()
    optimizer.step()


def test_a_refused_plan_changes_nothing_in_place() -> None:
    model, optimizer = _training(CASES["padded shortcut"].make())
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(psap.VerificationError, match="module mode: the small network fails"):
        psap.apply(model, _planned(model), optimizer=optimizer, mode="module", inplace=True)
    assert_same(before, snapshot(model))
    assert str(optimizer.state_dict()) == str(state)


# Refusals


def test_a_plan_of_another_model() -> None:
    plan = _planned(randomise(chain(8, 6)))
    other = randomise(chain(8, 10))
    for call in (psap.apply, psap.mask):
        with pytest.raises(psap.ArgumentError, match=r"3.weight has shape .* the plan expects 6"):
            call(other, plan)
        with pytest.raises(psap.ArgumentError, match=r"this Net has no"):
            call(randomise(CASES["residual"].make()), plan)
        with pytest.raises(psap.ArgumentError, match="names or shapes of its parameters differ"):
            call(randomise(nn.Sequential(*chain(8, 6), nn.Linear(5, 5))), plan)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "fast"}, "mode is 'fast'; pass 'auto', 'module' or 'graph'"),
        ({"optimizer": "sgd"}, "optimizer is a str"),
        ({"example_inputs": "x"}, "example_inputs is a str"),
        ({"example_inputs": ()}, "holds no tensor"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    model = randomise(chain(8))
    with pytest.raises((psap.ArgumentError, psap.ArgumentTypeError), match=match):
        psap.apply(model, _planned(model), **options)


def test_bad_model_and_plan() -> None:
    model = randomise(chain(8))
    plan = _planned(model)
    with pytest.raises(TypeError, match="model is a NoneType"):
        psap.apply(None, plan)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"plan is a str; pass what psap.plan returned"):
        psap.apply(model, plan.to_json())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="plan is a NoneType"):
        psap.mask(model, None)  # type: ignore[arg-type]


def test_a_plan_is_not_applied_twice() -> None:
    model = randomise(chain(8, 6))
    plan = _planned(model)
    small = psap.apply(model, plan).model
    with pytest.raises(psap.ArgumentError, match="made for another model"):
        psap.apply(small, plan)


def test_a_model_that_cannot_be_copied() -> None:
    model = randomise(chain(8, 6))
    plan = _planned(model)
    model.lock = threading.Lock()  # type: ignore[assignment]
    before = snapshot(model)
    for check in (True, False):
        with pytest.raises(psap.PsapError, match=r"Sequential cannot be copied .*_thread.lock"):
            psap.apply(model, plan, check=check)
    with pytest.raises(psap.PsapError, match="cannot be copied"):
        psap.mask(model, plan)
    assert_same(before, snapshot(model))


def test_weight_norm_of_the_old_kind_is_exact_after_training_too() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(conv(8, 8))
    net = Net(lambda m, x: m.head(m.b(F.relu(m.a(x)))), a=conv(3, 8), b=layer, head=head(8))
    model = randomise(net)
    model(image()).sum().backward()  # leaves a weight with a history, which refuses to be copied
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    small = psap.apply(model, plan).model
    assert {group.name: len(group.kept) for group in plan.groups} == {"a": 4, "b": 4}
    assert_exact(model, plan, small, (image(),))
    assert (small.b.in_channels, small.b.out_channels) == (4, 4)  # type: ignore[union-attr]


def test_without_the_proof_a_fixed_size_goes_unnoticed() -> None:
    model = randomise(CASES["padded shortcut"].make())
    result = psap.apply(model, _planned(model), check=False)
    assert result.report["verification"] is None
    with pytest.raises(RuntimeError, match="must match"):
        result.model(image())


def test_inputs_that_no_file_can_hold() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain(8, 6)

        def forward(self, x: Tensor, scales: frozenset[float]) -> Tensor:
            return self.body(x) * max(scales)

    model = randomise(Scaled())
    plan = psap.plan(psap.trace(model, (image(), frozenset({2.0}))), ratio=0.5)
    assert plan.inputs[1] is None
    assert psap.apply(model, plan).mode == "module"
    read = psap.Plan.from_json(plan.to_json())
    with pytest.raises(psap.ArgumentError, match="does not hold example inputs"):
        psap.apply(model, read)
    assert psap.apply(model, read, example_inputs=(image(), frozenset({2.0}))).mode == "module"
