"""Plans as JSON: the round trip, and files that mean harm."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import assert_exact, image, randomise
from zoo import CASES

import psap
from psap import planfile


def _plan(name: str = "residual") -> psap.Plan:
    return psap.plan(psap.trace(randomise(CASES[name].make()), CASES[name].inputs), ratio=0.4)


@pytest.mark.parametrize("name", ["residual", "flatten", "two inputs, dict output", "slices"])
def test_round_trip(name: str) -> None:
    plan = _plan(name)
    read = psap.Plan.from_json(plan.to_json())
    assert read == plan
    assert read.graph is None and plan.graph is not None
    assert read.to_json() == plan.to_json()
    assert read.explain() == plan.explain()


def test_a_read_plan_can_be_applied() -> None:
    model = randomise(CASES["residual"].make())
    plan = psap.Plan.from_json(psap.plan(psap.trace(model, image(1, 3, 8, 8)), ratio=0.4).to_json())
    assert_exact(model, plan, psap.apply(model, plan).model, (image(),))


@given(st.sets(st.integers(0, 60), min_size=1))
def test_any_index_list_survives(indices: set[int]) -> None:
    kept = tuple(sorted(indices))
    body = {"size": 61, "kept": planfile.packed(kept)}
    assert planfile._Reader().unpack(body, "x") == kept


def test_runs_are_written_short() -> None:
    assert planfile.packed([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"


BODY = json.loads(_plan().to_json())
NEW = ("dropped", "without")
"""What older plans do not have."""


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Change the value at a path; the last item is the value."""
    *steps, key, value = path

    def change(body: dict[str, Any]) -> None:
        at: Any = body
        for step in steps:
            at = at[step]
        at[key] = value

    return change


def _drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    *steps, key = path

    def change(body: dict[str, Any]) -> None:
        at: Any = body
        for step in steps:
            at = at[step]
        del at[key]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set("format", "other"), "this is no plan"),
        (_drop("format"), "this is no plan"),
        (_set("version", 2), "format version 2, this psap reads 1"),
        (_set("version", None), "format version None"),
        (_set("version", "9" * 1000), "format version 9{40},"),
        *((_drop(key), "damaged") for key in BODY if key not in ("format", "version", *NEW)),
        *((_set(key, None), "damaged") for key in BODY if key not in ("format", "version")),
        *((_set(key, 3), "damaged") for key in BODY if key not in ("format", "version")),
        (_set("groups", 0, None), "damaged"),
        (_set("groups", 0, "name", 3), "damaged at 'name'"),
        (_set("groups", 0, "size", "8"), "damaged at 'stem'"),
        (_set("groups", 0, "size", True), "damaged at 'stem'"),
        (_set("groups", 0, "size", -1), "damaged at 'stem'"),
        (_set("groups", 0, "size", 8.0), "damaged at 'stem'"),
        (_set("groups", 0, "size", 1 << 40), "damaged at 'stem'"),
        (_set("groups", 0, "layers", "stem"), "damaged at 'stem'"),
        (_set("groups", 0, "layers", [1]), "damaged at 'stem'"),
        (_set("groups", 0, "kept", [0, 1]), "damaged at 'kept'"),
        (_set("groups", 0, "kept", ""), "'' is no index range"),
        (_set("groups", 0, "kept", "0-"), None),
        (_set("groups", 0, "kept", "-1"), "'-1' is no index range"),
        (_set("groups", 0, "kept", "1.5"), "'1.5' is no index range"),
        (_set("groups", 0, "kept", "0 1"), "'0 1' is no index range"),
        (_set("groups", 0, "kept", "0-1-2"), "is no index range"),
        (_set("groups", 0, "kept", "٣"), "is no index range"),
        (_set("groups", 0, "kept", "9" * 5000), "is no index range"),
        (_set("groups", 0, "kept", "8"), "out of order or range"),
        (_set("groups", 0, "kept", "3,2"), "out of order or range"),
        (_set("groups", 0, "kept", "2,2"), "out of order or range"),
        (_set("groups", 0, "kept", "0-3,3-4"), "out of order or range"),
        (_set("groups", 0, "kept", "4-2"), "out of order or range"),
        (_set("groups", 0, "kept", "0-99999999999"), "out of order or range"),
        (_set("sides", 0, "dim", -1), "damaged"),
        (_set("sides", 0, "dim", "0"), "damaged"),
        (_set("sides", 0, "dim", 1 << 70), "damaged"),
        (_set("sides", 0, "role", "both"), "damaged"),
        (_set("sides", 0, "size", float("inf")), "damaged"),
        (_set("before", "macs", float("inf")), "damaged at 'before'"),
        (_set("before", "macs", float("nan")), "damaged at 'before'"),
        (_set("after", "parameters", -1), "damaged at 'after'"),
        (_set("layers", 0, [1]), "damaged"),
        (_set("layers", 0, 0, "macs", "many"), "damaged"),
        (_set("layers", 0, 0, "shape", [-1]), "damaged"),
        (_set("left_alone", "x", 3), "damaged at 'x'"),
        (_set("left_alone", ["x"]), "damaged"),
        (_set("architecture", 3), "damaged at 'architecture'"),
        (_set("inputs", 0, "dtype", "load"), "damaged at 'inputs'"),
        (_set("inputs", 0, "dtype", "nn"), "damaged at 'inputs'"),
        (_set("inputs", 0, "dtype", 3), "damaged at 'inputs'"),
        (_set("inputs", 0, "shape", [1 << 20, 1 << 20]), "damaged at 'inputs'"),
        (_set("inputs", 0, "shape", [-1, 3]), "damaged at 'inputs'"),
        (_set("inputs", 0, "shape", "12"), "damaged at 'inputs'"),
    ],
)
def test_damaged_bodies(change: Callable[[dict[str, Any]], None], match: str | None) -> None:
    body = copy.deepcopy(BODY)
    change(body)
    if match is None:  # an open range is one position
        assert psap.Plan.from_json(json.dumps(body)).groups[0].kept == (0,)
        return
    with pytest.raises(psap.FileError, match=match):
        psap.Plan.from_json(json.dumps(body))


def test_plans_from_before_branches_could_go() -> None:
    body = {key: value for key, value in BODY.items() if key not in NEW}
    assert psap.Plan.from_json(json.dumps(body)) == psap.Plan.from_json(json.dumps(BODY))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "this is no plan"),
        ("{", "this is no plan"),
        ("null", "this is no plan"),
        ("[]", "this is no plan"),
        ("3", "this is no plan"),
        ("[" * 100_000, "this is no plan"),
        ('{"a":' * 100_000, "this is no plan"),
        ("9" * 10_000, "this is no plan"),
        ("\ud800", "this is no plan"),
        (_plan().to_json()[:-20], "this is no plan"),
    ],
    ids=range(10),
)
def test_damaged_texts(text: str, match: str) -> None:
    with pytest.raises(psap.FileError, match=match):
        psap.Plan.from_json(text)


@pytest.mark.parametrize("text", [None, 3, b"{}", {"format": "psap-plan"}])
def test_what_is_no_text(text: Any) -> None:
    with pytest.raises(psap.ArgumentTypeError, match=r"pass the text of Plan.to_json"):
        psap.Plan.from_json(text)


def test_many_long_lists_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planfile, "MOST_POSITIONS", 1000)
    body = copy.deepcopy(BODY)
    body["inputs"] = []
    body["sides"] = [{**body["sides"][0], "size": 600, "kept": "0-599"}] * 2
    with pytest.raises(psap.FileError, match="more than 1000 positions"):
        psap.Plan.from_json(json.dumps(body))


@given(st.data())
def test_any_damage_is_a_named_error_or_another_plan(data: st.DataObject) -> None:
    text = json.dumps(BODY)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start, min(len(text), start + 30)))
    inserted = data.draw(st.text('0123456789-,"{}[]:null.eE', max_size=6))
    try:
        plan = psap.Plan.from_json(text[:start] + inserted + text[end:])
    except psap.FileError:
        return
    assert isinstance(plan, psap.Plan)
    assert psap.Plan.from_json(plan.to_json()) == plan


def test_a_plan_for_another_shape_is_refused_before_anything_is_made() -> None:
    model = randomise(CASES["residual"].make())
    body = copy.deepcopy(BODY)
    body["sides"][0]["size"] = 60
    body["sides"][0]["kept"] = "0-59"
    plan = psap.Plan.from_json(json.dumps(body))
    with pytest.raises(psap.ArgumentError, match=r"made for another model: .* the plan expects 60"):
        psap.apply(model, plan)
    body["sides"][0]["name"] = "nothing.weight"
    plan = psap.Plan.from_json(json.dumps(body))
    with pytest.raises(psap.ArgumentError, match=r"has no 'nothing.weight'"):
        psap.mask(model, plan)


def test_a_plan_whose_sides_do_not_fit_together_is_refused_by_the_proof() -> None:
    model = randomise(CASES["residual"].make())
    body = copy.deepcopy(BODY)
    side = next(s for s in body["sides"] if s["name"] == "one.weight" and s["dim"] == 0)
    assert side["size"] == 10
    side["kept"] = "0-5" if side["kept"] != "0-5" else "4-9"
    plan = psap.Plan.from_json(json.dumps(body))
    with pytest.raises(
        psap.VerificationError, match=r"the first layer that differs is|it stops at"
    ):
        psap.apply(model, plan)
    assert torch.is_grad_enabled()
