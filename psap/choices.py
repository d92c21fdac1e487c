"""What a caller of `psap.plan` chooses: ratios and scores, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psap import schedule, scores
from psap.errors import ArgumentError, ArgumentTypeError
from psap.graph import Graph


def check_whole(name: str, value: Any, least: int) -> None:
    """Check a whole number.

    Raises:
        ArgumentTypeError: it is none.
        ArgumentError: it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} is {value!r}; pass a whole number >= {least}")
    if value < least:
        raise ArgumentError(f"{name} is {value!r}; pass a whole number >= {least}")


def by_ratio(
    graph: Graph, ratio: float | Mapping[str, float], bounds: Sequence[schedule.Limits]
) -> schedule.Ints:
    """Widths int [groups] that a removed share gives, for all groups or by name.

    Raises:
        ArgumentError: a name is unknown, or a share is outside [0, 1).
        ArgumentTypeError: a share is no number.
    """
    if isinstance(ratio, Mapping):
        names = {group.name for group in graph.groups}
        unknown = sorted(set(ratio) - names, key=str)
        if unknown:
            raise ArgumentError(
                f"ratio names {unknown[0]!r}, which is no group; groups: {sorted(names)}"
            )
        ratios = [ratio.get(group.name, 0.0) for group in graph.groups]
    else:
        ratios = [ratio] * len(graph.groups)
    widths = []
    for value, bound in zip(ratios, bounds, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentTypeError(
                f"ratio is {value!r}; pass the removed share, from 0 to below 1"
            )
        if not 0 <= value < 1:
            raise ArgumentError(f"ratio is {value!r}; pass the removed share, from 0 to below 1")
        widths.append(bound.nearest(bound.size - int(np.floor(value * bound.size + 1e-9))))
    return np.array(widths, dtype=np.int64)


def floors(graph: Graph, wanted: Mapping[str, float]) -> scores.Floats:
    """Least kept share of every group, float64 [groups], from shares by the names of layers.

    Args:
        graph: the channel graph.
        wanted: shares by the name of a layer, of a module that holds it, or a pattern of names.

    Raises:
        ArgumentError: a name is that of no layer.
    """
    found = np.zeros(len(graph.groups))
    if not wanted:
        return found
    makers = [{w for name in group.producers for w in within(name)} for group in graph.groups]
    layers = {layer for name in graph.shapes for layer in within(name)}
    for pattern, share in wanted.items():
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            close = get_close_matches(pattern, sorted(layers), 3, 0.4)
            raise ArgumentError(
                f"floors names {pattern!r}, which is no layer of the model"
                + (f"; near are {', '.join(close)}" if close else "")
            )
        hit = [any(fnmatchcase(maker, pattern) for maker in of_group) for of_group in makers]
        found[hit] = np.maximum(found[hit], share)
    return found


def within(name: str) -> list[str]:
    """A parameter, the layer that has it, and all modules around: "a.b.weight", "a.b", "a"."""
    return list(accumulate(name.split("."), "{}.{}".format))


def importances(
    graph: Graph, stats: Sequence[scores.GroupStats], score: Any, seed: int
) -> list[scores.Floats]:
    """Importances of the channels of every group, float64 [C_g] each.

    Raises:
        ArgumentError: the score is unknown, or importances do not fit the groups.
        ArgumentTypeError: importances are no tensors.
    """
    if isinstance(score, Mapping):
        unknown = sorted(set(score) - {group.name for group in graph.groups}, key=str)
        if unknown:
            raise ArgumentError(f"score names {unknown[0]!r}, which is no group")
        return [_given(group.name, group.size, score) for group in graph.groups]
    if score == "random":
        rng = np.random.default_rng(seed)
        return [rng.random(group.size) for group in graph.groups]
    if score not in ("l1", "l2"):
        raise ArgumentError(
            f"score is {score!r}; pass 'l1', 'l2', 'random', or importances by group"
        )
    return [scores.importance(s, score) for s in stats]


def _given(name: str, size: int, score: Mapping[str, Tensor]) -> scores.Floats:
    if name not in score:
        raise ArgumentError(f"score has no entry for group {name!r}; give one of shape [{size}]")
    try:
        values = torch.as_tensor(score[name]).detach().double().cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(f"score[{name!r}] must be a tensor: {error}") from error
    if values.shape != (size,) or not np.isfinite(values).all():
        raise ArgumentError(f"score[{name!r}] must be finite and of shape [{size}]")
    result: scores.Floats = values
    return result
