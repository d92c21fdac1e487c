"""Export: ONNX and torch.export files with plain operators, checked against PyTorch.

Nothing of psap is inside the files: a small network is an ordinary network.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from psap.calling import called
from psap.errors import PsapError, VerificationError
from psap.files import Path_, replacing, require_writable
from psap.graph.inputs import Inputs, as_inputs, doubled, forward
from psap.graph.trace import output_tensors
from psap.recipe import check_is_result
from psap.shrink import Result
from psap.untouched import untouched

TOLERANCE = 1e-4
"""Largest difference from PyTorch, relative to the largest output; or 8 eps of a coarser dtype."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about their own internals; a failure still raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _inputs(value: Result | nn.Module, example_inputs: Any, dynamic_batch: bool) -> Inputs:
    if example_inputs is None and isinstance(value, Result):
        example_inputs = value.inputs
    inputs = as_inputs(example_inputs)
    twice = doubled(inputs) if dynamic_batch else None  # one would be taken for a constant
    return inputs if twice is None else twice


def _program(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> Any:
    batch = torch.export.Dim("batch", min=1)
    shapes = tree_map(lambda x: {0: batch} if isinstance(x, Tensor) and x.dim() else None, inputs)
    try:
        with _quiet(), untouched(model):
            model.eval()
            args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
            return torch.export.export(
                model, args, kwargs, dynamic_shapes=shapes if dynamic_batch else None
            )
    except Exception as error:
        hint = "; try dynamic_batch=False" if dynamic_batch else ""
        raise PsapError(
            f"torch.export failed on {type(model).__name__}: {type(error).__name__}: {error}{hint}"
        ) from error


def _expected(model: nn.Module, inputs: Inputs) -> Any:
    with untouched(model):
        return forward(model.eval(), inputs)


def _names(outputs: Any) -> list[str] | None:
    """What outputs are called, if the model says it by giving out a dict."""
    named = isinstance(outputs, dict) and all(isinstance(x, Tensor) for x in outputs.values())
    return [str(name) for name in outputs] if named else None


def _difference(wanted: list[Tensor], got: list[Tensor], what: str) -> float:
    """Largest absolute difference; refuses one that is large for the size of the outputs."""
    if [tuple(x.shape) for x in wanted] != [tuple(x.shape) for x in got]:
        raise VerificationError(
            f"{what} gives outputs of other shapes than PyTorch; nothing was written"
        )
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        difference = float((a.double() - b.double().to(a.device)).abs().max()) if a.numel() else 0.0
        scale = float(a.double().abs().max()) if a.numel() else 0.0
        allowed = max(TOLERANCE, 8 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0)
        if not difference <= allowed * max(scale, 1.0):
            raise VerificationError(
                f"{what} differs from PyTorch by {difference:.2e}; nothing was written"
            )
        worst = max(worst, difference)
    return worst


def _run_onnx(path: Path, model: nn.Module, inputs: Inputs) -> list[Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    tensors = [x.detach().cpu() for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        names = [i.name for i in session.get_inputs()]
        if isinstance(inputs, dict) and set(names) <= set(inputs):  # in the order of forward()
            tensors = [inputs[name].detach().cpu() for name in names]
        feeds = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feeds)]
    except Exception as error:  # it knows few operators in float64, and none in bfloat16
        raise PsapError(
            f"ONNX Runtime does not run the file of this {next(model.parameters()).dtype} model: "
            f"{error}; nothing was written. Export copy.deepcopy(result.model).float() with "
            "float32 inputs, or pass check=False to write the file all the same"
        ) from error


@called("psap.export_onnx(result, path)")
def export_onnx(
    model: Result | nn.Module,
    path: Path_,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> float | None:
    """Write an ONNX file in evaluation mode, and run it in ONNX Runtime against PyTorch.

    Inputs have the names of forward(), and outputs those of the dict that it gives, if it does.

    Args:
        model: a result or any module; it is not changed.
        path: where to; replaced atomically, and only if the check holds.
        example_inputs: as for `psap.trace`; by default what the result was traced with.
        dynamic_batch: let the first dimension of every input vary.
        check: compare with PyTorch in ONNX Runtime.

    Returns:
        The largest absolute difference from PyTorch, or None without check.

    Raises:
        PsapError: a package is missing (``pip install psap[onnx]``), or the export failed, or ONNX
            Runtime does not run the file (most operators are there in float32 only).
        VerificationError: the file computes something else.
        FileError: the file cannot be written.
    """
    module = check_is_result(model)
    try:
        import onnxruntime  # noqa: F401 - the check needs it
        import onnxscript  # noqa: F401 - the exporter needs it
    except ImportError as error:
        raise PsapError(f"{error.name} is missing; pip install 'psap[onnx]'") from error
    require_writable(path)
    inputs = _inputs(model, example_inputs, dynamic_batch)
    exported = _program(module, inputs, dynamic_batch)
    outputs = _expected(module, inputs)
    with replacing(path) as temporary:
        try:
            with _quiet():
                torch.onnx.export(
                    exported, f=str(temporary), dynamo=True, verbose=False, external_data=False,
                    output_names=_names(outputs),
                )  # fmt: skip
        except OSError:  # no space: `replacing` says so
            raise
        except Exception as error:
            raise PsapError(f"ONNX export failed: {type(error).__name__}: {error}") from error
        if not check:
            return None
        got = _run_onnx(temporary, module, inputs)
        return _difference(output_tensors(outputs), got, "the ONNX file")


@called("psap.export_pt2(result, path)")
def export_pt2(
    model: Result | nn.Module,
    path: Path_,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    check: bool = True,
) -> float | None:
    """Write a ``torch.export`` file (.pt2) in evaluation mode, and load it back to compare.

    Args:
        model: a result or any module; it is not changed.
        path: where to; replaced atomically, and only if the check holds.
        example_inputs: as for `psap.trace`; by default what the result was traced with.
        dynamic_batch: let the first dimension of every input vary.
        check: compare the loaded file with PyTorch.

    Returns:
        The largest absolute difference from PyTorch, or None without check.

    Raises:
        PsapError: the export failed.
        VerificationError: the file computes something else.
        FileError: the file cannot be written.
    """
    module = check_is_result(model)
    require_writable(path)
    inputs = _inputs(model, example_inputs, dynamic_batch)
    exported = _program(module, inputs, dynamic_batch)
    with replacing(path) as temporary:
        buffer = io.BytesIO()  # torch.export.save ends the process if it cannot write to a file
        with _quiet():  # it warns of channels_last weights
            torch.export.save(exported, buffer)
        temporary.write_bytes(buffer.getbuffer())
        if not check:
            return None
        with _quiet(), temporary.open("rb") as opened, torch.no_grad():
            got = output_tensors(forward(torch.export.load(opened).module(), inputs))
        wanted = output_tensors(_expected(module, inputs))
        return _difference(wanted, got, "the .pt2 file")
