from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from psap import data, measure, models
from psap.errors import ArgumentError, ArgumentTypeError

PARAMETERS = {
    "digits_resnet": 77_754,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "vgg16_bn": 14_724_042,
    "mobilenet_v2": 2_236_682,
}


def inputs(name: str, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8) if name == "digits_resnet" else torch.randn(count, 3, 32, 32)


def test_the_table_is_complete():
    assert set(models.FACTORIES) == set(PARAMETERS)
    assert all(getattr(models, name) is factory for name, factory in models.FACTORIES.items())


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_and_parameters(name):
    x = inputs(name)
    model = models.create(name, num_classes=10, in_channels=x.shape[1])
    assert measure.parameters(model) == PARAMETERS[name]
    assert model(x).shape == (2, 10)
    assert (
        models.create(name, num_classes=7, in_channels=2)(x[:, :1].repeat(1, 2, 1, 1)).shape[1] == 7
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_seed_decides_the_weights(name):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in models.FACTORIES[name]().parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("name", PARAMETERS)
def test_channels_last_gives_the_same(name):
    model = models.FACTORIES[name]().eval().double()
    x = inputs(name).double()
    wanted = model(x)
    model.to(memory_format=torch.channels_last)
    got = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_gets_a_gradient(name):
    model = models.FACTORIES[name]()
    nn.functional.cross_entropy(model(inputs(name, 4)), torch.tensor([0, 1, 2, 3])).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_option_a_shortcut():
    block = models.resnet20().layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet56"])
def test_pretrained_files_load_strictly(data_dir, name):
    model = models.create(name)
    model.load_state_dict(load_file(data_dir / "cifar-resnets" / f"{name}.safetensors"))


@pytest.mark.slow
def test_the_pretrained_network_classifies(data_dir):
    state = load_file(data_dir / "cifar-resnets" / "resnet20.safetensors")
    model = models.create("resnet20").eval()
    model.load_state_dict(state)
    test = data.load("cifar10", data_dir=data_dir / "cifar10-jpeg", batch_size=500).test
    with torch.inference_mode():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    assert correct / 10_000 == pytest.approx(0.8103, abs=5e-4)


def test_digits_are_learned():
    spec, epochs = data.load("digits", batch_size=32), 4
    model = models.create("digits_resnet", in_channels=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    steps = epochs * len(spec.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for epoch in range(epochs):
        for x, y in spec.train.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in spec.test)
    accuracy = correct / len(spec.test.images)
    assert accuracy > 0.95


# create()


@pytest.fixture
def factories(monkeypatch) -> types.ModuleType:
    module = types.ModuleType("psap_test_factories")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.width = 4
    module.nothing = lambda: None
    module.plain = lambda: nn.Linear(2, 3)
    module.required = lambda size: nn.Linear(size, 3)
    module.classes = lambda num_classes, hidden=2: nn.Linear(hidden, num_classes)
    module.both = lambda in_channels, num_classes: nn.Conv2d(in_channels, num_classes, 1)
    module.free = lambda **options: nn.Linear(2, *options.values())
    module.Space = types.SimpleNamespace(plain=module.plain)
    return module


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("plain", (3, 2)),
        ("classes", (5, 2)),
        ("both", (5, 7, 1, 1)),
        ("free", (5, 2)),
        ("Space.plain", (3, 2)),
    ],
)
def test_a_factory_gets_the_options_that_it_takes(factories, name, shape):
    model = models.create(f"{factories.__name__}:{name}", num_classes=5, in_channels=7)
    assert model.weight.shape == shape


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("resnet19", ArgumentError, "model is 'resnet19'; pass one of digits_resnet, resnet20"),
        ("module:", ArgumentError, "or package.module:factory"),
        ("psap_no_such:f", ArgumentError, "psap_no_such cannot be imported: No module named"),
        ("psap_test_factories:f", ArgumentError, "psap_test_factories has no f"),
        ("psap_test_factories:width", ArgumentTypeError, "is a int; pass a callable"),
        ("psap_test_factories:nothing", ArgumentTypeError, "returned a NoneType; it must return"),
        (
            "psap_test_factories:required",
            ArgumentTypeError,
            r"cannot be called with \{\}: .*'size'",
        ),
    ],
)
def test_factories_that_cannot_be_used(factories, name, error, message):
    with pytest.raises(error, match=message):
        models.create(name)


def test_bad_options():
    with pytest.raises(ArgumentError, match="num_classes is 0, in_channels is 3"):
        models.create("resnet20", num_classes=0)
