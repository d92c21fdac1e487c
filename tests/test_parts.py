"""Groups that are a part of a layer say so, wherever their widths are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, conv, head, image, randomise
from test_report import check
from torch import Tensor, nn

import psap
from psap import plans, record, report
from psap.cli import main
from psap.graph.parts import part


def split() -> nn.Module:
    """As in C2f: a half of what ``stem`` makes goes through ``inner``; all three are joined."""

    def body(m: Any, x: Tensor) -> Tensor:
        left, right = m.stem(x).chunk(2, 1)
        joined: Tensor = m.head(m.join(torch.cat([left, right, m.inner(right)], 1)))
        return joined

    return randomise(Net(body, stem=conv(3, 16), inner=conv(8, 8), join=conv(24, 6), head=head(6)))


def _graph() -> psap.Graph:
    return psap.trace(split(), image())


def _parts(model: nn.Module) -> dict[str, str]:
    graph = psap.trace(model, image())
    return {group.name: part(graph, group) for group in graph.groups}


def test_each_side_of_a_split_is_a_part() -> None:
    whole = {"inner": "", "join": ""}
    assert _parts(split()) == {
        "stem": "channels 0-7 of 16", "stem#2": "channels 8-15 of 16", **whole
    }  # fmt: skip


def test_a_channel_may_stand_for_several_of_its_layer() -> None:
    grouped = nn.Sequential(conv(3, 8), conv(8, 12, groups=4), head(12))
    assert _parts(randomise(grouped))["1"] == "channels 0-11 of 12, each 4 of them"


def test_a_part_that_stays_has_its_reason() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        left, right = m.stem(x).chunk(2, 1)
        left = left + torch.ones(4, 1, 1, dtype=x.dtype)
        joined: Tensor = m.head(torch.cat([left, right], 1))
        return joined

    model = randomise(Net(body, stem=conv(3, 8), head=head(8)))
    graph = psap.trace(model, image())
    assert _parts(model) == {"stem": "channels 4-7 of 8"}
    why = "add with data that has a fixed number of channels"
    assert graph.left_alone["stem (channels 0-3 of 8)"] == why
    text = psap.plan(graph, ratio=0.5).explain()
    assert f"left alone:\n  stem (channels 0-3 of 8)  {why}\n" in text
    assert text.endswith("\n  head.2                    output of the model")


def test_many_ranges_are_cut_short() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(torch.cat([x[:, ::2], m.b(x[:, 1::2])], 1))  # type: ignore[no-any-return]

    found = _parts(randomise(Net(body, a=conv(3, 12), b=conv(6, 4), head=head(10))))
    assert found == {"a": "channels 0,2,4,... of 12", "a#2": "channels 1,3,5,... of 12", "b": ""}


def test_explain_says_of_which_channels() -> None:
    plan = psap.plan(_graph(), ratio=0.5)
    text = plan.explain()
    assert "stem          8 ->     4  (4 removed)  of channels 0-7 of 16  with join\n" in text
    assert "join          6 ->     3  (3 removed)  with head.2\n" in text
    again = psap.Plan.from_json(plan.to_json())
    assert again.explain() == text
    assert [group.part for group in again.groups] == [group.part for group in plan.groups]


def test_a_difference_says_what_it_counts_within() -> None:
    graph = _graph()
    first = plans.from_masks(graph, [range(8), range(4), range(8), range(6)])
    second = plans.from_masks(graph, [range(8), range(8), range(8), range(5)])
    stem, join = first.diff(second).explain().splitlines()[1:]
    assert stem.endswith("removes 4-7 (4)  (counted within channels 8-15 of 16)")
    assert join.endswith("removes 5 (1)")


def test_inspect_says_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", "--arch", "resnet20", "--input", "3,16,16"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "│ layer2.0.conv2 │" in line]
    assert "16 (channels 0-7,24-31 of 32)" in rows[0]


def test_every_picture_of_the_report_says_it(tmp_path: Path) -> None:
    model = split()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    config = psap.Config(target=psap.Target(macs=0.5), prune_steps=1)
    pruner = psap.Pruner(model, image(), optimizer=optimizer, config=config)
    model(image()).square().mean().backward()
    optimizer.step()
    pruner.step()
    found = record.build(pruner.finish())
    page = report.write(found, tmp_path / "report.html").read_text()
    check(page)
    sparsity, channels = page[page.index("Sparsity sets") :].split("<h2>Every channel")
    for place in ("<figcaption>", "All ratios as a table"):
        assert "<small>channels 8-15 of 16</small>" in sparsity[sparsity.index(place) :]
    for place in ('class="group"', "All channels as a table"):
        assert "<small>channels 8-15 of 16</small>" in channels[channels.index(place) :]
    assert "its own are counted from 0" in channels


def test_rows_of_the_heat_map_say_it() -> None:
    group = {"name": "a", "size": 4, "kept": [0], "layers": ["a"], "part": "channels 0-3 of 9"}
    others = [{"name": f"b{i}", "size": 4, "kept": [0], "layers": []} for i in range(12)]
    names = ["a", *(entry["name"] for entry in others)]
    step = {
        "kind": "prune", "step": 1, "call": 1, "iteration": 1, "target_share": 0.5,
        "macs_share": 0.5, "parameters_share": 0.5, "sparsity": dict.fromkeys(names, 0.5),
        "sparsity_ema": {}, "widths": dict.fromkeys(names, 1), "pruned": {}, "returned": {},
    }  # fmt: skip
    page = report.render(
        {"format": report.FORMAT, "version": report.VERSION, "title": "t", "layers": [],
         "groups": [group, *others], "steps": [step]}
    )  # fmt: skip
    assert ">a (part)</text>" in page and ">b0</text>" in page
    assert "a, step 1\nchannels 0-3 of 9\nsparsity" in page
