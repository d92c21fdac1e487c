"""Methods that prune once: a score for every channel, widths under the budget, fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
from torch.nn import functional as F

import psap
from benchmarks.methods.task import Method, Task, at
from psap import plans, schedule, scores
from psap.cost import CostModel
from psap.graph import Graph

Scores = list[scores.Floats]
DEFAULTS = psap.Config()


def limits(graph: Graph) -> list[schedule.Limits]:
    """The bounds on widths of every method: those of `psap.Config`."""
    sizes = [g.size for g in graph.groups]
    return schedule.limits(sizes, DEFAULTS.max_ratio, DEFAULTS.min_channels, DEFAULTS.round_to)


def sized(graph: Graph, sparsity: scores.Floats, keep: float) -> schedule.Ints:
    """Widths whose ratios follow the sparsity of the groups, as psap's do."""
    cost, target = CostModel(graph), psap.Target(macs=keep)
    ones = np.ones(len(graph.groups))
    power, bounds = DEFAULTS.sparsity_power, limits(graph)
    return schedule.solve(sparsity, ones, power, bounds, lambda w: cost.fits(w, target))


def strongest(values: Scores, widths: schedule.Ints) -> list[list[int]]:
    """The channels of the largest scores in every group."""
    return [list(scores.strongest(v, int(w))) for v, w in zip(values, widths, strict=True)]


def uniform(graph: Graph, values: Scores, keep: float) -> list[list[int]]:
    """The same ratio in every group; the strongest stay."""
    return strongest(values, sized(graph, np.ones(len(graph.groups)), keep))


def ranked(graph: Graph, values: Scores, keep: float) -> list[list[int]]:
    """One threshold on the scores of all groups together: the lowest at which the budget holds."""
    cost, target, bounds = CostModel(graph), psap.Target(macs=keep), limits(graph)
    floors, sizes = np.array([b.floor for b in bounds]), np.array([b.size for b in bounds])
    group = np.repeat(np.arange(len(values)), [len(v) for v in values])
    group = group[np.argsort(-np.concatenate(values), kind="stable")]  # strongest channel first

    def widths(count: int) -> schedule.Ints:
        return np.maximum(np.bincount(group[:count], minlength=len(values)), floors)

    low, high = 0, len(group)  # how many of the strongest stay
    while low < high:
        middle = (low + high + 1) // 2
        fits = cost.fits(widths(middle), target)
        low, high = (middle, high) if fits else (low, middle - 1)
    found = widths(low)
    for g in group[low:]:  # what the budget has left over
        more = found.copy()
        more[g] += 1
        if more[g] <= sizes[g] and cost.fits(more, target):
            found = more
    return strongest(values, found)


def norms(graph: Graph, task: Task, score: str = "l2") -> Scores:
    """Norms of filters, each producer relative to its mean, each group relative to its mean."""
    stats = scores.measure(graph, dict(graph.model.named_parameters()), 0.5, score)
    found = [scores.importance(s, score) for s in stats]
    return [v / max(float(v.mean()), 1e-300) for v in found]


def l1(graph: Graph, task: Task) -> Scores:
    """L1 norm of the filters (Li et al., 2017)."""
    return norms(graph, task, "l1")


def draw(graph: Graph, task: Task) -> Scores:
    """Random: what any score must beat."""
    rng = np.random.default_rng(task.seed)
    return [rng.random(g.size) for g in graph.groups]


def median(graph: Graph, task: Task) -> Scores:
    """FPGM (He et al., 2019): the sum of the distances to all other filters of the layer."""
    tensors = dict(graph.model.named_parameters())
    found = []
    for group in graph.groups:
        total = np.zeros(group.size)
        for name in group.producers:
            channels = graph.channels[name, 0] - group.start
            inside = (channels >= 0) & (channels < group.size)
            rows = tensors[name].detach().cpu().flatten(1)[torch.from_numpy(inside)].double()
            distance = torch.cdist(rows, rows).sum(1).numpy()
            np.add.at(total, channels[inside], distance / max(distance.mean(), 1e-300))
        found.append(total)
    return found


def gate_derivatives(graph: Graph) -> scores.Floats:
    """Gate derivatives from the affine pairs of batch norms, float64 [channels]."""
    total = np.zeros(len(graph.group_of))
    tensors = dict(graph.model.named_parameters())
    for name in graph.affine:
        gradient = tensors[name].grad
        if gradient is None:
            continue
        channels = graph.channels[name, 0]
        inside = channels >= 0
        product = (tensors[name] * gradient).detach().double().cpu().numpy()
        np.add.at(total, channels[inside], product[inside])
    return total


def taylor(graph: Graph, task: Task, count: int = 16) -> Scores:
    """First-order Taylor (Molchanov et al., 2019): mean over batches of the squared derivative."""
    model = graph.model
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    total = np.zeros(len(graph.group_of))
    for x, y in islice(task.batches(), count):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        total += gate_derivatives(graph) ** 2
    model.zero_grad()
    model.load_state_dict(state)
    return [total[g.start : g.start + g.size] for g in graph.groups]


def affine(graph: Graph, task: Task) -> Scores:
    """Network slimming (Liu et al., 2017): |gamma|, mean over the norms of the group."""
    tensors = dict(graph.model.named_parameters())
    total, count = np.zeros(len(graph.group_of)), np.zeros(len(graph.group_of))
    for name in graph.affine:
        if not name.endswith("weight"):
            continue
        channels = graph.channels[name, 0]
        inside = channels >= 0
        scale = tensors[name].detach().abs().double().cpu().numpy()
        np.add.at(total, channels[inside], scale[inside])
        np.add.at(count, channels[inside], 1)
    mean = total / np.maximum(count, 1)
    return [mean[g.start : g.start + g.size] for g in graph.groups]


def shrink(task: Task, graph: Graph, kept: list[list[int]]) -> None:
    """Make the network small; momentum comes along."""
    result = psap.apply(task.model, plans.from_masks(graph, kept), optimizer=task.optimizer)
    assert result.optimizer is not None
    task.model, task.optimizer = result.model, result.optimizer


class OneShot(Method):
    """Prunes once, at `Task.prune_from`.

    Args:
        score: importance of every channel.
        choose: from scores to kept channels.
    """

    def __init__(
        self,
        score: Callable[[Graph, Task], Scores],
        choose: Callable[[Graph, Scores, float], list[list[int]]] = uniform,
    ) -> None:
        self.score, self.choose = score, choose

    def begin(self, task: Task) -> None:
        """Prunes at once where nothing shall be trained before."""
        if at(task, task.prune_from) == 0:
            self.prune(task)

    def stepped(self, task: Task, step: int) -> None:
        """Prunes when its time has come."""
        if step == at(task, task.prune_from):
            self.prune(task)

    def prune(self, task: Task) -> None:
        """Score, choose, shrink."""
        graph = psap.trace(task.model, task.example)
        shrink(task, graph, self.choose(graph, self.score(graph, task), task.keep))


class Slimming(OneShot):
    """Network slimming: an L1 penalty on every gamma until the network is pruned.

    The penalty must work first, so it prunes in the middle of the pruning phase.

    Args:
        penalty: factor of sum |gamma| in the loss.
    """

    def __init__(self, penalty: float = 1e-4) -> None:
        super().__init__(affine, ranked)
        self.penalty = penalty

    def begin(self, task: Task) -> None:
        """Finds the norms."""
        self.when = at(task, (task.prune_from + task.prune_until) / 2)
        graph = psap.trace(task.model, task.example)
        self.scales = [name for name in graph.affine if name.endswith("weight")]

    def gradients(self, task: Task) -> None:
        """Adds the gradient of the penalty."""
        tensors = dict(task.model.named_parameters())
        for name in self.scales:
            gradient = tensors[name].grad
            assert gradient is not None
            gradient += self.penalty * tensors[name].detach().sign()

    def stepped(self, task: Task, step: int) -> None:
        """Prunes when its time has come."""
        if step == self.when:
            self.prune(task)
            self.scales = []
