"""What can be pruned in a network of every construct, and what must be left alone and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from nets import chain, conv, image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from zoo_blocks import (
    by_hook,
    cross_channel_gate,
    cross_stage,
    fixed_filter,
    fixed_scale,
    frozen_batch_norm,
    functional_depthwise,
    fused_glu,
    fused_product,
    gated_parts,
    global_response_norm,
    grouped_transposed,
    half_width,
    in_place_sum_on_slice,
    mean_gate,
    new_dimensions,
    parametrised,
    root_mean_square,
    scaled_weight,
    selective_kernel,
    shifted,
    sorted_outputs,
    source_masks,
    split_attention,
    standard_filters,
    turned_in_place,
    unit_vectors,
)
from zoo_nets import (
    attention,
    auxiliary,
    block,
    cat_constant,
    chunked,
    conditional_norm,
    dense_block,
    depthwise,
    fixed_view,
    flattened,
    glu,
    group_normed,
    grouped,
    in_place,
    in_place_add_on_view,
    in_place_clamp_on_view,
    in_place_view,
    indexed,
    instance_normed,
    layer_norm,
    layer_scale,
    one_channel,
    one_channel_added,
    one_or_three,
    padded,
    permuted,
    pixel_shuffled,
    pixel_unshuffled,
    plain_bn,
    raw_parameter,
    residual,
    rolled,
    se,
    shared_module,
    shared_parameter,
    shuffle,
    sliced,
    split_in,
    standardised,
    tied_decoder,
    transposed,
    two_inputs,
    unknown,
    with_prelu,
    zeros_like_cat,
)


@dataclass(frozen=True)
class Case:
    """A network, its inputs, and what the graph should say.

    Attributes:
        make: builds the model.
        groups: size of every group by name.
        alone: a part of the reason why a layer is left alone, by layer.
        inputs: the example inputs.
        mode: how the small network must be made.
    """

    make: Callable[[], nn.Module]
    groups: dict[str, int]
    alone: dict[str, str] = field(default_factory=dict)
    inputs: tuple[Any, ...] = field(default_factory=lambda: (image(),))
    mode: str = "module"


OUT = {"head.2": "output of the model"}


def _case(
    make: Callable[[], nn.Module], *, alone: dict[str, str] | None = None, **groups: int
) -> Case:
    mode = "graph" if groups.pop("graph", 0) else "module"
    return Case(
        make,
        {k.replace("__", "#"): v for k, v in groups.items()},
        {**OUT, **(alone or {})},
        mode=mode,
    )


CASES: dict[str, Case] = {
    "chain": Case(lambda: chain(8, 10), {"0": 8, "3": 10}, {"6.2": "output of the model"}),
    "bias": Case(lambda: chain(8, 10, bias=True), {"0": 8, "3": 10}, {"6.2": "output"}),
    "residual": _case(residual, stem=8, one=10, last=6),
    "dense block": _case(dense_block, stem=8, one=4, two=6, last=6),
    "depthwise": _case(lambda: depthwise(1), stem=8, last=6),
    "depthwise, multiplier 3": _case(lambda: depthwise(3), stem=8, last=6),
    "grouped": _case(grouped, stem=4, gc=6, last=6),
    "shuffle, grouped": _case(
        lambda: shuffle(3, conv(12, 12, 1, groups=3)), stem=4, first=1, second=4, last=6
    ),
    "shuffle, plain": _case(
        lambda: shuffle(3, conv(12, 12, 1)), stem=4, first=4, second=12, last=6
    ),
    "shuffle, depthwise": _case(
        lambda: shuffle(3, conv(12, 12, groups=12)), stem=4, first=4, last=6
    ),
    "se, sigmoid": _case(lambda: se(torch.sigmoid), stem=8, down=4, last=6),
    "se, hardsigmoid": _case(lambda: se(F.hardsigmoid), stem=8, down=4, last=6),
    "permute and flatten": Case(permuted, {"stem": 6}, {"fc": "output of the model"}),
    "flatten": Case(flattened, {"stem": 6, "fc": 8}, {"fc2": "output of the model"}),
    "module called twice": _case(shared_module, stem=8, last=6),
    "parameter of two modules": _case(shared_parameter, stem=8, last=6),
    "raw parameter": _case(raw_parameter, stem=8, w=10, last=6),
    "conv1d": Case(lambda: one_or_three(1), {"0": 8, "4": 6}, {"7": "output"}, (image(4, 3, 12),)),
    "conv3d": Case(
        lambda: one_or_three(3), {"0": 8, "4": 6}, {"7": "output"}, (image(2, 3, 4, 4, 4),)
    ),
    "transposed": _case(transposed, stem=8, up=10, last=6),
    "padded shortcut": _case(padded, stem=6, wide=6, last=6, graph=1),
    "slices": _case(sliced, stem=3, stem__2=5, a=4, b=4, last=6, graph=1),
    "chunk": _case(chunked, stem=4, stem__2=4, a=4, b=4, last=6),
    "split, equal": _case(
        lambda: split_in(4, 4, 4), stem=4, stem__2=4, stem__3=4, b=4, c=4, last=6, graph=1
    ),
    "split, unequal": _case(
        lambda: split_in(2, 4, 6), stem=2, stem__2=4, stem__3=6, b=4, c=6, last=6, graph=1
    ),
    "glu": _case(glu, stem=8, both=6, last=6),
    "glu, fused": _case(fused_glu, stem=8, both=6, last=6),
    "turned in place": _case(turned_in_place, stem=8, deep=10, one=8, last=6),
    "new dimensions": _case(new_dimensions, stem=8, gate=8, last=6, graph=1),
    "two inputs, dict output": Case(
        two_inputs,
        {"a": 8},
        {"head.2": "output", "out": "output", "fc": "output"},
        (image(), image(4, 2, 8, 8)),
    ),
    "auxiliary head": _case(
        auxiliary, alone={"aux_head.2": "output of the model"}, stem=8, last=6, aux=4
    ),
    "in place": _case(in_place, stem=8, last=6),
    "in place on a view": _case(in_place_view, stem=8, one=8, last=6, graph=1),
    "in place, add on a view": _case(
        in_place_add_on_view,
        alone={"one (channels 0-3 of 8)": "lost in aten.add_"},
        stem=8,
        one=4,
        last=6,
    ),
    "in place, clamp on a view": _case(
        in_place_clamp_on_view,
        alone={"one (channels 0-3 of 8)": "lost in aten.clamp_"},
        stem=8,
        one=4,
        last=6,
    ),
    "in place, a sum on a slice": _case(
        lambda: in_place_sum_on_slice(False), stem=4, stem__2=4, last=6
    ),
    "in place, a gate on a slice": _case(
        lambda: in_place_sum_on_slice(True),
        last=6,
        alone=dict.fromkeys(("stem", "one", "two"), "lost in aten.add_"),
    ),
    "unit vectors": _case(unit_vectors, stem=8, one=10, last=6),
    "cat with a constant": _case(cat_constant, stem=8, last=6),
    "one channel multiplied": _case(one_channel, stem=8, last=6, alone={"gate": "spreads it over"}),
    "one channel added": _case(
        one_channel_added, stem=8, last=6, alone={"shift": "spreads it over"}
    ),
    "masks of two sources": _case(source_masks, stem=8, last=6, graph=1),
    "gates of parts": _case(
        gated_parts, stem=8, last=6, alone={"gate": "mul spreads it over"}, graph=1
    ),
    "weight standardisation": _case(
        standardised,
        last=6,
        alone={
            "stem": "computed in forward",
            "w": "w keeps its shape: forward() computes with it by aten.mean",
        },
    ),
    "weight norm": _case(lambda: parametrised(weight_norm, 10, 6), stem=8, one=10, two=6, last=6),
    "weight norm, depthwise": _case(
        lambda: parametrised(weight_norm, 10, 10), stem=8, one=10, last=6
    ),
    "weight norm, by a hook": _case(
        lambda: parametrised(by_hook, 10, 6), stem=8, one=10, two=6, last=6
    ),
    "spectral norm": _case(
        lambda: parametrised(spectral_norm, 10, 6), stem=8, one=10, two=6, last=6
    ),
    "scaled weight": _case(scaled_weight, stem=8, w=10, last=6),
    "filters standardised by a batch norm": _case(
        lambda: standard_filters(3, 1), stem=8, one=10, two=6, last=6, graph=1
    ),
    "filters standardised, 1x1": _case(
        lambda: standard_filters(1, 1), stem=8, one=10, two=6, last=6, graph=1
    ),
    "filters standardised, grouped": _case(
        lambda: standard_filters(3, 2), stem=8, one=5, two=3, last=6, graph=1
    ),
    "filters standardised, of what is not zero": _case(
        lambda: standard_filters(3, 1, 1.0),
        stem=8,
        two=6,
        last=6,
        graph=1,
        alone={"one": "not stay zero after add of a constant"},
    ),
    "filters standardised, depthwise": _case(
        lambda: standard_filters(3, 10), stem=8, one=10, last=6, graph=1
    ),
    "attention": _case(attention, stem=8, q=8, last=6),
    "layer norm": _case(layer_norm, stem=8, one=10, last=6, graph=1),
    "x + 1": _case(
        lambda: block(8, lambda m, x: m.one(x) + 1, one=conv(8, 8)), stem=8, one=8, last=6
    ),
    "bare sigmoid": _case(
        lambda: block(8, lambda m, x: torch.sigmoid(m.one(x)), one=conv(8, 8)),
        stem=8,
        one=8,
        last=6,
    ),
    "unknown op": _case(unknown, stem=8, last=6, alone={"one": "no rule for aten.cumsum"}),
    "layer scale and position": _case(layer_scale, stem=8, last=6),
    "tied decoder": _case(
        tied_decoder, last=6, alone={"w": "read and written", "stem": "read and written"}
    ),
    "computed norm": _case(
        conditional_norm, stem=8, last=6, alone={"one": "not stay zero after add"}
    ),
    "cat with zeros_like": _case(zeros_like_cat, stem=4, last=6),
    "roll": _case(rolled, stem=8, last=6, alone={"one": "roll moves channels"}),
    "index_select": _case(indexed, stem=8, last=6, alone={"one": "index_select moves channels"}),
    "group norm, one channel each": _case(lambda: group_normed(10), stem=8, one=10, last=6),
    "group norm, several": _case(lambda: group_normed(5), stem=8, one=2, last=6, graph=1),
    "group norm, no parameters": _case(
        lambda: group_normed(10, False), stem=8, last=6, alone={"one": "without parameters"}
    ),
    "instance norm, affine": _case(lambda: instance_normed(True), stem=8, one=10, last=6),
    "pixel shuffle": _case(pixel_shuffled, stem=8, one=6, last=6),
    "pixel unshuffle": _case(pixel_unshuffled, stem=8, one=4, last=6),
    "prelu, one slope": _case(lambda: with_prelu(1), stem=8, one=10, last=6),
    "prelu, a slope per channel": _case(lambda: with_prelu(10), stem=8, one=10, last=6),
    "batch norm": _case(lambda: plain_bn(True), stem=8, one=10, last=6),
    "batch norm, not affine": _case(lambda: plain_bn(False), stem=8, one=10, last=6),
    "fixed view": _case(fixed_view, stem=8, one=8, last=6, graph=1),
    "frozen batch norm": _case(frozen_batch_norm, stem=8, one=8, last=6),
    "selective kernel": _case(selective_kernel, stem=8, a=8, down=6, last=6),
    "split attention": _case(split_attention, stem=4, both=8, down=6, last=6),
    "transposed, grouped": _case(lambda: grouped_transposed(12, 4), stem=2, up=3, last=6),
    "transposed, depthwise": _case(lambda: grouped_transposed(8, 8), stem=8, last=6),
    "transposed, depthwise, multiplier 2": _case(lambda: grouped_transposed(16, 8), stem=8, last=6),
    "addcmul": _case(fused_product, stem=8, last=6),
    "depthwise in forward": _case(functional_depthwise, stem=8, last=6, graph=1),
    "fixed filter": _case(fixed_filter, stem=8, one=8, last=6),
    "cross stage": _case(cross_stage, stem=8, one=4, one__2=4, last=6, graph=1, **{"two.0": 6}),
    "cross-channel gate": _case(
        cross_channel_gate,
        stem=8,
        one=10,
        last=6,
        graph=1,
        alone={"slide": "slides over the channels"},
    ),
    "global response norm": _case(global_response_norm, stem=8, one=10, last=6, graph=1),
    "mean over channels": _case(mean_gate, stem=8, one=10, last=6, graph=1),
    "rms norm": _case(root_mean_square, stem=8, one=10, last=6, graph=1),
    "constant after each channel": _case(shifted, stem=8, one=10, last=6),
    "layer scale of fixed shape": _case(fixed_scale, stem=8, last=6, graph=1),
    "half of the width": _case(half_width, stem=8, one=4, last=6, graph=1),
    "sorted outputs": Case(sorted_outputs, {"stem": 8}, {"head.2": "no rule for aten.sort"}),
}
