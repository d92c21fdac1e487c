"""Faults of the kinds that CUDA kernels have, put into the real kernels: each must be noticed.

What the emulator cannot notice is said in docs/ops.md.
"""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import emulation
import pytest
from emulation import Emulated
from fault_cases import CASES
from faults import FAULTS, MEMORY_FAULTS, Fault

CSRC = emulation.ROOT / "csrc"


def name(fault: Fault) -> str:
    return f"{fault.op}: {fault.name}"


def builds_with(fault: Fault, faults: list[Fault]) -> tuple[Fault, ...]:
    """The faults that share a build with this one, since none is in the way of another."""
    if fault.file:
        return (fault,)
    by_op = [[f for f in faults if f.op == op and not f.file] for op in CASES]
    place = next(own.index(fault) for own in by_op if fault in own)
    return tuple(own[place] for own in by_op if place < len(own))


@cache
def build(seeded: tuple[Fault, ...], *, sanitize: bool = False) -> Path:
    """The emulator of a copy of the kernels with faults in it."""
    with TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(CSRC, Path(folder, "csrc")))
        for fault in seeded:
            text = (copy / fault.path).read_text()
            assert text.count(fault.old) == 1, f"{name(fault)}: the text is not there once"
            (copy / fault.path).write_text(text.replace(fault.old, fault.new))
        return emulation.build(copy, sanitize=sanitize, faulty=True)


def complaint(module, op: str) -> str | None:
    """What the first order of threads that notices anything says."""
    for schedule in range(module.SCHEDULES):
        module.set_schedule(schedule)
        try:
            CASES[op](Emulated(module))
        except (AssertionError, module.EmulatorError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            module.set_schedule(0)
    return None


@pytest.mark.parametrize("op", CASES)
def test_sound_kernels_pass(op):
    emulation.require()
    assert complaint(emulation.emulator(), op) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", FAULTS, ids=name)
def test_a_fault_is_noticed(fault):
    emulation.require()
    said = complaint(emulation.load(build(builds_with(fault, FAULTS))), fault.op)
    assert said is not None
    assert re.search(fault.shows, said), said


def run_sanitized(library: Path, op: str):
    return emulation.run_sanitized(
        "import torch, emulation, fault_cases, pathlib\n"
        "torch.manual_seed(0)\n"
        f"module = emulation.load(pathlib.Path({str(library)!r}))\n"
        f"fault_cases.CASES[{op!r}](emulation.Emulated(module))\n"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", MEMORY_FAULTS, ids=name)
def test_the_sanitizers_notice_a_fault(fault):
    emulation.require()
    done = run_sanitized(build(builds_with(fault, MEMORY_FAULTS), sanitize=True), fault.op)
    assert done.returncode != 0
    assert re.search(fault.shows, done.stderr), done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", sorted({fault.op for fault in MEMORY_FAULTS}))
def test_the_sanitizers_pass_sound_kernels(op):
    emulation.require()
    done = run_sanitized(emulation.build(CSRC, sanitize=True), op)
    assert done.returncode == 0, done.stderr[-3000:]
