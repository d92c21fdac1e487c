"""Files: safetensors plus JSON, with a checksum; written whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from psap.errors import ArgumentTypeError, FileError

Path_ = str | os.PathLike[str]
CHECKSUM = "psap-crc32"
"""Where a file says its checksum, in its metadata."""
TEMPORARY = re.compile(r"\..*\.psap-([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{16}", re.DOTALL)
"""Name of a folder in which a file is being written: by which process, and where that runs."""


@contextmanager
def replacing(path: Path_) -> Iterator[Path]:
    """Give a temporary path beside ``path``; move it there when the block succeeds.

    Whatever fails (no space, no permission, an interrupt), an older file at ``path`` survives.

    Raises:
        FileError: the file cannot be written.
    """
    target = checked(path)
    temporary = _temporary(target)
    room = temporary.parent
    try:
        _sweep(target.parent)
        mode = _create(target, temporary)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)  # save_file makes its own
        temporary.replace(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(
            f"cannot write {target}: {error}; an older file there is as it was. Free some space or "
            "choose another folder"
        ) from error
    finally:
        try:
            _remove(room)
        except BaseException:  # an interrupt, even before the first line of it
            _remove(room)
            raise


def require_writable(path: Path_) -> None:
    """Check that `replacing` can write there, before something that takes long.

    Raises:
        ArgumentTypeError: it is no path.
        FileError: the file cannot be written.
    """
    target = checked(path)
    temporary = _temporary(target)
    room = temporary.parent
    try:
        _create(target, temporary)
    finally:
        try:
            _remove(room)
        except BaseException:
            _remove(room)
            raise


def _temporary(target: Path) -> Path:
    """A file in a folder of its own beside a file, since save_file makes more of them.

    It is named before it is made: there is no moment at which an interrupt could leave it behind.
    """
    who = f"{_place()}-{os.getpid()}-{secrets.token_hex(8)}"
    return target.parent / f".{target.name[:40]}.psap-{who}" / "whole"


def _remove(room: Path) -> None:
    shutil.rmtree(room, ignore_errors=True)


def _create(target: Path, temporary: Path) -> int:
    """Make an empty file in a new folder; return the permissions that ``target`` shall have."""
    try:
        if target.exists() and not target.is_file():
            raise FileError(f"cannot write {target}: it is no regular file; choose another path")
        temporary.parent.mkdir(0o700)
        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        made = target if target.exists() else temporary  # the system applied the umask
        os.close(handle)
        return made.stat().st_mode & 0o777
    except OSError as error:
        raise FileError(
            f"cannot write {target}: {error.strerror}; choose a folder that exists and is writable"
        ) from error


def checked(path: Any) -> Path:
    """A path, with symbolic links resolved, so that a link goes on pointing to its file.

    Raises:
        ArgumentTypeError: it is no path.
        FileError: no file can have this name.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(f"path is a {type(path).__name__}; pass a str or a pathlib.Path")
    found = Path(path)
    if "\0" in str(found):
        raise FileError(f"{str(found)!r} is no path: it holds a null character")
    return Path(os.path.realpath(found)) if os.path.islink(found) else found


def atomic_write(path: Path_, data: str | bytes) -> None:
    """Replace a file by ``data``; an older one survives a failure.

    Raises:
        FileError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write(path: Path_, tensors: Mapping[str, Tensor], body: Mapping[str, Any]) -> None:
    """Write tensors and a JSON body to one file, atomically, with a checksum of both.

    Raises:
        ArgumentTypeError: a value cannot be written.
        FileError: the file cannot be written; an older one survives.
    """
    plain: dict[str, Tensor] = {}
    owned: set[int] = set()
    try:
        for name, tensor in tensors.items():
            value = tensor.detach().cpu().contiguous()
            if value.untyped_storage().data_ptr() in owned:  # safetensors refuses views of others
                value = value.clone()
            owned.add(value.untyped_storage().data_ptr())
            plain[name] = value
        text = json.dumps(body)
        metadata = {"psap": text, CHECKSUM: checksum(plain, text)}
        with replacing(path) as temporary:
            save_file(plain, temporary, metadata=metadata)
    except (LookupError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(f"a value cannot be written to {path}: {error}") from error


def read(path: Path_, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and the JSON body of a file; files of older versions have no checksum.

    Raises:
        FileError: there is no such file, it is no file of ours, or not a bit what was written.
    """
    source = checked(path)
    if not os.path.isfile(source):
        wrong = "is no regular file" if os.path.exists(source) else "does not exist"
        raise FileError(f"{source} {wrong}; pass the path of a {what}")
    try:
        with safetensors.safe_open(source, framework="pt") as opened:
            metadata = opened.metadata() or {}
            body = json.loads(metadata["psap"]) if "psap" in metadata else None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FileError(
            f"{source} cannot be read: {error}; it is damaged or cut short, or no file of psap.save"
        ) from error
    if not isinstance(body, dict):
        raise FileError(
            f"{source} is a safetensors file, but no {what}; it was not written by psap"
        )
    known = metadata.get(CHECKSUM)
    if known is not None and known != (found := checksum(tensors, metadata["psap"])):
        raise FileError(
            f"{source} is damaged: its CRC-32 is {found}, and {known[:8]!r} was written with it; "
            "copy it anew, or go back to an older file"
        )
    return tensors, body


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """CRC-32, as eight hexadecimal digits, of a text and of contiguous tensors in the CPU's memory.

    Names, dtypes and shapes count as well as values. It finds any flipped bit; it is no signature.
    """
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


@functools.cache
def _place() -> str:
    """Where numbers of processes mean the same: this machine, and in it this container."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _sweep(folder: Path) -> None:
    """Remove what killed processes left of their writing; never what another one still writes."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = TEMPORARY.fullmatch(entry.name)
            if found and found[1] == _place() and _is_gone(int(found[2])):
                shutil.rmtree(entry.path, ignore_errors=True)  # refuses links


def _is_gone(process: int) -> bool:
    """Whether there is no such process; False if nobody knows."""
    if os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
