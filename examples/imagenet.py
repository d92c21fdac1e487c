"""ResNet-50 on ImageNet: pruned while it trains, on one GPU or, through torchrun, on several.

``torchrun --nproc-per-node 8 examples/imagenet.py --data IMAGENET --weights resnet50.safetensors``
with ``train/<class>/*`` and ``val/<class>/*`` in IMAGENET; docs/imagenet.md says what to expect.
It stops at any time and goes on with ``--resume``, from the last epoch that was finished.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms

import psap
from psap.recipe import read_tree, write_tree

NORMALISE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def loaders(args: argparse.Namespace, rank: int, world: int) -> tuple[DataLoader, DataLoader]:
    """Training images, cropped at random, and validation images; every rank has its share."""
    size, tensor = args.size, transforms.ToTensor()
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    middle = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
    found = []
    for part, ways in (("train", crop), ("val", middle)):
        images = torchvision.datasets.ImageFolder(
            args.data / part, transforms.Compose([*ways, tensor, NORMALISE])
        )
        train = part == "train"
        found.append(
            DataLoader(
                images,
                batch_size=args.batch // world,
                sampler=DistributedSampler(images, world, rank, shuffle=train, seed=args.seed),
                num_workers=args.workers,
                pin_memory=torch.cuda.is_available(),
                drop_last=train,
            )
        )
    return found[0], found[1]


class Training:
    """What trains: the dense network with a pruner, and later the small one without.

    Args:
        args: the command line.
        device: where this rank trains.
        classes: how many there are.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, classes: int) -> None:
        self.args, self.device = args, device
        model = getattr(torchvision.models, args.arch)(num_classes=classes)
        if args.weights is not None:
            model.load_state_dict(load_file(args.weights))
        self.model = self.wrapped(model.to(device, memory_format=torch.channels_last))
        self.optimizer: Any = torch.optim.SGD(
            self.model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        self.example = torch.zeros(2, 3, args.size, args.size, device=device)
        config = psap.Config(
            target=psap.Target(macs=args.target_macs), prune_steps=args.prune_steps,
            interval=args.interval, progressive=args.progressive,
        )  # fmt: skip
        self.pruner = psap.Pruner(self.model, self.example, optimizer=self.optimizer, config=config)
        self.result: psap.Result | None = None
        self.epoch = 0

    def wrapped(self, model: nn.Module) -> nn.Module:
        """One process needs no wrapper."""
        return DistributedDataParallel(model) if distributed.is_initialized() else model

    def take(self, result: psap.Result) -> None:
        """From now on the small network trains, with the optimizer that has kept its momentum."""
        self.result, self.optimizer = result, result.optimizer
        self.model = self.wrapped(result.model)

    def run_epoch(self, images: DataLoader) -> None:
        """One epoch at a rate that rises for one epoch and then falls as a cosine."""
        torch.manual_seed(self.args.seed + self.epoch)  # of the crops: a resumed run has the same
        images.sampler.set_epoch(self.epoch)
        self.model.train()
        for number, (x, y) in enumerate(images):
            at = self.epoch + number / len(images)
            share = max(0.0, (at - 1) / max(1, self.args.epochs - 1))
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    self.args.lr * min(1.0, at + 0.01) * (1 + math.cos(math.pi * share)) / 2
                )
            x = x.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                loss = F.cross_entropy(self.model(x), y.to(self.device), label_smoothing=0.1)
            loss.backward()
            self.optimizer.step()
        self.epoch += 1
        if self.result is None:
            self.pruner.step()  # the one line of psap inside the loop
            if self.pruner.done:
                self.take(self.pruner.finish())

    @torch.inference_mode()
    def accuracy(self, images: DataLoader) -> float:
        """Share of the validation images that are classified correctly, over all ranks."""
        self.model.eval()
        counts = torch.zeros(2, device=self.device)
        for x, y in images:
            found = self.model(x.to(self.device, memory_format=torch.channels_last)).argmax(1)
            counts += torch.tensor([(found == y.to(self.device)).sum(), len(y)], device=self.device)
        if distributed.is_initialized():
            distributed.all_reduce(counts)
        return float(counts[0] / counts[1])

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        small, inner = self.result, getattr(self.model, "module", self.model)
        return {
            "epoch": self.epoch,
            "model": inner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": None if small else self.pruner.state_dict(),
            "plan": small and small.plan.to_json(),
            "mode": small and small.mode,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: first the shapes, then what is in them."""
        if state["plan"] is None:
            self.pruner.load_state_dict(state["pruner"])
        else:
            self.pruner.close()
            plan, inner = psap.Plan.from_json(state["plan"]), self.pruner.graph.model
            self.take(
                psap.apply(
                    inner, plan, optimizer=self.optimizer, example_inputs=self.example,
                    mode=state["mode"], check=False,
                )
            )  # fmt: skip
        getattr(self.model, "module", self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch = state["epoch"]


def train(args: argparse.Namespace, rank: int, world: int) -> None:
    """All epochs; rank 0 writes."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    device = torch.device(device)
    if cuda:
        torch.cuda.set_device(device)
    torch.manual_seed(args.seed)
    images, val = loaders(args, rank, world)
    training, checkpoint = Training(args, device, len(images.dataset.classes)), args.out / "last"
    if args.resume:
        training.load(read_tree(checkpoint))
    while training.epoch < (args.stop or args.epochs):
        training.run_epoch(images)
        right = training.accuracy(val)
        if rank == 0:
            write_tree(checkpoint, training.state())
            print(f"epoch {training.epoch}: {right:.2%}", flush=True)
    if rank == 0 and training.result is not None:
        psap.save(training.result, args.out / "small.safetensors")
        print(training.result.plan.explain())


def main() -> None:
    """Read the command line, join the other ranks, train."""
    parser = argparse.ArgumentParser(description="Prune a torchvision model on an image folder.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="a .safetensors file to start from")
    parser.add_argument("--out", type=Path, default=Path("out/imagenet"))
    parser.add_argument("--arch", default="resnet50", help="a name in torchvision.models")
    parser.add_argument("--target-macs", type=float, default=0.5, help="kept share of the MACs")
    parser.add_argument("--prune-steps", type=int, default=5)
    parser.add_argument("--interval", type=int, default=4, help="epochs between prune steps")
    parser.add_argument("--progressive", action="store_true", help="cut after every prune step")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=256, help="images per step, all ranks")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=8, help="processes that read, per rank")
    parser.add_argument("--bf16", action="store_true", help="train under autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", type=int, help="stop after this many epochs")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rank, world = (
        int(os.environ.get(name, other)) for name, other in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if "RANK" in os.environ:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        train(args, rank, world)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
