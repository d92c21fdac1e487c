"""Files are replaced whole or not at all: full disks, interrupts, kills, places that refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruner_nets import Chain, inputs

import psap
from psap.files import atomic_write, replacing
from psap.recipe import read_tree, write_tree

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


def result() -> psap.Result:
    model = Chain()
    return psap.apply(model, psap.plan(psap.trace(model, inputs()), ratio=0.5))


@pytest.fixture(scope="module")
def network() -> psap.Result:
    torch.manual_seed(0)
    return result()


def run(script: str, folder: Path) -> dict[str, Any]:
    """Run a script in a process of its own, in ``folder``; it prints JSON in its last line."""
    roots = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


FULL_DISK = """
import json, os, resource, torch
import psap
from psap.files import atomic_write
from psap.recipe import write_tree
from test_saving import result

small = result()
old = {}
for name in ("a.safetensors", "b.tree", "c.html", "d.pt2", "e.onnx"):
    open(name, "wb").write(b"old " + name.encode())
    old[name] = open(name, "rb").read()
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
found = {}
for name, write in {
    "a.safetensors": lambda: psap.save(small, "a.safetensors"),
    "b.tree": lambda: write_tree("b.tree", {"x": torch.ones(5000)}),
    "c.html": lambda: atomic_write("c.html", "x" * 5000),
    "d.pt2": lambda: psap.export_pt2(small, "d.pt2"),
    "e.onnx": lambda: psap.export_onnx(small, "e.onnx"),
    "new.safetensors": lambda: psap.save(small, "new.safetensors"),
}.items():
    try:
        write()
        found[name] = "written"
    except psap.PsapError as error:
        found[name] = f"{type(error).__name__}: {error}"
found["same"] = all(open(name, "rb").read() == text for name, text in old.items())
found["left"] = sorted(os.listdir("."))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
psap.save(small, "a.safetensors")  # there is space again
found["after"] = os.path.getsize("a.safetensors") > 1000
print(json.dumps(found))
"""


@POSIX
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A real failure of write(): the process may not write files above 1000 bytes."""
    found = run(FULL_DISK, tmp_path)
    for name in ("a.safetensors", "b.tree", "c.html", "d.pt2", "new.safetensors"):
        assert found[name].startswith(f"FileError: cannot write {name}"), found[name]
        assert "older file there is as it was. Free some space" in found[name]
    assert found["same"]
    assert found["e.onnx"].startswith("FileError: cannot write e.onnx"), found["e.onnx"]
    assert found["left"] == ["a.safetensors", "b.tree", "c.html", "d.pt2", "e.onnx"]
    assert found["after"]


KILLED = """
import json, os, random, signal, time, torch
from psap.recipe import read_tree, write_tree

random.seed(0)
trees = [{"round": torch.full((200_000,), float(i))} for i in range(2)]
write_tree("tree", trees[0])
seen, ends = set(), []
for number in range(12):
    kind = signal.SIGKILL if number % 2 else signal.SIGINT
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(tell, b"x")
            at = 0
            while True:
                at += 1
                write_tree("tree", trees[at % 2])
        except KeyboardInterrupt:
            os._exit(7)
        finally:
            os._exit(9)
    os.read(ready, 1)
    time.sleep(0.03 + 0.03 * random.random())
    os.kill(child, kind)
    os.close(ready), os.close(tell)
    status = os.waitpid(child, 0)[1]
    ends.append(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
    values = read_tree("tree")["round"]
    assert values.shape == (200_000,) and bool((values == values[0]).all())
    seen.add(float(values[0]))
    if kind == signal.SIGINT:
        assert os.listdir(".") == ["tree"], os.listdir(".")
    else:  # nobody can clean up after kill -9 but who writes there next
        write_tree("tree", trees[0])
        assert os.listdir(".") == ["tree"], os.listdir(".")
print(json.dumps({"seen": sorted(seen), "ends": ends, "left": os.listdir(".")}))
"""


@POSIX
def test_interrupts_and_kills_leave_a_whole_file(tmp_path: Path) -> None:
    found = run(KILLED, tmp_path)
    assert found["ends"] == [-7, int(signal.SIGKILL)] * 6
    assert found["left"] == ["tree"]
    assert found["seen"] and set(found["seen"]) <= {0.0, 1.0}


EVERY_CALL = """
import os, sys, torch
from psap.files import require_writable
from psap.recipe import read_tree, write_tree

def interrupted(work, at):
    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "call"
        if count == at:
            sys.settrace(None)
            raise KeyboardInterrupt("now")

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False

tree = {"a": torch.arange(5)}
write_tree("tree", tree)
for work in (lambda: write_tree("tree", tree), lambda: require_writable("tree")):
    at = 1
    while interrupted(work, at):
        assert os.listdir(".") == ["tree"], (at, os.listdir("."))
        at += 1
    assert at > 20
    assert torch.equal(read_tree("tree")["a"], tree["a"])
print("{}")
"""


def test_an_interrupt_at_the_entry_of_any_call_leaves_nothing(tmp_path: Path) -> None:
    assert run(EVERY_CALL, tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_whatever_fails_while_writing(
    error: type[BaseException],
    network: psap.Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "a.safetensors"
    psap.save(network, path)
    before = path.read_bytes()

    def half(_: Any, filename: Path, **__: Any) -> None:
        Path(filename).write_bytes(before[:100])
        raise error("now")

    monkeypatch.setattr("psap.files.save_file", half)
    with pytest.raises(error, match="now"):
        psap.save(network, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def _under_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "a"


PLACES: dict[str, tuple[Callable[[Path], Any], type[psap.PsapError], str]] = {
    "under a file": (_under_a_file, psap.FileError, "Not a directory; choose a folder"),
    "no folder": (
        lambda f: f / "none" / "a",
        psap.FileError,
        "No such file or directory; choose a folder that exists and is writable",
    ),
    "a folder": (lambda f: f, psap.FileError, "it is no regular file"),
    "a device": (lambda _: "/dev/null", psap.FileError, "it is no regular file"),
    "a kernel's folder": (lambda _: "/proc/self/a", psap.FileError, "choose a folder"),
    "a long name": (lambda f: f / ("x" * 300), psap.FileError, "File name too long"),
    "a null": (lambda f: f"{f}/a\0b", psap.FileError, "null"),
    "a number": (lambda _: 5, psap.ArgumentTypeError, "path is a int; pass a str"),
    "nothing": (lambda _: None, psap.ArgumentTypeError, "path is a NoneType"),
}


@POSIX
@pytest.mark.parametrize("place", PLACES)
def test_places_that_cannot_be_written(place: str, network: psap.Result, tmp_path: Path) -> None:
    make, error, message = PLACES[place]
    path = make(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for write in (
        lambda: psap.save(network, path),
        lambda: write_tree(path, 1),
        lambda: atomic_write(path, "x"),
        lambda: psap.export_pt2(network, path, check=False),
    ):
        with pytest.raises(error, match=message):
            write()
    assert sorted(os.listdir(tmp_path)) == before
    if place == "a device":
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("path", [5, None, "a\0b"])
def test_places_that_cannot_be_read(path: Any) -> None:
    for read in (lambda: read_tree(path), lambda: psap.load(path, Chain)):
        with pytest.raises(psap.PsapError, match=r"path is a|does not exist|null"):
            read()


@POSIX
def test_permissions_links_and_long_names_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "tree"
    mask = os.umask(0o027)
    try:
        write_tree(path, 1)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    write_tree(path, 2)
    assert path.stat().st_mode & 0o777 == 0o604
    link = tmp_path / "link"
    link.symlink_to(path)
    write_tree(link, 3)
    assert link.is_symlink() and read_tree(path) == read_tree(link) == 3
    long = tmp_path / ("x" * 240)
    write_tree(str(long), 4)
    assert read_tree(long) == 4
    assert sorted(os.listdir(tmp_path)) == ["link", "tree", "x" * 240]


def test_text_and_bytes(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "text ä")
    assert (tmp_path / "a").read_bytes() == "text ä".encode()
    atomic_write(tmp_path / "a", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"


def test_a_file_that_is_open_stays_what_it_was(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", {"x": torch.ones(1000)})
    values = read_tree(tmp_path / "tree")["x"]
    write_tree(tmp_path / "tree", {"x": torch.zeros(1000)})
    assert bool((values == 1).all())
    with pytest.raises(psap.FileError, match=r"No space left.*older file there is as it was"):  # noqa: SIM117
        with replacing(tmp_path / "tree"):
            raise OSError(28, "No space left on device")
    assert bool((read_tree(tmp_path / "tree")["x"] == 0).all())
    assert os.listdir(tmp_path) == ["tree"]


def test_an_interrupt_while_cleaning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = shutil.rmtree, []

    def interrupted(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt("now")
        real(*arguments, **options)

    monkeypatch.setattr("psap.files.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt, match="now"):
        atomic_write(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    assert os.listdir(tmp_path) == ["a"]
