"""The proof that the small network computes what the masked dense network computes.

Both are made from one float64 copy of the user's model whose norm statistics and affine pairs are
random, so that nothing passes by accident (fresh batch norms are the identity; many nets start a
residual branch with gamma = 0). They are compared in evaluation mode as they are, then in both
modes with activation functions that are nowhere flat, so that no closed ReLU hides a difference;
and not only their outputs, but those of every layer, so that no later layer levels it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from psap.decisions import Decisions
from psap.errors import ArgumentError, VerificationError
from psap.foreign import Foreign
from psap.graph.inputs import Inputs, batched, forward
from psap.graph.outputs import NoDropout, output_tensors
from psap.layerwise import Glimpse, first_difference, glimpses, stopped_at
from psap.noise import EvenNoise
from psap.plans import Plan
from psap.randomising import random_inputs, randomised
from psap.settling import settle, settling
from psap.sloping import Sloping
from psap.untouched import untouched
from psap.widening import Widening

TOLERANCE = 1e-9
"""Largest relative error in float64."""

LOCAL = 1e-6
"""Largest relative error of the outputs of a single layer, which may be small differences."""

DRAWS = 3
"""Random networks that are tried if the outputs of one do not depend on its inputs."""


@dataclass(frozen=True)
class Verification:
    """The outcome of a proof.

    Attributes:
        max_relative_error: largest difference of an output over the largest output, float64.
        dtype: dtype of the comparison.
        modes: which modes of the model were compared.
        mode: "module" or "graph", how the small network was made.
        silent: layers that gave the same for all inputs: of what these alone read, the proof says
            little.
    """

    max_relative_error: float
    dtype: str
    modes: tuple[str, ...]
    mode: str
    silent: tuple[str, ...] = ()


def verify(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    make: Callable[[nn.Module], nn.Module],
    zero_: Callable[[nn.Module, Plan], None],
    mode: str,
) -> Verification:
    """Compare the masked and the small network on copies.

    Args:
        model: the dense model; it is not changed.
        plan: the plan.
        inputs: example inputs; floating ones are replaced by random numbers of their shape.
        make: builds the small network from a dense one.
        zero_: masks a dense network in place.
        mode: how ``make`` works, for the record.

    Raises:
        VerificationError: the outputs differ, or the small network fails; names the first layer. Or
            there is nothing to compare: the dense network fails, or gives the same for all inputs.
        ArgumentError: a copy of the model still runs parts of the model.
    """

    def networks(generator: torch.Generator) -> tuple[nn.Module, nn.Module]:
        masked = randomised(model, generator)
        small = _made(make, masked)
        zero_(masked, plan)
        return masked, small

    with untouched(model):
        try:
            return _verified(model, plan, inputs, networks, mode)
        except VerificationError:
            narrows, draws = _narrows_or_draws(model, inputs)
            if not narrows and not draws:
                raise
        with Widening() if narrows else nullcontext():
            return _verified(model, plan, inputs, networks, mode, even=draws)


def _narrows_or_draws(model: nn.Module, inputs: Inputs) -> tuple[bool, bool]:
    """Whether a float64 copy of a model computes with narrower numbers, and draws random ones."""
    generator = torch.Generator().manual_seed(0)
    wide = randomised(model, generator)
    widening, even = Widening(), EvenNoise(mean=False)
    for training in (False, True):
        with suppress(Exception), torch.no_grad(), NoDropout(), widening, even:
            forward(wide.train(training), random_inputs(inputs, generator))
    return widening.changed, even.changed


def _verified(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    networks: Callable[[torch.Generator], tuple[nn.Module, nn.Module]],
    mode: str,
    *,
    even: bool = False,
) -> Verification:
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        masked, small = networks(generator)
        proof = _Proof(masked, small, plan, random_inputs(inputs, generator), even)
        proof.run(model)
        if proof.alive:
            return Verification(proof.worst, "float64", proof.modes, mode, proof.silent())
    raise VerificationError(
        "the dense network gives the same for all random inputs, so that comparing outputs proves "
        "nothing; pass check=False to go without the proof"
    )


class _Way(NamedTuple):
    """How both networks are run."""

    training: bool
    sloping: bool
    even: bool

    @property
    def mode(self) -> str:
        """The mode of the model."""
        return "train" if self.training else "eval"

    def __str__(self) -> str:
        slope = ", activation functions with a slope" if self.sloping else ""
        return f"{self.mode} mode{slope}"


class _Proof:
    """The comparison of two networks.

    Attributes:
        worst: the largest relative error.
        modes: the modes in which they were compared.
        alive: whether the outputs depend on the inputs, as far as that can be seen.
    """

    def __init__(
        self,
        masked: nn.Module,
        small: nn.Module,
        plan: Plan,
        inputs: Inputs,
        even: bool,
    ) -> None:
        self.worst = 0.0
        self.modes: tuple[str, ...] = ()
        tensors = batched(inputs)
        self._telling = any(x.is_floating_point() and x.shape[0] > 1 for x in tensors)
        self.alive = not self._telling
        self._masked, self._small, self._plan, self._inputs = masked, small, plan, inputs
        self._even = even
        self._failure = ""
        self._settled = False
        self._silent: dict[str, bool] = {}

    def run(self, model: nn.Module) -> None:
        """Compare in evaluation mode, and in both with activation functions that are not flat.

        Args:
            model: what the dense network is a copy of.

        Raises:
            VerificationError: the networks differ, or the dense one fails in both modes.
            ArgumentError: it still runs parts of the model.
        """
        self._foreign = Foreign(model, self._masked)
        self._compare(training=False, sloping=True)
        self._compare(training=False, sloping=False)
        if not self._compare(training=True, sloping=True):
            self._compare(training=True, sloping=False)
        if not self.modes:
            raise VerificationError(
                "the dense network itself failed on random float64 inputs: "
                f"{self._failure}; pass check=False to go without the proof"
            )

    def silent(self) -> tuple[str, ...]:
        """Layers that gave the same for all inputs whenever they were looked at."""
        zeroed = {name.rpartition(".")[0] for b in self._plan.dropped for name in b.tensors}
        return tuple(name for name, same in self._silent.items() if same and name not in zeroed)

    def _compare(self, *, training: bool, sloping: bool) -> bool:
        """Compare in one way; returns whether there was something to compare."""
        way = _Way(training, sloping, self._even)
        decided = Decisions(None, TOLERANCE)
        settles = not (way.training or self._settled)
        try:
            with (
                self._watched(self._masked, way) as seen,
                settling(self._masked, settles) as stats,
                decided,
                nullcontext() if way.mode in self.modes else self._foreign,
            ):
                wanted = _run(self._masked, self._inputs, way)
        except ArgumentError:
            raise
        except Exception as error:  # the dense network itself cannot run in this mode
            self._failure = f"{type(error).__name__}: {error}"
            return False
        if way.sloping and not all(bool(torch.isfinite(x).all()) for x in wanted):
            return False  # such as the square root of what a ReLU keeps positive
        if not any(x.numel() for x in wanted):
            nothing = "it returns no number, so that there is nothing to compare"
            self._failure = self._failure or nothing
            return False
        if stats:
            settle(self._masked, stats, {})
            settle(self._small, stats, self._plan.kept())
            self._settled = True
        self._against(wanted, seen, decided, way)
        self.modes += () if way.mode in self.modes else (way.mode,)
        if self._telling:
            self.alive = self.alive or _varies(wanted)
            for glimpse in seen:
                self._silent[glimpse.name] = glimpse.silent and self._silent.get(glimpse.name, True)
        return True

    def _watched(self, model: nn.Module, way: _Way) -> AbstractContextManager[list[Glimpse]]:
        """What the layers give, if they have not been compared in this mode yet."""
        if way.mode in self.modes:
            return nullcontext([])
        return glimpses(model, self._masked)

    def _against(
        self, wanted: list[Tensor], seen: list[Glimpse], decided: Decisions, way: _Way
    ) -> None:
        """Run the small network, and compare what it gives."""
        with self._watched(self._small, way) as found:
            try:
                with Decisions(decided.made, TOLERANCE):
                    got = _run(self._small, self._inputs, way)
            except Exception as error:
                first_line = str(error).partition("\n")[0]  # of an assertion it is empty
                raise VerificationError(
                    f"the small network fails in {way.mode} mode with {type(error).__name__}: "
                    f"{first_line}{self._place(seen, found)}"
                ) from error
        off = _relative_error(wanted, got)
        if not off <= TOLERANCE:
            raise VerificationError(
                f"the small network differs from the masked one by {off:.2e} (relative, {way}, "
                f"float64; at most {TOLERANCE:.0e} is allowed){self._place(seen, found)}"
            )
        layer = first_difference(seen, found, self._plan, LOCAL)
        if layer:
            raise VerificationError(
                f"the small network gives the same as the masked one, but by chance ({way}): the "
                f"first layer that differs is {layer}"
            )
        self.worst = max(self.worst, off)

    def _place(self, wanted: list[Glimpse], got: list[Glimpse]) -> str:
        """Where the networks part, as the end of a sentence."""
        layer = first_difference(wanted, got, self._plan, TOLERANCE)
        if layer:
            return f"; the first layer that differs is {layer}"
        layer = stopped_at(wanted, got)
        if layer:
            return f"; it stops at {layer}"
        return "; the difference comes after the last layer" if wanted else ""


def require_finite(model: nn.Module) -> None:
    """Check that there is something to prove: every weight and running statistic is a number.

    Raises:
        VerificationError: one is not.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            tensors[name] = buffer
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta:
            total = float(tensor.detach().sum(dtype=torch.float64))  # a copy of no tensor
            if not math.isfinite(total):
                raise VerificationError(
                    f"{name} holds values that are not finite, so nothing can be proven of the "
                    "model; go back to a checkpoint from before"
                )


def _made(make: Callable[[nn.Module], nn.Module], dense: nn.Module) -> nn.Module:
    try:
        return make(dense)
    except VerificationError:
        raise
    except Exception as error:
        raise VerificationError(f"building failed with {type(error).__name__}: {error}") from error


def _run(model: nn.Module, inputs: Inputs, way: _Way) -> list[Tensor]:
    """All outputs; of a second pass too, and its counters, where a pass changes buffers."""
    norms = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for key in module._buffers
    }
    with (
        untouched(model),
        NoDropout(),
        Sloping() if way.sloping else nullcontext(),
        EvenNoise(mean=way.training) if way.even else nullcontext(),
    ):
        model.train(way.training)
        torch.default_generator.manual_seed(0)  # torch.manual_seed is slower than a small network
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        own = {n: b.clone() for n, b in model.named_buffers() if n not in norms}
        outputs = output_tensors(forward(model, inputs))
        now = dict(model.named_buffers())
        moved = [n for n, before in own.items() if not torch.equal(now[n], before)]
        if moved:
            outputs += output_tensors(forward(model, inputs))
            outputs += [now[n].clone() for n in moved if not now[n].dim()]
        return outputs


def _relative_error(wanted: list[Tensor], got: list[Tensor]) -> float:
    if not wanted or [x.shape for x in wanted] != [x.shape for x in got]:
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        if a.is_floating_point() and a.numel():
            scale = float(a.abs().max())
            difference = float((a - b).abs().max())
            if difference != 0:  # NaN counts as a difference
                worst = max(worst, difference / scale if scale else float("inf"), key=_nan_last)
        elif not torch.equal(a, b):
            return float("inf")
    return worst


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _varies(outputs: list[Tensor]) -> bool:
    """Whether outputs depend on the inputs: False if each is the same for all of them."""
    told = [x for x in outputs if x.is_floating_point() and x.dim() and x.shape[0] > 1]
    return not told or any(bool((x != x[:1]).any()) for x in told)
