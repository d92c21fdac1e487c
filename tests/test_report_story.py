"""What a report tells of a run: who gave most and why, what came back, and what pruning cost."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_records as records
import torch
from pruner_nets import NETS, inputs, labels
from test_report import check, drawings
from torch import Tensor, nn, optim
from torch.nn import functional as F

import psap
from psap import record, report
from psap.cost import CostModel
from psap.events import WindowEvent
from psap.hooktime import HookTime


def pruned(**options: Any) -> tuple[psap.Pruner, psap.Result]:
    """A loop of one's own, with a pruner and nothing else of psap."""
    model = NETS["residual"]()
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9)
    config = psap.Config(target=psap.Target(macs=0.4), prune_steps=3, window=3, **options)
    pruner = psap.Pruner(model, inputs(), optimizer=optimizer, config=config)
    for epoch in range(4):
        for i in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs(seed=10 * epoch + i)), labels(seed=i)).backward()
            optimizer.step()
        pruner.step()
    return pruner, pruner.finish()


PULSE = {"protect": "pulse", "z_threshold": 0.3, "restore_share": 0.5}


@pytest.mark.parametrize("progressive", [False, True])
def test_what_a_group_gave_is_what_its_width_alone_saves(progressive: bool) -> None:
    options = {"progressive": progressive, "protect": "gate"}
    pruner, result = pruned(**options, stream_power=0.0)  # all groups give
    cost = CostModel(psap.trace(NETS["residual"](), inputs(), gated=True))
    names = [group.name for group in result.plan.groups]
    widths = np.array([group.size for group in result.plan.groups])
    for event in pruner.events:
        now = np.array([event.widths[name] for name in names])
        for i, name in enumerate(names):
            alone = np.where(np.arange(len(names)) == i, now, widths)
            saved = cost.cost(widths).macs - cost.cost(alone).macs
            assert event.gave[name] == pytest.approx(saved / cost.dense.macs, abs=1e-12)
        widths = now
    assert sum(pruner.events[-1].gave.values()) > 0


def test_a_loop_of_ones_own_has_the_whole_report(tmp_path: Path) -> None:
    pruner, result = pruned(**PULSE)
    found = record.build(result)
    page = report.write(found, tmp_path / "report.html").read_text()
    assert page == report.render(json.loads(json.dumps(found)))
    text = " ".join(check(page).text)
    for heading in ("Who gave most", "Every channel", "Verification", "What pruning cost"):
        assert heading in text
    kinds = {layer["name"]: layer["kind"] for layer in found["layers"]}
    assert kinds == {k: ("Linear" if k == "head.fc" else "Conv2d") for k in kinds}
    first = pruner.events[0]
    top = max(first.gave, key=lambda name: first.gave[name])
    at = page.index("Who gave most")
    assert f"<code>{top}</code>" in page[at : page.index("</tr>", page.index("<tbody>", at))]


def test_the_report_of_psap_apply(tmp_path: Path) -> None:
    model = NETS["residual"]()
    result = psap.apply(model, psap.plan(psap.trace(model, inputs()), ratio=0.5))
    found = record.build(result, dense=model, title="once")
    text = " ".join(check(report.write(found, tmp_path / "report.html").read_text()).text)
    assert "once" in text and "Who gave most" not in text and "What pruning cost" not in text
    assert found["fates"]["pruned"] == sum(g.size - len(g.kept) for g in result.plan.groups)


def test_a_result_is_made_a_record_first(tmp_path: Path) -> None:
    model = NETS["residual"]()
    result = psap.apply(model, psap.plan(psap.trace(model, inputs()), ratio=0.5))
    with pytest.raises(psap.ArgumentTypeError, match=r"result is a Plan; pass what Pruner\.finish"):
        record.build(result.plan)  # type: ignore[arg-type]
    with pytest.raises(psap.ArgumentError, match=r"pass what psap\.record\.build\(result\) return"):
        report.write(result, tmp_path / "report.html")  # type: ignore[arg-type]


def test_fates_in_numbers() -> None:
    pruner, result = pruned(**PULSE)
    counts = record.build(result)["fates"]
    kept = {(group.name, i) for group in result.plan.groups for i in group.kept}
    came = [c for e in pruner.events if isinstance(e, WindowEvent) for c in e.candidates]
    back = {(c.group, c.channel) for c in came if c.restored}
    assert counts["restored"] == len(back) > 0
    assert counts["restored_stayed"] == len(back & kept)
    watched = [e.supervised for e in pruner.events if isinstance(e, WindowEvent)]
    assert counts["watched"] == sum(sum(groups.values()) for groups in watched)
    page = report.render(record.build(result))
    assert f"{counts['restored']} restored by supervision, {counts['restored_stayed']} of" in page


def test_channels_that_came_back_twice_count_once() -> None:
    group = {"name": "g", "size": 4, "kept": [0, 3], "layers": ["g"]}
    came = {"group": "g", "channel": 3, "value": 1.0, "z": 4.0, "restored": True}
    windows = [{"step": step, "supervised": {"g": 2}, "candidates": [came]} for step in (1, 2)]
    steps = [{"step": 1, "returned": {}}, {"step": 3, "returned": {"g": [3, 0, 1], "other": [1]}}]
    found = {"format": "psap-report", "version": 1, "groups": [group], "layers": []}
    assert report.fates({**found, "steps": steps, "windows": windows}) == {
        "pruned": 2, "watched": 4, "restored": 1, "restored_stayed": 1, "returned": 2,
        "returned_stayed": 1,
    }  # fmt: skip


def test_prices_are_told() -> None:
    pruner, result = pruned(protect="price")
    page = report.render(record.build(result))
    text = " ".join(check(page).text)
    assert "All prices as a table" in text and "factor on the next width" in text
    changed = [
        (name, factor)
        for event in pruner.events
        if isinstance(event, WindowEvent)
        for name, factor in event.factors.items()
        if factor != 1
    ]
    assert changed
    at = page.index("All prices as a table")
    for name, factor in changed:
        assert f"<code>{name}</code>" in page[at:] and f"{factor:.3g}" in page[at:]


def test_hostile_names_stay_text() -> None:
    record = records.make(records.residual(7), steps=3)
    for step in record["steps"]:
        step["gave"] = {name: 0.1 for name in step["widths"]}
    for window in record["windows"]:
        window["factors"] = window["prices"] = {g["name"]: 1.5 for g in record["groups"]}
    page = report.render(records.hostile(record))
    check(page)
    assert "<script>alert" not in page
    plain = report.render(record)
    assert "Who gave most" in plain and "All prices" in plain


# Time


def test_time_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 14.0, 14.25, 20.0, 23.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    times, seen = HookTime(), []
    assert times.hook(lambda value: value, 7) == 7
    times.hook(seen.append, 1)
    times.pruning(seen.append, 2)
    assert seen == [1, 2]
    assert times.to_json() == {
        "optimizer_steps": 1, "training_s": 4.25, "hooks_s": 0.75,
        "hooks_share": pytest.approx(0.75 / 4.25), "prune_steps_s": 3.0,
    }  # fmt: skip


def test_a_run_knows_what_pruning_cost() -> None:
    _, result = pruned()
    found = result.report["time"]
    assert found["optimizer_steps"] == 20
    assert 0 < found["hooks_s"] < found["training_s"] and found["prune_steps_s"] > 0
    assert found["hooks_share"] == found["hooks_s"] / found["training_s"]


def test_without_an_optimizer_step_nothing_is_divided_by_zero() -> None:
    assert HookTime().to_json()["hooks_share"] == 0.0
    model = NETS["residual"]()
    result = psap.apply(model, psap.plan(psap.trace(model, inputs()), ratio=0.5))
    result.report["time"] = HookTime().to_json()
    assert "What pruning cost" not in report.render(record.build(result))


def test_a_line_on_the_edge_of_what_is_drawn_keeps_its_width_and_dots() -> None:
    """The lowest accuracy of pruning is a round number, which is where the plot ends."""
    small = records.make(records.residual(7), steps=5)
    for epoch, entry in enumerate(small["history"]):
        low = 0.7 if epoch == 12 else 0.72
        entry["val_accuracy"] = 0.1 if entry["phase"] == "dense" and epoch < 4 else low
    (drawing,) = [found for found in drawings(report.render(small)) if "history-t" in found]
    root = ElementTree.fromstring(drawing)
    cut, *whole = root.findall("svg")
    assert cut.get("height") == "152" and cut.get("class") is None
    assert cut.get("viewBox") == "0 0 1000 152"
    assert {plot.get("height") for plot in whole} == {"84"}
    dots = [c for c in root.findall("circle") if c.get("class") == "dot accuracy"]
    assert len(dots) == len(small["history"]) - 4
    assert max(float(c.get("cy", 0)) for c in dots) == 66 + 150


def test_text_below_a_chart_keeps_its_distance() -> None:
    page = report.render(records.make(records.residual(7), steps=5))
    assert re.search(r'class="maps">.*</div><p>\d+ channels are gone', page, re.S)
    assert ".maps+p,.tall+p{margin-top:20px}" in page


class Kinds(nn.Module):
    """A convolution of every kind: of a grey image, depthwise, grouped, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 12, 3, padding=1)
        self.depth = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(24, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 10, 2, stride=2)
        self.each = nn.ConvTranspose2d(10, 10, 2, groups=10)
        self.last = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.depth(F.relu(self.one(x))))))
        return self.last(F.relu(self.each(F.relu(self.up(x)))))


@pytest.mark.parametrize("given", [False, True])
def test_widths_are_outputs_and_inputs_of_every_kind_of_layer(given: bool) -> None:
    torch.manual_seed(0)
    model = Kinds()
    plan = psap.plan(psap.trace(model, torch.randn(2, 1, 8, 8)), ratio=0.5)
    result = psap.apply(model, plan)
    layers = record.build(result, dense=model if given else None)["layers"]
    assert [entry["name"] for entry in layers] == [name for name, _ in model.named_children()]
    for entry in layers:
        for network, found in ((model, entry["before"]), (result.model, entry["after"])):
            conv = network.get_submodule(entry["name"])
            assert found == [conv.out_channels, conv.in_channels], entry["name"]
    assert layers[3]["before"] == [10, 16] and layers[3]["after"] == [5, 8]


def test_the_accuracy_when_pruning_began_is_in_the_page() -> None:
    _, result = pruned()
    measured = record.Measured(began_accuracy=0.875, small_accuracy=0.75)
    page = report.render(record.build(result, measured=measured))
    row = re.search(r"Accuracy when pruning began</t[dh]>.*?</tr>", page)
    assert row and re.sub(r"\s", " ", row[0]).count("87.50 %") == 1
    assert "when pruning began" not in report.render(record.build(result))


@pytest.mark.parametrize(
    ("path", "shown"), [("/usr/bin/psap", "psap"), ("/x/psap/__main__.py", "python -m psap")]
)
def test_the_command_is_what_was_typed(
    path: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [path, "prune", "--grey"])
    assert record.command_line() == f"{shown} prune --grey"
