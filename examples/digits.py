"""Train a small residual network on real images of digits, and make it four times cheaper.

Run ``python examples/digits.py --out out/demo``: dense training, pruning while training, the
physically small network, fine-tuning, export, measurements, report. The dense network that it is
compared with went on training for as long.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from psap import data, measure, record, report
from psap.files import atomic_write
from psap.models import digits_resnet

DENSE, PRUNE, FINETUNE = 10, 8, 50  # epochs
PRUNE_LR, FINETUNE_LR = (0.05, 0.05), (0.05, 0.0)  # learning rates: first, last
Log = list[dict[str, Any]]


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    digits: data.DataSpec,
    log: Log,
    *,
    phase: str,
    epochs: int,
    lr: tuple[float, float],
    pruner: psap.Pruner | None = None,
) -> None:
    """An ordinary training loop. With psap it has one more line, and that is `pruner.step()`."""
    for epoch in range(epochs):
        start, seen = time.monotonic(), []
        rate = lr[1] + (lr[0] - lr[1]) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        for x, y in digits.train.epoch(len(log)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        entry = {
            "epoch": len(log) + 1,
            "phase": phase,
            "train_loss": sum(seen) / len(seen),
            "val_accuracy": accuracy(model, digits.val),
            "macs_share": log[-1]["macs_share"] if log else 1.0,
            "lr": rate,
            "seconds": time.monotonic() - start,
        }
        if pruner is not None:
            pruner.step()
            entry["macs_share"] = record.macs_share(pruner.events)
        log.append(entry)
    print(
        f"{phase:<8}  {epochs} epochs  loss {entry['train_loss']:.3f}  "
        f"validation {entry['val_accuracy']:.1%}  MACs {entry['macs_share']:.1%}"
    )


@torch.inference_mode()
def accuracy(model: nn.Module, images: data.Loader) -> float:
    """Share of the images that are classified correctly."""
    model.eval()
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in images) / len(images.images)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of both networks."""
    return torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )


def train(digits: data.DataSpec, log: Log) -> tuple[nn.Module, psap.Result]:
    """The small network, and a dense one that was trained for just as long to compare with."""
    model = digits_resnet()
    optimizer = sgd(model)
    fit(model, optimizer, digits, log, phase="dense", epochs=DENSE, lr=(0.05, 0.0))
    dense = train_on(model, optimizer, digits, log)

    example, _ = next(iter(digits.test))
    config = psap.Config(target=psap.Target(macs=0.25), prune_steps=5)
    pruner = psap.Pruner(model, example, optimizer=optimizer, config=config)
    fit(model, optimizer, digits, log, phase="prune", epochs=PRUNE, lr=PRUNE_LR, pruner=pruner)
    result = pruner.finish()

    # From here on it is an ordinary small network, and its optimizer has kept its momentum.
    small, optimizer = result.model, result.optimizer
    fit(small, optimizer, digits, log, phase="finetune", epochs=FINETUNE, lr=FINETUNE_LR)
    return dense, result


def train_on(
    model: nn.Module, optimizer: torch.optim.Optimizer, digits: data.DataSpec, log: Log
) -> nn.Module:
    """A copy that is not pruned: as many epochs, the same images, the same learning rates."""
    dense, log = copy.deepcopy(model), list(log)
    again = sgd(dense)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for epochs, lr in ((PRUNE, PRUNE_LR), (FINETUNE, FINETUNE_LR)):
        fit(dense, again, digits, log, phase="unpruned", epochs=epochs, lr=lr)
    return dense


class Onnx(nn.Module):
    """An ONNX file in ONNX Runtime, in the guise of a module, so that it can be timed like one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to logits [N, classes]."""
        name = self.session.get_inputs()[0].name
        return torch.from_numpy(self.session.run(None, {name: x.numpy()})[0])


def measured(
    dense: nn.Module, result: psap.Result, digits: data.DataSpec, out: Path
) -> tuple[record.Measured, Table]:
    """Write the files of the small network; what it costs, and a table for batches of one."""
    small, images = result.model, torch.cat([x for x, _ in digits.test])[:128]
    psap.save(result, out / "small.safetensors")
    psap.export_pt2(result, out / "small.pt2")
    psap.export_onnx(dense, out / "dense.onnx", images)
    difference = psap.export_onnx(result, out / "small.onnx")  # runs it and compares
    onnx = (Onnx(out / "dense.onnx"), Onnx(out / "small.onnx"))
    figures = record.Measured(
        dense_accuracy=accuracy(dense, digits.test),
        small_accuracy=accuracy(small, digits.test),
        dense_bytes=record.state_bytes(dense),
        small_bytes=measure.file_size(out / "small.safetensors"),
        latency=measure.compare_latency(dense, small, images),
        onnx_latency=measure.compare_latency(*onnx, images),
        batch=len(images),
        onnx_difference=difference,
    )
    table = Table("", "dense", "small", "")
    for name, pair in (("PyTorch", (dense, small)), ("ONNX Runtime", onnx)):
        times = measure.compare_latency(*pair, images[:1])
        cells = (f"{side.median_ms:.3f} ms" for side in (times.a, times.b))
        table.add_row(f"latency, {name}, batch 1", *cells, record.speed(times.ratio))
    return figures, table


def check(holds: bool, what: str) -> None:
    """Stop the demo with an error if a promise is broken."""
    if not holds:
        raise RuntimeError(f"the demo promised: {what}")


def check_promises(found: dict[str, Any]) -> None:
    """What the demo promises, against the record of this run."""
    dense, small = found["compare"]["dense"], found["compare"]["small"]
    proof, onnx = found["verification"]["max_relative_error"], found["onnx"]["max_abs_difference"]
    check(small["macs"] <= 0.25 * dense["macs"], "at most 25 % of the MACs")
    check(proof <= 1e-9, f"small equals masked dense to 1e-9; the error is {proof:.1e}")
    check(onnx <= 1e-4, f"ONNX Runtime equals PyTorch to 1e-4; the difference is {onnx:.1e}")
    check(small["accuracy"] >= 0.95, "at least 95 % accuracy")
    check(
        small["accuracy"] >= dense["accuracy"] - 0.01,
        "within one point of a dense network that trained for as long",
    )


def main() -> None:
    """Train, measure, write, check."""
    parser = argparse.ArgumentParser(description="Prune a small network on the digits.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # images of 8x8 pixels are too small to share among cores
    torch.manual_seed(args.seed)

    # Contiguous: in channels_last, PyTorch cannot train strided 1x1 convolutions this narrow.
    digits = data.load("digits", seed=args.seed, batch_size=64)
    digits, log, start = digits.as_format(torch.contiguous_format), Log(), time.monotonic()
    dense, result = train(digits, log)
    print(f"trained in {time.monotonic() - start:.0f} s\n\n{result.plan.explain()}\n")

    figures, single = measured(dense, result, digits, args.out)
    found = record.build(
        result,
        dense=dense,
        measured=figures,
        history=log,
        title="digits_resnet on the UCI digits",
        command=record.command_line(),
        seed=args.seed,
    )
    atomic_write(args.out / "record.json", json.dumps(found, indent=1))
    report.write(found, args.out / "report.html")
    Console().print(record.summary(found), single)
    check_promises(found)
    print(f"shrunk equals masked: {found['verification']['max_relative_error']:.1e} in float64")
    print(f"ONNX Runtime equals PyTorch: {figures.onnx_difference:.1e}")
    print(f"the report: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
