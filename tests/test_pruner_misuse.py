"""Dead ends and silent misuse of a pruner: what is said, when, and that there is a way on."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from pruner_nets import Chain, backward, inputs, make, train

import psap

CONFIG = psap.Config(target=psap.Target(macs=0.5), prune_steps=2)
UNCUT: dict[str, Any] = {
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=1),
}


def uncut(kind: str, **options: Any) -> tuple[Chain, torch.optim.Optimizer, psap.Pruner]:
    model = Chain()
    opt = UNCUT[kind](model.parameters())
    return model, opt, psap.Pruner(model, inputs(), optimizer=opt, config=CONFIG, **options)


def epoch(model: Chain, opt: torch.optim.Optimizer) -> None:
    for seed in range(2):
        opt.step(lambda seed=seed: torch.tensor(backward(model, opt, seed)))  # type: ignore[misc]


@pytest.mark.parametrize("kind", UNCUT)
def test_state_that_cannot_be_cut_is_refused_in_the_first_epoch(kind: str) -> None:
    model, opt, pruner = uncut(kind)
    epoch(model, opt)
    for _ in range(2):
        with pytest.raises(psap.PsapError, match=r"such as SGD or AdamW.*keep_optimizer=False"):
            pruner.step()
    assert not pruner.events


@pytest.mark.parametrize("kind", UNCUT)
def test_a_pruner_that_does_not_keep_the_optimizer_goes_to_the_end(kind: str) -> None:
    model, opt, pruner = uncut(kind, keep_optimizer=False)
    for _ in range(2):
        epoch(model, opt)
        pruner.step()
    result = pruner.finish()
    assert result.optimizer is None
    assert result.plan.after.macs <= 0.5 * result.plan.before.macs
    assert result.model.conv1.out_channels == len(result.plan.groups[0].kept)
    assert result.model.conv2.out_channels == len(result.plan.groups[1].kept) < 12


def test_finish_without_the_optimizer_saves_the_training() -> None:
    model, opt, pruner = make("chain", prune_steps=1)
    train(model, opt, pruner)
    opt.state[model.conv1.weight]["factor"] = torch.zeros(8)  # appeared after the check
    with pytest.raises(psap.PsapError, match=r"'factor'.*finish\(keep_optimizer=False\)"):
        pruner.finish()
    with pytest.raises(psap.ArgumentError, match=r"inplace=True.*state of the wrong shapes"):
        pruner.finish(keep_optimizer=False, inplace=True)
    assert model.conv1.out_channels == 8
    result = pruner.finish(keep_optimizer=False)
    assert result.optimizer is None and result.report["events"]


def test_a_closed_pruner_makes_room_and_does_nothing_more() -> None:
    model, opt, pruner = make("chain")
    with pytest.raises(psap.StateError, match=r"pruner\.close\(\), then run the cell again"):
        psap.Pruner(model, inputs(), optimizer=opt, config=CONFIG)
    for _ in range(2):
        pruner.close()
        assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
    for call in (pruner.step, pruner.finish, lambda: pruner.load_state_dict(pruner.state_dict())):
        with pytest.raises(psap.StateError, match=r"\(\) after close\(\); make a new Pruner"):
            call()
    again = psap.Pruner(model, inputs(), optimizer=opt, config=CONFIG)
    train(model, opt, again, epochs=2)
    assert again.finish().optimizer is not None


def test_a_deleted_pruner_frees_itself_and_the_optimizer() -> None:
    model, opt, pruner = make("chain")
    train(model, opt, pruner)
    ghost = weakref.ref(pruner)
    del pruner
    gc.collect()
    assert ghost() is None
    assert not opt._optimizer_step_pre_hooks and not opt._optimizer_step_post_hooks
    psap.Pruner(model, inputs(), optimizer=opt, config=CONFIG)


def test_step_without_training_is_warned_of_until_the_last_prune_step() -> None:
    model, opt, pruner = make("chain", prune_steps=2)
    with pytest.warns(psap.PsapWarning, match=r"no step since the last call; train between"):
        pruner.step()
    train(model, opt, pruner)  # trained: no warning
    pruner.step()  # nothing left to prune: no warning
    assert pruner.done


def test_an_optimizer_that_trains_nothing_here_is_warned_of() -> None:
    model, _, pruner = make("chain")
    other = torch.optim.SGD(model.parameters(), lr=0.01)
    backward(model, other, 0)
    other.step()
    with pytest.warns(psap.PsapWarning, match="pass to Pruner the optimizer that trains the model"):
        pruner.step()


def test_a_resumed_pruner_may_step_at_once() -> None:
    """The state may have been saved between the last batch of an epoch and `step`."""
    model, opt, pruner = make("chain")
    train(model, opt)
    state = pruner.state_dict()
    pruner.load_state_dict(state)
    pruner.step()
    with pytest.warns(psap.PsapWarning, match="no step since the last call"):
        pruner.step()


def test_finish_says_how_many_prune_steps_it_made_up_for() -> None:
    model, opt, pruner = make("chain", prune_steps=5)
    train(model, opt, pruner, epochs=2)
    with pytest.warns(psap.PsapWarning, match=r"3 of 5 prune steps.*or lower Config.prune_steps"):
        result = pruner.finish()
    assert result.plan.after.macs <= 0.4 * result.plan.before.macs


# Training that cannot work


def pruner_of(params: Any, model: Chain, **options: Any) -> psap.Pruner:
    opt = torch.optim.SGD(params, 0.1)
    return psap.Pruner(model, inputs(), optimizer=opt, config=CONFIG, **options)


def test_layers_that_nothing_trains_are_named() -> None:
    model = Chain()
    message = (
        r"trains none of 2 of the 2 weights that make prunable channels, conv1\.weight for one.*"
        r"friends=\[\.\.\.\].*requires_grad_\(False\)"
    )
    with pytest.warns(psap.PsapWarning, match=message) as caught:
        pruner_of(model.head.parameters(), model)
    assert caught[0].filename == __file__
    with pytest.warns(psap.PsapWarning, match="trains none of 1 of the 2 weights"):
        pruner_of([*model.conv1.parameters(), *model.head.parameters()], model)


def test_layers_that_another_optimizer_trains_or_that_are_frozen_are_no_mistake() -> None:
    model = Chain()
    other = torch.optim.SGD([*model.conv1.parameters(), *model.conv2.parameters()], 0.01)
    norms = [*model.bn1.parameters(), *model.bn2.parameters(), *model.head.parameters()]
    pruner_of(norms, model, friends=[other])
    model = Chain()
    model.conv1.requires_grad_(False)
    pruner_of([p for p in model.parameters() if p.requires_grad], model)


def test_a_step_per_batch_is_noticed_once() -> None:
    model, opt, pruner = make("chain", prune_steps=8)
    with pytest.warns(psap.PsapWarning, match=r"once per epoch, not once per batch") as caught:
        for seed in range(6):
            backward(model, opt, seed)
            opt.step()
            pruner.step()
    assert len(caught) == 1 and caught[0].filename == __file__


def test_short_epochs_are_no_mistake() -> None:
    model, opt, pruner = make("chain", prune_steps=6)
    for steps in (1, 1, 2, 1, 1, 2):  # never three single steps in a row
        for seed in range(steps):
            backward(model, opt, seed)
            opt.step()
        pruner.step()
    assert pruner.done
    for seed in range(4):  # the masks are final: nothing is pruned any more
        backward(model, opt, seed)
        opt.step()
        pruner.step()


def test_what_a_resumed_pruner_does_not_know_is_no_mistake() -> None:
    model, opt, pruner = make("chain", prune_steps=8)
    for seed in range(6):  # a job that is stopped after every epoch of one step
        backward(model, opt, seed)
        opt.step()
        pruner.load_state_dict(pruner.state_dict())
        pruner.step()


def test_friends_that_are_no_list_are_refused() -> None:
    model = Chain()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(opt, 1)
    with pytest.raises(psap.ArgumentTypeError, match="friends is a StepLR; pass a list of"):
        psap.Pruner(model, inputs(), optimizer=opt, friends=scheduler)
    pruner = psap.Pruner(model, inputs(), optimizer=opt)
    with (
        pytest.warns(psap.PsapWarning, match="makes up for"),
        pytest.raises(psap.ArgumentTypeError, match="friends is a StepLR; pass a list of"),
    ):
        pruner.finish(friends=scheduler)
    assert pruner.finish(friends=[scheduler]).friends[0].optimizer is not opt


# What finish() leaves behind


def _warned(opt: torch.optim.Optimizer, match: str) -> None:
    with pytest.warns(psap.PsapWarning, match=match) as caught:
        opt.step()
        opt.step()  # says it once
    assert [warning.filename for warning in caught] == [__file__]


def test_the_old_optimizer_says_that_it_trains_nothing() -> None:
    model, opt, pruner = make("chain", prune_steps=1)
    train(model, opt, pruner)
    result = pruner.finish()
    before = result.model.conv1.weight.clone()
    backward(model, opt, 0)
    _warned(opt, r"a step of the SGD from before finish\(\).*Go on with result\.optimizer; finish")
    assert torch.equal(result.model.conv1.weight, before)
    backward(result.model, result.optimizer, 0)
    result.optimizer.step()
    assert not torch.equal(result.model.conv1.weight, before)


def test_old_optimizers_among_the_friends_say_it_too() -> None:
    model = Chain()
    opt = torch.optim.SGD([*model.conv1.parameters(), *model.bn1.parameters()], 0.1)
    rest = [*model.conv2.parameters(), *model.bn2.parameters(), *model.head.parameters()]
    other, last = torch.optim.Adam(rest[:1]), torch.optim.SGD(rest[1:], 0.1, momentum=0.9)
    pruner = psap.Pruner(model, inputs(), optimizer=opt, config=CONFIG, friends=[other])
    scheduler = torch.optim.lr_scheduler.StepLR(last, 1)
    with pytest.warns(psap.PsapWarning, match="makes up for"):
        result = pruner.finish(friends=[scheduler, last])
    assert [type(friend).__name__ for friend in result.friends] == ["Adam", "StepLR", "SGD"]
    backward(model, opt, 0)
    _warned(other, r"the Adam from .*Go on with result\.friends\[0\]; ")
    with pytest.warns(psap.PsapWarning, match=r"the SGD from .*result\.friends\[2\]; "):
        last.step()  # in the scheduler's wrapper, so that the warning names another line
    _warned(opt, r"the SGD from .*Go on with result\.optimizer; ")


def _scheduled(*, carried: bool) -> tuple[torch.optim.Optimizer, Any, psap.Result]:
    model, opt, pruner = make("chain", prune_steps=1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)
    train(model, opt, pruner)
    result = pruner.finish(friends=[scheduler] if carried else [])
    backward(result.model, result.optimizer, 0)
    return opt, scheduler, result


def test_a_scheduler_of_the_old_optimizer_is_noticed() -> None:
    opt, scheduler, result = _scheduled(carried=False)
    result.optimizer.step()
    rate = result.optimizer.param_groups[0]["lr"]
    scheduler.step()
    _warned(
        result.optimizer, r"the learning rate of the SGD from before finish\(\) changes, and th"
    )
    assert result.optimizer.param_groups[0]["lr"] == rate != opt.param_groups[0]["lr"]


@pytest.mark.parametrize("carried", [False, True])
def test_a_new_scheduler_and_one_that_went_along_are_silent(carried: bool) -> None:
    _, scheduler, result = _scheduled(carried=carried)
    new: Any = torch.optim.lr_scheduler.StepLR(result.optimizer, 1)  # type: ignore[arg-type]
    for _ in range(2):
        result.optimizer.step()
        (result.friends[0] if carried else new).step()
    assert scheduler.optimizer.param_groups[0]["lr"] != result.optimizer.param_groups[0]["lr"]


def test_the_watch_on_the_old_optimizer_ends_with_it() -> None:
    opt, scheduler, result = _scheduled(carried=False)
    hooks = result.optimizer._optimizer_step_pre_hooks
    assert len(hooks) == 1
    del opt, scheduler
    gc.collect()
    result.optimizer.step()
    assert len(hooks) == 0


def test_without_an_optimizer_in_the_result_a_new_one_is_asked_for() -> None:
    model, opt, pruner = make("chain", prune_steps=1)
    train(model, opt, pruner)
    pruner.finish(keep_optimizer=False)
    _warned(opt, r"Make a new optimizer from result\.model\.parameters\(\); ")


def test_optimizers_that_go_on_in_place_or_with_a_new_pruner_say_nothing() -> None:
    model, opt, pruner = make("chain", prune_steps=1)
    train(model, opt, pruner)
    assert pruner.finish(inplace=True).optimizer is opt
    backward(model, opt, 0)
    opt.step()
    model, opt, pruner = make("chain", prune_steps=1)
    train(model, opt, pruner)
    pruner.finish()
    again = psap.Pruner(model, inputs(), optimizer=opt, config=CONFIG)
    train(model, opt, again)
    again.close()
    opt.step()
