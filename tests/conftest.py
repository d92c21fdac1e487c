"""Shared by all tests: threads, what is skipped and why, where larger data sets are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: idle OpenMP threads sleep and leave the cores to other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

# Before triton is imported, by whatever test: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for benchmarks/; at the end, so that an installed psap goes first

settings.register_profile("psap", deadline=None, derandomize=True, database=None)
settings.load_profile("psap")


def pytest_configure(config: pytest.Config) -> None:
    # The networks of the tests are too small for a second thread to help.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.option.markexpr
    skips = {
        "slow": "slow" not in chosen and "slow; run it with -m slow",
        "zoo": "zoo" not in chosen and "needs torchvision and timm; run `make zoo`",
        "gpu": not torch.cuda.is_available() and "needs a CUDA device",
    }
    for item in items:
        for marker, reason in skips.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """For tests that compile: Dynamo gives up on code that was compiled too often, by any test."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of larger data sets."""
    folder = Path(os.environ.get("PSAP_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("set PSAP_DATA_DIR to a folder with cifar10-jpeg/ and cifar-resnets/")
    return folder


@pytest.fixture(scope="module")
def no_export() -> Iterator[None]:
    """Runs without exports, which have tests of their own and take longer than tiny runs.

    Factories of networks in the tests are found by name.
    """
    from psap import run as runs

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setattr(runs.Run, "_export", lambda self, listener: None)
        yield
