"""The models of the coverage benchmark, by family, and how each one is built and fed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TORCHVISION = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s",
    "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet1_0", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnet50", "resnext50_32x4d", "wide_resnet50_2", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg16_bn", "vit_b_16",
]  # fmt: skip
SEGMENTATION = [
    "fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
]  # fmt: skip
DETECTION = [
    "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
]  # fmt: skip
TIMM = [
    "res2net50_26w_4s", "res2next50", "cspresnet50", "cspdarknet53", "cspresnext50", "darknet53",
    "dpn48b", "dpn68", "ecaresnet26t", "seresnet50", "rexnet_100", "rexnetr_100", "skresnet18",
    "skresnext50_32x4d", "mixnet_s", "nf_regnet_b0", "nf_resnet26", "ghostnet_100",
    "ghostnetv2_100", "hrnet_w18_small", "densenet121", "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium", "efficientnet_b0", "tf_efficientnet_b0", "tf_efficientnetv2_b0",
    "regnety_002", "regnetx_002", "regnetz_b16", "resnet18", "resnet26d", "resnetv2_50",
    "resnetv2_50d_gn", "resnetblur18", "resnetaa50", "resnest14d", "gernet_s", "repvgg_a0",
    "mobileone_s0", "convnext_atto", "convnextv2_atto", "convmixer_768_32", "cs3darknet_s",
    "dla34", "dla60_res2net", "edgenext_xx_small", "efficientvit_b0", "fasternet_t0",
    "fastvit_t8", "fbnetc_100", "fbnetv3_b", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0",
    "inception_next_atto", "inception_resnet_v2", "inception_v3", "inception_v4", "lcnet_050",
    "legacy_seresnet18", "legacy_xception", "mambaout_femto", "mnasnet_100", "mobilenetv2_100",
    "mobilenetv3_small_100", "mobilenetv3_large_100", "mobilevit_xxs", "mobilevitv2_050",
    "nasnetalarge", "pnasnet5large", "poolformer_s12", "rdnet_tiny", "repghostnet_050",
    "repvit_m0_9", "selecsls42", "semnasnet_100", "spnasnet_100", "starnet_s1", "swiftformer_xs",
    "tinynet_a", "tresnet_m", "vgg11_bn", "vovnet39a", "ese_vovnet19b_dw", "visformer_tiny",
    "xception41", "coatnet_0_rw_224", "dm_nfnet_f0", "eca_nfnet_l0", "botnet26t_256",
    "halonet26t", "lambda_resnet26t", "gcresnet33ts", "bat_resnext26ts", "efficientformer_l1",
    "levit_128s", "nextvit_small",
]  # fmt: skip

NAMES = [
    *(f"torchvision/{name}" for name in [*TORCHVISION, *SEGMENTATION, *DETECTION]),
    *(f"timm/{name}" for name in TIMM),
]
"""Every model: ``library/name``."""

CI = [
    "torchvision/resnet18", "torchvision/shufflenet_v2_x0_5", "torchvision/densenet121",
    "torchvision/ssdlite320_mobilenet_v3_large", "timm/res2net50_26w_4s", "timm/cspresnet50",
    "timm/dpn48b", "timm/ecaresnet26t", "timm/rexnet_100", "timm/skresnet18", "timm/mixnet_s",
    "timm/ghostnet_100",
]  # fmt: skip
"""A dozen of them, for continuous integration."""


OWN_SIZE = ("halonet26t", "bat_resnext26ts", "efficientformer_l1")
"""Models of timm that take no images of another size."""


def build(name: str, size: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model without pretrained weights, and inputs of its own size (or of ``size``).

    Args:
        name: ``torchvision/...`` or ``timm/...``.
        size: edge of the images; 0 for what the model is made for. Detectors always get small ones.
    """
    library, _, model = name.partition("/")
    if model in DETECTION:
        return _detector(model)
    if library == "timm":
        import timm

        takes = size and _takes_size(model) and model not in OWN_SIZE
        options = {"img_size": size} if takes else {}
        net = timm.create_model(model, pretrained=False, **options)
        size = 0 if model in OWN_SIZE else size
        edge = size or net.default_cfg["input_size"][-1]
        return net, (torch.randn(1, 3, edge, edge),)
    import torchvision

    options = {"weights": None}
    if model in SEGMENTATION:
        options |= {"weights_backbone": None}
    if model in ("googlenet", "inception_v3"):
        options |= {"aux_logits": True, "init_weights": False}
    if model in ("fcn_resnet50", "deeplabv3_resnet50"):
        options |= {"aux_loss": True}
    edge = 299 if model == "inception_v3" else 224
    fixed = ("inception_v3", "googlenet", "maxvit_t", "swin_t", "swin_v2_t", "vit_b_16")
    return torchvision.models.get_model(model, **options), (
        torch.randn(1, 3, *[size if size and model not in fixed else edge] * 2),
    )


def _takes_size(model: str) -> bool:
    return any(
        part in model for part in ("coatnet", "halonet", "botnet", "lambda", "levit", "visformer")
    )


def _detector(model: str) -> tuple[nn.Module, tuple[Any, ...]]:
    import torchvision

    # Untrained heads are sure of nothing: let them find boxes all the same, or nothing is compared.
    options: dict[str, Any] = {"box_score_thresh" if "rcnn" in model else "score_thresh": 0.0}
    options |= {} if model.startswith("ssd") else {"min_size": 128, "max_size": 160}
    net = torchvision.models.get_model(model, weights=None, weights_backbone=None, **options)
    return net, ([torch.rand(3, 128, 160), torch.rand(3, 128, 128)],)


def targets(name: str) -> tuple[Any, ...]:
    """What a detector wants besides images while it trains."""
    if name.partition("/")[2] not in DETECTION:
        return ()
    boxes = torch.tensor([[10.0, 10.0, 80.0, 90.0], [30.0, 20.0, 120.0, 110.0]])
    return ([{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in range(2)],)


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Layers that make the classes: what other libraries are told to leave alone."""
    classes = {1000, 91, 21}
    return [
        m
        for m in model.modules()
        if getattr(m, "out_features", getattr(m, "out_channels", 0)) in classes
    ]


def loss(outputs: list[Tensor]) -> Tensor:
    """Some number that depends on all floating outputs."""
    floating = [x for x in outputs if x.is_floating_point() and x.requires_grad]
    return sum((x.float().square().mean() for x in floating), torch.zeros(()))
