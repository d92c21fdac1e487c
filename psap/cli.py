"""The command line. Heavy imports are inside the commands, so that ``psap --help`` is quick."""

from __future__ import annotations

import json
import os

# Idle OpenMP threads spin by default, which slows machines with few cores by up to 20 times. It is
# read once, when torch is imported, so it is set before anything else can do that.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from psap import __version__
from psap.errors import ArgumentError, FileError, PsapError, TraceError
from psap.run_config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from psap.graph import Graph
    from psap.plans import Plan

SHOWN = 6
"""Layers of a group that ``psap inspect`` names."""

RunOptions = Annotated[RunConfig, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]


def prune(run: RunOptions, *, resume: bool = False) -> int:
    """Train a network, prune it while it trains, and write the small one to a folder.

    Args:
        run: the settings of the run.
        resume: go on from the checkpoint in the output folder, bit for bit.
    """
    from psap import record
    from psap.progress import Bars, Lines
    from psap.run import train
    from psap.run_files import CHECKPOINT

    console = Console()
    progress = (Bars if console.is_terminal else Lines)(console, run.epochs)
    try:
        with progress:
            found = train(run, resume=resume, listener=progress, command=record.command_line())
    except KeyboardInterrupt:
        if (Path(run.out) / CHECKPOINT).exists():
            again = sys.argv[1:] + ([] if resume else ["--resume"])
            print(f"interrupted; go on with: psap {shlex.join(again)}", file=sys.stderr)
        raise
    console.print(record.summary(found))
    print(f"everything is in {run.out}; open {Path(run.out) / 'report.html'}")
    return 0


def export(
    source: tyro.conf.Positional[Path],
    *,
    out: Path | None = None,
    format: Literal["onnx", "pt2"] = "onnx",
    arch: str | None = None,
    num_classes: int | None = None,
    input: str | None = None,
) -> int:
    """Export a small network with plain operators, and compare it with PyTorch.

    Args:
        source: the folder of a run, or a file written by psap.save.
        out: the file to write; by default model.onnx or model.pt2 in the folder of the run, or the
            name of the file with another ending.
        format: "onnx", or "pt2" (torch.export).
        arch: the dense architecture; known for the folder of a run, and where it is one of psap's.
        num_classes: classes of the dense architecture; by default what the file says.
        input: shape of one input, such as 3,32,32; by default what the file says.
    """
    from torch.utils._pytree import tree_leaves

    import psap
    from psap.rebuilding import dense_factory, recorded_inputs
    from psap.recipe import read_saved

    if not source.exists():
        raise FileError(
            f"there is no run or file {source}; pass the folder of a finished run, or a file "
            "written by psap.save"
        )
    path = source
    if source.is_dir():
        settings = _settings(source)
        arch, num_classes = settings["arch"], settings["num_classes"]
        path = source / "small.safetensors"
    saved = read_saved(path)
    plan = saved.plan
    inputs: Any = (_zeros(input),) if input else recorded_inputs(plan, path)
    first = next(x for x in tree_leaves(inputs) if hasattr(x, "shape"))
    channels = first.shape[1] if first.dim() > 1 else 1
    factory = dense_factory(plan, path, arch, num_classes=num_classes, in_channels=channels)
    small = saved.rebuild(factory)
    if out is None:
        out = path.with_suffix(f".{format}")
        out = out.with_stem("model") if source.is_dir() else out
    write = psap.export_onnx if format == "onnx" else psap.export_pt2
    difference = write(small, out, inputs)
    print(f"wrote {out}; it differs from PyTorch by at most {difference:.1e}")
    return 0


def report(folder: tyro.conf.Positional[Path]) -> int:
    """Draw the report of a run again, from its record.json.

    Args:
        folder: the folder of the run.
    """
    from psap.report import write

    print(f"wrote {write(_record(folder), folder / 'report.html')}")
    return 0


def inspect(*, arch: str, num_classes: int = 10, input: str | None = None) -> int:
    """List channel groups, the reason for every layer left alone, and residual branches.

    Args:
        arch: resnet20, vgg16_bn, ... or package.module:factory.
        num_classes: classes of the model.
        input: shape of one input, also in 1d or 3d; 3,32,32 by default, 1,8,8 for digits_resnet.
    """
    import psap
    from psap.branches import branches
    from psap.models import create

    example = _zeros(input or _default(arch))
    model = create(arch, num_classes=num_classes, in_channels=example.shape[1])
    with _naming_input():
        graph = psap.trace(model, example)
    console = Console()
    console.print(*_groups(graph), sep="\n")
    names = [branch.block.name for branch in branches(model, graph.inputs)]
    shown = ", ".join(names) or "none"
    print(f"{len(names)} residual branches, each for psap.drop_blocks: {shown}")
    return 0


def latency(
    *,
    arch: str,
    table: Path,
    num_classes: int = 10,
    input: str | None = None,
    target_latency: float | None = None,
    threads: int = 1,
) -> int:
    """Time every layer at several widths, and find the multiple of channels that is fastest here.

    Args:
        arch: resnet20, vgg16_bn, ... or package.module:factory.
        table: file of the times; made if there is none, and used again if there is.
        num_classes: classes of the model.
        input: shape of one input, also in 1d or 3d; 3,32,32 by default, 1,8,8 for digits_resnet.
        target_latency: kept share of the predicted latency of the network that is tried; by default
            half of every layer goes.
        threads: CPU threads of one operator.
    """
    import torch

    import psap
    from psap.models import create
    from psap.rounding import fastest

    example = _zeros(input or _default(arch))
    model = create(arch, num_classes=num_classes, in_channels=example.shape[1]).eval()
    with _naming_input():
        graph = psap.trace(model, torch.randn(example.shape))
    times = psap.measure_latency(graph, table, threads=threads)
    print(times.explain(graph))
    target = None if target_latency is None else psap.Target(latency=target_latency)
    ratio = 0.5 if target is None else None
    found = fastest(graph, ratio=ratio, target=target, latency=times, threads=threads)
    print(found.explain())
    return 0


def diff(
    first: tyro.conf.Positional[Path],
    second: tyro.conf.Positional[Path],
    *,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Say which channels one plan removes and the other does not.

    Args:
        first: the folder of a run, a file of psap.save, or one with the text of Plan.to_json().
        second: another one, of the same model.
        as_json: for machines.
    """
    found = _plan(first).diff(_plan(second))
    print(found.to_json() if as_json else found.explain())
    return 0


def doctor(
    *, as_json: Annotated[bool, tyro.conf.arg(name="json")] = False, strict: bool = False
) -> int:
    """Show what is installed and built, which backend each op takes, and what mends the rest.

    Args:
        as_json: for machines.
        strict: exit with 1 if something is missing.
    """
    from psap.doctor import report, show

    found = report()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found, Console())
    return int(strict and bool(found["problems"]))


COMMANDS: dict[str, Callable[..., int]] = {
    "prune": prune,
    "export": export,
    "report": report,
    "inspect": inspect,
    "diff": diff,
    "latency": latency,
    "doctor": doctor,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: what was typed after the program's name; by default that of this process.

    Returns:
        0; 1 if ``doctor --strict`` found something; 2 after a mistake or a failure that psap
        explains; 130 after Ctrl-C.
    """
    if os.getcwd() not in sys.path:  # package.module:factory may be the user's own, right here
        sys.path.append(os.getcwd())
    if list(sys.argv[1:] if args is None else args) == ["--version"]:
        print(f"psap {__version__}")
        return 0
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="psap",
            description="Turns a convolutional network into a smaller one while it trains. "
            "--version prints its version.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        return code
    except SystemExit as ended:  # tyro: 0 after --help, 2 after a mistake
        return ended.code if isinstance(ended.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `psap inspect | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except PsapError as error:
        if os.environ.get("PSAP_DEBUG") == "1":
            raise
        print(f"psap: {error}", file=sys.stderr)
        return 2


def _groups(graph: Graph) -> tuple[Table, Table]:
    import numpy as np

    from psap.cost import CostModel
    from psap.graph.parts import part

    cost = CostModel(graph)
    table = Table(
        "group",
        "channels",
        "MACs through it",
        "layers",
        title=f"{len(graph.groups)} channel groups, {cost.dense.macs:,} MACs, "
        f"{cost.dense.parameters:,} parameters",
        caption="MACs through a group: the share of all MACs that producing and reading it takes",
    )
    through = -cost.changes(cost.sizes, np.zeros_like(cost.sizes))[0] / max(1, cost.dense.macs)
    for group, share in zip(graph.groups, through, strict=True):
        others = len(group.layers) - SHOWN
        layers = ", ".join(group.layers[:SHOWN]) + (f" and {others} more" if others > 0 else "")
        found = part(graph, group)
        size = f"{group.size} ({found})" if found else str(group.size)
        table.add_row(escape(group.name), size, f"{share:.1%}", escape(layers))
    alone = Table("layer", "reason", title=f"left alone: {len(graph.left_alone)}")
    for layer, reason in graph.left_alone.items():
        alone.add_row(escape(layer), escape(reason))
    return table, alone


@contextmanager
def _naming_input() -> Iterator[None]:
    """Say how inputs are given on the command line, if the model does not take them."""
    try:
        yield
    except TraceError as error:
        told = str(error).partition("; pass inputs that")[0]
        raise ArgumentError(
            f"{told}; pass the shape of an input, such as --input 1,28,28 for grey images"
        ) from error


def _default(arch: str) -> str:
    """The shape of an input of an architecture, where none is given."""
    return "1,8,8" if arch == "digits_resnet" else "3,32,32"


def _zeros(text: str) -> Tensor:
    """A batch of two inputs of the given shape."""
    import torch

    try:
        shape = [int(part) for part in text.split(",")]
    except ValueError:
        shape = []
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise ArgumentError(
            f"input is {text!r}; pass channels,height,width, such as 3,32,32 (channels,length for "
            "a network in 1d)"
        )
    return torch.zeros([2, *shape])


def _text(path: Path) -> str:
    """A file of a finished run."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FileError(
            f"{path} cannot be read ({why}); pass the folder of a finished run"
        ) from error


def _record(folder: Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        FileError: there is none, or it is damaged.
    """
    path = folder / "record.json"
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise FileError(
            f"{path} is damaged: {error}; finish the run again with --resume"
        ) from error
    if not isinstance(found, dict):
        raise FileError(f"{path} is no record of a run")
    return found


def _settings(folder: Path) -> dict[str, Any]:
    settings = _record(folder).get("config")
    if not isinstance(settings, dict) or not {"arch", "num_classes"} <= set(settings):
        raise FileError(
            f"{folder / 'record.json'} does not say arch and num_classes; pass "
            f"{folder / 'small.safetensors'} with --arch and --num-classes"
        )
    return settings


def _plan(path: Path) -> Plan:
    from psap.plans import Plan
    from psap.recipe import read_saved

    if path.suffix == ".safetensors":
        return read_saved(path).plan
    return Plan.from_json(_text(path / "plan.json" if path.is_dir() else path))
