"""Made-up report records for the tests of the report: shaped like those of real runs."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

HOSTILE = "<script>alert(1)</script>\"'&\x00\ud800]]>"
REASONS = {
    "output": "its outputs are outputs of the model",
    "frozen": "its parameters are frozen (requires_grad is False)",
}


def _groups(sizes: dict[str, int], share: float, rng: random.Random) -> list[dict[str, Any]]:
    groups = []
    for name, size in sizes.items():
        width = max(2, round(size * share * rng.uniform(0.7, 1.4)))
        kept = sorted(rng.sample(range(size), min(width, size)))
        groups.append(
            {"name": name, "size": size, "kept": kept, "reason": None, "layers": [name, "more"]}
        )
    return groups


def _layers(groups: list[dict[str, Any]], classes: int) -> list[dict[str, Any]]:
    layers, before, after = [], 1, 1
    for group in groups:
        width, kept = group["size"], len(group["kept"])
        layers.append(
            {
                "name": group["name"],
                "kind": "Conv2d",
                "before": [width, before],
                "after": [kept, after],
                "macs_before": 9 * 64 * width * before,
                "macs_after": 9 * 64 * kept * after,
                "parameters_before": 9 * width * before,
                "parameters_after": 9 * kept * after,
            }
        )
        before, after = width, kept
    head = {"name": "fc", "kind": "Linear", "before": [classes, before], "after": [classes, after]}
    counts = {"before": classes * before, "after": classes * after}
    for key, value in counts.items():
        head[f"macs_{key}"] = head[f"parameters_{key}"] = value
    return [*layers, head]


def _fate(
    t: int, count: int, group: dict[str, Any], gone: set[int], rng: random.Random
) -> tuple[list[int], list[int], list[dict[str, Any]]]:
    """What step t prunes and returns, and whom its window judges; updates who is gone."""
    dead = sorted(set(range(group["size"])) - set(group["kept"]))
    random.Random(group["name"]).shuffle(dead)
    target = set(dead[: round((1 - (1 - t / count) ** 3) * len(dead))])
    victims = rng.sample(group["kept"], min(len(group["kept"]) // 6, 2)) if t < count else []
    back = sorted(gone - target - set(dead))
    fresh = sorted((target | set(victims)) - gone)
    gone -= set(back)
    gone |= set(fresh)
    candidates = []
    for channel in fresh:
        useful = channel in victims and rng.random() < 0.7
        if useful or rng.random() < 0.2:
            z = rng.uniform(3.1, 7.5) if useful else rng.uniform(0.2, 2.9)
            reason = "significant, within the share" if useful else "z is not above 3"
            entry = {"group": group["name"], "channel": channel, "value": 1e-3 * z * rng.random()}
            candidates.append({**entry, "z": z, "restored": useful, "reason": reason})
            gone -= {channel} if useful else set()
    return fresh, back, candidates


def _events(
    groups: list[dict[str, Any]], count: int, rng: random.Random
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prune steps that end at the kept channels of the groups, and their windows."""
    steps: list[dict[str, Any]] = []
    windows: list[dict[str, Any]] = []
    gone: dict[str, set[int]] = {group["name"]: set() for group in groups}
    base = {name: rng.uniform(0.38, 0.7) for name in gone}
    total = sum(group["size"] for group in groups)
    for t in range(1, count + 1):
        pruned, returned, candidates = {}, {}, []
        for group in groups:
            name = group["name"]
            pruned[name], returned[name], judged = _fate(t, count, group, gone[name], rng)
            candidates += judged
        widths = {group["name"]: group["size"] - len(gone[group["name"]]) for group in groups}
        share = (sum(widths.values()) / total) ** 2
        sparsity = {n: min(0.99, b + 0.05 * t * rng.uniform(-0.6, 1)) for n, b in base.items()}
        iteration = 45 * (2 * t - 1)
        steps.append(
            {
                "step": t,
                "call": 2 * t - 1,
                "iteration": iteration,
                "target_share": 0.25 + 0.75 * (1 - t / count) ** 3,
                "macs_share": share,
                "parameters_share": share,
                "sparsity": sparsity,
                "sparsity_ema": {n: 0.5 * (b + sparsity[n]) for n, b in base.items()},
                "widths": widths,
                "pruned": pruned,
                "returned": returned,
            }
        )
        windows.append(
            {
                "step": t,
                "iteration": iteration + 8,
                "observed": 8,
                "skipped": 0,
                "supervised": {name: len(found) for name, found in pruned.items()},
                "candidates": sorted(candidates, key=lambda item: -item["value"]),
            }
        )
    return steps, windows


def _history(steps: list[dict[str, Any]], dense: int, tune: int, rng: random.Random) -> list[Any]:
    history: list[dict[str, Any]] = []
    prune = 2 * len(steps) + 1
    macs = 1.0
    for epoch in range(1, dense + prune + tune + 1):
        phase = "dense" if epoch <= dense else "prune" if epoch <= dense + prune else "finetune"
        accuracy = 0.985 - 0.55 * math.exp(-epoch / 2.2) - rng.uniform(0, 0.008)
        loss = 0.03 + 2.1 * math.exp(-epoch / 2.4) + rng.uniform(0, 0.02)
        for step in steps:
            if step["call"] == epoch - dense:
                macs = step["macs_share"]
                accuracy -= 0.07 * rng.uniform(0.4, 1)
                loss += 0.2 * rng.uniform(0.4, 1)
        history.append(
            {
                "epoch": epoch,
                "phase": phase,
                "train_loss": loss,
                "val_accuracy": accuracy,
                "macs_share": macs,
                "lr": 0.1 * 0.5 * (1 + math.cos(math.pi * epoch / (dense + prune + tune))),
                "seconds": 1.9,
            }
        )
    return history


def _compare(layers: list[dict[str, Any]]) -> dict[str, Any]:
    sides: dict[str, Any] = {"batch": 64, "threads": 1}
    for name, key, accuracy, scale in (
        ("dense", "before", 0.9833, 1.0),
        ("small", "after", 0.9806, 0.46),
    ):
        count = sum(layer[f"parameters_{key}"] for layer in layers)
        spread = {"median": 4.31 * scale, "p20": 4.2 * scale, "p80": 4.9 * scale}
        sides[name] = {
            "accuracy": accuracy,
            "macs": sum(layer[f"macs_{key}"] for layer in layers),
            "parameters": count,
            "file_bytes": 4 * count + 9000,
            "latency_ms": spread,
            "onnx_latency_ms": {key: 0.52 * value for key, value in spread.items()},
        }
    return sides


def make(sizes: dict[str, int], *, steps: int, seed: int = 0) -> dict[str, Any]:
    """A complete record for groups of these sizes."""
    rng = random.Random(seed)
    groups = _groups(sizes, 0.42, rng)
    layers = _layers(groups, 10)
    events, windows = _events(groups, steps, rng) if steps else ([], [])
    head = {"name": "fc", "size": 10, "kept": list(range(10)), "layers": ["fc"]}
    groups.append({**head, "reason": REASONS["output"]})
    return {
        "format": "psap-report",
        "version": 1,
        "title": "A small residual network on handwritten digits",
        "created": "2025-01-31T12:34:56+00:00",
        "command": "psap prune --arch resnet8 --data digits --target-macs 0.25 --out runs/digits",
        "environment": {"python": "3.12.3", "torch": "2.10.0", "CPU": "AMD EPYC, 2 cores"},
        "config": {"target": {"macs": 0.25}, "protect": "pulse", "window": 8, "round_to": None},
        "seed": 0,
        "groups": groups,
        "layers": layers,
        "left_alone": [
            {"layer": "fc", "reason": REASONS["output"]},
            {"layer": "stem", "reason": REASONS["frozen"]},
        ],
        "steps": events,
        "windows": windows,
        "history": _history(events, 8, 9, rng),
        "compare": _compare(layers),
        "verification": {
            "max_relative_error": 2.13e-15,
            "dtype": "float64",
            "modes": ["eval", "train"],
            "mode": "module",
        },
        "onnx": {"max_abs_difference": 1.9e-6},
    }


def residual(depth: int, widths: tuple[int, ...] = (16, 32, 64)) -> dict[str, int]:
    """Group sizes of a CIFAR-like residual network with depth convolutions, stem included."""
    sizes = {"stem": widths[0]}
    blocks = (depth - 1) // (2 * len(widths))
    for s, width in enumerate(widths):
        for b in range(blocks):
            sizes[f"layer{s + 1}.{b}.conv1"] = width
            sizes[f"layer{s + 1}.{b}.conv2"] = width
    return sizes


def _poison(value: Any) -> Any:
    """The same structure with every string hostile."""
    if isinstance(value, dict):
        return {(HOSTILE + str(key)): _poison(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_poison(item) for item in value]
    return HOSTILE + value if isinstance(value, str) else value


def hostile(record: dict[str, Any]) -> dict[str, Any]:
    """Strings that users choose, hostile; keys of the format as they are."""
    found = copy.deepcopy(record)
    for key in ("title", "created", "command"):
        found[key] = HOSTILE
    for key in ("environment", "config"):
        found[key] = _poison(found[key])
    found["verification"] = {key: HOSTILE for key in found["verification"]}
    found["left_alone"] = [{"layer": HOSTILE, "reason": HOSTILE}]
    for layer in found["layers"]:
        layer.update(name=HOSTILE + layer["name"], kind=HOSTILE)
    for group in found["groups"]:
        group.update(name=HOSTILE + group["name"], layers=[HOSTILE], reason=HOSTILE)
    for event in found["steps"]:
        for key, value in event.items():
            if isinstance(value, dict):
                event[key] = {HOSTILE + name: item for name, item in value.items()}
    for window in found["windows"]:
        window["supervised"] = _poison(window["supervised"])
        for item in window["candidates"]:
            item.update(group=HOSTILE + item["group"], reason=HOSTILE)
    for epoch in found["history"]:
        epoch["phase"] = HOSTILE
    return found
