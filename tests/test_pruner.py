"""The state machine against an oracle written from docs/method.md, and its invariants."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from pruner_nets import NETS, OPTIMIZERS, Chain, Plain, backward, inputs, make, train
from torch import Tensor, nn

import psap
from psap import scores, selection
from psap.events import PruneEvent
from psap.protect import Window


@dataclass
class Oracle:
    """Section 3, (a) to (d), for `Chain` and `Plain`: plain NumPy, loops, no code of psap."""

    sizes: tuple[int, int]
    final_share: float
    steps: int
    floor: int = 2
    power: float = 2.0
    linear: bool = False
    uniform: bool = False
    norm: str = "l2"
    restored: tuple[int, ...] = (0, 3, 5)
    alive: list[set[int]] = field(default_factory=list)
    mean: list[float] | None = None

    def __post_init__(self) -> None:
        self.alive = [set(range(n)) for n in self.sizes]

    def macs(self, widths: list[int]) -> int:
        a, b = widths
        return 64 * 27 * a + 64 * 9 * a * b + 5 * b

    def sparsity(self, weight: np.ndarray) -> float:
        tau = 0.5 * weight.std(ddof=1)  # of the sample, as torch.std
        return float(np.mean([abs(w) < tau for w in weight.reshape(-1)]))

    def share(self, t: int) -> float:
        x = t / self.steps
        return 1 - (1 - self.final_share) * (x if self.linear else 1 - (1 - x) ** 3)

    def widths(self, kappa: float, ratios: list[float]) -> list[int]:
        found = []
        for size, ratio in zip(self.sizes, ratios, strict=True):
            kept = math.floor(size * (1 - min(1.0, kappa * ratio)) + 0.5)
            found.append(max(self.floor, math.ceil(size * (1 - 0.9) - 1e-9), kept))
        return found

    def solve(self, budget: float, mean: list[float]) -> list[int]:
        ratios = [1.0, 1.0] if self.uniform else [s**self.power for s in mean]
        if len(set(ratios)) == 1:
            ratios = [1.0, 1.0]
        low, high = 0.0, 1e4
        for _ in range(60):
            middle = (low + high) / 2
            fits = self.macs(self.widths(middle, ratios)) <= budget
            low, high = (low, middle) if fits else (middle, high)
        widths = self.widths(high, ratios)
        order = [0, 1] if (self.uniform or mean[0] <= mean[1]) else [1, 0]
        grew = set(order)
        while grew:
            for g in [g for g in order if g in grew]:
                more = [w + (i == g) for i, w in enumerate(widths)]
                if more[g] <= self.sizes[g] and self.macs(more) <= budget:
                    widths = more
                else:
                    grew.discard(g)
        return widths

    def step(self, t: int, weights: list[np.ndarray]) -> tuple[list[float], list[int]]:
        now = [self.sparsity(w) for w in weights]
        old = self.mean
        self.mean = now if old is None else [0.5 * a + 0.5 * b for a, b in zip(old, now)]  # noqa: B905
        widths = self.solve(self.share(t) * self.macs(list(self.sizes)), self.mean)
        for g, weight in enumerate(weights):
            rows = weight.reshape(len(weight), -1)
            power = (rows**2).sum(1) if self.norm == "l2" else np.abs(rows).sum(1)
            score = power / power.mean()
            score = np.sqrt(score) if self.norm == "l2" else score
            score = score / score.mean() + 0.3 * np.isin(np.arange(len(rows)), self.restored)
            rank = sorted(range(len(rows)), key=lambda i: (i not in self.alive[g], -score[i], i))
            self.alive[g] = set(rank[: widths[g]])
        return now, widths


ORACLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "linear": ({"schedule": "linear"}, {"linear": True}),
    "uniform": ({"adapt": "uniform"}, {"uniform": True}),
    "l1": ({"score": "l1"}, {"norm": "l1"}),
    "power": ({"sparsity_power": 5.0, "min_channels": 3}, {"power": 5.0, "floor": 3}),
}


@pytest.mark.parametrize("case", ORACLES)
@pytest.mark.parametrize("share", [0.5, 0.16])
def test_prune_steps_are_those_of_the_oracle(case: str, share: float) -> None:
    options, theirs = ORACLES[case]
    target = psap.Target(macs=share)
    model, opt, pruner = make("chain", target=target, prune_steps=4, protect="gate", **options)
    oracle = Oracle((8, 12), share, 4, **theirs)
    with torch.no_grad():  # sparsity ratios that differ from layer to layer
        model.conv1.weight.pow_(3).mul_(10)
    for group in pruner.graph.groups:  # as if a window had restored these
        pruner._bonus[group.start + np.array(oracle.restored)] = 0.3
    for t in range(1, 5):
        train(model, opt, iterations=3, first=3 * t)
        weights = [c.weight.detach().double().numpy() for c in (model.conv1, model.conv2)]
        now, widths = oracle.step(t, weights)
        pruner.step()
        event = pruner.events[-1]
        assert isinstance(event, PruneEvent)
        assert event.step == t
        assert event.target_share == pytest.approx(oracle.share(t), abs=1e-15)
        assert list(event.sparsity.values()) == pytest.approx(now, abs=1e-12)
        assert list(event.sparsity_ema.values()) == pytest.approx(oracle.mean, abs=1e-12)
        assert list(event.widths.values()) == widths
        assert event.macs_share == oracle.macs(widths) / oracle.macs([8, 12])
        found = [set(torch.nonzero(m).flatten().tolist()) for m in pruner.masks().values()]
        assert found == oracle.alive
    assert pruner.done


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_bonus_and_stickiness_rank_before_the_norm() -> None:
    model, _, pruner = make("chain", target=psap.Target(macs=0.7), prune_steps=1)
    group = pruner.graph.groups[0]
    with torch.no_grad():
        for i, size in enumerate([1.0, 9.0, 1.1, 8.0, 7.0, 6.0, 5.0, 4.0]):
            model.conv1.weight[i] = size
    pruner._alive[group.start + 1] = False  # pruned before: stays pruned in spite of its norm
    pruner._bonus[group.start] = 5.0  # restored before: stays in spite of its norm
    pruner.step()
    kept = torch.nonzero(pruner.masks()[group.name]).flatten().tolist()
    assert 0 in kept
    assert 1 not in kept
    assert 2 not in kept


def test_a_width_that_grows_takes_pruned_channels_back_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, opt, pruner = make("chain", protect="gate")
    train(model, opt)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(selection, "widths", lambda *_: np.array([4, 12]))
    pruner.step()
    train(model, opt, iterations=2, first=9)
    monkeypatch.setattr(selection, "widths", lambda *_: np.array([6, 12]))
    pruner.step()
    rows = pruner.events[1].returned["conv1"]
    assert len(rows) == 2
    state = model.state_dict()
    for key in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        assert torch.equal(state[key][rows], before[key][rows]), key
        others = [i for i in range(8) if i not in rows]
        assert not torch.equal(state[key][others], before[key][others]), key
    for parameter in (model.conv1.weight, model.bn1.weight, model.bn1.bias):
        assert not opt.state[parameter]["momentum_buffer"][rows].any()
    assert pruner.masks()["conv1"][rows].all() and int(pruner.masks()["conv1"].sum()) == 6


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("protect", ["gate", "price", "pulse", "none"])
def test_every_net_ends_on_budget_exact_and_zero(name: str, protect: str) -> None:
    """The last masks meet the target, hold at exact zero, and shrink exactly."""
    optimizer = list(OPTIMIZERS)[len(name) % 4]
    model, opt, pruner = make(name, optimizer=optimizer, protect=protect, window=3)
    sizes = np.array([g.size for g in pruner.graph.groups])
    train(model, opt, pruner, epochs=3)
    train(model, opt, iterations=4, first=50)
    assert pruner.done
    prunes = [e for e in pruner.events if isinstance(e, PruneEvent)]
    shares = [e.target_share for e in prunes]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0.4
    assert prunes[-1].macs_share <= 0.4
    widths = np.array([int(m.sum()) for m in pruner.masks().values()])
    assert (widths >= np.maximum(2, np.ceil(0.1 * sizes))).all()
    for g in range(len(sizes)):  # not one channel more would fit
        more = widths + (np.arange(len(sizes)) == g)
        assert more[g] > sizes[g] or not pruner.cost.fits(more, pruner.config.target)
    for _ in range(3):
        assert_erased(model, pruner)
        train(model, opt, iterations=1, first=77)
    trained = [t.detach().clone() for t in model.state_dict().values()]
    result = pruner.finish()
    assert [torch.equal(a, b) for a, b in zip(trained, model.state_dict().values(), strict=True)]
    masked = copy.deepcopy(model).double().eval()
    small = copy.deepcopy(result.model).double().eval()
    x = inputs(dtype=torch.float64)
    with torch.no_grad():
        wanted, got = masked(x), small(x)
    assert float((got - wanted).abs().max()) <= 1e-9 * float(wanted.abs().max())
    assert model.training and result.model.training


def assert_erased(model: nn.Module, pruner: psap.Pruner) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    count = 0
    for (name, dim), role in pruner.graph.roles.items():
        dead = ~pruner._alive[pruner.graph.channels[name, dim]]
        dead &= pruner.graph.channels[name, dim] >= 0
        if role == "out" and dead.any():
            rows = tensors[name].detach().movedim(dim, 0)[torch.from_numpy(dead)]
            assert torch.equal(rows, torch.zeros_like(rows)), name
            count += rows.numel()
    assert count > 0


@pytest.mark.parametrize("name", ["chain", "bias_bn", "plain", "residual", "preact", "mobile"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_on_is_the_same_masked_and_shrunk(name: str, optimizer: str) -> None:
    model, opt, pruner = make(name, optimizer=optimizer, dtype=torch.float64)
    train(model, opt, pruner, epochs=3, iterations=2, dtype=torch.float64)
    assert pruner.done
    twin = copy.deepcopy(model)
    result = pruner.finish()
    assert result.optimizer is not None and type(result.optimizer) is type(opt)
    small = train(result.model, result.optimizer, iterations=6, first=9, dtype=torch.float64)
    # The masks must be held for the dense one: a second pruner is not wanted, zero by hand.
    masked = []
    keep = {n: t != 0 for n, t in twin.named_parameters()}
    opt2 = OPTIMIZERS[optimizer](twin.parameters())
    opt2.load_state_dict(opt.state_dict())
    for i in range(6):
        masked.append(backward(twin, opt2, 109 + i, torch.float64))
        opt2.step()
        with torch.no_grad():
            for n, t in twin.named_parameters():
                t *= keep[n]
    assert small == pytest.approx(masked, rel=1e-6)
    assert small[0] != pytest.approx(small[-1], rel=1e-3)


@pytest.mark.parametrize("protect", ["price", "pulse"])
def test_same_seed_same_masks_and_events(protect: str) -> None:
    outcomes = []
    for _ in range(2):
        model, opt, pruner = make("residual", protect=protect, z_threshold=0.5)
        train(model, opt, pruner, epochs=3, iterations=4)
        train(model, opt, iterations=4)
        outcomes.append((pruner.masks(), pruner.events))
    assert outcomes[1][1] == outcomes[0][1]
    assert all(torch.equal(outcomes[1][0][k], m) for k, m in outcomes[0][0].items())


@pytest.mark.parametrize("net", [Chain, Plain])
def test_the_pruner_computes_the_same_bits_on_any_number_of_threads(net: Any) -> None:
    """Given the same weights and gradients: training itself may differ by rounding."""
    model = net(96, 160)
    opt = OPTIMIZERS["sgd"](model.parameters())
    config = psap.Config(protect="pulse", prune_steps=3, verify=False)
    pruner = psap.Pruner(model, inputs(), optimizer=opt, config=config)
    backward(model, opt, 1)
    opt.step()
    backward(model, opt, 2)
    start = copy.deepcopy((model.state_dict(), opt.state_dict(), pruner.state_dict()))
    outcomes = []
    for threads in (1, 2):
        model.load_state_dict(start[0])
        opt.load_state_dict(copy.deepcopy(start[1]))
        pruner.load_state_dict(start[2])
        torch.set_num_threads(threads)
        try:
            pruner.step()
            window = Window(len(pruner._alive))
            pruner.gates.observe(window.sums, window.seen)
        finally:
            torch.set_num_threads(1)
        outcomes.append((window.sums, pruner.events, pruner.masks(), pruner.gates.state_dict()))
    (d1, e1, m1, s1), (d2, e2, m2, s2) = outcomes
    assert d1.abs().max() > 0
    assert torch.equal(d1, d2)
    assert e1 == e2
    assert all(torch.equal(m1[k], m2[k]) for k in m1)
    assert all(torch.equal(s1[k]["values"], s2[k]["values"]) for k in s1)


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("protect", ["gate", "price", "pulse", "none"])
@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
def test_an_early_finish_meets_the_target(calls: int, protect: str) -> None:
    model, opt, pruner = make("chain", protect=protect, prune_steps=5, window=9)
    train(model, opt, pruner, epochs=calls, iterations=2)
    train(model, opt, iterations=2)  # a window may be open
    result = pruner.finish()
    assert pruner.done
    assert result.plan.after.macs <= 0.4 * result.plan.before.macs
    assert pruner.events[-1].step == 5


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_warmup_and_interval_say_which_calls_prune() -> None:
    _, _, pruner = make("chain", warmup=2, interval=3, prune_steps=3)
    for _ in range(12):
        pruner.step()
    prunes = [e for e in pruner.events if isinstance(e, PruneEvent)]
    assert [e.call for e in prunes] == [3, 6, 9]
    assert [e.step for e in prunes] == [1, 2, 3]


@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
def test_both_bounds_hold_and_the_parameter_bound_alone() -> None:
    for target in (psap.Target(macs=0.6, parameters=0.3), psap.Target(parameters=0.3)):
        _, _, pruner = make("chain", target=target)
        result = pruner.finish()
        assert result.plan.after.parameters <= 0.3 * result.plan.before.parameters
        share = pruner.events[-1].target_share
        assert share == (0.6 if target.macs else 0.3)


@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
def test_streams_are_spared_by_the_layers_that_make_them() -> None:
    widths = {}
    for power in (0.0, 1.0):
        _, _, pruner = make("residual", stream_power=power)
        pruner.finish()
        widths[power] = pruner.events[-1].widths
    assert widths[1.0]["stem"] > widths[0.0]["stem"]
    assert widths[1.0]["conv1"] < widths[0.0]["conv1"]


def test_a_depthwise_convolution_makes_no_stream() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)
    )
    graph = psap.trace(net, torch.randn(1, 3, 8, 8))
    assert graph.groups[0].producers == ("0.weight", "1.weight")
    assert scores.summands(graph).tolist() == [1, 1]
    graph = psap.trace(NETS["residual"](), inputs())
    found = {g.name: int(m) for g, m in zip(graph.groups, scores.summands(graph), strict=True)}
    assert found == {"stem": 2, "conv1": 1, "conv3": 2}


@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
def test_round_to_gives_multiples() -> None:
    _, _, pruner = make("chain", round_to=4, target=psap.Target(macs=0.5))
    result = pruner.finish()
    assert [len(g.kept) % 4 for g in result.plan.groups] == [0, 0]
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs


def test_finish_in_place_keeps_every_object() -> None:
    model, opt, pruner = make("residual", optimizer="adamw")
    rate = torch.optim.lr_scheduler.StepLR(opt, 1)
    parameters: list[Tensor] = list(model.parameters())
    train(model, opt, pruner, epochs=4)
    twin_result = copy.deepcopy(model)
    result = pruner.finish(inplace=True)
    assert result.model is model and result.optimizer is opt
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.conv1.out_channels < 8
    wanted = twin_result.eval()(inputs())
    torch.testing.assert_close(model.eval()(inputs()), wanted, rtol=1e-5, atol=1e-6)
    train(model.train(), opt, iterations=2)
    rate.step()
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks


def test_a_pruner_and_a_result_can_be_printed() -> None:
    model, opt, pruner = make("chain", prune_steps=2)
    assert repr(pruner) == "Pruner(Chain: 2 groups, prune step 0 of 2, MACs 100.0 % kept)"
    train(model, opt, pruner)
    share = 100 * pruner.events[0].macs_share  # type: ignore[union-attr]
    assert repr(pruner) == f"Pruner(Chain: 2 groups, prune step 1 of 2, MACs {share:.1f} % kept)"
    train(model, opt, pruner)
    result = pruner.finish()
    assert repr(result) == f"Result(Chain, SGD, module mode, {result.plan})"
    assert "no optimizer" in repr(replace(result, optimizer=None))
