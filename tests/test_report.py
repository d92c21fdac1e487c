"""The report: complete, safe, self-contained, the same bytes for the same record."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest
import report_records as records

from psap import report
from psap.errors import ArgumentError, FileError, PsapError
from psap.events import Candidate, PruneEvent, WindowEvent
from psap.report.fates import Fate, lives
from psap.report.history import prune_epochs
from psap.report.record import read
from psap.report.svg import ticks
from psap.report.text import escape, percent, ranges, scientific, short_count, signed

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(HTMLParser):
    """Fails on tags that do not match; collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def check(page: str) -> Checker:
    """The page is well formed, loads nothing, and each of its pictures is XML with a name."""
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    ids = [attributes["id"] for _, attributes in checker.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in checker.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "image", "use"}
        assert not {"src", "href", "xlink:href", "srcset", "action"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert [tag for tag, _ in checker.tags].count("script") == 1
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    for drawing in drawings(page):
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        named = [root[0].get("id"), root[1].get("id")]
        assert (root.get("aria-labelledby") or "").split() == named
        assert [child.tag for child in root[:2]] == ["title", "desc"]
        assert all(child.text and child.text.strip() for child in root[:2])
    assert "nan" not in re.findall(r"\b(?:nan|inf|None)\b", " ".join(checker.text))
    return checker


def drawings(page: str) -> list[str]:
    """The outermost svg elements."""
    found, depth, start = [], 0, 0
    for match in re.finditer(r"<svg\b[^>]*?(/?)>|</svg>", page):
        if match[0] == "</svg>":
            depth -= 1
            if depth == 0:
                found.append(page[start : match.end()])
        elif not match[1]:
            start = match.start() if depth == 0 else start
            depth += 1
    assert depth == 0
    return found


@pytest.fixture
def small() -> dict[str, Any]:
    return records.make(records.residual(7), steps=5)


def minimal() -> dict[str, Any]:
    return {"format": "psap-report", "version": 1, "groups": [], "layers": []}


SIZES = {
    "8 layers": (records.residual(7), 5),
    "60 layers": (records.residual(61), 5),
    "97 layers, many steps": (records.residual(97), 14),
    "1000 channels": ({"wide": 1000, "narrow": 3}, 3),
    "one shot": (records.residual(19), 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_pages_are_complete_and_self_contained(name: str) -> None:
    sizes, steps = SIZES[name]
    record = records.make(sizes, steps=steps)
    page = report.render(record)
    assert page == report.render(copy.deepcopy(record))
    assert page == report.render(json.loads(json.dumps(record)))
    checker = check(page)
    text = "".join(checker.text)
    for title in ("Widths", "Training", "Every channel", "Left alone", "Verification"):
        assert f"{title}" in text
    assert ("Sparsity sets the ratio" in text) == (steps > 0)
    assert ("Supervised and restored" in text) == (steps > 0)
    cells = sum(drawing.count("v10h-10z") for drawing in drawings(page))
    assert cells == sum(group["size"] for group in record["groups"])
    for layer in record["layers"]:
        assert layer["name"] in text
    assert not re.search(r"https?:", page)


def test_every_section_is_optional(small: dict[str, Any]) -> None:
    check(report.render(minimal()))
    for key in set(small) - set(minimal()):
        check(report.render({name: value for name, value in small.items() if name != key}))
        check(report.render({**small, key: None}))
        check(report.render({**minimal(), key: small[key]}))


def test_the_head_says_what_was_measured(small: dict[str, Any]) -> None:
    page = report.render(small)
    tiles = re.findall(r"<dt>([^<]*)</dt><dd><strong>(.*?)</strong>", page)
    shown = {name: re.sub(r"\s", " ", figure) for name, figure in tiles}
    assert shown["Accuracy"] == "98.1 %"
    assert shown["Latency"] == "2.17×"  # noqa: RUF001
    assert "10<sup>−15</sup>" in shown["Relative error"]  # noqa: RUF001
    macs = small["compare"]["small"]["macs"] / small["compare"]["dense"]["macs"]
    assert shown["MACs kept"] == f"{100 * macs:.1f} %"
    del small["compare"]  # the layers know the MACs and parameters as well
    again = report.render(small)
    assert "MACs kept</dt>" in again and "Latency</dt>" not in again


def test_layers_that_a_proof_says_little_of_are_named(small: dict[str, Any]) -> None:
    assert "the same for all inputs" not in report.render(small)
    small["verification"]["silent"] = ["head.<1>"]
    assert "the same for all inputs</dt><dd><code>head.&lt;1&gt;</code>" in report.render(small)


def test_events_of_psap_are_understood(small: dict[str, Any]) -> None:
    group = {"name": "g", "size": 4, "kept": [0, 3], "reason": None, "layers": ["g"]}
    event = PruneEvent(
        step=1,
        call=1,
        iteration=10,
        target_share=0.5,
        macs_share=0.4,
        parameters_share=0.4,
        sparsity={"g": 0.4},
        sparsity_ema={"g": 0.4},
        widths={"g": 1},
        pruned={"g": [1, 2, 3]},
        returned={},
    )
    came = Candidate(group="g", channel=3, value=2e-4, z=4.5, restored=True, reason="useful")
    window = WindowEvent(
        step=1, iteration=18, observed=8, skipped=0, supervised={"g": 3}, candidates=(came,)
    )
    record = {**small, "groups": [group], "steps": [event.to_json()]}
    record["windows"] = [window.to_json()]
    page = report.render(record)
    check(page)
    assert "window of step 1: z 4.5, value 0.0002, restored (useful)" in page
    assert "window of step 1: watched, no positive value" in page
    assert "3 freshly pruned channels were watched in 1 window; 1 came back" in page


def test_fates() -> None:
    step = {"call": 1, "iteration": 1}
    record = read(
        {
            **minimal(),
            "groups": [{"name": "g", "size": 7, "kept": [0, 2, 3], "reason": None, "layers": []}],
            "steps": [
                {**step, "step": 1, "pruned": {"g": [1, 2, 4, 99]}, "returned": {}},
                {**step, "step": 2, "pruned": {"g": [3, 4, 6]}, "returned": {"g": [4]}},
                {**step, "step": 3, "pruned": {"g": []}, "returned": {"g": [3]}},
            ],
            "windows": [
                {
                    "step": 1,
                    "supervised": {"g": 3},
                    "candidates": [
                        {"group": "g", "channel": 2, "value": 1, "z": 9, "restored": True}
                    ],
                }
            ],
        }
    )
    found = lives(record.groups[0], record.steps, record.windows)
    fates = [life.fate for life in found]
    assert fates == [
        Fate.KEPT,
        Fate.PRUNED,
        Fate.RESTORED,
        Fate.RETURNED,
        Fate.PRUNED_AGAIN,
        Fate.PRUNED,
        Fate.PRUNED,
    ]
    assert [life.step for life in found] == [None, 1, None, None, 2, None, 2]
    assert found[4].story.splitlines() == [
        "pruned at step 1",
        "window of step 1: watched, no positive value",
        "brought back by the ranking at step 2",
        "pruned at step 2",
        "pruned again",
    ]


def test_prune_steps_stand_at_the_epochs_of_the_pruner(small: dict[str, Any]) -> None:
    record = read(small)
    found = [(epoch, step.step) for epoch, step in prune_epochs(record.history, record.steps)]
    assert found == [(9, 1), (11, 2), (13, 3), (15, 4), (17, 5)]
    assert prune_epochs(record.history[:3], record.steps) == []


def test_first_epochs_do_not_flatten_the_others(small: dict[str, Any]) -> None:
    page = report.render(small)
    (drawing,) = [found for found in drawings(page) if 'id="history-t"' in found]
    note = "<span>accuracies below 90% are not drawn</span>"
    assert page.index(note) < page.index(drawing)  # in the legend: nothing runs through it there
    assert "90%" in drawing and "below 90%" not in drawing
    assert "</i>dense network before pruning, " in page
    small["history"] = small["history"][8:]
    page = report.render(small)
    assert "not drawn" not in page and "dense network before pruning" not in page


@pytest.mark.parametrize("depth", [7, 61])
def test_hostile_names_are_only_text(depth: int) -> None:
    page = report.render(records.hostile(records.make(records.residual(depth), steps=5)))
    checker = check(page)
    assert "<script>alert" not in page and "\x00" not in page
    assert any("<script>alert(1)</script>" in text for text in checker.text)
    page.encode()


@pytest.mark.parametrize("bad", [None, math.nan, -math.inf, "3", True, 10**400, 1e99, -1.0])
def test_numbers_that_are_none_show_a_dash(small: dict[str, Any], bad: Any) -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: item if key in structural else spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return bad if isinstance(value, float | int) and not isinstance(value, bool) else value

    structural = {"version", "groups", "step", "channel", "pruned", "returned", "before", "after"}
    checker = check(report.render(spoil(small)))
    assert not re.search(r"\b(nan|inf|None)\b", "".join(checker.text))
    if bad not in (1e99, -1.0):
        assert "–" in checker.text  # noqa: RUF001


def test_unknown_widths(small: dict[str, Any]) -> None:
    for layer in small["layers"]:
        layer["before"] = [None, math.nan]
    check(report.render(small))
    small["layers"] = [{"name": "x", "before": [0, 0], "after": [0, 0]}]
    small["groups"] = [{"name": "x", "size": 0, "kept": []}]
    check(report.render(small))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "psap-recipe"}, "not a report record: its format is 'psap-recipe'"),
        ({"format": None}, "not a report record"),
        ({"version": 2}, "version 2, this psap reads version 1"),
        ({"version": "1"}, "version '1'"),
        ({"groups": 3}, "groups is int 3, wanted a list"),
        ({"groups": None, "layers": "abc"}, "layers is str 'abc', wanted a list"),
        ({"groups": [1]}, r"groups\[0\] is int 1, wanted an object"),
        ({"groups": [{"name": "a", "size": 2}]}, r"groups\[0\] lacks the key 'kept'"),
        ({"groups": [{"name": 1, "size": 2, "kept": []}]}, r"groups\[0\].name is int 1"),
        ({"groups": [{"name": "a", "size": -1, "kept": []}]}, r"size is int -1"),
        ({"groups": [{"name": "a", "size": 2.5, "kept": []}]}, r"size is float 2.5"),
        ({"groups": [{"name": "a", "size": 10**9, "kept": []}]}, "at most 1000000 channels"),
        ({"groups": [{"name": "a", "size": 2, "kept": [2]}]}, "wanted an integer < 2"),
        ({"groups": [{"name": "a", "size": 2, "kept": ["x"]}]}, "an index in groups"),
        ({"layers": [{"name": "a", "before": [1], "after": [1, 1]}]}, r"wanted \[out, in\]"),
        ({"layers": [{"name": "a", "before": [1, -1], "after": [1, 1]}]}, r"\[out, in\] >= 0"),
        ({"steps": [{"step": "one"}]}, r"steps\[0\].step is str 'one'"),
        ({"steps": [{"step": 1, "sparsity": []}]}, r"steps\[0\].sparsity is list"),
        ({"windows": [{"step": 1, "candidates": [{"group": "g"}]}]}, "lacks the key 'channel'"),
        ({"history": {}}, "history is dict {}, wanted a list"),
        ({"compare": []}, "compare is list"),
        ({"compare": {"dense": {"latency_ms": 3}}}, "compare.dense.latency_ms is int 3"),
        ({"title": 5}, "title is int 5, wanted a string"),
        ({"config": {"a": {(1, 2): 3}}}, "config is not JSON"),
    ],
)
def test_broken_records_say_what_is_broken(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        report.render({**minimal(), **change})
    assert isinstance(caught.value, ValueError | PsapError)


def test_records_that_lack_what_is_needed() -> None:
    for record in ([], None, "x"):
        with pytest.raises(ArgumentError, match="not a report record"):
            report.render(record)  # type: ignore[arg-type]
    for key in ("groups", "layers"):
        record = minimal()
        del record[key]
        with pytest.raises(ArgumentError, match=f"lacks the key '{key}'"):
            report.render(record)


def test_write(tmp_path: Any, small: dict[str, Any]) -> None:
    path = report.write(small, tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == report.render(small)
    report.write(minimal(), str(path))
    assert path.read_text(encoding="utf-8") == report.render(minimal())
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Any, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*report.html.*No space left on device"):
        report.write(small, path)
    with pytest.raises(ArgumentError, match="not a report record"):
        report.write({}, path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_places_that_cannot_be_written(tmp_path: Any) -> None:
    with pytest.raises(FileError, match="cannot write"):
        report.write(minimal(), tmp_path / "missing" / "report.html")
    with pytest.raises(FileError, match="cannot write"):
        report.write(minimal(), tmp_path)


def test_numbers_read_well() -> None:
    plain = [short_count(v) for v in (0, 999, 1000, 999_600, 12_345_678, 4.1e9)]
    assert [re.sub(r"\s", " ", text) for text in plain] == [
        "0",
        "999",
        "1.00 k",
        "1.00 M",
        "12.3 M",
        "4.10 G",
    ]
    assert signed(-0.04) == "0.0" and signed(1.25) == "+1.2"
    assert ranges([5, 1, 2, 3]) == "1–3, 5"  # noqa: RUF001
    assert "<sup>−6</sup>" in scientific(1.9e-6) and scientific(0.0) == "0"  # noqa: RUF001
    assert percent(None) == "–"  # noqa: RUF001
    assert escape("a\x07<b>") == "a\N{REPLACEMENT CHARACTER}&lt;b&gt;"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.62, 0.98), (-3, 1e9), (5, 5), (1e-300, 2e-300), (-1e308, 1e308)]
)
def test_ticks_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found == sorted(set(found))
    if high - low < math.inf:
        assert found[0] <= low and found[-1] >= high
