"""Differences of two plans: text, JSON, and plans that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nets import chain, image, randomise
from zoo import CASES

import psap
from psap import cli, plans


def _graph(*widths: int) -> psap.Graph:
    return psap.trace(randomise(chain(*widths)), image())


def test_what_only_one_of_them_removes() -> None:
    graph = _graph(8, 4, 6)
    first = plans.from_masks(graph, [[0, 1, 2, 3], [0, 1, 2, 3], [1, 5]])
    second = plans.from_masks(graph, [[2, 3, 4], [0, 1, 2, 3], [1, 5]])
    found = first.diff(second)
    assert found and found.same == 2
    (group,) = found.groups
    assert (group.name, group.size) == ("0", 8)
    assert (group.first, group.second, group.both) == ((4,), (0, 1), 3)
    assert (found.before, found.first, found.second) == (first.before, first.after, second.after)
    back = second.diff(first).groups[0]
    assert (back.first, back.second, back.both) == (group.second, group.first, group.both)
    head, line = found.explain().splitlines()
    assert head.startswith("other channels in 1 of 3 groups; kept by the first and by the second")
    share = first.after.macs / first.before.macs
    assert f"MACs {share:.1%} and " in head
    assert line.split(maxsplit=2)[2] == (
        "only the first removes 4 (1); only the second removes 0-1 (2); both remove 3"
    )


def test_as_json() -> None:
    graph = _graph(8, 4)
    first = plans.from_masks(graph, [range(8), [0]])
    second = plans.from_masks(graph, [[0, 2], [0]])
    assert json.loads(first.diff(second).to_json()) == {
        "format": "psap-plan-diff",
        "version": 1,
        "groups": [{"name": "0", "size": 8, "first": "", "second": "1,3-7", "both": 0, "part": ""}],
        "same": 1,
        "before": vars(first.before),
        "first": vars(first.after),
        "second": vars(second.after),
    }


def test_saved_networks_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = _graph(8, 4)
    plan = psap.plan(graph, ratio=0.5)
    psap.save(psap.apply(graph.model, plan), tmp_path / "small.safetensors")
    (tmp_path / "plan.json").write_text(psap.plan(graph, ratio=0.25).to_json())
    files = [str(tmp_path / "small.safetensors"), str(tmp_path)]
    assert cli.main(["diff", *files]) == 0
    assert "only the first removes" in capsys.readouterr().out
    (tmp_path / "other").write_bytes(b"\xe8\x00")
    assert cli.main(["diff", files[0], str(tmp_path / "other")]) == 2
    assert "other cannot be read (it is no text); pass the folder" in capsys.readouterr().err


def test_equal_plans_do_not_differ() -> None:
    plan = psap.plan(_graph(8, 4), ratio=0.5)
    found = plan.diff(psap.Plan.from_json(plan.to_json()))
    assert not found
    assert found.explain() == "both plans remove the same channels, in all of 2 groups"


def test_what_cannot_be_compared() -> None:
    plan = psap.plan(_graph(8, 4), ratio=0.5)
    with pytest.raises(psap.ArgumentTypeError, match=r"other is a str; pass another psap\.Plan"):
        plan.diff(plan.to_json())  # type: ignore[arg-type]
    with pytest.raises(psap.ArgumentError, match="the plans were made for different models"):
        plan.diff(psap.plan(_graph(8, 5), ratio=0.5))
    frozen = randomise(chain(8, 4))
    frozen[3].requires_grad_(False)
    with pytest.raises(psap.ArgumentError, match="different channel groups, such as '0'"):
        plan.diff(plans.from_masks(psap.trace(frozen, image()), []))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = psap.trace(randomise(CASES["residual"].make()), image())
    first, second = (psap.plan(graph, ratio=r) for r in (0.25, 0.5))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text(first.to_json())
    (tmp_path / "other.json").write_text(second.to_json())
    paths = [str(tmp_path / "run"), str(tmp_path / "other.json")]
    assert cli.main(["diff", *paths]) == 0
    assert capsys.readouterr().out.rstrip() == first.diff(second).explain()
    assert cli.main(["diff", *paths, "--json"]) == 0
    assert capsys.readouterr().out.rstrip() == first.diff(second).to_json()
    assert cli.main(["diff", paths[0], str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
