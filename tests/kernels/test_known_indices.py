"""Values of indices are looked at once, and again when they may have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import psap_kernels
from psap_kernels import _checks


@pytest.fixture(autouse=True)
def python_checks() -> Iterator[None]:
    """The compiled kernels check in C++, each time."""
    with psap_kernels.use_backend("reference"):
        yield


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "_waits", lambda index: not index.is_inference())


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    calls: list[str] = []
    real: Callable[..., Tensor] = getattr(Tensor, name)

    def call(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append(name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, name, call)
    return calls


@pytest.mark.usefixtures("as_on_a_device")
def test_rows_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, "unique")
    tensor, rows = torch.zeros(4, 2), torch.tensor([0, 2])
    for _ in range(3):
        psap_kernels.restore_filters_([tensor], [rows], [torch.ones(2, 2)])
    assert len(calls) == 1
    psap_kernels.restore_filters_([tensor], [rows.clone()], [torch.ones(2, 2)])
    assert len(calls) == 2


@pytest.mark.usefixtures("as_on_a_device")
def test_rows_that_changed_are_looked_at_again() -> None:
    tensor, rows, saved = torch.zeros(4, 2), torch.tensor([0, 2]), torch.ones(2, 2)
    psap_kernels.restore_filters_([tensor], [rows], [saved])
    rows[1] = 4
    with pytest.raises(ValueError, match="index 4, wanted 0 <= index < 4"):
        psap_kernels.restore_filters_([tensor], [rows], [saved])
    rows[1] = 0
    with pytest.raises(ValueError, match="names a row twice"):
        psap_kernels.restore_filters_([tensor], [rows], [saved])
    rows[1] = 3
    psap_kernels.restore_filters_([tensor], [rows], [saved])
    assert tensor[3].tolist() == [1, 1]


@pytest.mark.usefixtures("as_on_a_device")
def test_rows_are_looked_at_for_every_size() -> None:
    rows, saved = torch.tensor([0, 3]), torch.ones(2, 2)
    psap_kernels.restore_filters_([torch.zeros(4, 2)], [rows], [saved])
    with pytest.raises(ValueError, match="index 3, wanted 0 <= index < 3"):
        psap_kernels.restore_filters_([torch.zeros(3, 2)], [rows], [saved])


@pytest.mark.usefixtures("as_on_a_device")
def test_inference_tensors_count_no_versions() -> None:
    with torch.inference_mode():
        tensor, rows, saved = torch.zeros(4, 2), torch.tensor([0, 2]), torch.ones(2, 2)
        psap_kernels.restore_filters_([tensor], [rows], [saved])
        rows[1] = 9
        with pytest.raises(ValueError, match="index 9"):
            psap_kernels.restore_filters_([tensor], [rows], [saved])


def gate(terms: Tensor, offsets: Tensor, rows: int = 3) -> Tensor:
    sums = torch.zeros(2, 2, dtype=torch.float64)
    seen = torch.zeros(2, dtype=torch.int64)
    values = [torch.ones(rows)]
    psap_kernels.gate_stats_(sums, seen, values, values, terms, offsets)
    return sums


@pytest.mark.usefixtures("as_on_a_device")
def test_terms_are_looked_at_once_and_again_when_they_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terms = torch.tensor([[0, 0, 0], [0, 2, 2]], dtype=torch.int32)
    offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
    calls = counted(monkeypatch, "cpu")
    assert gate(terms, offsets).tolist() == [[1, 1], [1, 1]]
    first = len(calls)
    gate(terms, offsets)
    assert len(calls) == first > 0
    with pytest.raises(ValueError, match=r"terms\[1\] is \[0, 2, 2\]"):
        gate(terms, offsets, rows=2)
    terms[0, 0] = 1
    with pytest.raises(ValueError, match=r"terms\[0\] is \[1, 0, 0\]"):
        gate(terms, offsets)
    terms[0, 0] = 0
    offsets[1] = 3
    with pytest.raises(ValueError, match="offsets run from 0 to 2"):
        gate(terms, offsets)


def test_on_a_cpu_they_are_looked_at_each_time() -> None:
    tensor, rows, saved = torch.zeros(4, 2), torch.tensor([0, 2]), torch.ones(2, 2)
    psap_kernels.restore_filters_([tensor], [rows], [saved])
    rows.numpy()[1] = 0
    with pytest.raises(ValueError, match="names a row twice"):
        psap_kernels.restore_filters_([tensor], [rows], [saved])
