"""Backends to test, and poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import emulation
import pytest
import torch

import psap_kernels
from psap_kernels import build_info


def _require_compiled() -> None:
    part = build_info()["parts"]["_C"]
    if part["available"]:
        return
    reason = f"the C++ backend is missing: {part['why_missing']}"
    if os.environ.get("PSAP_REQUIRE_EXT") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def compiled() -> None:
    """Skip (or fail, with PSAP_REQUIRE_EXT=1) where nothing is compiled."""
    _require_compiled()


@pytest.fixture(params=["reference", "cpu", "cpu-portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test on the reference, on the fastest CPU kernels and on the portable ones."""
    if request.param != "reference":
        _require_compiled()
    if request.param == "cpu-portable":
        monkeypatch.setenv("PSAP_CPU_CAPABILITY", "default")
    with psap_kernels.use_backend(request.param.removesuffix("-portable")):
        yield request.param


@pytest.fixture
def plain() -> emulation.Emulated:
    """The CUDA kernels on the emulator, threads and blocks in their order."""
    emulation.require()
    return emulation.Emulated(emulation.emulator())


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (or the largest integer): unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
