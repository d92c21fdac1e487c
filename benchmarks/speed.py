"""Forward passes of dense and pruned networks, in PyTorch and in ONNX Runtime.

The networks are those of `psap.plan`, without training: latency depends on shapes, not on values.
All networks of a share run in turn in one process, one thread, CPU time. The proof must hold, and
ONNX Runtime must agree with PyTorch, before anything is timed.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import psap
from benchmarks import rows, timing
from psap.cost import CostModel
from psap.models import create
from psap.recipe import read_saved

Forward = Callable[[], Any]
WAYS = ("plain", "round-8", "measured", "latency")
ALL_WAYS = (*WAYS, "round-16")  # blocks of AVX-512; half of the MACs is out of its reach
ROUND_TO = {"round-8": 8, "round-16": 16}
NETWORKS = ("resnet20", "resnet56")


def _dense(network: str, weights: Path | None) -> nn.Module:
    torch.manual_seed(0)
    model = create(network)
    if weights is not None:
        model.load_state_dict(load_file(weights / f"{network}.safetensors"), strict=False)
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def plan(graph: psap.Graph, keep: float, way: str) -> psap.Plan:
    """The plan of a way; "latency" bounds the predicted time, not the MACs.

    Args:
        graph: of the dense network, traced with the batch that is timed.
        keep: kept share of the MACs, or of the predicted latency.
        way: one of `ALL_WAYS`.

    Raises:
        TargetError: the target cannot be met.
    """
    if way == "latency":
        times = psap.measure_latency(graph)
        return psap.plan(graph, target=psap.Target(latency=keep), latency=times)
    target = psap.Target(macs=keep)
    if way == "measured":
        return psap.plan(graph, target=target, round_to="measured")
    return psap.plan(graph, target=target, round_to=ROUND_TO.get(way, 1))


def _onnx(model: psap.Result | nn.Module, x: Tensor, path: Path) -> Forward:
    """A pass of the exported network; the export compares it with PyTorch."""
    import onnxruntime

    psap.export_onnx(model, path, x[:2])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def _torch(model: nn.Module, x: Tensor) -> Forward:
    model.eval()

    def forward() -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(x)
        return found

    return forward


def compare(
    network: str,
    keep: float,
    batch: int,
    *,
    ways: tuple[str, ...] = WAYS,
    weights: Path | None = None,
    repeats: int = 15,
) -> list[dict[str, Any]]:
    """One share of one network: a row for every runtime and way.

    Raises:
        VerificationError: a small network differs from the masked one, or ONNX from PyTorch.
    """
    dense, x = _dense(network, weights), _batch(batch)
    graph, made, found = psap.trace(dense, x), dict[str, psap.Plan](), list[dict[str, Any]]()
    for way in ways:
        try:
            made[way] = plan(graph, keep, way)
        except psap.TargetError as error:
            shown = {"network": network, "keep": keep, "batch": batch, "way": way}
            found.append({"case": f"{network}, {way}", **shown, "refused": str(error)})
    few = _batch(4)  # the proof costs as much as its batch is large
    small = {way: psap.apply(dense, chosen, example_inputs=few) for way, chosen in made.items()}
    kind = "random" if weights is None else "pretrained"
    for runtime, times in _timed(dense, small, x, repeats):
        for way, chosen in made.items():
            row = _row(network, keep, batch, runtime, way, chosen, times)
            proof = small[way].report["verification"]["max_relative_error"]
            found.append({**row, "relative_error": proof, "weights": kind})
    return found


def trained(network: str, file: Path, batch: int, *, repeats: int = 15) -> list[dict[str, Any]]:
    """A network that was trained, in a file of `psap.save`: a row for every runtime.

    Raises:
        FileError: the file is damaged.
        VerificationError: ONNX differs from PyTorch.
    """
    dense, x, few = _dense(network, None), _batch(batch), _batch(4)
    saved = read_saved(file)
    model = saved.rebuild(lambda: create(network)).eval()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before, after = (CostModel(psap.trace(net, few)).dense for net in (dense, model))
    chosen = replace(saved.plan, before=before, after=after)  # of the whole network
    small = psap.Result(model, None, chosen, saved.mode, (few,), {})
    share = round(after.macs / before.macs, 4)
    return [
        {
            **_row(network, share, batch, runtime, file.stem, chosen, times),
            "relative_error": None,  # the file was proved when it was made
            "weights": "trained",
        }
        for runtime, times in _timed(dense, {file.stem: small}, x, repeats)
    ]


def _batch(size: int) -> Tensor:
    return torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last)


def _timed(
    dense: nn.Module, small: dict[str, psap.Result], x: Tensor, repeats: int
) -> Iterator[tuple[str, dict[str, timing.Times]]]:
    """Times of a pass in each runtime, by way; those of the dense network under "dense"."""
    models = {**{way: result.model for way, result in small.items()}, "dense": dense}
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, dict[str, Forward]] = {
            "pytorch": {way: _torch(model, x) for way, model in models.items()},
            "onnxruntime": {
                way: _onnx(result, x, Path(folder) / f"{way}.onnx")
                for way, result in {**small, "dense": dense}.items()
            },
        }
        for runtime, variants in runs.items():
            yield runtime, timing.measure(variants, torch.device("cpu"), repeats=repeats)


def _row(
    network: str,
    keep: float,
    batch: int,
    runtime: str,
    way: str,
    chosen: psap.Plan,
    times: dict[str, timing.Times],
) -> dict[str, Any]:
    own, dense = times[way], times["dense"]
    return {
        "op": "forward",
        "case": f"{network}, {way}",
        "network": network,
        "keep": keep,
        "way": way,
        "batch": batch,
        "shape": f"batch {batch}, [3, 32, 32]",
        "dtype": "float32",
        "layout": "channels_last" if runtime == "pytorch" else "contiguous",
        "device": "cpu",
        "threads": 1,
        "clock": timing.clock(torch.device("cpu"), 1),
        "backend": runtime,
        "bytes": None,
        "macs_share": chosen.after.macs / chosen.before.macs,
        "parameter_share": chosen.after.parameters / chosen.before.parameters,
        **asdict(own),
        "limit": None,
        "percent_of_limit": None,
        "baselines": {"dense": {**asdict(dense), "ratio": dense.median_ms / own.median_ms}},
        "widths": [len(group.kept) for group in chosen.groups],
    }


def run(
    networks: tuple[str, ...] = NETWORKS,
    keeps: tuple[float, ...] = (0.5, 0.3, 0.15),
    batches: tuple[int, ...] = (1, 128),
    ways: tuple[str, ...] = WAYS,
    weights: Path | None = None,
    repeats: int = 15,
    files: tuple[Path, ...] = (),
    out: Path = rows.RESULTS,
) -> None:
    """Time dense against pruned networks; a row for each into ``speed.jsonl``.

    Args:
        networks: CIFAR networks of `psap.models`.
        keeps: kept shares of the MACs.
        batches: images of a pass.
        ways: how the widths are chosen: "plain", "round-8", "round-16", "measured" (the fastest
            multiple of channels), "latency" (a bound on the predicted latency, not the MACs).
        weights: a folder with ``<network>.safetensors``; without it the weights are random.
        repeats: timed turns of each network.
        files: small networks that were trained from the one network named, as `psap.save` wrote
            them (``benchmarks accuracy --save``); then only these are timed, for all ``batches``.
        out: folder of the rows.
    """
    if unknown := set(ways) - set(ALL_WAYS):
        raise ValueError(f"ways are {sorted(unknown)}; pass some of {', '.join(ALL_WAYS)}")
    torch.set_num_threads(1)
    for file, batch in itertools.product(files, batches):
        for row in trained(networks[0], file, batch, repeats=repeats):
            rows.write("speed", row, out)
    for network in () if files else networks:
        for keep in keeps:
            for batch in batches:
                for row in compare(
                    network, keep, batch, ways=ways, weights=weights, repeats=repeats
                ):
                    rows.write("speed", row, out)
