"""Supervision windows against formulas written from docs/method.md, section 3e."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pruner_nets import NETS, backward, inputs, make, train

import psap
from psap.events import Candidate, WindowEvent
from psap.protect import Verdict, Window, check_trainable


def observe(window: Window, sample: np.ndarray | None) -> None:
    """What `Gates.observe` does with the derivatives of one step; None: not all were finite."""
    if sample is not None:
        d = torch.from_numpy(sample)
        window.sums += torch.stack([d, d * d])
    window.seen[int(sample is None)] += 1


def window_of(samples: list[np.ndarray]) -> Window:
    window = Window(len(samples[0]))
    for sample in samples:
        observe(window, sample)
    return window


def test_usefulness_and_significance_are_mean_and_z_score() -> None:
    samples = list(np.random.default_rng(0).normal(-0.2, 1.0, (8, 5)))
    value, z = window_of(samples).significance()
    for i in range(5):
        d = [float(s[i]) for s in samples]
        mean = -sum(d) / 8
        deviation = math.sqrt(sum((-x - mean) ** 2 for x in d) / 8)
        assert value[i] == pytest.approx(mean, rel=1e-12)
        assert z[i] == pytest.approx(mean / (deviation / math.sqrt(8)), rel=1e-9)


def test_no_deviation_and_no_observation_give_finite_numbers() -> None:
    value, z = window_of([np.array([-1.0, 0.0, 2.0])] * 4).significance()
    assert value.tolist() == [1.0, 0.0, -2.0]
    assert z.tolist() == [1e12, 0.0, -2e12]
    value, z = Window(3).significance()
    assert value.tolist() == z.tolist() == [0.0, 0.0, 0.0]


def test_steps_that_are_not_finite_are_counted_apart() -> None:
    window = window_of([np.array([1.0, -2.0])])
    observe(window, None)
    observe(window, np.array([3.0, 2.0]))
    assert (window.observed, window.skipped) == (2, 1)
    assert window.sums.tolist() == [[4.0, 0.0], [10.0, 8.0]]


@pytest.fixture
def pruner() -> psap.Pruner:
    """Groups conv1 (8 channels) and conv2 (12 channels)."""
    return make("chain", protect="pulse")[2]


def judge(
    pruner: psap.Pruner,
    fresh: list[int],
    d: dict[int, tuple[float, float]],
    *,
    last: bool = False,
    dead: tuple[int, ...] = (),
    **options: Any,
) -> Verdict:
    """``d``: mean and deviation of the derivative of some channels; the others are +-1 noise."""
    alive, new = np.ones(20, dtype=bool), np.zeros(20, dtype=bool)
    new[fresh] = True
    alive[[*fresh, *dead]] = False
    window = Window(20)
    mean, deviation = np.array([d.get(i, (0, 1)) for i in range(20)], dtype=float).T
    for sign in (1, -1) * 4:
        observe(window, mean + sign * deviation)
    options = {"protect": "pulse", "restore_share": 0.5, "z_threshold": 3.0, **options}
    return window.judge(pruner._lineage, alive, new, psap.Config(**options), last)


def indices(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def reasons(verdict: Verdict) -> dict[tuple[str, int], str]:
    return {(c.group, c.channel): c.reason for c in verdict.candidates}


def test_only_fresh_significant_useful_channels_return(pruner: psap.Pruner) -> None:
    strong, weak, harmful = (-2.0, 0.1), (-1.0, 5.0), (2.0, 0.1)
    verdict = judge(pruner, [0, 1, 2, 3], {0: strong, 1: weak, 2: harmful, 7: strong}, dead=(7,))
    assert indices(verdict.restored) == [0]
    assert indices(verdict.dropped) == []
    assert [(c.group, c.channel, c.restored) for c in verdict.candidates] == [
        ("conv1", 0, True),
        ("conv1", 1, False),
    ]
    assert verdict.candidates[0].value == pytest.approx(2.0)
    assert verdict.candidates[0].z == pytest.approx(2.0 / (0.1 / math.sqrt(8)))
    assert reasons(verdict)["conv1", 1] == "not significant: z = 0.6, needs more than 3"
    assert "lowers the loss" in reasons(verdict)["conv1", 0]


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (0.01, 1), (0.2, 1), (0.21, 2), (0.5, 3), (1.0, 5)]
)
def test_the_share_caps_what_a_group_restores(
    pruner: psap.Pruner, share: float, count: int
) -> None:
    """The best ceil(rho * |fresh|) by value."""
    d = {i: (-1.0 - i, 0.1) for i in range(5)}
    verdict = judge(pruner, [0, 1, 2, 3, 4], d, restore_share=share)
    assert indices(verdict.restored) == sorted([4, 3, 2, 1, 0][:count])
    if count < 5:
        assert "share" in reasons(verdict)["conv1", 4 - count]


def test_the_share_is_counted_for_each_group(pruner: psap.Pruner) -> None:
    d = {0: (-1.0, 0.1), 1: (-2.0, 0.1), 8: (-1.0, 0.1), 9: (-3.0, 0.1)}
    verdict = judge(pruner, [0, 1, 8, 9], d)
    assert indices(verdict.restored) == [1, 9]
    values = [c.value for c in verdict.candidates]
    assert values == sorted(values, reverse=True)


def test_the_threshold_is_strict(pruner: psap.Pruner) -> None:
    z = window_of([np.array([-1.0]), np.array([-3.0])]).significance()[1][0]
    for threshold, back in ((z, []), (np.nextafter(z, 0), [0])):
        window = Window(20)
        for value in (-1.0, -3.0):
            observe(window, np.full(20, value))
        alive, fresh = np.ones(20, dtype=bool), np.zeros(20, dtype=bool)
        alive[0], fresh[0] = False, True
        config = psap.Config(protect="pulse", z_threshold=float(threshold))
        assert indices(window.judge(pruner._lineage, alive, fresh, config, False).restored) == back


def test_at_the_last_step_channels_swap_strictly(pruner: psap.Pruner) -> None:
    """One out for one in, the most harmful significant ones; never without."""
    useful = {0: (-2.0, 0.1), 1: (-1.0, 0.1), 2: (-0.5, 0.1)}
    verdict = judge(pruner, [0, 1, 2], useful, last=True, restore_share=1.0)
    assert not verdict.restored.any() and not verdict.dropped.any()
    assert "no kept channel is harmful enough" in reasons(verdict)["conv1", 0]
    # 5 is worst, but not significantly so; 6 and 7 are. Channel 15 is of another group.
    harmful = {5: (9.0, 50.0), 6: (0.5, 0.1), 7: (0.9, 0.1), 15: (5.0, 0.1)}
    verdict = judge(pruner, [0, 1, 2], useful | harmful, last=True, restore_share=1.0)
    assert indices(verdict.restored) == [0, 1]
    assert indices(verdict.dropped) == [6, 7]
    assert reasons(verdict)["conv1", 0] == "swapped with channel 7, which raises the loss"
    assert reasons(verdict)["conv1", 1] == "swapped with channel 6, which raises the loss"
    verdict = judge(pruner, [0, 1, 2], useful | harmful, last=True, restore_share=0.1)
    assert (indices(verdict.restored), indices(verdict.dropped)) == ([0], [7])


def test_nothing_observed_nothing_restored(pruner: psap.Pruner) -> None:
    fresh = np.arange(20) < 4
    config = psap.Config(z_threshold=0.0, restore_share=1.0)
    verdict = Window(20).judge(pruner._lineage, ~fresh, fresh, config, False)
    assert not verdict.restored.any() and verdict.candidates == ()


# The same within a pruner


@pytest.fixture
def useful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every pruned channel looks useful, the higher the more; every kept one harmful."""

    def derivative(gates: Any, sums: torch.Tensor, seen: torch.Tensor) -> None:
        count = len(gates.graph.group_of)
        saved: set[int] = set()
        for side, copies in gates.saved.items():
            saved.update(gates.graph.channels[side][copies.rows].tolist())
        d = torch.tensor([-1.0 - i if i in saved else 1.0 + i for i in range(count)])
        sums += torch.stack([d, d * d])
        seen[0] += 1

    monkeypatch.setattr("psap.gates.Gates.observe", derivative)
    yield


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_before_the_last_step_restored_channels_exceed_the_budget(useful: None) -> None:
    model, opt, pruner = make("chain", protect="pulse", restore_share=0.5)
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    pruner.step()
    dead = {n: torch.nonzero(~m).flatten().tolist() for n, m in pruner.masks().items()}
    width = {n: int(m.sum()) for n, m in pruner.masks().items()}
    train(model, opt, iterations=3)
    event = pruner.events[-1]
    assert isinstance(event, WindowEvent)
    assert (event.observed, event.skipped, event.iteration) == (3, 0, 3)
    assert event.supervised == {n: len(rows) for n, rows in dead.items()}
    for group, rows in dead.items():
        back = sorted(c.channel for c in event.candidates if c.group == group and c.restored)
        assert back == rows[len(rows) - math.ceil(len(rows) / 2) :]
        mask = pruner.masks()[group]
        assert mask[back].all() and int(mask.sum()) == width[group] + len(back)
        assert (pruner._bonus[pruner._alive] <= 0.3).all()
    back = [c.channel for c in event.candidates if c.group == "conv1" and c.restored]
    state = model.state_dict()
    for key in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        assert torch.equal(state[key][back], before[key][back]), key
    for parameter in (model.conv1.weight, model.bn1.weight, model.bn1.bias):
        assert not opt.state[parameter]["momentum_buffer"][back].any()
    start = {g.name: g.start for g in pruner.graph.groups}
    bonus = {i for i in np.flatnonzero(pruner._bonus == 0.3).tolist()}
    assert bonus == {start[c.group] + c.channel for c in event.candidates if c.restored}
    train(model, opt, pruner)  # the budget is met again at the next prune step
    assert pruner.events[-1].macs_share <= pruner.events[-1].target_share


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_the_last_window_swaps_and_keeps_the_budget(useful: None) -> None:
    model, opt, pruner = make("chain", protect="pulse", prune_steps=1, restore_share=0.5)
    pruner.step()
    before = {n: m.clone() for n, m in pruner.masks().items()}
    assert not pruner.done
    train(model, opt, iterations=3)
    assert pruner.done
    swapped = [c for c in pruner.events[-1].candidates if c.restored]
    assert swapped and all("swapped with channel" in c.reason for c in swapped)
    for group, mask in pruner.masks().items():
        assert int(mask.sum()) == int(before[group].sum())
        assert not torch.equal(mask, before[group])
    result = pruner.finish()
    assert result.plan.after.macs <= 0.4 * result.plan.before.macs


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_a_gradient_that_is_not_finite_is_skipped_and_the_optimizer_goes_on(bad: float) -> None:
    model, opt, pruner = make("chain", protect="pulse", window=3)
    pruner.step()
    dead = torch.nonzero(~pruner.masks()["conv1"]).flatten().tolist()
    held = model.conv1.weight.detach()[dead].clone()
    beta, row = model.bn1.bias, int(pruner.masks()["conv1"].nonzero()[0])
    for i in range(3):
        backward(model, opt, i)
        if i < 2:
            beta.grad[row] = bad
        opt.step()
        with torch.no_grad():
            assert not bool(beta[row].isfinite()) or i == 2  # it did step
            beta[row] = 0.0
            opt.state[beta]["momentum_buffer"].zero_()
        assert torch.equal(model.conv1.weight.detach()[dead], held)
    event = pruner.events[-1]
    assert isinstance(event, WindowEvent)
    assert (event.observed, event.skipped) == (1, 2)


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_a_window_of_bad_gradients_only_restores_nothing() -> None:
    model, opt, pruner = make("chain", protect="pulse", window=2, z_threshold=0.0, restore_share=1)
    pruner.step()
    before = pruner._alive.copy()
    for _ in range(2):
        backward(model, opt, 0)
        model.bn1.weight.grad.fill_(float("nan"))
        opt.step()
    event = pruner.events[-1]
    assert (event.observed, event.skipped, event.candidates) == (0, 2, ())
    assert (pruner._alive == before).all()


@pytest.mark.parametrize("protect", ["gate", "none"])
def test_windows_open_under_supervision_only(protect: str) -> None:
    model, opt, pruner = make("chain", protect=protect)
    train(model, opt, pruner, epochs=3)
    assert not any(isinstance(e, WindowEvent) for e in pruner.events)
    assert pruner._window.observed == pruner._window.skipped == 0
    assert pruner.done  # right after the last prune step


def test_a_prune_step_closes_a_window_that_is_still_open() -> None:
    model, opt, pruner = make("chain", protect="pulse", window=50)
    train(model, opt, pruner, epochs=3, iterations=2)
    kinds = [type(e).__name__ for e in pruner.events]
    assert kinds == ["PruneEvent", "WindowEvent", "PruneEvent", "WindowEvent", "PruneEvent"]
    assert [e.observed for e in pruner.events if isinstance(e, WindowEvent)] == [2, 2]
    assert not pruner.done


def test_only_a_model_that_trains_is_taken() -> None:
    model = NETS["chain"]()
    check_trainable(model)
    model.requires_grad_(False)
    with pytest.raises(psap.StateError, match=r"every parameter of the model is frozen.*psap.plan"):
        check_trainable(model)
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    with pytest.raises(psap.StateError, match="is frozen"):
        psap.Pruner(model, inputs(), optimizer=opt)


def test_state_of_a_window() -> None:
    window = window_of([np.array([1.0, 2.0]), np.array([0.5, -1.0])])
    observe(window, None)
    other = Window(2)
    other.load_state_dict(window.state_dict())
    assert np.array_equal(other.sums, window.sums)
    assert (other.observed, other.skipped) == (2, 1)
    observe(other, np.array([1.0, 1.0]))
    assert window.observed == 2 and window.sums[0, 0] == 1.5  # nothing is shared
    for damage in (
        {"sums": torch.zeros(2, 3, dtype=torch.float64)},
        {"sums": torch.zeros(2, 2)},
        {"observed": -1},
        {"skipped": 1.5},
    ):
        with pytest.raises(psap.StateError, match="the state is damaged: the window"):
            Window(2).load_state_dict({**window.state_dict(), **damage})


def test_candidates_are_records() -> None:
    candidate = Candidate(group="a", channel=1, value=1.0, z=2.0, restored=True, reason="r")
    with pytest.raises(AttributeError, match="cannot assign to field"):
        candidate.value = 2.0
