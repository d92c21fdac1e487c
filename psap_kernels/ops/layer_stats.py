"""layer_stats: sums and counts over the filters of all layers in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from psap_kernels import _backend, _checks, reference
from psap_kernels._library import register


@dataclass(frozen=True, eq=False)  # tensors have no one truth value to compare by
class LayerStats:
    """What ``layer_stats`` knows of F filters in L layers.

    Attributes:
        filter_sums: float32 [6, F]; rows: weight_abs, weight_sq, grad_abs, grad_sq,
            weight_grad_abs, weight_grad.
        filter_counts: int32 [3, F]; rows: below_tau, nonfinite_weight, nonfinite_grad.
        layer_sums: float64 [L, 7]; columns: the six sums above, and sum w.
        layer_counts: int64 [L, 3]; columns: the three counts above.
        shapes: L shapes of weights.
        input_weight_grad: float32 [I], sum of w g, signed, of every input channel (dimension 1) of
            every layer that has one; None unless it was asked for.
    """

    filter_sums: Tensor
    filter_counts: Tensor
    layer_sums: Tensor
    layer_counts: Tensor
    shapes: tuple[torch.Size, ...]
    input_weight_grad: Tensor | None = None

    @property
    def offsets(self) -> tuple[int, ...]:
        """L + 1 numbers; the filters of layer i are offsets[i] to offsets[i + 1] - 1."""
        return (0, *accumulate(shape[0] for shape in self.shapes))

    @property
    def numels(self) -> tuple[int, ...]:
        """L numbers of weights."""
        return tuple(shape.numel() for shape in self.shapes)

    @property
    def input_offsets(self) -> tuple[int, ...]:
        """L + 1 numbers; the input channels of layer i are input_offsets[i] to [i + 1] - 1."""
        return (0, *accumulate(_inputs(shape) for shape in self.shapes))

    @property
    def weight_abs(self) -> Tensor:
        """Sum of |w|, float32 [F]."""
        return self.filter_sums[0]

    @property
    def weight_sq(self) -> Tensor:
        """Sum of w^2, float32 [F]."""
        return self.filter_sums[1]

    @property
    def grad_abs(self) -> Tensor:
        """Sum of |g|, float32 [F]."""
        return self.filter_sums[2]

    @property
    def grad_sq(self) -> Tensor:
        """Sum of g^2, float32 [F]."""
        return self.filter_sums[3]

    @property
    def weight_grad_abs(self) -> Tensor:
        """Sum of |w g|, float32 [F]."""
        return self.filter_sums[4]

    @property
    def weight_grad(self) -> Tensor:
        """Sum of w g, signed, float32 [F]."""
        return self.filter_sums[5]

    @property
    def below_tau(self) -> Tensor:
        """Number of |w| < tau, int32 [F]."""
        return self.filter_counts[0]

    @property
    def nonfinite_weight(self) -> Tensor:
        """Number of NaN and Inf among the weights, int32 [F]."""
        return self.filter_counts[1]

    @property
    def nonfinite_grad(self) -> Tensor:
        """Number of NaN and Inf among the gradients, int32 [F]."""
        return self.filter_counts[2]

    def layer(self, index: int) -> LayerStats:
        """Return the part of one layer (views); ``index`` may be negative, as in a list."""
        if not -len(self.shapes) <= index < len(self.shapes):
            raise IndexError(
                f"index is {index}, wanted one of {len(self.shapes)} layers: see len(stats.shapes)"
            )
        index %= len(self.shapes)
        first, last = self.offsets[index], self.offsets[index + 1]
        inputs = self.input_weight_grad
        if inputs is not None:
            inputs = inputs[self.input_offsets[index] : self.input_offsets[index + 1]]
        return LayerStats(
            self.filter_sums[:, first:last],
            self.filter_counts[:, first:last],
            self.layer_sums[index : index + 1],
            self.layer_counts[index : index + 1],
            (self.shapes[index],),
            inputs,
        )

    def layer_std(self) -> Tensor:
        """Standard deviation of each layer's weights, unbiased, float64 [L].

        From the totals, so no second pass; NaN for fewer than two weights, as torch.std has it.
        """
        n = self.layer_sums.new_tensor(self.numels)
        total, squares = self.layer_sums[:, 6], self.layer_sums[:, 1]
        variance = (squares - total * total / n).clamp_min(0) / (n - 1).clamp_min(0)
        return variance.sqrt()


def layer_stats(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
    *,
    tau: Tensor | None = None,
    per_input: bool = False,
) -> LayerStats:
    """Sum up the weights and gradients of every filter of every layer, in one call.

    Args:
        weights: [O, ...] each, float32, float64, bfloat16 or float16 (they may differ between
            layers), any strides, on one device. A filter is a row of dimension 0.
        grads: the gradient of each weight, of its shape and dtype; strides may differ. None:
            everything about gradients is 0.
        tau: float32 [L], the threshold of each layer for ``below_tau``, which counts
            |w| < tau (strict). None: the count is 0.
        per_input: also sum w g over every input channel (dimension 1); needs ``grads``.

    Returns:
        The sums and counts as a ``LayerStats``. NaN and Inf make sums non-finite; counts stay
        exact.

    Raises:
        ValueError: a shape, the number of tensors or a device does not fit.
        TypeError: not tensors, or a dtype that is not supported.
    """
    given = [] if grads is None else grads
    if not isinstance(weights, (list, tuple)):
        weights = _checks.tensor_list("weights", weights)
    if tau is None:
        device = _backend.device_of(weights)
        tau = torch.zeros(len(weights), dtype=torch.float32, device=device)
    arguments = (weights, given, tau, per_input)
    filter_sums, filter_counts, layer_sums, layer_counts, input_sums = _backend.run(
        "layer_stats", weights, arguments, lambda: _check(weights, grads, tau, per_input)
    )
    return LayerStats(
        filter_sums,
        filter_counts,
        layer_sums,
        layer_counts,
        tuple([weight.shape for weight in weights]),
        input_sums if per_input else None,
    )


def _check(
    weights: Sequence[Tensor], grads: Sequence[Tensor] | None, tau: Tensor, per_input: bool
) -> None:
    weights = _checks.tensor_list("weights", weights)
    if not isinstance(per_input, bool):
        raise TypeError(f"per_input is a {type(per_input).__name__}, wanted True or False")
    if per_input and not grads and weights:
        raise ValueError("per_input is True without grads: pass the gradient of every weight")
    grads = [] if grads is None else _checks.tensor_list("grads", grads, length=len(weights))
    if not isinstance(tau, Tensor):
        raise TypeError(
            f"tau is a {type(tau).__name__}, wanted a float32 tensor [L]: use torch.tensor(...)"
        )
    _checks.stats_arguments(weights, grads, tau)


def _inputs(shape: torch.Size) -> int:
    return shape[1] if len(shape) > 1 else 0


def _fake(
    weights: list[Tensor], grads: list[Tensor], tau: Tensor, per_input: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _checks.one_device(weights, grads, [tau])
    inputs = sum(_inputs(weight.shape) for weight in weights) if per_input else 0
    filters, layers = sum(weight.shape[0] for weight in weights), len(weights)
    return (
        tau.new_empty((6, filters), dtype=torch.float32),
        tau.new_empty((3, filters), dtype=torch.int32),
        tau.new_empty((layers, 7), dtype=torch.float64),
        tau.new_empty((layers, 3), dtype=torch.int64),
        tau.new_empty(inputs, dtype=torch.float32),
    )


register("layer_stats", reference=reference.layer_stats, fake=_fake)
