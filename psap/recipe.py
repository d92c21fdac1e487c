"""Networks and trees in files: safetensors plus JSON, read with suspicion, never pickled.

A saved network is one ``.safetensors`` file: the small tensors, and in its metadata the recipe that
turns the dense architecture into the small one. A *tree* is any nest of dicts, lists, scalars and
tensors in the same kind of file; checkpoints are trees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from psap.branches import without
from psap.calling import called
from psap.errors import ArgumentError, ArgumentTypeError, FileError, PsapError
from psap.files import Path_, read, write
from psap.graph.inputs import check_model
from psap.inputspec import zeros
from psap.plans import DROPPED, Plan
from psap.shrink import Result, made, other_model
from psap.untouched import trainable

FORMAT = "psap-recipe"
VERSION = 1


def _check_header(path: Path_, body: Mapping[str, Any], form: str, version: int, what: str) -> None:
    if body.get("format") != form:
        raise FileError(f"{path} holds {body.get('format')!r}, and is no {what}")
    if body.get("version") != version:
        raise FileError(
            f"{path} has format version {body.get('version')!r}, this psap reads {version}; "
            "upgrade psap"
        )


# Networks


@called("psap.save(result, path)")
def save(result: Result, path: Path_) -> None:
    """Save a small network: its tensors, and the recipe to rebuild it from the dense factory.

    Args:
        result: what `psap.apply` or `Pruner.finish` returned. The model may have been trained on.
        path: where to; conventionally ends in ``.safetensors``. Replaced atomically.

    Raises:
        ArgumentTypeError: ``result`` is no result.
        FileError: the file cannot be written; an older one survives.
    """
    if not isinstance(result, Result):
        raise ArgumentTypeError(
            f"result is a {type(result).__name__}; pass what psap.apply or Pruner.finish returned"
        )
    tensors, aliases = _state(result.model)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "mode": result.mode,
        "class": type(result.model).__name__,
        "aliases": aliases,
        "plan": json.loads(result.plan.to_json()),
    }
    write(path, tensors, body)


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict without repetitions, and which name stands for which."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(
                f"the state of {name!r} is a {type(tensor).__name__}; only tensors can be saved"
            )
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor
    return tensors, aliases


@dataclass(frozen=True)
class Saved:
    """What a file of `save` holds.

    Attributes:
        path: the file.
        tensors: those of the small network, without repetitions.
        mode: how it is made, "module" or "graph".
        aliases: names of further tensors, and which of the others they are.
        plan: which channels of the dense network it has.
    """

    path: Path_
    tensors: Mapping[str, Tensor]
    mode: Literal["module", "graph"]
    aliases: Mapping[str, Any]
    plan: Plan

    @trainable
    def rebuild(self, factory: Callable[[], nn.Module]) -> nn.Module:
        """The small network, as `load` gives it.

        Raises:
            FileError: the file is damaged or hostile.
            ArgumentError: the recipe belongs to another architecture.
            ArgumentTypeError: the factory makes no module.
        """
        dense = factory()
        if not isinstance(dense, nn.Module):
            raise ArgumentTypeError(
                f"factory returned a {type(dense).__name__}; return the dense nn.Module"
            )
        with self._on_zeros():
            dense = shortened(check_model(dense), self.plan)
        difference = other_model(dense, self.plan)
        if difference:
            names = {*self.tensors, *self.aliases}
            difference = _odd(dense, self.plan, names, self.tensors) or difference
            raise ArgumentError(
                f"factory() does not build the network that {self.path} was cut from: "
                f"{difference}; build it with the arguments of that time, such as num_classes (a "
                "network that was pruned twice: lambda: psap.load(path of the first small "
                "network, factory))"
            )
        with self._on_zeros():
            small = _small(dense, self.plan, self.mode)
        _fill(small, self.tensors, self.aliases, self.path)
        return small

    @contextmanager
    def _on_zeros(self) -> Iterator[None]:
        """Say what happened if the dense model fails on inputs that are zeros."""
        try:
            yield
        except PsapError:
            raise
        except Exception as error:
            raise FileError(
                f"{self.path} is rebuilt by running the dense model on zeros of the shapes of its "
                f"example inputs, and there it failed with {type(error).__name__}: {error}; let "
                "forward() take zeros, or keep the network with psap.export_pt2"
            ) from error


def shortened(dense: nn.Module, plan: Plan) -> nn.Module:
    """The model without the residual branches that it had lost before a plan was made.

    Raises:
        FileError: the plan does not say with which inputs the model runs.
        ArgumentError: the model has no such branch.
    """
    for names in plan.without[len(vars(dense).get(DROPPED, ())) :]:
        inputs = zeros(plan.inputs, next(dense.parameters()).device)
        if inputs is None:
            raise FileError(
                "the recipe was traced with inputs that no file can hold; build the network "
                "without its residual branches (psap.drop_blocks) in factory()"
            )
        dense = without(dense, names, inputs)
    return dense


@called("psap.load(path, factory), where factory() builds the dense model")
@trainable
def load(path: Path_, factory: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a small network from the dense architecture and a saved file.

    Files of `psap.export_pt2` need no factory: ``torch.export.load(path).module()``.

    Args:
        path: what `save` wrote.
        factory: builds the dense model, untrained, on any device.

    Returns:
        The small network with the saved values, in the mode (train or eval) and on the device that
        the factory gave.

    Raises:
        FileError: the file is missing, damaged, hostile, or of another version.
        ArgumentError: the recipe belongs to another architecture.
        ArgumentTypeError: the factory is not callable or makes no module.
    """
    if not callable(factory) or isinstance(factory, nn.Module):
        raise ArgumentTypeError(
            "factory must build the dense model, for example lambda: resnet20()"
        )
    return read_saved(path).rebuild(factory)


def _odd(dense: nn.Module, plan: Plan, names: set[str], tensors: Mapping[str, Tensor]) -> str:
    """The first tensor of a dense model that cannot have become what is in the file, in words."""
    kept, state = plan.kept(), dense.state_dict()
    for name, tensor in state.items():
        if name not in names:
            return f"it has {name}, which is not in the file"
        cut = kept.get(name, {})
        small = [len(cut[d]) if d in cut else size for d, size in enumerate(tensor.shape)]
        if name in tensors and small != list(tensors[name].shape):
            return (
                f"its {name} has shape {tuple(tensor.shape)}, which would be {tuple(small)} when "
                f"pruned; in the file it has {tuple(tensors[name].shape)}"
            )
    absent = sorted(names - set(state))
    return f"it has no {absent[0]}" if absent else ""


def read_saved(path: Path_) -> Saved:
    """Read a file that `save` wrote, once.

    Raises:
        FileError: the file is missing, damaged, hostile, or of another version.
    """
    tensors, body = read(path, "network saved by psap.save")
    _check_header(path, body, FORMAT, VERSION, "network saved by psap.save")
    if body.get("mode") not in ("module", "graph") or not isinstance(body.get("aliases"), dict):
        raise FileError(f"{path} is damaged: its recipe has no mode; save it again")
    try:
        plan = Plan.from_json(json.dumps(body.get("plan")))
    except RecursionError as error:
        raise FileError(f"{path} is damaged: its plan is nested too deeply") from error
    return Saved(path, tensors, body["mode"], body["aliases"], plan)


def _small(dense: nn.Module, plan: Plan, mode: Literal["module", "graph"]) -> nn.Module:
    inputs = zeros(plan.inputs, next(dense.parameters()).device)
    if mode == "graph" and inputs is None:
        raise FileError(
            "the recipe was traced with inputs that no file can hold; apply the plan anew"
        )
    return made(dense, plan, mode, inputs)


@torch.no_grad()
def _fill(
    model: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, Any], path: Path_
) -> None:
    values = dict(tensors)
    for name, other in aliases.items():
        if not isinstance(other, str) or other not in tensors:
            raise FileError(f"{path} is damaged: {name!r} stands for {other!r}, which is missing")
        values[name] = tensors[other]
    state = model.state_dict()
    missing, extra = sorted(set(state) - set(values)), sorted(set(values) - set(state))
    if missing or extra:
        raise FileError(
            f"{path} does not fit its recipe: "
            + (f"{missing[0]!r} is missing" if missing else f"{extra[0]!r} is too much")
        )
    for name, tensor in state.items():
        if tensor.shape != values[name].shape:
            raise FileError(
                f"{path} does not fit its recipe: {name!r} has shape {tuple(values[name].shape)}, "
                f"the recipe makes {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() != values[name].is_floating_point():
            raise FileError(
                f"{path} does not fit its recipe: {name!r} is {values[name].dtype}, the recipe "
                f"makes {tensor.dtype}"
            )
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if name in values:
            if tensor.dtype != values[name].dtype:
                tensor.data = tensor.data.to(values[name].dtype)
            tensor.data.copy_(values[name])


# Trees


def write_tree(path: Path_, tree: Any) -> None:
    """Write a nest of dicts, lists, tuples, scalars and tensors to one file, atomically.

    Args:
        path: where to.
        tree: the nest; keys may be strings or numbers. Tensors keep dtype and channels_last.

    Raises:
        ArgumentTypeError: the nest holds something else.
        FileError: the file cannot be written; an older one survives.
    """
    tensors: dict[str, Tensor] = {}
    try:
        body = {"format": "psap-tree", "version": 1, "tree": _encode(tree, tensors, "tree")}
    except RecursionError as error:
        raise ArgumentTypeError("the tree is nested too deeply, or holds itself") from error
    write(path, tensors, body)


def read_tree(path: Path_) -> Any:
    """Read what `write_tree` wrote; tensors come on the CPU.

    Raises:
        FileError: the file is missing, damaged, or no tree.
    """
    tensors, body = read(path, "tree written by psap")
    _check_header(path, body, "psap-tree", 1, "tree written by psap")
    try:
        return _decode(body["tree"], tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FileError(f"{path} is damaged ({error}); go back to an older checkpoint") from error


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta:
            raise ArgumentTypeError(f"{where} is a tensor without plain values; make it dense")
        name = str(len(tensors))
        last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
        return {"$tensor": name, "last": last and not value.is_contiguous()}
    if isinstance(value, Mapping):
        pairs = [[k, _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]
        if any(not isinstance(k, (str, int, float)) for k, _ in pairs):
            raise ArgumentTypeError(f"{where} has a key that is neither text nor number")
        return {"$dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise ArgumentTypeError(f"{where} is a {type(value).__name__}, which cannot be saved in a tree")


def _decode(value: Any, tensors: Mapping[str, Tensor], depth: int = 0) -> Any:
    if depth > MAX_DEPTH:  # whatever Python's own limit is at the moment
        raise RecursionError("nested too deeply")
    if isinstance(value, list):
        return [_decode(v, tensors, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        tensor = tensors[value["$tensor"]]
        return tensor.contiguous(memory_format=torch.channels_last) if value["last"] else tensor
    if "$tuple" in value:
        return tuple(_decode(v, tensors, depth + 1) for v in value["$tuple"])
    return {k: _decode(v, tensors, depth + 1) for k, v in value["$dict"]}


MAX_DEPTH = 200
"""How deep a tree that is read may be nested."""


def check_is_result(value: Any) -> nn.Module:
    """The model of a result, or the module itself.

    Raises:
        ArgumentTypeError: it is neither.
        ArgumentError: it has no parameters.
    """
    model = value.model if isinstance(value, Result) else value
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"got a {type(value).__name__}; pass a psap Result or an nn.Module")
    if not list(model.parameters()):
        raise ArgumentError("the model has no parameters; there is nothing to export")
    return model
