"""From the first step to the file on every device; the CPU cases show that the tests work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pruner_nets import OPTIMIZERS, Residual
from torch import Tensor, nn
from torch.nn import functional as F

import psap
from psap import optim
from psap.models import create

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0 if request.param == "cuda" else None)


def batch(device: torch.device, seed: int = 0, count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return images.to(device), torch.randint(5, (count,), generator=generator).to(device)


def digits() -> nn.Module:
    return create("digits_resnet", num_classes=10, in_channels=1)


def residual(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return Residual().to(device).train()


def pruned(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device,
    *,
    net: Any = None,
    friends: tuple[Any, ...] = (),
    **options: Any,
) -> tuple[psap.Pruner, list[float]]:
    """Four epochs of two batches; the pruner, and the losses."""
    config = psap.Config(
        **{"target": psap.Target(macs=0.4), "prune_steps": 3, "window": 2, **options}
    )
    pruner = psap.Pruner(model, batch(device)[0], optimizer=opt, config=config, friends=friends)
    losses = []
    for epoch in range(4):
        for i in range(2):
            x, y = batch(device, 2 * epoch + i)
            opt.zero_grad()
            loss = F.cross_entropy((model if net is None else net)(x), y)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        pruner.step()
    return pruner, losses


def agrees(small: nn.Module, masked: nn.Module, x: Tensor) -> None:
    """In float32 on a GPU convolutions may use TF32."""
    small.eval(), masked.eval()
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(x), rtol=5e-3, atol=5e-3)
    small.train(), masked.train()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("protect", ["gate", "price", "pulse", "none"])
def test_train_prune_finish_train(device: torch.device, name: str, protect: str) -> None:
    model = residual(device)
    opt = OPTIMIZERS[name](model.parameters())
    pruner, losses = pruned(model, opt, device, protect=protect)
    assert np.isfinite(losses).all()
    result = pruner.finish()
    assert result.plan.after.macs <= 0.4 * result.plan.before.macs
    for tensor in (*result.model.parameters(), *result.model.buffers()):
        assert tensor.device == device
    for state in result.optimizer.state.values():
        moments = [v for v in state.values() if isinstance(v, Tensor) and v.dim()]
        assert moments and all(v.device == device for v in moments)
    x, y = batch(device, 99)
    agrees(result.model, model, x)
    before = [p.detach().clone() for p in result.model.parameters()]
    F.cross_entropy(result.model(x), y).backward()
    result.optimizer.step()
    assert all(
        not torch.equal(a, b) for a, b in zip(before, result.model.parameters(), strict=True)
    )


def test_the_same_masks_twice(device: torch.device) -> None:
    found = []
    for _ in range(2):
        model = residual(device)
        opt = OPTIMIZERS["sgd"](model.parameters())
        # Nothing trains: convolutions on a GPU need not give the same bits twice.
        for group in opt.param_groups:
            group["lr"] = 0.0
        found.append(pruned(model, opt, device)[0].masks())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.gpu
def test_the_masks_of_the_cpu() -> None:
    """Statistics of the same weights give the same masks, whatever computes them."""
    found = []
    for device in map(torch.device, ("cpu", "cuda")):
        model = residual(device)
        opt = torch.optim.SGD(model.parameters(), lr=0.0)
        found.append(pruned(model, opt, device)[0].masks())
    assert all(torch.equal(found[0][n].cpu(), found[1][n].cpu()) for n in found[0])


def test_automatic_mixed_precision(device: torch.device) -> None:
    model = residual(device)
    opt = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    config = psap.Config(target=psap.Target(macs=0.4), prune_steps=3, protect="pulse", window=2)
    pruner = psap.Pruner(model, batch(device)[0], optimizer=opt, config=config)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    for epoch in range(4):
        for i in range(2):
            x, y = batch(device, 2 * epoch + i)
            opt.zero_grad()
            with torch.autocast(device.type, dtype=dtype):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
        pruner.step()
    assert sum(getattr(event, "observed", 0) for event in pruner.events) == 6
    result = pruner.finish(friends=[scaler])
    agrees(result.model, model, batch(device)[0])
    with torch.autocast(device.type, dtype=dtype):
        loss = F.cross_entropy(result.model(batch(device)[0]), batch(device)[1])
    scaler.scale(loss).backward()
    scaler.step(result.optimizer)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_that_step_all_at_once(device: torch.device, fused: bool, foreach: bool) -> None:
    if fused and foreach:
        pytest.skip("PyTorch has one or the other")
    model = residual(device)
    opt = torch.optim.AdamW(model.parameters(), 3e-3, fused=fused, foreach=foreach)
    pruner, _ = pruned(model, opt, device)
    result = pruner.finish()
    agrees(result.model, model, batch(device)[0])
    optim.check_state(result.optimizer, result.model)
    F.cross_entropy(result.model(batch(device)[0]), batch(device)[1]).backward()
    result.optimizer.step()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of inductor
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of inductor
@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model(device: torch.device) -> None:
    model = residual(device)
    net = torch.compile(model, backend="eager" if device.type == "cpu" else "inductor")
    opt = OPTIMIZERS["sgd"](model.parameters())
    pruner, losses = pruned(model, opt, device, net=net)
    assert np.isfinite(losses).all()
    agrees(pruner.finish().model, model, batch(device)[0])


@pytest.mark.filterwarnings("ignore:PyTorch may crash:psap.PsapWarning")
def test_channels_last_progressive_with_an_average(device: torch.device) -> None:
    model = residual(device).to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(model)
    opt = OPTIMIZERS["sgd"](model.parameters())
    sizes = [p.numel() for p in model.parameters()]
    pruner, _ = pruned(model, opt, device, friends=(average,), progressive=True)
    assert sum(p.numel() for p in model.parameters()) < sum(sizes)
    weight = model.conv2.weight
    assert weight.device == device
    assert weight.is_contiguous(memory_format=torch.channels_last)
    average.update_parameters(model)
    result = pruner.finish(inplace=True)
    assert average(batch(device)[0]).shape == result.model(batch(device)[0]).shape


@pytest.mark.filterwarnings(r"ignore:step\(\) was called:psap.PsapWarning")
def test_resuming(device: torch.device, tmp_path: Path) -> None:
    model = residual(device)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner, _ = pruned(model, opt, device, protect="pulse", prune_steps=5)
    file = tmp_path / "run.pt"
    torch.save([model.state_dict(), opt.state_dict(), pruner.state_dict()], file)
    states = torch.load(file, map_location=device, weights_only=True)
    other = residual(device)
    again = torch.optim.SGD(other.parameters(), lr=0.0)
    resumed = psap.Pruner(other, batch(device)[0], optimizer=again, config=pruner.config)
    resumed.load_state_dict(states[2])
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    masks = pruner.masks()
    assert all(torch.equal(resumed.masks()[n], masks[n]) for n in masks)
    for one in (pruner, resumed):
        one.step()
    assert all(torch.equal(resumed.masks()[n], pruner.masks()[n]) for n in masks)


def test_from_the_device_to_a_file_and_back(device: torch.device, tmp_path: Path) -> None:
    model = digits().to(device)
    x = torch.randn(4, 1, 16, 16, device=device)
    graph = psap.trace(model, x)
    result = psap.apply(model, psap.plan(graph, target=psap.Target(macs=0.4)))
    psap.save(result, tmp_path / "small.safetensors")
    loaded = psap.load(tmp_path / "small.safetensors", digits).to(device)
    agrees(loaded, result.model, x)
    assert next(loaded.parameters()).device == device


@pytest.mark.gpu
def test_models_and_inputs_apart() -> None:
    model = residual(torch.device("cuda"))
    with pytest.raises(psap.PsapError, match="cuda"):
        psap.trace(model, batch(torch.device("cpu"))[0])
    assert all(p.is_cuda for p in model.parameters())


@pytest.mark.gpu
def test_one_rank_on_nccl(tmp_path: Path) -> None:
    dist = torch.distributed
    if not dist.is_nccl_available():
        pytest.skip("PyTorch was built without NCCL")
    device = torch.device("cuda", 0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        model = residual(device)
        net = nn.parallel.DistributedDataParallel(model, device_ids=[0])
        opt = OPTIMIZERS["sgd"](net.parameters())
        pruner, losses = pruned(net, opt, device, net=net, protect="pulse")
        assert np.isfinite(losses).all()
        agrees(pruner.finish().model, model, batch(device)[0])
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
def test_vision_networks_on_a_gpu() -> None:
    """Exact, in float64, on the device; where torchvision is there."""
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    for name in ("resnet50", "mobilenet_v3_small", "shufflenet_v2_x1_0", "vit_b_16", "swin_t"):
        torch.manual_seed(0)
        model = getattr(models, name)(weights=None).cuda()
        x = torch.randn(2, 3, 224, 224, device="cuda")
        kept = copy.deepcopy(model.state_dict())
        result = psap.apply(model, psap.plan(psap.trace(model, x), ratio=0.5))
        assert result.report["verification"]["max_relative_error"] <= 1e-9, name
        assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items()), name
        small = result.model.train()
        small(x).sum().backward()
        assert all(p.grad is not None for p in small.parameters()), name
