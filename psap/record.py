"""From a finished run to the JSON record that `psap.report` draws."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save
from torch import nn

import psap
from psap import measure, report
from psap.cost import LayerCost
from psap.errors import ArgumentTypeError
from psap.events import PruneEvent, WindowEvent
from psap.shrink import Result


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run measured beside the plan; None where it did not.

    Attributes:
        dense_accuracy: of a dense network that was trained for as long as the small one, on the
            test images, in [0, 1].
        began_accuracy: of the dense network on these images when pruning began. It had trained
            for less time than the small network, so their difference is not shown.
        small_accuracy: of the small network on the same images.
        dense_bytes: size of the dense network's file.
        small_bytes: size of the small network's file.
        latency: dense against small in PyTorch.
        onnx_latency: dense against small in ONNX Runtime.
        batch: images per forward pass while timing.
        onnx_difference: largest difference of the ONNX file from PyTorch.
    """

    dense_accuracy: float | None = None
    began_accuracy: float | None = None
    small_accuracy: float | None = None
    dense_bytes: int | None = None
    small_bytes: int | None = None
    latency: measure.Comparison | None = None
    onnx_latency: measure.Comparison | None = None
    batch: int | None = None
    onnx_difference: float | None = None


def build(
    result: Result,
    *,
    dense: nn.Module | None = None,
    measured: Measured | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    title: str = "Pruned network",
    command: str = "",
    seed: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a run, for `psap.report.write`.

    ``report.write(record.build(result), "report.html")`` is enough after a loop of one's own;
    whatever else is given is shown too.

    Args:
        result: what `psap.Pruner.finish` or `psap.apply` returned.
        dense: a model of the dense architecture, for the kinds of its layers; by default the small
            network says them.
        measured: accuracies, sizes, latencies.
        history: one entry per epoch with ``epoch``, ``phase``, ``train_loss``, ``val_accuracy``,
            ``macs_share``, ``lr`` and ``seconds``; what is missing is not drawn.
        title: heading of the report.
        command: what was typed.
        seed: of the run.
        config: settings to show; by default those of the pruner.

    Raises:
        ArgumentTypeError: it is no result.
    """
    if not isinstance(result, Result):
        raise ArgumentTypeError(
            f"result is a {type(result).__name__}; pass what Pruner.finish or psap.apply returned"
        )
    plan, events = result.plan, result.report.get("events", [])
    owner, measured = result.model if dense is None else dense, measured or Measured()
    found = {
        "format": report.FORMAT,
        "version": report.VERSION,
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "environment": environment(),
        "config": dict(config if config is not None else result.report.get("config", {})),
        "groups": [
            {**vars(g), "kept": list(g.kept), "layers": list(g.layers)} for g in plan.groups
        ],
        "layers": [_layer(owner, before, after) for before, after in plan.layers],
        "blocks": result.report.get("blocks") or [],
        "left_alone": [{"layer": k, "reason": why} for k, why in plan.left_alone.items()],
        "steps": [event for event in events if event["kind"] == "prune"],
        "windows": [event for event in events if event["kind"] == "window"],
        "history": [dict(entry) for entry in history],
        "compare": _compare(result, measured),
        "verification": result.report.get("verification") or {},
        "onnx": {"max_abs_difference": measured.onnx_difference},
        "time": result.report.get("time") or {},
    }
    return {**found, "fates": report.fates(found)}


def environment() -> dict[str, str]:
    """Versions and machine, for the record."""
    return {
        "psap": psap.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def command_line() -> str:
    """What was typed, without the folder of the program."""
    path = Path(sys.argv[0])
    program = f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name
    return " ".join([program, *sys.argv[1:]])


def state_bytes(model: nn.Module) -> int:
    """Size of a .safetensors file of the model's state; a tensor that is used twice counts once."""
    unique = {t.data_ptr() or id(t): t for t in model.state_dict().values()}
    plain = {str(i): t.detach().cpu().contiguous() for i, t in enumerate(unique.values())}
    return len(save(plain))


def macs_share(events: Sequence[PruneEvent | WindowEvent]) -> float:
    """Kept share of the MACs after the last prune step, for the history of a run."""
    return next((e.macs_share for e in reversed(events) if isinstance(e, PruneEvent)), 1.0)


def _layer(dense: nn.Module, before: LayerCost, after: LayerCost) -> dict[str, Any]:
    name = before.weight.rpartition(".")[0] or before.weight
    owner = dict(dense.named_modules()).get(name)
    return {
        "name": name,
        "kind": type(owner).__name__ if owner is not None else "",
        "before": _width(before, owner),
        "after": _width(after, owner),
        "macs_before": before.macs,
        "macs_after": after.macs,
        "parameters_before": math.prod(before.shape),
        "parameters_after": math.prod(after.shape),
    }


def _width(layer: LayerCost, owner: nn.Module | None) -> list[int]:
    """[out, in] of a weight [O, I / groups, ...] or, of a transposed convolution, [I, O / groups].

    Args:
        layer: the weight, dense or small.
        owner: its module, dense or small: one group per channel stays that, other counts stay.
    """
    first, second = [*layer.shape[:2], 1, 1][:2]
    if not isinstance(owner, nn.modules.conv._ConvNd):
        return [first, second]
    groups = owner.groups
    if 1 < groups == owner.in_channels:
        groups = first if owner.transposed else first // (owner.out_channels // groups)
    return [second * groups, first] if owner.transposed else [first, second * groups]


def _compare(result: Result, measured: Measured) -> dict[str, Any]:
    plan, torch_, onnx = result.plan, measured.latency, measured.onnx_latency
    return {
        "batch": measured.batch,
        "threads": torch_.a.threads if torch_ else None,
        "accuracy_when_pruning_began": measured.began_accuracy,
        "dense": {
            "accuracy": measured.dense_accuracy,
            "macs": plan.before.macs,
            "parameters": plan.before.parameters,
            "file_bytes": measured.dense_bytes,
            "latency_ms": _latency(torch_.a) if torch_ else None,
            "onnx_latency_ms": _latency(onnx.a) if onnx else None,
        },
        "small": {
            "accuracy": measured.small_accuracy,
            "macs": plan.after.macs,
            "parameters": plan.after.parameters,
            "file_bytes": measured.small_bytes,
            "latency_ms": _latency(torch_.b) if torch_ else None,
            "onnx_latency_ms": _latency(onnx.b) if onnx else None,
        },
    }


def _latency(value: measure.Latency) -> dict[str, float]:
    return {"median": value.median_ms, "p20": value.p20_ms, "p80": value.p80_ms}


def summary(found: Mapping[str, Any]) -> Table:
    """Dense against small, from a record, for a terminal."""
    dense, small = found["compare"]["dense"], found["compare"]["small"]
    table = Table("", "dense", "small", "")
    rows = [("accuracy", "accuracy", "{:.2%}"), ("MACs", "macs", "{:,}")]
    rows += [("parameters", "parameters", "{:,}"), ("file, bytes", "file_bytes", "{:,}")]
    for name, key, form in rows:
        pair = [None if side[key] is None else side[key] for side in (dense, small)]
        cells = ["-" if value is None else form.format(value) for value in pair]
        table.add_row(name, *cells, _change(key, *pair))
        began = found["compare"].get("accuracy_when_pruning_began")
        if key == "accuracy" and began is not None:
            table.add_row("accuracy, dense, when pruning began", form.format(began), "", "")
    batch = found["compare"]["batch"]
    for name, key in (("PyTorch", "latency_ms"), ("ONNX Runtime", "onnx_latency_ms")):
        if dense[key] and small[key]:
            a, b = dense[key]["median"], small[key]["median"]
            label = f"latency, {name}, batch {batch}"
            table.add_row(label, f"{a:.2f} ms", f"{b:.2f} ms", speed(a / b))
    return table


def speed(ratio: float) -> str:
    """A ratio of latencies, dense over small, in words."""
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def _change(key: str, dense: float | None, small: float | None) -> str:
    if dense is None or small is None:
        return ""
    if key == "accuracy":
        return f"{100 * (small - dense):+.2f} points"
    return f"{small / dense:.1%} kept"
