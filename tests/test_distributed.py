"""DistributedDataParallel: the same masks on every rank, resumption, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruner_nets import Chain, inputs
from torch import distributed, nn

import psap
from psap.ranks import Ranks

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


def torchrun(*arguments: object) -> None:
    """The script on two processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(HERE / "ddp_training.py"), *map(str, arguments)]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + script, capture_output=True, text=True, timeout=110, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PsapWarning" not in done.stderr, done.stderr[-3000:]


def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["kept"] == two["kept"] and one["events"] == two["events"]
    for key in ("masks", "weights"):
        assert one[key].keys() == two[key].keys()
        assert all(torch.equal(one[key][name], two[key][name]) for name in one[key])


@pytest.mark.slow
def test_two_ranks_prune_alike_and_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir(), resumed.mkdir()
    torchrun(whole, 0, "new")
    first, second = ranks(whole)
    same(first, second)
    assert [event["step"] for event in first["events"]] == [1, 1, 2, 2, 3, 3]
    assert any(not kept.all() for kept in first["masks"].values())
    assert any(event["observed"] for event in first["events"] if "observed" in event)
    assert "DistributedDataParallel, whose buckets have the dense shapes" in first["refusal"]
    torchrun(resumed, 9, "new")  # in the second window
    torchrun(resumed, 0, "resume")
    for rank in ranks(resumed):
        same(rank, first)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[nn.parallel.DistributedDataParallel]:
    """A process group of one."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel(Chain())
    distributed.destroy_process_group()
    # The group goes with the last reference to the model, and then waits for its threads with the
    # GIL held, which a thread that lets go of its last work needs: leave them the time for it.
    time.sleep(0.1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile(ddp)
@pytest.mark.parametrize("dtype", [np.bool_, np.float64, np.int64])
def test_what_is_agreed_keeps_dtype_and_shape(alone: nn.Module, dtype: type) -> None:
    mine = np.arange(6).reshape(2, 3).astype(dtype)
    for model in (alone, torch.compile(alone), alone.module):
        found = Ranks(model).agree(mine, "numbers")
        assert found.dtype == mine.dtype and np.array_equal(found, mine)
    assert Ranks(alone).distributed and not Ranks(alone.module).distributed


def test_a_rank_that_drifted_takes_the_decision_of_rank_0(
    alone: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(tensor: torch.Tensor, source: int, group: Any) -> None:
        tensor.copy_(torch.tensor([1, 0, 1], dtype=torch.uint8))

    monkeypatch.setattr(distributed, "broadcast", other)
    with pytest.warns(psap.PsapWarning, match="rank 0 found other masks than rank 0"):
        found = Ranks(alone).agree(np.array([True, True, False]), "masks")
    assert found.tolist() == [True, False, True]


def test_shapes_do_not_change_inside_of_it(alone: nn.Module) -> None:
    opt = torch.optim.SGD(alone.parameters(), 0.1)
    with pytest.raises(psap.ArgumentError, match=r"Config\(progressive=True\) cannot change"):
        psap.Pruner(alone, inputs(), optimizer=opt, config=psap.Config(progressive=True))
    plan = psap.plan(psap.trace(alone, inputs()), ratio=0.5)
    with pytest.raises(psap.ArgumentError, match="inplace=True cannot change a model inside"):
        psap.apply(alone, plan, inplace=True)
    small = psap.apply(alone, plan).model
    assert isinstance(small, Chain) and small.conv1.out_channels == 4


def test_sharded_models_are_refused_by_name(alone: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    model = Chain()
    fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(psap.ArgumentTypeError, match=r"conv1\.weight is spread over several proc"):
        psap.trace(model, inputs())
