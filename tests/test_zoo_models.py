"""Real models of torchvision and timm: exact at half of the channels, and they train afterwards."""

from __future__ import annotations

import pytest

MODELS = {
    "torchvision/resnet18": ("module", 0.27),
    "torchvision/shufflenet_v2_x0_5": ("graph", 0.46),
    "torchvision/mobilenet_v3_small": ("module", 0.40),
    "torchvision/ssdlite320_mobilenet_v3_large": ("module", 0.37),
    "timm/res2net50_26w_4s": ("graph", 0.28),
    "timm/cspresnet50": ("graph", 0.27),
    "timm/dpn48b": ("graph", 0.28),
    "timm/rexnet_100": ("graph", 0.33),
    "timm/skresnet18": ("graph", 0.27),
    "timm/mixnet_s": ("graph", 0.36),
    "timm/ghostnet_100": ("module", 0.38),
    "timm/mobilevitv2_050": ("graph", 0.46),
}
"""How the small network is made, and the largest share of the parameters that it may keep."""


@pytest.mark.zoo
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODELS)
def test_half_of_a_real_model_is_exact(name: str) -> None:
    from benchmarks import coverage

    mode, kept = MODELS[name]
    row = coverage.one(name, size=96, limit_s=500)
    assert row["result"] == "exact", row.get("reason")
    assert row["mode"] == mode
    assert row["error"] <= 1e-9
    assert row["kept_parameters"] < kept
