"""The files of a run: its folder, its checkpoint, the weights that it starts from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from psap.errors import ArgumentError, FileError, StateError, TraceError
from psap.recipe import read_tree
from psap.run_config import RunConfig, difference

CHECKPOINT = "checkpoint.safetensors"
FORMAT = "psap-run"
VERSION = 1


@contextmanager
def output_folder(out: str) -> Iterator[Path]:
    """Make the output folder; after an error, remove again what was made and is still empty.

    Raises:
        FileError: no files can be written there.
    """
    folder = Path(out)
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        _prepare(folder, out)
        yield folder
    except BaseException:
        for path in made:
            try:
                path.rmdir()
            except OSError:  # there is something in it, or it was not made
                continue
        raise


def _prepare(folder: Path, out: str) -> None:
    """Make the folder, and check that files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".psap-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FileError(
            f"out is {out!r}, which cannot be written: {error.strerror}; choose another folder"
        ) from error


def load_weights(model: nn.Module, path: str) -> None:
    """Load the weights of a dense model from a .safetensors file.

    Raises:
        FileError: it is another kind of file, or is missing or damaged.
        ArgumentError: the weights belong to another model.
    """
    if not path.endswith(".safetensors"):
        raise FileError(
            f"weights is {path!r}, no .safetensors file; psap reads no pickles (.pt, .pth), since "
            "loading one runs the code in it. Where you trust it, convert it with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'w.safetensors')"
        )
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise FileError(f"weights is {path!r}, which does not exist") from error
    except Exception as error:  # safetensors raises many types for a damaged file
        raise FileError(f"weights is {path!r}, which cannot be read: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1:2]) or str(error)
        raise ArgumentError(
            f"weights is {path!r}, which does not fit {type(model).__name__}: {reason}"
            + _other_channels(model, state)
        ) from error


def _other_channels(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What to do if weights are for grey images and the model for colour, or the other way."""
    for name, mine in model.named_parameters():
        theirs = state.get(name)
        if theirs is not None and theirs.dim() == mine.dim() > 1 and theirs.shape != mine.shape:
            pair = theirs.shape[1], mine.shape[1]
            if pair == (1, 3):
                return " They are for grey images: with --data imagefolder pass --grey"
            if pair == (3, 1):
                return " They are for colour images: leave --grey out"
    return ""


@contextmanager
def naming_channels(model: nn.Module, config: RunConfig, channels: int) -> Iterator[None]:
    """Say what to do if a model cannot run because its images have another number of channels.

    Args:
        model: the model.
        config: the settings of the run.
        channels: C of the images.

    Raises:
        ArgumentError: instead of the `TraceError` in the block.
    """
    try:
        yield
    except TraceError as error:
        takes = {m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)}
        other = {1: 3, 3: 1}[channels]
        if channels in takes or other not in takes:
            raise
        advice = "leave --grey out" if config.grey else "pass --grey"
        if config.data != "imagefolder":
            advice = f"pass an architecture for {channels}"
        raise ArgumentError(
            f"{config.arch} takes images with {other} channel{'s' * (other > 1)}, and those of "
            f"{config.data} have {channels}; {advice}"
        ) from error


def read_checkpoint(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The checkpoint of a run with these settings.

    Raises:
        FileError: there is none.
        StateError: the settings differ; names the first difference.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        raise FileError(f"{path} does not exist, so there is no run to resume; start one first")
    tree = read_tree(path)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT or tree.get("version") != VERSION:
        raise FileError(f"{path} is no checkpoint of this version of psap; start the run again")
    changed = difference(tree["config"], config)
    if changed is not None:
        raise StateError(
            f"{path} belongs to a run with other settings: {changed}; resume with the same ones"
        )
    return tree
