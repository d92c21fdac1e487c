"""What is read is what was written, bit for bit; what killed writers left is removed, no more."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from pruner_nets import Chain, inputs
from safetensors.torch import load_file, save_file

import psap
from psap import files
from psap.files import CHECKSUM, atomic_write, checksum, read
from psap.recipe import read_tree, write_tree

DATA = Path(__file__).parent / "data"
POSIX = pytest.mark.skipif(os.name != "posix", reason="asks the system for processes")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Chain()
    plan = psap.plan(psap.trace(model, inputs()), ratio=0.5)
    psap.save(psap.apply(model, plan), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
        return found


# The checksum


def test_every_flipped_bit_of_a_tensor_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    places = [start, len(content) - 1]
    places += np.random.default_rng(0).integers(start, len(content), 60).tolist()
    for at, place in enumerate(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << at % 8
        saved.write_bytes(damaged)
        with pytest.raises(psap.FileError, match=r"small\.safetensors is damaged: its CRC-32 is"):
            psap.load(saved, Chain)
    saved.write_bytes(content)
    psap.load(saved, Chain)


def test_a_flipped_bit_of_a_tree_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    write_tree(path, {"x": torch.arange(1000.0), "n": 3})
    content = bytearray(path.read_bytes())
    content[-7] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(psap.FileError, match=r"tree is damaged: .*copy it anew, or go back to an"):
        read_tree(path)


def test_the_recipe_names_and_shapes_count_too(saved: Path) -> None:
    tensors, known = load_file(saved), metadata(saved)
    assert known[CHECKSUM] == checksum(tensors, known["psap"])
    swapped = {**tensors, "bn1.weight": tensors["bn1.bias"], "bn1.bias": tensors["bn1.weight"]}
    assert tensors["bn1.bias"].shape == tensors["bn1.weight"].shape
    flat = {**tensors, "conv1.weight": tensors["conv1.weight"].flatten()}
    typed = {**tensors, "bn1.bias": tensors["bn1.bias"].view(torch.int32)}
    for found in (swapped, flat, typed):
        save_file(found, saved, metadata=known)
        with pytest.raises(psap.FileError, match="is damaged: its CRC-32"):
            psap.load(saved, Chain)
    text = known["psap"].replace('"macs": ', '"macs":  ')
    save_file(tensors, saved, metadata={**known, "psap": text})
    with pytest.raises(psap.FileError, match="is damaged: its CRC-32"):
        psap.load(saved, Chain)


def test_files_without_a_checksum_still_load(saved: Path) -> None:
    before = psap.load(saved, Chain).state_dict()
    save_file(load_file(saved), saved, metadata={"psap": metadata(saved)["psap"]})
    after = psap.load(saved, Chain).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for golden in ("golden_v1.safetensors", "golden_tree_v1.safetensors"):
        assert CHECKSUM not in metadata(DATA / golden)
        assert read(DATA / golden, "file")[0]


def test_known_checksums() -> None:
    """They may never change: files that exist say them."""
    assert checksum({}, "") == "00000000"
    assert checksum({}, "123456789") == "cbf43926"  # the check value of CRC-32
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.zeros(0), "c": torch.tensor(True)}
    parts = [b"{}", b"a torch.float32 (0,)", b"b torch.float32 (2, 3)"]
    parts += [struct.pack("<6f", *range(6)), b"c torch.bool ()", b"\x01"]
    assert checksum(tensors, "{}") == f"{zlib.crc32(b''.join(parts)):08x}" == "23b3b9b8"


# What killed processes leave


def _name(process: int, place: str | None = None) -> str:
    return f".a.psap-{place or files._place()}-{process}-0123456789abcdef"


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@POSIX
def test_only_files_of_ended_processes_are_removed(tmp_path: Path, gone: int) -> None:
    others = {
        _name(os.getpid()),  # another thread of this process writes it
        _name(os.getppid()),
        _name(1),
        _name(gone, "0" * 8),  # another machine, or another container
        _name(gone)[1:],
        _name(gone) + "0",
        f".a.{gone}",
        "a",
    }
    for name in (*others, _name(gone)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "whole").write_text("x")
    atomic_write(tmp_path / "new", "y")
    assert set(os.listdir(tmp_path)) == {*others, "new"}


@POSIX
def test_nothing_is_removed_through_a_link(tmp_path: Path, gone: int) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / _name(gone)).symlink_to(tmp_path / "kept")
    (tmp_path / _name(gone).replace(".a", ".b")).mkdir()
    (tmp_path / _name(gone).replace(".a", ".b") / "whole").symlink_to(tmp_path / "kept" / "file")
    atomic_write(tmp_path / "new", "y")
    assert sorted(os.listdir(tmp_path)) == [_name(gone), "kept", "new"]
    assert (tmp_path / "kept" / "file").read_text() == "x"


@POSIX
def test_what_a_killed_writer_left_is_what_the_next_one_looks_for(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from psap.files import replacing\n"
        "with replacing('a\\nb' if len(sys.argv) > 1 else 'tree') as temporary:\n"
        "    (temporary.parent / '.tmp123').touch()  # as safetensors does\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = str(Path(__file__).parents[1])
    for more in ([], ["odd"]):
        subprocess.run(
            [sys.executable, "-c", script, *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root},
            check=False,
        )
        (left,) = os.listdir(tmp_path)
        assert re.match(r"\.(tree|a\nb)\.psap-", left)
        with files.replacing(tmp_path / "other"):
            assert left not in os.listdir(tmp_path)
        (tmp_path / "other").unlink()


@POSIX
def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "a") as temporary:
        temporary.write_text("a")
        atomic_write(tmp_path / "b", "b")
    assert (tmp_path / "a").read_text() == "a" and sorted(os.listdir(tmp_path)) == ["a", "b"]
