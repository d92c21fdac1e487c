"""State dicts: resumption bit for bit at every phase, and all-or-nothing refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruner_nets import make, train

import psap
from psap.recipe import read_tree, write_tree

EPOCH = 5
END = 24
PHASES = {
    "before": 2,
    "just pruned": 5,
    "in a window": 7,
    "between": 9,
    "second window": 11,
    "last window": 17,
    "final": 22,
}


def through_tree(value: Any, folder: Path) -> Any:
    write_tree(folder / "state.safetensors", value)
    return read_tree(folder / "state.safetensors")


def through_torch(value: Any, folder: Path) -> Any:
    torch.save(value, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def advance(model: Any, opt: Any, pruner: psap.Pruner, start: int, stop: int) -> None:
    """Iterations ``start`` to ``stop``; a `Pruner.step` after every fifth, three in all."""
    for i in range(start, stop):
        train(model, opt, iterations=1, first=i)
        if (i + 1) % EPOCH == 0:
            pruner.step()


def everything(model: Any, opt: Any, pruner: psap.Pruner) -> dict[str, Any]:
    return {"model": model.state_dict(), "opt": opt.state_dict(), "pruner": pruner.state_dict()}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b) or isinstance(a, dict), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


OPTIONS = {"protect": "pulse", "window": 3, "z_threshold": 0.3, "restore_share": 0.5}


@pytest.mark.parametrize("through", [through_tree, through_torch])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("net", ["residual", "plain"])
@pytest.mark.parametrize("protect", ["pulse", "price"])
def test_a_resumed_run_has_the_same_bits(
    phase: str, net: str, protect: str, through: Callable[[Any, Path], Any], tmp_path: Path
) -> None:
    options = {**OPTIONS, "protect": protect}
    optimizer = "adamw" if net == "residual" else "sgd"
    model, opt, pruner = make(net, optimizer=optimizer, **options)
    advance(model, opt, pruner, 0, PHASES[phase])
    saved = through(everything(model, opt, pruner), tmp_path)
    assert_same(saved["pruner"], pruner.state_dict(), "pruner")
    advance(model, opt, pruner, PHASES[phase], END)
    assert pruner.done
    kinds = [e["kind"] for e in pruner.state_dict()["events"]]
    assert kinds == (["prune", "window"] * 3)[: 6 if protect == "pulse" else 5]
    assert (pruner._factors != 1).any() == (protect == "price")
    other, opt2, resumed = make(net, optimizer=optimizer, seed=99, **options)
    other.load_state_dict(saved["model"])
    opt2.load_state_dict(saved["opt"])
    resumed.load_state_dict(saved["pruner"])
    advance(other, opt2, resumed, PHASES[phase], END)
    assert_same(everything(other, opt2, resumed), everything(model, opt, pruner))
    one, two = pruner.finish(), resumed.finish()
    assert one.plan == two.plan
    assert one.report["events"] == two.report["events"]
    assert_same(one.model.state_dict(), two.model.state_dict())
    assert_same(one.optimizer.state_dict(), two.optimizer.state_dict())


def test_the_phases_are_what_they_say() -> None:
    model, opt, pruner = make("residual", **OPTIONS)
    found = {}
    for i in range(END):
        for name, at in PHASES.items():
            if at == i:
                state = pruner.state_dict()
                counters = state["counters"]
                found[name] = (
                    counters["step"], counters["left"], bool(state["saved"]), counters["final"]
                )  # fmt: skip
        advance(model, opt, pruner, i, i + 1)
    assert found == {
        "before": (0, 0, False, False),
        "just pruned": (1, 3, True, False),
        "in a window": (1, 1, True, False),
        "between": (1, 0, True, False),
        "second window": (2, 2, True, False),
        "last window": (3, 1, True, False),
        "final": (3, 0, False, True),
    }


def test_a_state_dict_is_a_snapshot() -> None:
    model, opt, pruner = make("residual", **OPTIONS)
    advance(model, opt, pruner, 0, 7)
    state = pruner.state_dict()
    kept = copy.deepcopy(state)
    advance(model, opt, pruner, 7, 12)
    assert_same(state, kept)
    fresh = make("residual", **OPTIONS)[2]
    fresh.load_state_dict(state)
    fresh._alive[:] = False
    fresh.gates.saved["conv1.weight", 0].values.zero_()
    fresh._window.sums[:] = 7
    assert_same(state, kept)


def _without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k != key}


def _counter(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda s: {**s, "counters": {**s["counters"], name: value}}


def _saved(**entry: Any) -> Callable[[dict[str, Any]], Any]:
    def damage(s: dict[str, Any]) -> Any:
        first = s["saved"]["conv1.weight:0"]
        return {**s, "saved": {**s["saved"], "conv1.weight:0": {**first, **entry}}}

    return damage


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no mapping": (lambda s: [1, 2], "no state of a Pruner"),
    "none": (lambda s: None, "no state of a Pruner"),
    "empty": (lambda s: {}, "no state of a Pruner"),
    "version": (lambda s: {**s, "version": 2}, "no state of a Pruner"),
    "no architecture": (lambda s: _without(s, "architecture"), "another model"),
    "foreign": (lambda s: {**s, "architecture": "0" * 64}, "another model"),
    "no config": (lambda s: _without(s, "config"), "damaged"),
    "config": (lambda s: {**s, "config": {**s["config"], "window": 9}}, "window was 9 and is 3"),
    "target": (
        lambda s: {**s, "config": {**s["config"], "target": {"macs": 0.1}}},
        "another Config: target was",
    ),
    "config type": (lambda s: {**s, "config": 3}, "damaged"),
    "alive shape": (lambda s: {**s, "alive": s["alive"][:-1]}, "damaged: 'alive'"),
    "alive dtype": (lambda s: {**s, "alive": s["alive"].float()}, "damaged: 'alive'"),
    "alive all": (lambda s: {**s, "alive": torch.zeros_like(s["alive"])}, "keeps no channel of"),
    "alive other": (lambda s: {**s, "alive": ~s["fresh"].roll(1)}, "does not fit the masks"),
    "alive type": (lambda s: {**s, "alive": "x"}, "damaged"),
    "fresh": (lambda s: {**s, "fresh": s["bonus"]}, "damaged: 'fresh'"),
    "bonus": (lambda s: {**s, "bonus": s["bonus"] * float("nan")}, "damaged: 'bonus'"),
    "factors": (lambda s: {**s, "factors": torch.ones(3)}, "damaged: 'factors'"),
    "no factors": (lambda s: _without(s, "factors"), "damaged"),
    "sparsity": (lambda s: {**s, "sparsity": torch.ones(9)}, "damaged: 'sparsity'"),
    "no sparsity": (lambda s: _without(s, "sparsity"), "damaged"),
    "window": (lambda s: {**s, "window": {**s["window"], "sums": None}}, "damaged"),
    "window sums": (
        lambda s: {**s, "window": {**s["window"], "sums": torch.ones(2, 2)}},
        "damaged: the window",
    ),
    "no window": (lambda s: _without(s, "window"), "damaged"),
    "saved none": (lambda s: {**s, "saved": {}}, "does not fit the masks"),
    "saved more": (lambda s: {**s, "saved": {**s["saved"], "x:0": {}}}, "another model"),
    "saved rows": (_saved(rows=torch.tensor([0, 99])), "does not fit the masks"),
    "saved values": (_saved(values=torch.ones(1)), "does not fit this model"),
    "saved no values": (_saved(values=None), "damaged"),
    "counter type": (_counter("step", "1"), "counter 'step' is '1'"),
    "counter bool": (_counter("final", 1), "counter 'final' is 1"),
    "counter range": (_counter("step", 4), "counter 'step' is 4"),
    "counter negative": (_counter("left", -1), "counter 'left' is -1"),
    "counter huge": (_counter("left", 10**9), "counter 'left'"),
    "final too early": (_counter("final", True), "does not fit|another model"),
    "no counter": (lambda s: {**s, "counters": {}}, "damaged"),
    "event kind": (lambda s: {**s, "events": [{"kind": "prune"}]}, "damaged"),
    "event type": (lambda s: {**s, "events": [1]}, "damaged"),
    "events": (lambda s: {**s, "events": None}, "damaged"),
}


@pytest.fixture(scope="module")
def in_a_window() -> dict[str, Any]:
    torch.manual_seed(0)
    model, opt, pruner = make("residual", **OPTIONS)
    advance(model, opt, pruner, 0, 7)
    return everything(model, opt, pruner)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_changes_nothing(
    damage: str, in_a_window: dict[str, Any]
) -> None:
    model, opt, pruner = make("residual", **OPTIONS)
    advance(model, opt, pruner, 0, 11)
    before = copy.deepcopy(everything(model, opt, pruner))
    change, message = DAMAGES[damage]
    with pytest.raises(psap.StateError, match=message):
        pruner.load_state_dict(change(copy.deepcopy(in_a_window["pruner"])))
    assert_same(everything(model, opt, pruner), before)
    advance(model, opt, pruner, 11, END)  # and it goes on
    assert pruner.done
    pruner.finish()


def test_states_of_other_models_and_configurations_are_refused() -> None:
    _, _, pruner = make("chain", **OPTIONS)
    for other in (make("plain", **OPTIONS), make("bias_bn", **OPTIONS)):
        with pytest.raises(psap.StateError, match="belongs to another model"):
            pruner.load_state_dict(other[2].state_dict())
    for option, value in (("prune_steps", 4), ("gate_eps", 0.01), ("target", psap.Target(macs=1))):
        other = make("chain", **{**OPTIONS, option: value})
        with pytest.raises(psap.StateError, match=f"another Config: {option} was"):
            pruner.load_state_dict(other[2].state_dict())


@pytest.mark.filterwarnings(r"ignore:finish\(\) makes up:psap.PsapWarning")
def test_a_finished_pruner_takes_no_state() -> None:
    _, _, pruner = make("chain")
    state = pruner.state_dict()
    pruner.finish()
    with pytest.raises(psap.StateError, match=r"load_state_dict\(\) after finish\(\)"):
        pruner.load_state_dict(state)


def test_going_back_to_an_older_state_of_the_same_pruner() -> None:
    model, opt, pruner = make("residual", **OPTIONS)
    advance(model, opt, pruner, 0, 7)
    saved = copy.deepcopy(everything(model, opt, pruner))
    advance(model, opt, pruner, 7, END)
    wanted = copy.deepcopy(everything(model, opt, pruner))
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    pruner.load_state_dict(saved["pruner"])
    assert not pruner.done
    advance(model, opt, pruner, 7, END)
    assert_same(everything(model, opt, pruner), wanted)
    assert np.array_equal(pruner._alive, wanted["pruner"]["alive"].numpy())
