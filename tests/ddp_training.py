"""One rank of a training with DistributedDataParallel; test_distributed.py starts it by torchrun.

Arguments: a folder, the iteration to stop at (0: the end), and whether to resume from the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from pruner_nets import NETS, inputs, labels
from torch import distributed, nn
from torch.nn import functional as F

import psap

EPOCH, END = 4, 18


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One iteration; every rank has another batch, and another loss to begin with."""
    seed = 10 * seed + distributed.get_rank()
    optimizer.zero_grad()
    F.cross_entropy(model(inputs(seed=seed)), labels(seed=seed)).backward()
    optimizer.step()


def main(folder: Path, stop: int, resume: bool) -> None:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(NETS["residual"]())
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    options: dict[str, Any] = {"protect": "pulse", "z_threshold": 0.3, "restore_share": 0.5}
    config = psap.Config(target=psap.Target(macs=0.4), prune_steps=3, window=3, **options)
    pruner = psap.Pruner(model, inputs(), optimizer=optimizer, config=config)
    begin = 0
    if resume:
        state = torch.load(folder / "state.pt", weights_only=True)
        begin = state["iteration"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        pruner.load_state_dict(state["pruner"])
    for i in range(begin, stop or END):
        train(model, optimizer, i)
        if (i + 1) % EPOCH == 0:
            pruner.step()
    rank = distributed.get_rank()
    if stop:
        if rank == 0:
            parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "iteration": stop}, folder / "state.pt")
        distributed.barrier()
        return
    try:
        pruner.finish(inplace=True)
    except psap.ArgumentError as error:
        refusal = str(error)
    result = pruner.finish()
    small = nn.parallel.DistributedDataParallel(result.model)
    for i in range(3):
        train(small, result.optimizer, 100 + i)
    found = {
        "masks": pruner.masks(),
        "kept": [list(group.kept) for group in result.plan.groups],
        "weights": {k: v.detach() for k, v in result.model.named_parameters()},
        "events": [event.to_json() for event in pruner.events],
        "refusal": refusal,
    }
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume")
    finally:
        distributed.destroy_process_group()
