"""The training run behind ``psap prune``: one explicit state, saved and restored bit-exactly."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from psap import data, hazards, measure, record, report, run_blocks, run_machine
from psap.data import Loader
from psap.errors import FileError, PsapError, StateError
from psap.files import atomic_write
from psap.models import create
from psap.plans import Plan
from psap.progress import Listener, Silent, Stop
from psap.recipe import write_tree
from psap.run_blocks import Dropped
from psap.run_config import RunConfig
from psap.run_files import (
    CHECKPOINT,
    FORMAT,
    VERSION,
    load_weights,
    naming_channels,
    output_folder,
    read_checkpoint,
)
from psap.shrink import Result, apply


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train, prune, shrink, fine-tune; write the small network, its exports, and a report.

    A first Ctrl-C ends the run after the present optimizer step, with a checkpoint there; a second
    one ends it at once, and the checkpoint of the last epoch stays.

    Args:
        config: the settings.
        resume: go on from the checkpoint in ``config.out``, with the same bits as without the stop.
        listener: told about progress.
        command: what was typed, for the report.

    Returns:
        The record, as in ``record.json``.

    Raises:
        FileError: the folder is not writable, or holds a run that shall not be resumed, or holds
            none that could be.
        StateError: the checkpoint was made with other settings.
        ArgumentError: a setting does not fit the data or the model.
        PsapError: the training diverged.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.
    """
    listener = listener or Silent()
    with (
        output_folder(config.out) as folder,
        run_machine.threads(config.cpu_threads()),
        Stop() as stop,
    ):
        tree = read_checkpoint(folder, config) if resume else None
        if tree is not None:
            torch.set_num_threads(tree["threads"])
        elif (folder / CHECKPOINT).exists():
            raise FileError(
                f"{folder} holds a run already; resume it (--resume), or choose another folder, or "
                f"remove {folder / CHECKPOINT}"
            )
        run = Run(config, tree)
        if tree is None:
            run.save()
        atomic_write(folder / "history.jsonl", "".join(map(_line, run.history)))
        while run.epoch < config.epochs:
            run.advance(stop, listener)
        stop.release()
        return run.deliver(listener, command)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader, device: torch.device | str = "cpu") -> float:
    """Share of the images that a model classifies correctly; it is left in eval mode."""
    model.eval()
    right = sum(int((model(x.to(device)).argmax(1) == y.to(device)).sum()) for x, y in loader)
    return right / len(loader.images)


class Run:
    """The state of a run: model, optimizer, pruner, place in the data, random state.

    Args:
        config: the settings.
        tree: a checkpoint to go on from, or None to begin.
    """

    def __init__(self, config: RunConfig, tree: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.device = run_machine.device(config.device)
        self.data = data.load(
            config.data,
            data_dir=config.data_dir,
            seed=config.seed,
            batch_size=config.batch_size,
            val_share=config.val_share,
            pictures=config.pictures(),
        )
        torch.manual_seed(config.seed)
        self.model = self._factory()
        self.format = hazards.training_format(self.model)
        self.model = self.model.to(memory_format=self.format)  # type: ignore[call-overload]
        self.data = self.data.as_format(self.format)
        if config.weights is not None and tree is None:
            load_weights(self.model, config.weights)
        shape = (2, self.data.channels, self.data.size, self.data.size)
        example = torch.zeros(shape, device=self.device)
        self.example = example.clone(memory_format=self.format)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        with naming_channels(self.model, config, self.data.channels):
            self.pruner = psap.Pruner(
                self.model, self.example, optimizer=self.optimizer, config=config.pruning()
            )
        self.dropped: Dropped | None = None
        self.result: Result | None = None
        self.epoch = 0
        self.batch = 0
        self.loss = 0.0
        self.history: list[dict[str, Any]] = []
        self.dense_accuracy: float | None = None
        if tree is not None:
            self._restore(tree)
        elif config.weights is not None:
            self._measure_dense()

    def _factory(self) -> nn.Module:
        model = create(
            self.config.arch, num_classes=self.data.num_classes, in_channels=self.data.channels
        )
        return model.to(self.device)

    def advance(self, stop: Stop, listener: Listener) -> None:
        """Finish the present epoch.

        Raises:
            KeyboardInterrupt: a stop was asked for; the checkpoint is written.
            PsapError: the training diverged; the checkpoint of the epoch before is kept.
        """
        phase, total = self.config.phase(self.epoch), len(self.data.train)
        began = time.monotonic()
        if self.config.drop_blocks and phase == "prune" and self.dropped is None:
            self._drop(stop, listener)
        self.model.train()
        for x, y in self.data.train.epoch(self.epoch, start=self.batch):
            self._train_on(x.to(self.device), y.to(self.device), self.epoch + self.batch / total)
            self.batch += 1
            listener.step(self.epoch, phase, self.batch, total)
            if stop.requested:
                self.save()
                stop.check()
        entry = self._close_epoch(phase)
        entry["seconds"] = round(time.monotonic() - began, 3)
        self.history.append(entry)
        self.save()
        with (self.folder / "history.jsonl").open("a") as lines:
            lines.write(_line(entry))
        listener.epoch(entry)
        stop.check()

    def _drop(self, stop: Stop, listener: Listener) -> None:
        """Remove residual branches, unless every one matters; then a checkpoint says so."""
        note, images = listener.note, self.data.train
        have = (self.model, self.example, self.optimizer, images, self.config)
        left = run_blocks.drop(*have, note=note, check=stop.check)
        self.dropped = Dropped.of(None)
        if left is not None:
            try:
                self._shorten(left)
                note(run_blocks.told(left, images))
            except PsapError as error:
                note(f"no residual branch goes: what would be left is refused: {error}")
        self.save()
        stop.check()

    def _shorten(self, left: Result) -> None:
        """From now on the network without some residual branches is what trains."""
        assert left.optimizer is not None
        config = run_blocks.pruning(self.config, left)
        pruner = psap.Pruner(left.model, self.example, optimizer=left.optimizer, config=config)
        self.pruner.close()
        self.pruner, self.model, self.optimizer = pruner, left.model, left.optimizer
        self.dropped = Dropped.of(left)

    def _train_on(self, x: Tensor, y: Tensor, epoch: float) -> None:
        """One optimizer step, except on a single image, which batch norm refuses."""
        if len(y) == 1:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(epoch)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        value = loss.item()
        if not math.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        loss.backward()
        self.optimizer.step()
        self.loss += value * len(y)

    def _diverged(self, what: str) -> PsapError:
        return PsapError(
            f"{what} in epoch {self.epoch + 1}, step {self.batch + 1}: the training diverged; "
            f"begin again with a lower lr (it is {self.config.lr:g}). {self.folder / CHECKPOINT} "
            f"is as it was after epoch {self.epoch}"
        )

    def _close_epoch(self, phase: str) -> dict[str, Any]:
        """Evaluate; prune if it is time; shrink after the last prune epoch."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self._diverged("a weight is not finite")
        val, config = self.data.val, self.config
        entry = {
            "epoch": self.epoch + 1,
            "phase": phase,
            "train_loss": self.loss / len(self.data.train.images),
            "val_accuracy": None if val is None else evaluate(self.model, val, self.device),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        if phase == "prune":
            self.pruner.step()
        self.epoch, self.batch, self.loss = self.epoch + 1, 0, 0.0
        dense, prune, _ = config.phases()
        if self.epoch == dense:
            self._measure_dense()
        if self.epoch == dense + prune:
            small = self.pruner.finish()
            self._take(small if self.dropped is None else self.dropped.whole(small))
        entry["macs_share"] = self._macs_share()
        return entry

    def _macs_share(self) -> float:
        if self.result is not None:
            return self.result.plan.after.macs / max(1, self.result.plan.before.macs)
        left = 1.0 if self.dropped is None else self.dropped.macs_share
        return left * record.macs_share(self.pruner.events)

    def _measure_dense(self) -> None:
        self.dense_accuracy = evaluate(self.model, self.data.test, self.device)

    def _take(self, result: Result) -> None:
        """From now on the small network is what trains."""
        if result.optimizer is None:
            raise StateError("the result has no optimizer; pass the optimizer to psap.apply")
        self.result, self.model, self.optimizer = result, result.model, result.optimizer

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        small = self.result
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_json(),
            "threads": torch.get_num_threads(),
            "epoch": self.epoch,
            "batch": self.batch,
            "loss": self.loss,
            "history": self.history,
            "dense_accuracy": self.dense_accuracy,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device)
            if self.device.type == "cuda"
            else None,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict() if small is None else None,
            "dropped": None if self.dropped is None else self.dropped.state_dict(),
            "plan": None if small is None else small.plan.to_json(),
            "mode": None if small is None else small.mode,
            "report": None if small is None else small.report,
        }
        write_tree(self.folder / CHECKPOINT, tree)

    def _restore(self, tree: Mapping[str, Any]) -> None:
        """Go on where the checkpoint was written.

        Raises:
            StateError: it does not fit the model, whose code may have changed.
        """
        try:
            self._load(tree)
        except (PsapError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise StateError(
                f"{self.folder / CHECKPOINT} does not fit {self.config.arch}: {reason}; resume "
                "with the code that the run was started with"
            ) from error

    def _load(self, tree: Mapping[str, Any]) -> None:
        if (state := tree.get("dropped")) is not None:  # absent in older checkpoints
            self.dropped = Dropped.from_state(state)
            if left := self.dropped.again(self.model, self.example, self.optimizer):
                self._shorten(left)
        if tree["plan"] is not None:
            plan = Plan.from_json(tree["plan"])
            result = apply(
                self.model,
                plan,
                optimizer=self.optimizer,
                example_inputs=self.example,
                mode=tree["mode"],
                check=False,
            )
            self._take(replace(result, report=tree["report"]))
        else:  # first: it cuts a network that shrinks progressively, so that the rest fits
            self.pruner.load_state_dict(tree["pruner"])
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.epoch, self.batch, self.loss = tree["epoch"], tree["batch"], tree["loss"]
        self.history, self.dense_accuracy = tree["history"], tree["dense_accuracy"]
        torch.set_rng_state(tree["rng"])
        if tree["cuda_rng"] is not None:
            torch.cuda.set_rng_state(tree["cuda_rng"], self.device)

    def deliver(self, listener: Listener, command: str = "") -> dict[str, Any]:
        """Test, save, export and report the small network.

        Raises:
            StateError: it does not exist yet.
            FileError: a file cannot be written.
        """
        if self.result is None:
            raise StateError("the network is not shrunk yet; finish all epochs first")
        listener.note("testing, timing and exporting the small network")
        small = self.folder / "small.safetensors"
        psap.save(self.result, small)
        atomic_write(self.folder / "plan.json", self.result.plan.to_json())
        dense = self._factory().to(memory_format=self.format)  # type: ignore[call-overload]
        batch = self.example[:1].expand(min(self.config.batch_size, 128), -1, -1, -1)
        batch = batch.clone(memory_format=self.format)
        measured = record.Measured(
            began_accuracy=self.dense_accuracy,
            small_accuracy=evaluate(self.model, self.data.test, self.device),
            dense_bytes=record.state_bytes(dense),
            small_bytes=measure.file_size(small),
            latency=measure.compare_latency(dense, self.model, batch, repeats=20, warmup=3),
            batch=len(batch),
            onnx_difference=self._export(listener),
        )
        found = record.build(
            self.result,
            dense=dense,
            measured=measured,
            history=self.history,
            title=f"{self.config.arch} on {self.config.data}",
            command=command,
            seed=self.config.seed,
            config={
                **self.config.to_json(),
                "num_classes": self.data.num_classes,
                "in_channels": self.data.channels,
            },
        )
        atomic_write(self.folder / "record.json", json.dumps(found, indent=1))
        report.write(found, self.folder / "report.html")
        return found

    def _export(self, listener: Listener) -> float | None:
        """Write model.onnx; a run is not lost because an exporter fails or is not installed."""
        try:
            return psap.export_onnx(
                self.result or self.model, self.folder / "model.onnx", self.example
            )
        except PsapError as error:
            listener.note(f"model.onnx was not written: {error}")
            return None


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry) + "\n"
