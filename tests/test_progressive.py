"""Networks that are cut after every prune step, while they train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruner_nets import NETS, OPTIMIZERS, Chain, inputs, make, train
from torch import fx, nn

import psap
from psap import commit, scores, selection
from psap.events import PruneEvent, WindowEvent
from psap.models.resnet import PaddedBlock

PROGRESSIVE = {"progressive": True, "window": 3, "prune_steps": 3}


def indices(event: PruneEvent | WindowEvent, field: str) -> set[tuple[str, int]]:
    return {(name, i) for name, found in getattr(event, field).items() for i in found}


def dead(pruner: psap.Pruner) -> set[tuple[str, int]]:
    return {
        (name, i) for name, kept in pruner.masks().items() for i in np.flatnonzero(~kept.numpy())
    }


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("protect", ["gate", "price", "pulse", "none"])
def test_the_network_shrinks_while_it_trains(name: str, protect: str, tmp_path: Path) -> None:
    optimizer = list(OPTIMIZERS)[len(name) % 4]
    model, opt, pruner = make(name, optimizer=optimizer, protect=protect, **PROGRESSIVE)
    dense = copy.deepcopy(model)
    parameters, sizes = list(model.parameters()), [p.numel() for p in model.parameters()]
    shapes = {name: kept.shape for name, kept in pruner.masks().items()}
    counts = [sum(sizes)]
    for epoch in range(3):
        train(model, opt, iterations=5, first=5 * epoch)
        pruner.step()
        train(model, opt, iterations=3, first=50 + epoch)  # the window
        counts.append(sum(p.numel() for p in model.parameters()))
    assert pruner.done and counts[0] == counts[1]  # what was just pruned may still come back
    assert counts[1] > counts[2] > counts[3]
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert {name: kept.shape for name, kept in pruner.masks().items()} == shapes
    gone, fresh = set[tuple[str, int]](), set[tuple[str, int]]()
    for event in pruner.events:
        if isinstance(event, PruneEvent):
            assert not indices(event, "pruned") & gone and indices(event, "returned") <= fresh
            fresh = indices(event, "pruned")
            gone = gone - indices(event, "returned") | fresh
        else:
            gone -= {(c.group, c.channel) for c in event.candidates if c.restored}
    if protect != "pulse":  # whose strict swap at the end exchanges channels
        assert gone == dead(pruner)
    last = [e for e in pruner.events if isinstance(e, PruneEvent)][-1]
    assert last.macs_share <= 0.4
    result = pruner.finish()
    macs = result.plan.after.macs / result.plan.before.macs
    assert macs == pytest.approx(last.macs_share) and result.plan.before == pruner.cost.dense
    psap.save(result, tmp_path / "small.psap")
    loaded = psap.load(tmp_path / "small.psap", lambda: copy.deepcopy(dense))
    wanted = model.eval()(inputs())
    for net in (loaded, result.model):
        torch.testing.assert_close(net.eval()(inputs()), wanted, rtol=1e-6, atol=1e-7)
    before = [p.detach().clone() for p in result.model.parameters()]
    train(result.model.train(), result.optimizer, iterations=2, first=90)
    moved = zip(before, result.model.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


def first(graph: Any, stats: Any, widths: Any, alive: Any, *_: Any) -> Any:
    """The first channels of each group that are still there: a choice by no weight."""
    chosen = np.zeros_like(alive)
    for group, width in zip(graph.groups, widths, strict=True):
        there = group.start + np.flatnonzero(alive[group.start : group.start + group.size])
        chosen[there[:width]] = True
    return chosen


@pytest.mark.parametrize("name", ["chain", "plain", "residual", "preact", "mobile", "dense"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_masked(
    name: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gates and with a choice that looks at no weight, masking is all there is."""
    monkeypatch.setattr(selection, "strongest", first)
    losses, masks = [], []
    for progressive in (False, True):
        options = {**PROGRESSIVE, "progressive": progressive, "protect": "none", "adapt": "uniform"}
        model, opt, pruner = make(name, optimizer=optimizer, dtype=torch.float64, **options)
        losses.append(train(model, opt, pruner, epochs=4, iterations=3, dtype=torch.float64))
        masks.append(pruner.masks())
        assert pruner.done
    assert all(torch.equal(kept, masks[1][group]) for group, kept in masks[0].items())
    assert len(losses[0]) == 12
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def everything(model: Any, opt: Any, pruner: psap.Pruner) -> dict[str, Any]:
    state = {"model": model.state_dict(), "opt": opt.state_dict(), "pruner": pruner.state_dict()}
    return copy.deepcopy(state)


def advance(model: Any, opt: Any, pruner: psap.Pruner, start: int, stop: int) -> None:
    for i in range(start, stop):
        train(model, opt, iterations=1, first=i)
        if (i + 1) % 5 == 0:
            pruner.step()


@pytest.mark.parametrize("at", [3, 5, 6, 9, 11, 17, 22])
@pytest.mark.parametrize("protect", ["gate", "price", "pulse"])
def test_a_resumed_run_has_the_same_bits(protect: str, at: int, tmp_path: Path) -> None:
    options = {**PROGRESSIVE, "protect": protect, "z_threshold": 0.3, "restore_share": 0.5}
    model, opt, pruner = make("residual", **options)
    advance(model, opt, pruner, 0, at)
    torch.save(everything(model, opt, pruner), tmp_path / "state.pt")
    advance(model, opt, pruner, at, 24)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other, opt2, resumed = make("residual", seed=99, **options)
    resumed.load_state_dict(saved["pruner"])  # first: it cuts what the others fill
    other.load_state_dict(saved["model"])
    opt2.load_state_dict(saved["opt"])
    advance(other, opt2, resumed, at, 24)
    one, two = pruner.finish(), resumed.finish()
    assert one.plan == two.plan and one.report["events"] == two.report["events"]
    weights = zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_averaged_copies_and_schedulers_shrink_along() -> None:
    torch.manual_seed(0)
    model = NETS["residual"]().train()
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.9)
    pruner = psap.Pruner(
        model,
        inputs(),
        optimizer=opt,
        config=psap.Config(target=psap.Target(macs=0.4), prune_steps=2, progressive=True),
        friends=[average, scheduler],
    )
    for epoch in range(3):
        for i in range(3):
            train(model, opt, iterations=1, first=3 * epoch + i)
            average.update_parameters(model)
        scheduler.step()
        pruner.step()
        shapes = [p.shape for p in model.parameters()]
        assert [p.shape for p in average.module.parameters()] == shapes
    assert average.eval()(inputs()).isfinite().all() and opt.param_groups[0]["lr"] < 0.04
    result = pruner.finish()
    assert [p.shape for p in result.friends[0].module.parameters()] == shapes


def test_a_cut_leaves_statistics_as_they_were() -> None:
    """What is left is less sparse than the whole, and its filters have fewer inputs."""
    model, opt, pruner = make("residual", protect="gate", **PROGRESSIVE)
    advance(model, opt, pruner, 0, 9)
    everything = np.ones(len(pruner._alive), dtype=bool)
    before, channels = pruner._measure(), pruner._lineage.kept(everything)
    pruner.step()
    rest = pruner._lineage.kept(np.ones(len(pruner._alive), dtype=bool))
    alone = scores.measure(pruner.graph, pruner.gates.weights(), pruner.config.sparsity_alpha)
    known = zip(before, pruner._measure(), alone, channels, rest, strict=True)
    less = 0
    for was, now, left, had, has in known:
        assert now.sparsity == was.sparsity and now.elements == was.elements
        powers = was.power[:, np.isin(had, has)]
        np.testing.assert_allclose(now.power, powers, rtol=1e-6)
        less += bool((left.power < 0.99 * powers).any()) and left.elements < now.elements
    assert less


@pytest.mark.parametrize(("name", "dim"), [("residual", 0), ("grouped", 0), ("smooth", 1)])
def test_saved_copies_lose_the_inputs_that_are_cut(name: str, dim: int) -> None:
    def channels(side: tuple[str, int]) -> Any:
        """Where each position of a tensor was in the dense one."""
        return pruner._lineage.original[pruner.graph.channels[side]]

    options = {**PROGRESSIVE, "adapt": "uniform", "stream_power": 0.0}
    model, opt, pruner = make(name, protect="gate", **options)
    advance(model, opt, pruner, 0, 9)
    side, across = ("conv2.weight", dim), ("conv2.weight", 1 - dim)
    weight, rows = model.conv2.weight.detach().clone(), channels(side)
    inputs_before = channels(across) if across in pruner.graph.channels else None
    pruner.step()
    saved = pruner.gates.saved[side]
    kept = torch.from_numpy(np.isin(rows, channels(side)[saved.rows]))
    expected = weight.movedim(dim, 0)[kept]
    if inputs_before is not None:
        expected = expected[:, torch.from_numpy(np.isin(inputs_before, channels(across)))]
    assert saved.rows.numel() and torch.equal(saved.values, expected)
    assert inputs_before is None or saved.values.shape[1] < len(inputs_before)


def test_a_state_of_a_larger_network_is_refused() -> None:
    model, opt, pruner = make("residual", protect="gate", **PROGRESSIVE)
    advance(model, opt, pruner, 0, 5)
    older = copy.deepcopy(pruner.state_dict())
    advance(model, opt, pruner, 5, 10)
    before = everything(model, opt, pruner)
    with pytest.raises(psap.StateError, match=r"channels of .* that the model has no more"):
        pruner.load_state_dict(older)
    damaged = {**older, "kept": [kept.float() for kept in older["kept"]]}
    with pytest.raises(psap.StateError, match=r"damaged: it has no channels of"):
        pruner.load_state_dict(damaged)
    with pytest.raises(psap.StateError, match="another number of groups"):
        pruner.load_state_dict({**older, "kept": older["kept"][:-1]})
    with pytest.raises(psap.StateError, match=r"damaged \(KeyError"):
        pruner.load_state_dict({key: value for key, value in older.items() if key != "kept"})
    fresh, fresh_opt, other = make("residual", protect="gate", **PROGRESSIVE)
    shapes = [p.shape for p in fresh.parameters()]
    with pytest.raises(psap.StateError, match="damaged: 'bonus'"):
        other.load_state_dict({**older, "bonus": older["bonus"][:-1]})
    assert [p.shape for p in fresh.parameters()] == shapes and not fresh_opt.state
    after = everything(model, opt, pruner)
    assert torch.equal(before["pruner"]["alive"], after["pruner"]["alive"])
    pairs = zip(before["model"].values(), after["model"].values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Padded(nn.Module):
    """Fixes widths in Python, in a block and in the model itself."""

    def __init__(self, *, root: bool) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, padding=1), PaddedBlock(4, 8, 1)
        self.root, self.head = root, nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.stem(x))
        if self.root:
            x = x.view(x.shape[0], 8, 64).view(x.shape[0], 8, 8, 8)
        return self.head(x.mean((2, 3)))

    def help(self) -> str:
        return "a method of the user's"


@pytest.mark.parametrize("protect", ["gate", "pulse"])
@pytest.mark.parametrize("root", [False, True])
def test_modules_that_fix_widths_become_programs(root: bool, protect: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prune_steps": 3, "window": 3, "protect": protect}
    config = psap.Config(target=psap.Target(macs=0.4), progressive=True, **options)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, psap.Pruner]:
        torch.manual_seed(0)
        model = Padded(root=root).train()
        opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return model, opt, psap.Pruner(model, inputs(), optimizer=opt, config=config)

    model, opt, pruner = begin()
    block, parameters = model.block, list(model.parameters())
    seen = []
    model.block.register_forward_hook(lambda *_: seen.append(1))
    advance(model, opt, pruner, 0, 11)
    state = everything(model, opt, pruner)
    advance(model, opt, pruner, 11, 24)
    assert pruner.done and model.block is block and len(seen) >= 24
    assert isinstance(block, fx.GraphModule) and isinstance(model, fx.GraphModule) is root
    assert root or model.help() == "a method of the user's"
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    result = pruner.finish()
    assert result.mode == "graph" and result.report["verification"]["mode"] == "graph"
    assert 0 < result.report["verification"]["max_relative_error"] < 1e-9  # the worst of all cuts
    assert result.report["verification"]["silent"] == ()
    psap.save(result, tmp_path / "small.psap")
    loaded = psap.load(tmp_path / "small.psap", lambda: Padded(root=root))
    wanted = model.eval()(inputs())
    for net in (result.model, loaded):
        torch.testing.assert_close(net.eval()(inputs()), wanted, rtol=1e-6, atol=1e-7)
    other, opt2, resumed = begin()
    resumed.load_state_dict(state["pruner"])
    other.load_state_dict(state["model"])
    opt2.load_state_dict(state["opt"])
    advance(other, opt2, resumed, 11, 24)
    again = resumed.finish()
    assert again.plan == result.plan
    pairs = zip(result.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_failed_cut_leaves_the_module_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Padded(root=True).train()
    opt = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    train(model, opt, iterations=1)
    plan = psap.plan(psap.trace(model, inputs()), ratio=0.5)
    before = [(type(m), dict(vars(m)), dict(m._modules)) for m in model.modules()]
    values = copy.deepcopy(model.state_dict())

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt("stopped")

    monkeypatch.setattr(commit, "_move_state", broken)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        psap.apply(model, plan, optimizer=opt, inplace=True)
    after = [(type(m), dict(vars(m)), dict(m._modules)) for m in model.modules()]
    assert [kind for kind, *_ in before] == [kind for kind, *_ in after]
    for (_, own, children), (_, own_after, children_after) in zip(before, after, strict=True):
        assert list(own) == list(own_after) and list(children) == list(children_after)
    assert all(
        torch.equal(a, b) for a, b in zip(values.values(), model.state_dict().values(), strict=True)
    )
    train(model, opt, iterations=1)


def test_a_cut_that_fails_loses_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt, pruner = make("residual", protect="gate", **PROGRESSIVE)
    advance(model, opt, pruner, 0, 9)
    before, older = model.bn1.weight.detach().clone(), pruner.masks()["conv1"]

    def refuse(*_: Any, **__: Any) -> None:
        raise psap.VerificationError("the small network was refused")

    with monkeypatch.context() as patch:
        patch.setattr(pruner._lineage, "cut", refuse)
        with pytest.raises(psap.VerificationError, match="was refused"):
            pruner.step()
    masks = pruner.masks()["conv1"]
    saved = pruner.gates.saved["bn1.weight", 0]
    assert torch.equal(saved.rows, (~masks).nonzero().flatten())
    fresh = (older & ~masks).nonzero().flatten()
    assert fresh.numel() and torch.equal(saved.values[torch.isin(saved.rows, fresh)], before[fresh])
    advance(model, opt, pruner, 10, 20)
    assert pruner.done and pruner.finish().plan.after.macs <= 0.4 * pruner.cost.dense.macs


def test_a_cut_that_fails_brings_no_prune_step_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt, pruner = make("residual", protect="gate", interval=3, **PROGRESSIVE)
    advance(model, opt, pruner, 0, 15)

    def refuse(*_: Any, **__: Any) -> None:
        raise psap.VerificationError("the small network was refused")

    with monkeypatch.context() as patch:
        patch.setattr(pruner._lineage, "cut", refuse)
        with pytest.raises(psap.VerificationError, match="was refused"):
            advance(model, opt, pruner, 15, 20)
    advance(model, opt, pruner, 20, 35)
    steps = [event for event in pruner.events if isinstance(event, PruneEvent)]
    assert [event.call for event in steps] == [1, 4, 7]


def test_what_cannot_be_cut_in_place_is_refused_at_once() -> None:
    config = psap.Config(progressive=True)
    net = Chain()
    opt = torch.optim.LBFGS(net.parameters())
    with pytest.raises(psap.ArgumentError, match=r"cuts the optimizer's state while it trains"):
        psap.Pruner(net, inputs(), optimizer=opt, config=config, keep_optimizer=False)
    with pytest.raises(psap.ArgumentTypeError, match=r"Config\.progressive is 1; pass True or"):
        psap.Config(progressive=1)
