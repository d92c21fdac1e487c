"""Gates: what closes, what is saved, what moves, and the derivative of the loss by a gate."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from pruner_nets import OPTIMIZERS, Chain, backward, inputs, labels, make, train
from torch import Tensor, nn
from torch.nn import functional as F

import psap

EPS = 1e-3


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in tensors(model).items()}


def dead_rows(pruner: psap.Pruner, name: str, dim: int = 0) -> list[int]:
    channels = pruner.graph.channels[name, dim]
    return [i for i, c in enumerate(channels.tolist()) if c >= 0 and not pruner._alive[c]]


def derivative(pruner: psap.Pruner) -> np.ndarray | None:
    """d of every channel, or None where the observation is left out."""
    sums = torch.zeros(2, len(pruner._alive), dtype=torch.float64)
    seen = torch.zeros(2, dtype=torch.int64)
    pruner.gates.observe(sums, seen)
    assert seen.sum() == 1
    torch.testing.assert_close(sums[1], sums[0] ** 2, rtol=1e-12, atol=0)
    return sums[0].numpy() if seen[0] else None


def momenta(opt: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = opt.state[parameter]
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_closing_scales_the_affine_pair_and_leaves_the_filters(optimizer: str) -> None:
    model, opt, pruner = make("residual", optimizer=optimizer)
    train(model, opt)
    before = snapshot(model)
    moved = {n: copy.deepcopy(momenta(opt, p)) for n, p in model.named_parameters()}
    pruner.step()
    pairs = {"bn": "stem", "bn1": "conv1", "bn2": "conv2", "bn3": "conv3", "bn4": "down"}
    some = 0
    for norm, conv in pairs.items():
        rows = dead_rows(pruner, f"{norm}.weight")
        kept = [i for i in range(len(tensors(model)[f"{norm}.weight"])) if i not in rows]
        some += len(rows)
        for name in (f"{norm}.weight", f"{norm}.bias"):
            now = tensors(model)[name].detach()
            assert torch.equal(now[rows], before[name][rows] * EPS)
            assert torch.equal(now[kept], before[name][kept])
        for name in (f"{conv}.weight", f"{norm}.running_mean", f"{norm}.running_var"):
            assert torch.equal(tensors(model)[name], before[name])
        for name in (f"{conv}.weight", f"{norm}.weight", f"{norm}.bias"):
            found = momenta(opt, dict(model.named_parameters())[name])
            assert found
            for key, value in found.items():
                assert not value[rows].any()
                assert torch.equal(value[kept], moved[name][key][kept])
    assert some > 4
    assert torch.equal(tensors(model)["head.fc.weight"], before["head.fc.weight"])


def test_without_a_norm_filters_and_biases_are_the_gates() -> None:
    model, opt, pruner = make("plain")
    train(model, opt)
    before = snapshot(model)
    pruner.step()
    for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
        rows = dead_rows(pruner, name)
        assert rows
        assert torch.equal(tensors(model)[name][rows], before[name][rows] * EPS)
    # Scores and sparsity are those of the saved filters, not of the scaled ones.
    weights = pruner.gates.weights()
    assert torch.equal(weights["conv1.weight"], before["conv1.weight"])


def test_protect_none_and_eps_zero_close_for_good() -> None:
    for options in ({"protect": "none"}, {"gate_eps": 0.0}):
        model, opt, pruner = make("chain", **options)
        train(model, opt)
        pruner.step()
        if options == {"protect": "none"}:
            train(model, opt)
        rows = dead_rows(pruner, "bn1.weight")
        assert rows
        assert not model.bn1.weight[rows].any() and not model.bn1.bias[rows].any()
        assert model.conv1.weight[rows].all()


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_soft_between_windows_the_gated_pair_trains() -> None:
    model, opt, pruner = make("chain", protect="gate")
    pruner.step()
    rows = dead_rows(pruner, "bn1.weight")
    before = snapshot(model)
    train(model, opt, iterations=2)
    for name in ("bn1.weight", "bn1.bias", "conv1.weight"):
        assert (tensors(model)[name][rows] != before[name][rows]).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("net", ["chain", "plain", "residual", "preact", "mobile", "smooth"])
@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_held_rows_do_not_move_in_a_window_and_come_back_exactly(net: str, optimizer: str) -> None:
    """In spite of weight decay and momentum; running statistics come back as well."""
    model, opt, pruner = make(net, optimizer=optimizer, protect="pulse", window=5, warmup=1)
    train(model, opt, pruner, iterations=3)
    before = snapshot(model)
    pruner.step()
    closed = snapshot(model)
    for i in range(4):
        train(model, opt, iterations=1, first=i)
        for name, dim in pruner.gates.makers:
            rows = dead_rows(pruner, name, dim)
            if "running" in name:
                continue  # the forward pass moves it, and the hook puts it back
            now = tensors(model)[name].detach().movedim(dim, 0)
            assert torch.equal(now[rows], closed[name].movedim(dim, 0)[rows]), name
            if (parameter := dict(model.named_parameters()).get(name)) is not None:
                decay = opt.param_groups[0]["weight_decay"] if optimizer == "sgd" else 0.0
                most = 5 * decay * closed[name].movedim(dim, 0)[rows].abs()
                for value in momenta(opt, parameter).values():  # no gradient gets into it
                    assert (value.movedim(dim, 0)[rows].abs() <= most).all(), name
    dead = ~pruner._alive
    assert dead.any()
    places = {(n, d): dead_rows(pruner, n, d) for n, d in pruner.gates.makers}
    places |= {(n, d): dead_rows(pruner, n, d) for n, d in pruner.gates.states}
    pruner.gates.open(dead)
    for (name, dim), rows in places.items():
        now = tensors(model)[name].detach().movedim(dim, 0)
        assert torch.equal(now[rows], before[name].movedim(dim, 0)[rows]), name
    assert any("running_var" in name for name, _ in places) == (net != "plain")
    assert not any(saved.rows.numel() for saved in pruner.gates.saved.values())


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_a_channel_pruned_twice_keeps_its_first_copy() -> None:
    model, opt, pruner = make("chain")
    before = snapshot(model)
    pruner.step()
    first = dead_rows(pruner, "conv1.weight")
    train(model, opt, iterations=3)
    pruner.step()
    saved = pruner.gates.saved["conv1.weight", 0]
    where = [saved.rows.tolist().index(i) for i in first]
    assert torch.equal(saved.values[where], before["conv1.weight"][first])
    assert torch.equal(model.bn1.weight.detach()[first], before["bn1.weight"][first] * EPS)


@contextmanager
def scaled(modules: list[nn.Module], channel: int, factor: float) -> Any:
    """Multiply one output channel of the modules by a number: an independent gate."""

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        scale = torch.ones(out.shape[1], dtype=out.dtype)
        scale[channel] = factor
        return out * scale[:, None, None]

    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


GATED = {
    "chain": {"conv1": ["bn1"], "conv2": ["bn2"]},
    "bias_bn": {"conv1": ["bn1"], "conv2": ["bn2"]},
    "plain": {"conv1": ["conv1"], "conv2": ["conv2"]},
    "residual": {"stem": ["bn", "bn2"], "conv1": ["bn1"], "conv3": ["bn3", "bn4"]},
    "mobile": {"stem": ["bn", "bn3"], "up": ["bn1", "bn2"]},
    "preact": {"stem": ["bn1", "conv2", "bn3"], "conv1": ["bn2"]},
    "smooth": {"conv1": ["bn1"], "conv2": ["bn2"]},
}


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("net", GATED)
def test_the_derivative_is_the_finite_difference_by_a_gate(net: str, closed: bool) -> None:
    dtype = torch.float64
    model, opt, pruner = make(net, dtype=dtype)
    train(model, opt, dtype=dtype)
    if closed:
        pruner.step()
        train(model, opt, iterations=1, dtype=dtype)  # the gate need not be at eps exactly
        pruner.gates.hold(whole=True)
    backward(model, opt, 5, dtype)
    found = derivative(pruner)
    x, y = inputs(seed=5, dtype=dtype), labels(seed=5)
    checked = 0
    for group in pruner.graph.groups:
        modules = [model.get_submodule(name) for name in GATED[net][group.name]]
        for i in range(group.size):
            alive = bool(pruner._alive[group.start + i])
            step, losses = (1e-6 if alive else 1e-3), []  # small: ReLU has kinks
            for factor in (1 + step, 1 - step):
                with scaled(modules, i, factor), torch.no_grad():
                    losses.append(F.cross_entropy(model(x), y).item())
            wanted = (losses[0] - losses[1]) / (2 * step) / (1.0 if alive else EPS)
            assert found[group.start + i] == pytest.approx(wanted, rel=1e-4, abs=1e-8), (net, i)
            checked += abs(wanted) > 1e-5 and not alive
    assert checked > 0 or not closed


def test_row_dots_vanish_under_a_batch_norm() -> None:
    """<W_i, G_i> = 0 in train mode, so it must not be used as importance; the pair is."""
    model, opt, pruner = make("chain", dtype=torch.float64)
    backward(model, opt, 3, torch.float64)
    for conv, norm in ((model.conv1, model.bn1), (model.conv2, model.bn2)):
        rows = (conv.weight * conv.weight.grad).sum((1, 2, 3)).detach()
        size = conv.weight.detach().norm() * conv.weight.grad.norm()
        # Exact but for the eps of the norm, 1e-5 beside variances of about 1.
        assert rows.abs().max() < 2e-4 * size
        pair = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).detach()
        assert pair.abs().max() > 1e-3 * size
    found = derivative(pruner)
    pair = model.bn1.weight * model.bn1.weight.grad + model.bn1.bias * model.bn1.bias.grad
    np.testing.assert_allclose(found[:8], pair.detach().numpy(), rtol=1e-12)


def test_the_consumer_column_says_the_same_as_the_affine_pair() -> None:
    model, opt, pruner = make("chain", dtype=torch.float64)
    train(model, opt, dtype=torch.float64)
    backward(model, opt, 3, torch.float64)
    columns = (model.conv2.weight * model.conv2.weight.grad).sum((0, 2, 3)).detach().numpy()
    np.testing.assert_allclose(derivative(pruner)[:8], columns, rtol=1e-9, atol=1e-12)
    assert np.abs(columns).max() > 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["bn1.weight", "bn2.bias"])
def test_any_gradient_that_is_not_finite_gives_no_derivative(name: str, value: float) -> None:
    model, opt, pruner = make("chain")
    assert derivative(pruner) is None  # no gradient at all
    backward(model, opt, 0)
    assert derivative(pruner) is not None
    model.get_parameter(name).grad.view(-1)[-1] = value
    assert derivative(pruner) is None


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_gradients_of_pruned_channels_are_cleared_and_no_others() -> None:
    model, opt, pruner = make("residual", protect="pulse")
    pruner.step()
    backward(model, opt, 0)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    pruner.gates.still_gradients(pruner._alive)
    for name, parameter in model.named_parameters():
        role = pruner.graph.roles.get((name, 0))
        rows = dead_rows(pruner, name) if role == "out" else []
        kept = [i for i in range(len(parameter)) if i not in rows]
        assert not parameter.grad[rows].any()
        assert torch.equal(parameter.grad[kept], before[name][kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_other_dtypes_close_and_open_exactly(dtype: torch.dtype) -> None:
    model, _, pruner = make("chain", dtype=dtype)
    before = snapshot(model)
    pruner.step()
    rows = dead_rows(pruner, "bn1.weight")
    assert torch.equal(model.bn1.weight.detach()[rows], before["bn1.weight"][rows] * EPS)
    pruner.gates.open(~pruner._alive)
    for name, tensor in tensors(model).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_an_empty_parameter_and_a_missing_gradient_do_no_harm() -> None:
    class Odd(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.empty = nn.Parameter(torch.empty(0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.empty.sum()

    model = Odd()
    opt = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = psap.Pruner(model, inputs(), optimizer=opt, config=psap.Config(protect="pulse"))
    pruner.step()
    backward(model, opt, 0)
    model.bn2.bias.grad = None
    opt.step()
    assert pruner._window.observed == 1
    assert pruner._window.sums[0].abs().max() > 0


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_a_module_that_was_replaced_is_named() -> None:
    model, _, pruner = make("chain")
    model.bn1 = nn.BatchNorm2d(8)
    with pytest.raises(psap.StateError, match=r"bn1.weight is another tensor since the Pruner"):
        pruner.step()


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_buffers_that_were_replaced_are_found() -> None:
    """As `Module.to` does it, which keeps parameters and makes new buffers."""
    model, opt, pruner = make("chain", protect="pulse")
    pruner.step()
    rows = dead_rows(pruner, "bn1.running_mean")
    held = model.bn1.running_mean[rows].clone()
    model.bn1.running_mean = model.bn1.running_mean + 1
    backward(model, opt, 0)
    opt.step()
    assert rows and torch.equal(model.bn1.running_mean[rows], held)
