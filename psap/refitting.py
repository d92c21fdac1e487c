"""Attributes of PyTorch's modules that follow the shapes of their tensors."""

from __future__ import annotations

import functools
import warnings
from contextlib import suppress
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from psap.graph.inputs import Inputs, forward
from psap.members import named_modules
from psap.untouched import untouched

Model = TypeVar("Model", bound=nn.Module)

FEATURES: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: -2,
    nn.InstanceNorm2d: -3,
    nn.InstanceNorm3d: -4,
}
"""Norms that warn of a width that is not theirs, and the dimension of their channels."""


def refit(module: nn.Module) -> None:
    """Let the attributes of a module follow the shapes of its tensors."""
    weight = _weight(module)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        vector = weight if weight is not None else module._buffers.get("running_mean")
        if vector is not None:
            module.num_features = vector.shape[0]
    if weight is None:
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        _refit_conv(module, weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.GroupNorm):
        alone = module.num_groups == module.num_channels
        module.num_channels = weight.shape[0]
        module.num_groups = weight.shape[0] if alone else module.num_groups
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)


def _weight(module: nn.Module) -> Tensor | None:
    """The weight of a module, or what a weight norm or spectral norm computes it from."""
    for name in ("weight", "weight_v", "weight_orig"):
        if module._parameters.get(name) is not None:
            return module._parameters[name]
    computed = module._modules.get("parametrizations")
    if not isinstance(computed, nn.ModuleDict) or "weight" not in computed:
        return None
    return list(computed["weight"].parameters(recurse=False))[-1]


def _refit_conv(module: nn.modules.conv._ConvNd, weight: Tensor) -> None:
    depthwise = module.groups > 1 and module.in_channels == module.groups
    multiplier = module.out_channels // module.groups
    if depthwise:
        module.groups = weight.shape[0] if module.transposed else weight.shape[0] // multiplier
    if module.transposed:
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    else:
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups


def bare_norms(model: nn.Module) -> list[nn.Module]:
    """Norms that have a width, but no tensor that tells it."""
    return [m for _, m in named_modules(model) if type(m) in FEATURES and not m.state_dict()]


def refit_bare(model: Model, inputs: Inputs | None) -> Model:
    """Let norms without any tensor follow what they meet when the model runs once.

    Args:
        model: a small network; only these attributes are changed.
        inputs: example inputs, of any floating dtype and device; None leaves the norms alone.

    Returns:
        The model.
    """
    bare = bare_norms(model)
    if not bare or inputs is None:
        return model
    widths: dict[nn.Module, int] = {}

    def note(at: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        widths[module] = args[0].shape[at]

    hooks = [m.register_forward_pre_hook(functools.partial(note, FEATURES[type(m)])) for m in bare]
    try:
        with untouched(model), warnings.catch_warnings(), suppress(Exception):
            warnings.simplefilter("ignore")
            forward(model.eval(), _like(model, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    for module, width in widths.items():
        vars(module)["num_features"] = width
    return model


def _like(model: nn.Module, inputs: Inputs) -> Any:
    """Inputs on the device of a model, and of its dtype where they are floating numbers."""
    like = next(model.parameters())

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)

    return tree_map(moved, inputs)
