"""Which models of torchvision and timm can be pruned, how exactly, and at what price.

Every model is pruned by half in a process of its own, with a limit on CPU time, and gives one row.
What is in the output file already is not run again. Needs torchvision and timm (``make zoo``); for
``--library torch-pruning`` or ``torch-kirigami`` those too (``--peers`` may name their folder).
"""

from __future__ import annotations

import copy
import importlib
import json
import multiprocessing
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import psap
from benchmarks import coverage_models as models
from benchmarks import rows
from psap.decisions import Decisions
from psap.graph.outputs import output_tensors

Library = Literal["psap", "torch-pruning", "torch-kirigami"]
Row = dict[str, Any]


def _seconds(call: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """CPU seconds of the fastest of some calls, and what the last one returned."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
    return best, result


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Random norms: fresh ones are the identity or zero, and would hide errors."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if tensor.dim() == 1 or bool((tensor == tensor.reshape(-1)[0]).all()):
            numbers = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(numbers + 0.5 if "bias" not in name else numbers - 0.5)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _widths(model: nn.Module) -> dict[str, int]:
    """How many filters every convolution and linear layer has."""
    return {
        name: m.weight.shape[int(getattr(m, "transposed", False))]
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.conv._ConvNd | nn.Linear)
    }


def _narrowest(before: dict[str, int], after: dict[str, int]) -> tuple[str, int, int]:
    """The layer that lost the largest share of its filters, how many it had, and has."""
    name = min(after, key=lambda n: after[n] / before[n])
    return name, before[name], after[name]


def _error(model: nn.Module, plan: psap.Plan, small: nn.Module, inputs: Any) -> float:
    """The largest relative difference to the masked dense network, computed apart from psap's."""
    masked = psap.mask(model, plan).double().eval()
    other = copy.deepcopy(small).double().eval()
    cast = torch.utils._pytree.tree_map(lambda x: x.double(), inputs)
    with torch.no_grad(), Decisions(None, 1e-9) as decided:
        wanted = output_tensors(masked(*cast))
    with torch.no_grad(), Decisions(decided.made, 1e-9):  # equal scores may be sorted either way
        got = output_tensors(other(*cast))
    if [x.shape for x in wanted] != [x.shape for x in got] or not wanted:
        return float("inf")
    return max(
        float((a - b).abs().max()) / max(float(a.abs().max()), 1e-300)
        for a, b in zip(wanted, got, strict=True)
        if a.numel()
    )


def _trains(name: str, model: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Run a forward pass and a training step; says what is wrong, or nothing."""
    with torch.no_grad():
        model.eval()(*inputs)
    twice = [x.repeat(2, 1, 1, 1) if isinstance(x, torch.Tensor) else x for x in inputs]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    models.loss(output_tensors(model.train()(*twice, *models.targets(name)))).backward()
    optimizer.step()
    still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    return f"no gradient reaches {still[0]} and {len(still) - 1} more" if still else ""


def _psap(name: str, model: nn.Module, inputs: tuple[Any, ...], row: Row) -> None:
    try:
        _pruned(name, model, inputs, row, gated=False)
    except psap.VerificationError as error:
        row["ungated"] = f"{type(error).__name__}: {error}"[:600]
        _pruned(name, model, inputs, row, gated=True)


def _pruned(name: str, model: nn.Module, inputs: tuple[Any, ...], row: Row, *, gated: bool) -> None:
    """Prune by half, or, gated, only where every module stays what it is."""
    row["phase"], row["gated"] = "trace", gated
    row["trace_s"], graph = _seconds(lambda: psap.trace(model, inputs, gated=gated))
    row["groups"] = len(graph.groups)
    row["left_alone"] = dict(list(graph.left_alone.items())[:12])
    row["unknown_ops"] = dict(graph.unknown_ops)
    row["phase"] = "plan"
    row["plan_s"], plan = _seconds(lambda: psap.plan(graph, ratio=0.5))
    row["kept_parameters"] = plan.after.parameters / plan.before.parameters
    row["kept_macs"] = plan.after.macs / plan.before.macs
    row["phase"] = "apply"
    row["proof_s"], result = _seconds(lambda: psap.apply(model, plan))
    row["mode"] = result.mode
    proof = result.report["verification"]
    row["proved"], row["modes"] = proof["max_relative_error"], proof["modes"]
    row["phase"] = "apply, no proof"
    row["apply_s"], _ = _seconds(lambda: psap.apply(model, plan, check=False, mode=result.mode))
    row["phase"] = "compare"
    row["error"] = _error(model, plan, result.model, inputs)
    row["phase"] = "train"
    row["reason"] = _trains(name, result.model, inputs)
    row["result"] = "exact" if row["error"] <= 1e-9 else "wrong"
    if row["reason"] and row["reason"] != _trains(name, model, inputs):
        row["result"] = "broken"


def _torch_pruning(name: str, model: nn.Module, inputs: tuple[Any, ...], row: Row) -> None:
    pruning = importlib.import_module("torch_pruning")
    before, wide = _count(model), _widths(model)
    row["phase"] = "trace"
    row["trace_s"], pruner = _seconds(
        lambda: pruning.pruner.BasePruner(
            model,
            inputs[0] if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor) else inputs,
            importance=pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=models.classifiers(model),
        )
    )
    row["phase"] = "step"
    row["apply_s"], _ = _seconds(pruner.step)
    row["kept_parameters"] = _count(model) / before
    row["narrowest"] = _narrowest(wide, _widths(model))
    row["phase"] = "train"
    row["reason"] = _trains(name, model, inputs)
    row["result"] = "broken" if row["reason"] else "runs"


def _kirigami(name: str, model: nn.Module, inputs: tuple[Any, ...], row: Row) -> None:
    """Half of every layer by plan_remove: the automatic search takes minutes for a ResNet-18."""
    kirigami = importlib.import_module("torch_kirigami")
    pruning = importlib.import_module("torch_kirigami.pruning")
    before, ignored = _count(model), models.classifiers(model)

    def halve() -> None:
        pruner = pruning.Pruner(model, graph=graph)
        wanted: list[Any] = []
        gone: Mapping[str, Any] = {}
        for path, module in model.named_modules():
            known = isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
            if not known or module in ignored:
                continue
            dim = int(getattr(module, "transposed", False))
            axis = graph.parameter(f"{path}.weight").axis(dim)
            weak = module.weight.detach().movedim(dim, 0).flatten(1).norm(dim=1).argsort().tolist()
            taken = gone.get(axis.tensor.id)
            already = set(taken.fully_selected_indices(dim)) if taken is not None else set()
            missing = len(weak) // 2 - len(already)
            if missing <= 0:
                continue
            chosen = axis.select([i for i in weak if i not in already][:missing])
            impact = graph.propagate(remove=[*wanted, chosen], constraints=pruner.constraints)
            if impact.status == "resolved":  # others are outputs, or what it does not follow
                wanted.append(chosen)
                gone = impact.selections
        if not wanted:
            raise kirigami.UnsupportedOperation("no layer can be pruned")
        pruner.apply(pruner.plan_remove(wanted))

    try:
        row["phase"] = "trace"
        row["trace_s"], graph = _seconds(
            lambda: kirigami.DependencyGraph.build(model.eval(), args=inputs)
        )
        row["phase"] = "step"
        wide = _widths(model)
        row["apply_s"], _ = _seconds(halve)
        row["narrowest"] = _narrowest(wide, _widths(model))
    except (kirigami.KirigamiError, kirigami.UnsupportedOperation) as error:
        row |= {"result": "refused", "reason": f"{type(error).__name__}: {error}"[:1500]}
        return
    row["kept_parameters"] = _count(model) / before
    row["phase"] = "train"
    row["reason"] = _trains(name, model, inputs)
    row["result"] = "broken" if row["reason"] else "runs"


RUNNERS = {"psap": _psap, "torch-pruning": _torch_pruning, "torch-kirigami": _kirigami}


def _child(pipe: Connection, name: str, library: Library, size: int, limit_s: float) -> None:
    """Prune one model; send the row when it is done, or how far it came."""
    row: Row = {"phase": "build"}

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in time, in phase {row['phase']!r}")

    for number in (signal.SIGTERM, signal.SIGPROF):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        model, inputs = models.build(name, size)
        randomise(model)
        row["parameters"] = _count(model)
        with torch.no_grad():
            row["forward_s"], _ = _seconds(lambda: model.eval()(*inputs), 3)
        RUNNERS[library](name, model.train(), inputs, row)
    except TimeoutError as error:
        row |= {"result": "timeout", "reason": str(error)}
    except psap.PsapError as error:
        row |= {"result": "refused", "reason": f"{type(error).__name__}: {error}"[:1500]}
    except Exception as error:
        row |= {"result": "crash", "reason": f"{type(error).__name__}: {error}"[:1500]}
    pipe.send(row)


def one(name: str, library: Library = "psap", size: int = 0, limit_s: float = 300) -> Row:
    """The row of one model, made in a process of its own."""
    context = multiprocessing.get_context("fork")  # torchvision and timm are imported once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, name, library, size, limit_s))
    start = time.monotonic()
    process.start()
    theirs.close()
    row: Row = {"result": "crash", "reason": "the process died"}
    try:
        if not ours.poll(10 * limit_s):  # on a busy machine, or if it sleeps
            process.terminate()
        if ours.poll(200):
            row = ours.recv()
    except EOFError:
        pass
    process.join(5)
    if process.is_alive():
        process.kill()
        row = {"result": "timeout", "reason": "hung"}
    wall = time.monotonic() - start
    return {"model": name, "library": library, **row, "size": size, "wall_s": round(wall, 2)}


def need(module: str, mend: str) -> None:
    """Exit with what is missing and what mends it, if a module cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(
            f"this benchmark needs {module}, which cannot be imported ({error}); {mend}"
        ) from None


def run(
    names: tuple[str, ...] = (),
    /,
    *,
    out: Path = rows.RESULTS / "coverage.jsonl",
    library: Library = "psap",
    peers: Path | None = None,
    size: int = 0,
    limit_s: float = 300,
    ci: bool = False,
) -> None:
    """Prune every model by half and write a row for each.

    Args:
        names: models as ``timm/resnet18``; parts of names work too. All by default.
        out: the file; models that it has are skipped.
        library: what prunes.
        peers: a folder that holds torch-pruning and torch-kirigami.
        size: edge of the images; 0 for what each model is made for.
        limit_s: seconds of CPU time for one model.
        ci: only a dozen models.
    """
    if peers is not None:
        sys.path.insert(0, str(peers.resolve()))
    for module in ("torchvision", "timm"):
        need(module, "run it in the environment that `make zoo` sets up")
    if library != "psap":
        need(
            library.replace("-", "_"), f"pip install --no-deps --target DIR {library}, --peers DIR"
        )
    for public in psap.__all__:  # imported here, once, and not in every child
        getattr(psap, public)
    torch.set_num_threads(1)
    machine = rows.machine()
    known = out.read_text().splitlines() if out.exists() else []
    done = {(r["model"], r["library"], r["size"]) for r in map(json.loads, known)}
    wanted = models.CI if ci else models.NAMES
    for name in [n for n in wanted if not names or any(part in n for part in names)]:
        if (name, library, size) in done:
            continue
        row = one(name, library, size, limit_s)
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps({"benchmark": "coverage", **row, **machine}) + "\n")
        print(line(row), flush=True)


def line(row: Row) -> str:
    """One row as a line of text."""
    error = f"{row['error']:.0e}" if "error" in row else "-"
    kept = f"{row['kept_parameters']:.1%}" if "kept_parameters" in row else "-"
    times = " ".join(
        f"{k[:-2]} {row[k]:.2f}"
        for k in ("forward_s", "trace_s", "plan_s", "apply_s", "proof_s")
        if k in row
    )
    return (
        f"{row['model']:44} {row['result']:8} {error:>6} {kept:>6} {row.get('groups', '-'):>4} "
        f"{row.get('mode', '-'):6} {times} {row.get('reason') or ''}"
    )
