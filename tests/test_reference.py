"""The reference page is what the docstrings say, and they say something of everything public."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import psap
from psap import data, record

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "reference.md").read_text()


def test_the_page_is_up_to_date(maker: ModuleType, page: str) -> None:
    assert page == maker.page(), "run: python docs/make_reference.py"


def test_every_public_name_has_a_heading(page: str) -> None:
    headings = {line.removeprefix("### ") for line in page.splitlines()}
    assert {f"psap.{name}" for name in psap.__all__} <= headings


def test_what_belongs_to_a_report_and_data_has_a_heading(page: str) -> None:
    headings = {line.removeprefix("### ") for line in page.splitlines()}
    assert {f"psap.data.{name}" for name in set(data.__all__) - {"DataName"}} <= headings
    assert {f"psap.{n}" for n in ("record.build", "record.Measured", "report.write")} <= headings
    assert "psap.measure.compare_latency" in headings  # makes what Measured.latency wants
    assert "`'digits' \\| 'cifar10' \\| 'imagefolder'`" in page


@pytest.mark.parametrize("owner", [psap.Config, psap.Target, record.Measured, data.Pictures])
def test_every_setting_has_its_type_default_and_meaning(owner: type, page: str) -> None:
    name = f"{owner.__module__}.{owner.__name__}".replace(".config", "").replace(".folder", "")
    start = page.index(f"### {name}\n")
    rows = [line for line in page[start:].split("\n### ")[0].splitlines() if line[:3] == "| `"]
    told = {row.split("`")[1]: row for row in rows}
    assert list(told) == [field.name for field in dataclasses.fields(owner)]
    for row in told.values():
        cells = [cell.strip() for cell in row.replace("\\|", "/").strip("|").split("|")]
        assert len(cells) == 4 and all(cells), row


def test_every_parameter_is_explained(maker: ModuleType) -> None:
    """Of every public function and method: an entry for each parameter, and no others."""
    found = [(name, getattr(psap, name)) for name in psap.__all__]
    for name, value in [*found]:
        if inspect.isclass(value):
            found += [(f"{name}.{k}", v) for k, v in vars(value).items() if k[0] != "_"]
    for name, value in found:
        if not inspect.isfunction(value) and value is not psap.Pruner:
            continue
        doc = inspect.getdoc(value) or ""
        told = [item for item, _ in maker.items(maker.sections(doc).get("Args", []))]
        wanted = list(maker.signature(value).parameters)
        assert told == wanted or (len(wanted) == 1 and not told), name


def test_a_name_that_is_in_no_part_is_noticed(
    maker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(maker.PARTS, "Files", ("save", "load"))
    with pytest.raises(ValueError, match=r"differ: \['export_onnx', 'export_pt2'\]"):
        maker.page()


def test_a_name_of_the_data_that_is_in_no_part_is_noticed(
    maker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "__all__", [*data.__all__, "load_mnist"])
    with pytest.raises(ValueError, match=r"MODULES and psap\.data differ: \['load_mnist'\]"):
        maker.page()


def test_docstrings_are_read(maker: ModuleType) -> None:
    text = (
        "Do.\n\nArgs:\n    a: first\n        and second: both.\n    b: x | y.\n\nReturns:\n    A."
    )
    found = maker.sections(text)
    assert list(maker.items(found["Args"])) == [("a", "first and second: both."), ("b", "x | y.")]
    assert "".join(maker.body(text, {})).endswith("**Returns** A.")
    assert maker.spoken("``a|b``") == "`a\\|b`"
    with pytest.raises(ValueError, match=r"text after the section Args: 'More\.'"):
        maker.sections("Do it.\n\nArgs:\n    a: first.\nMore.")
