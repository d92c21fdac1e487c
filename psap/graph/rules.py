"""The table of rules: for every ATen op what a call does to the channel labels of its tensors.

A rule gets the tracer, the arguments by schema name, and the output. This is the whole list of what
psap understands; whatever is not listed freezes the channels that it touches, and is reported.
"""

from __future__ import annotations

from typing import Any

import torch

from psap.graph.attention import attends, baddbmm, bmm
from psap.graph.compute import addmm, batch_norm, convolution, linear, mm
from psap.graph.elementwise import (
    add,
    addcmul,
    clamp,
    div,
    glu,
    keeps_zero,
    moves_zero,
    mul,
    power,
    prelu,
)
from psap.graph.movement import (
    cat,
    embedding,
    expands,
    index,
    moves,
    pad,
    permutes,
    pixel_shuffle,
    pools,
    restrides,
    same,
    selects,
    shifts,
    stack,
    unfolds,
)
from psap.graph.norms import group_norm, layer_norm, rms_norm
from psap.graph.reductions import means, reduces, sizes, softmax, sums
from psap.graph.reshaping import reshapes
from psap.graph.trace import Rule
from psap.graph.weights import inner_product, matrix_vector, weight_norm

aten = torch.ops.aten

RULES: dict[Any, Rule] = {}


def _table(rule: Rule, *names: str) -> None:
    for name in names:
        if hasattr(aten, name):
            RULES[getattr(aten, name)] = rule


_table(convolution, "convolution", "_convolution")
_table(mm, "mm")
_table(addmm, "addmm")
_table(linear, "linear")
_table(bmm, "bmm")
_table(baddbmm, "baddbmm")
_table(attends, "_scaled_dot_product_flash_attention_for_cpu")
_table(attends, "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
_table(attends, "_scaled_dot_product_cudnn_attention")
_table(attends, "_scaled_dot_product_fused_attention_overrideable")
_table(batch_norm, "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
_table(batch_norm, "_native_batch_norm_legit_no_training", "_batch_norm_with_update")
_table(batch_norm, "_batch_norm_no_update", "miopen_batch_norm", "batch_norm")
_table(weight_norm, "_weight_norm_interface")
_table(matrix_vector, "mv")
_table(inner_product, "dot", "vdot")
_table(layer_norm, "native_layer_norm", "layer_norm")
_table(rms_norm, "_fused_rms_norm", "rms_norm")
_table(group_norm, "native_group_norm")
_table(keeps_zero, "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu")
_table(keeps_zero, "celu_", "selu", "selu_", "gelu", "silu", "silu_", "mish", "mish_", "tanh")
_table(keeps_zero, "tanh_", "hardswish", "hardswish_", "hardshrink", "softshrink", "abs", "neg")
_table(
    keeps_zero, "sqrt", "sin", "asinh", "atan", "erf", "sign", "round", "floor", "ceil", "square"
)
_table(keeps_zero, "native_dropout", "dropout", "dropout_", "nan_to_num", "trunc", "expm1", "log1p")
_table(moves_zero("sigmoid"), "sigmoid", "sigmoid_")
_table(moves_zero("hardsigmoid"), "hardsigmoid", "hardsigmoid_")
_table(moves_zero("softplus"), "softplus")
_table(moves_zero("exp"), "exp", "exp_")
_table(moves_zero("log_sigmoid"), "log_sigmoid_forward")
_table(moves_zero("cos"), "cos")
_table(moves_zero("subtraction from a constant"), "rsub")
_table(moves_zero("rsqrt"), "rsqrt")
_table(keeps_zero, "zeros_like", "zero_")
_table(moves_zero("new data"), "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
_table(clamp, "clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_")
_table(clamp, "hardtanh", "hardtanh_")
_table(power, "pow", "pow_")
_table(prelu, "_prelu_kernel", "prelu")
_table(add, "add", "add_", "sub", "sub_", "maximum", "minimum")
_table(mul, "mul", "mul_")
_table(div, "div", "div_")
_table(glu, "glu")
_table(addcmul, "addcmul", "addcmul_")
_table(pools, "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool1d", "max_pool2d")
_table(
    pools, "avg_pool2d", "avg_pool3d", "avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"
)
_table(pools, "adaptive_avg_pool1d", "adaptive_avg_pool2d", "mkldnn_max_pool2d")
_table(pools, "adaptive_max_pool2d", "adaptive_max_pool3d")
_table(pools, "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d")
_table(pools, "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d")
_table(pools, "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
_table(means, "mean")
_table(sizes, "linalg_vector_norm")
_table(reduces, "amax", "amin", "var", "std")
_table(sums, "sum")
_table(softmax, "_softmax", "_log_softmax", "softmax", "log_softmax")
_table(reshapes, "view", "_unsafe_view", "reshape", "_reshape_alias", "flatten")
_table(permutes(aten.permute), "permute")
_table(permutes(aten.transpose), "transpose", "transpose_")
_table(permutes(aten.t), "t", "t_")
_table(same, "detach", "alias", "clone", "contiguous", "_to_copy", "lift_fresh")
_table(expands, "expand")
_table(restrides, "as_strided_")
_table(selects, "select")
_table(moves(aten.slice), "slice")
_table(moves(aten.split), "split")
_table(moves(aten.split_with_sizes), "split_with_sizes")
_table(moves(aten.unbind), "unbind")
_table(moves(aten.squeeze), "squeeze", "squeeze_")
_table(moves(aten.unsqueeze), "unsqueeze", "unsqueeze_")
_table(moves(aten.flip), "flip")
_table(shifts(aten.roll), "roll")
_table(moves(aten.repeat), "repeat")
_table(shifts(aten.index_select), "index_select")
_table(pixel_shuffle, "pixel_shuffle")
_table(moves(aten.pixel_unshuffle), "pixel_unshuffle")
_table(moves(aten.channel_shuffle), "channel_shuffle", "native_channel_shuffle")
_table(pad, "constant_pad_nd")
_table(cat, "cat")
_table(stack, "stack")
_table(unfolds, "unfold")
_table(index, "index")
_table(pools, "grid_sampler_2d", "grid_sampler_3d")
_table(embedding, "embedding")
