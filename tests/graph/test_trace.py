"""Tracing leaves the model as it was, whatever happens, and refuses by name what it cannot do."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nets import Net, assert_exact, assert_same, chain, conv, head, image, randomise, snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import CASES

import psap
from psap.untouched import untouched


class Failing(nn.Module):
    """Draws random numbers, changes a buffer, then raises; only in one of the modes if asked."""

    def __init__(self, error: BaseException, training: bool | None = None) -> None:
        super().__init__()
        self.stem, self.bn, self.spare = conv(3, 8), nn.BatchNorm2d(8), conv(8, 8)
        self.register_buffer("seen", torch.zeros(3))
        self.error, self.when = error, training

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)) + torch.rand(())
        self.seen.add_(1)
        self.eval()
        if self.when in (None, self.training):
            raise self.error
        return x


@pytest.mark.parametrize("name", ["residual", "auxiliary head", "weight norm", "in place"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_was(name: str, training: bool) -> None:
    model = randomise(CASES[name].make()).train(training)
    next(model.children()).eval()
    next(iter(model.parameters())).grad = torch.ones_like(next(iter(model.parameters())))
    model.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    psap.trace(model, CASES[name].inputs)
    assert_same(before, snapshot(model))


def test_statistics_of_train_mode_are_put_back() -> None:
    model = randomise(CASES["auxiliary head"].make())
    means = model.bn.running_mean.clone()  # type: ignore[union-attr,operator]
    graph = psap.trace(model, image())
    assert "aux" in {group.name for group in graph.groups}  # so train mode did run
    assert torch.equal(model.bn.running_mean, means)  # type: ignore[union-attr,arg-type]


def test_unchanged_buffers_are_not_written() -> None:
    model = randomise(chain(8))
    versions = [buffer._version for buffer in model.buffers()]
    psap.trace(model, image())
    assert [buffer._version for buffer in model.buffers()] == versions


@pytest.mark.parametrize("when", [None, False])
@pytest.mark.parametrize(
    "error", [ValueError("broken"), KeyboardInterrupt("broken"), SystemExit("broken")]
)
def test_a_failure_leaves_no_trace(error: BaseException, when: bool | None) -> None:
    model = Failing(error, when).double().train()
    before = snapshot(model)
    expected = psap.TraceError if isinstance(error, Exception) else type(error)
    with pytest.raises(expected, match="broken"):
        psap.trace(model, image())
    assert_same(before, snapshot(model))


def test_the_error_of_the_model_is_named() -> None:
    with pytest.raises(psap.TraceError, match=r"evaluation mode: ValueError: broken"):
        psap.trace(Failing(ValueError("broken")).double(), image())


def test_wrong_shape_and_wrong_dtype() -> None:
    with pytest.raises(psap.TraceError, match=r"expected input.* to have 3 channels"):
        psap.trace(chain(8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(psap.TraceError, match="expected scalar type Double but found Float"):
        psap.trace(chain(8), torch.zeros(1, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "inputs", "kind", "match"),
    [
        (None, torch.zeros(1), TypeError, "model is a NoneType; pass a torch.nn.Module"),
        (chain, torch.zeros(1), TypeError, "model is a function"),
        (nn.ReLU(), torch.zeros(1), ValueError, "no parameters"),
        (nn.LazyConv2d(3, 3), torch.zeros(1, 3, 8, 8), ValueError, "not initialised"),
        (chain(4), None, TypeError, "example_inputs is a NoneType"),
        (chain(4), {1: torch.zeros(1)}, TypeError, "example_inputs is a dict with keys"),
        (chain(4), (), ValueError, "holds no tensor"),
        (chain(4), (3,), ValueError, "holds no tensor"),
        (chain(4), torch.zeros(0, 3, 8, 8), ValueError, "empty tensor"),
    ],
)
def test_bad_arguments(model: Any, inputs: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(psap.PsapError, match=match) as caught:
        psap.trace(model, inputs)
    assert isinstance(caught.value, kind)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("made", ["script", "trace"])
def test_scripted_modules_are_refused_by_name(made: str) -> None:
    inner, x = nn.Sequential(conv(8, 8), nn.ReLU()).eval(), torch.zeros(1, 8, 8, 8)
    scripted = torch.jit.script(inner) if made == "script" else torch.jit.trace(inner, x)
    told = "^model is a ScriptModule .*; pass the eager nn.Module that it was made from"
    with pytest.raises(psap.ArgumentTypeError, match=told):
        psap.trace(scripted, x)
    net, y = nn.Sequential(conv(3, 8), nn.Sequential(nn.ReLU(), inner), conv(8, 4)), image().float()
    plan = psap.plan(psap.trace(net, y), ratio=0.5)
    net[1][1] = scripted
    told = r"^1\.1 is a ScriptModule .*; put the eager nn.Module in its place"
    with pytest.raises(psap.ArgumentTypeError, match=told):
        psap.trace(net, y)
    with pytest.raises(psap.ArgumentTypeError, match=told):
        psap.apply(net, plan)


def _scaled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A wrapper that gives forward() an argument which callers do not know."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x, 2)

    return wrapper


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 8), head(8)

    @_scaled
    def forward(self, x: Tensor, scale: int) -> Tensor:
        x = F.relu(self.stem(x) * scale)
        return self.head(x.view(len(x), x.shape[1], -1).view_as(x))


def test_a_wrapper_that_adds_arguments_to_forward() -> None:
    model = randomise(Wrapped())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


def test_two_devices_are_refused() -> None:
    model = chain(4)
    model[0].to("meta")
    with pytest.raises(psap.ArgumentError, match=r"several devices \(cpu, meta\)"):
        psap.trace(model, torch.zeros(1, 3, 8, 8))


class Answer:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.note = logits, "a"


@dataclass
class Pair:
    first: Tensor
    rest: dict[str, Any]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: Answer(x),
        lambda x: {"a": [Answer(x)]},
        lambda x: Pair(torch.zeros(2), {"x": (x, None)}),
        lambda x: [[[x]]],
    ],
)
def test_tensors_are_found_in_whatever_is_returned(wrap: Any) -> None:
    net = Net(lambda m, x: wrap(m.b(F.relu(m.a(x)))), a=conv(3, 6), b=conv(6, 4))
    graph = psap.trace(net.double(), image())
    assert {group.name for group in graph.groups} == {"a"}
    assert graph.left_alone == {"b": "output of the model"}


@pytest.mark.parametrize("answer", [None, 3.0, "text", {}, object()])
def test_a_model_that_returns_no_tensor_is_refused(answer: Any) -> None:
    def body(m: Any, x: Tensor) -> Any:
        m.a(x)
        return answer

    with pytest.raises(psap.TraceError, match="without any tensor in it"):
        psap.trace(Net(body, a=conv(3, 6)).double(), image())


def test_a_compiled_model_is_looked_through() -> None:
    model = randomise(chain(8, 6))
    compiled = torch.compile(model, backend="eager")
    graph = psap.trace(compiled, image())
    assert graph.model is model
    plan = psap.plan(graph, ratio=0.5)
    assert psap.apply(compiled, plan).model.state_dict().keys() == model.state_dict().keys()


def test_a_compiled_part_is_traced_eagerly() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled while tracing")

    inner = torch.compile(nn.Sequential(conv(3, 8), nn.ReLU()), backend=refuse)
    model = randomise(nn.Sequential(inner, conv(8, 6), head(6)))
    graph = psap.trace(model, image())
    assert [group.size for group in graph.groups] == [8, 6]


def test_data_parallel_wrapper() -> None:
    model = randomise(nn.Sequential(chain(8, 6)))
    assert {g.name for g in psap.trace(model, image()).groups} == {"0.0", "0.3"}


def test_a_batch_of_one_with_an_auxiliary_head() -> None:
    model = randomise(CASES["auxiliary head"].make())
    model.aux = nn.Sequential(  # batch norm over one value per channel needs two samples
        nn.AdaptiveAvgPool2d(1), conv(8, 4, 1), nn.BatchNorm2d(4)
    ).double()
    passes: list[bool] = []
    model.stem.register_forward_hook(lambda m, x, y: passes.append(m.training))
    graph = psap.trace(model, image(1, 3, 8, 8))
    assert {group.name: group.size for group in graph.groups} == {"stem": 8, "last": 6, "aux.1": 4}
    assert passes == [False, True]  # running statistics need no second sample
    assert torch.equal(model.aux[2].running_mean, torch.zeros(4).double())


def test_dropout_before_an_auxiliary_head_freezes_nothing() -> None:
    model = randomise(CASES["auxiliary head"].make())
    model.drop = nn.Dropout(0.5)
    graph = psap.trace(model, image())
    assert {group.name: group.size for group in graph.groups} == {"stem": 8, "last": 6, "aux": 4}


class _DeepSupervision(nn.Module):
    """Makes a side output in both modes, but gives it out in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.last = conv(3, 8), conv(8, 5), conv(8, 5)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        self.kept = [self.side(x)]
        return torch.stack([self.last(x), *self.kept], 1) if self.training else self.last(x)


def test_what_train_mode_alone_gives_out_stays() -> None:
    model = randomise(_DeepSupervision())
    model(image()).sum().backward()  # the copy of what it keeps has no history
    graph = psap.trace(model, image())
    assert {group.name: group.size for group in graph.groups} == {"stem": 8}
    assert graph.left_alone["side"] == "output of the model"
    plan = psap.plan(graph, ratio=0.5)
    small = psap.apply(model, plan).model
    assert small.kept[0] is not model.kept[0] and not small.kept[0].requires_grad
    for net in (model, small):
        net.train()
    assert_exact(model, plan, small, (image(),))


def test_an_unread_layer_of_a_model_that_wants_targets_to_train() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        m.unread(x)
        if m.training:
            raise ValueError("pass targets")
        return m.head(F.relu(m.stem(x)))

    model = randomise(Net(body, stem=conv(3, 8), unread=conv(3, 4), head=head(8)))
    assert {g.name for g in psap.trace(model, image()).groups} == {"stem", "unread"}


def test_a_head_of_train_mode_costs_no_macs() -> None:
    model = randomise(CASES["auxiliary head"].make())
    plan = psap.plan(psap.trace(model, image()), ratio=0.5)
    assert plan.before.macs == 64 * 9 * (3 * 8 + 8 * 6) + 6 * 5
    assert plan.before.parameters == sum(p.numel() for p in model.parameters())


def test_unused_layers_are_reported() -> None:
    model = randomise(Net(lambda m, x: m.used(x), used=chain(8), unused=conv(3, 5)))
    graph = psap.trace(model, image())
    assert graph.left_alone["unused"] == "not used in forward"


def test_a_table_is_named_and_not_its_module() -> None:
    """As relative position biases of attention: the layers beside the table are not left alone."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.attn.out(m.attn.one(x)) + m.attn.table[m.index[:, 0]].view(1, 5, 8, 8)
        return x.mean((2, 3))

    attn = nn.Module()
    attn.one, attn.out, attn.table = conv(3, 6), conv(6, 5), nn.Parameter(torch.zeros(9, 5))
    model = randomise(Net(body, attn=attn, index=torch.arange(64)[:, None] % 9))
    model.attn.spare = nn.Parameter(torch.zeros(2, 2))
    graph = psap.trace(model, image())
    why = "keeps its shape: forward() looks entries up in it by number (aten.index), so all stay"
    assert {group.name for group in graph.groups} == {"attn.one"}
    assert graph.left_alone["attn.table"] == f"attn.table {why}"
    assert graph.left_alone["attn.spare"] == "not used in forward"
    assert "attn" not in graph.left_alone
    assert "index" not in graph.left_alone  # a buffer is no layer


def test_unknown_ops_are_counted() -> None:
    graph = psap.trace(randomise(CASES["unknown op"].make()), image())
    assert graph.unknown_ops == {"aten.cumsum": 1}
    assert repr(graph) == "Graph(Net: 2 groups, 14 channels, 2 left alone)"


def test_repeated_traces_are_the_same() -> None:
    model = randomise(CASES["dense block"].make())
    one, two = psap.trace(model, image()), psap.trace(model, image(seed=5))
    assert one.groups == two.groups and one.left_alone == two.left_alone


def test_grad_mode_and_random_state_are_put_back() -> None:
    model = chain(4).train()
    with pytest.raises(ZeroDivisionError, match="stop"), untouched(model):
        torch.rand(3)
        model.eval()
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError("stop")
    assert model.training and torch.is_grad_enabled()


def test_tracing_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch, psap\n"
        "from torch import nn\n"
        "net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))\n"
        "graph = psap.trace(net, torch.zeros(1, 3, 8, 8))\n"
        "result = psap.apply(net, psap.plan(graph, ratio=0.5))\n"
        "assert result.model[0].out_channels == 2\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor', 'onnx') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", ""), done.stderr


def test_wrappers_are_looked_through() -> None:
    x = torch.randn(2, 3, 8, 8)
    wrapped = torch.nn.DataParallel(chain(4))
    assert psap.trace(wrapped, x).model is wrapped.module
    ddp = torch.nn.parallel.DistributedDataParallel.__new__(
        torch.nn.parallel.DistributedDataParallel
    )
    torch.nn.Module.__init__(ddp)
    ddp.module = chain(4)
    assert psap.trace(ddp, x).model is ddp.module


def test_the_meta_device_is_refused() -> None:
    with pytest.raises(psap.ArgumentError, match="meta device"):
        psap.trace(chain(4).to("meta"), torch.randn(2, 3, 8, 8, device="meta"))


def test_inference_mode_around_a_trace_changes_nothing() -> None:
    model, x = chain(4), torch.randn(2, 3, 8, 8)
    wanted = [group.name for group in psap.trace(model, x).groups]
    with torch.inference_mode():
        assert [group.name for group in psap.trace(model, x).groups] == wanted


def test_what_forward_expands_to_a_size_keeps_its_channels() -> None:
    """Nobody rewrites that size: pruning the channels would refuse the whole model."""

    def body(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(m.b(x / (1 + x.norm(dim=1, keepdim=True)).expand(4, 8, 8, 8)))

    model = randomise(Net(body, a=conv(3, 8), b=conv(8, 8), head=head(8)))
    graph = psap.trace(model, image())
    assert "fixed number of channels" in graph.left_alone["a"]
    plan = psap.plan(graph, ratio=0.5)
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


def test_a_sparse_buffer_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    model[1].register_buffer("mixing", torch.eye(8).to_sparse())
    with pytest.raises(psap.ArgumentError, match=r"1\.mixing is no dense tensor.*to_dense"):
        psap.trace(model, torch.randn(1, 3, 8, 8))
