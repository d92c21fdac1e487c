"""Fused kernels for pruning: one call for all layers of a network, on any backend."""

from psap_kernels._backend import use_backend
from psap_kernels._load import build_info
from psap_kernels.ops.abs_histogram import abs_histogram, abs_quantile
from psap_kernels.ops.gate_stats_ import gate_stats_
from psap_kernels.ops.layer_stats import LayerStats, layer_stats
from psap_kernels.ops.restore_filters_ import restore_filters_
from psap_kernels.ops.shrink import shrink
from psap_kernels.ops.zero_filters_ import zero_filters_

__all__ = [
    "LayerStats",
    "abs_histogram",
    "abs_quantile",
    "build_info",
    "gate_stats_",
    "layer_stats",
    "restore_filters_",
    "shrink",
    "use_backend",
    "zero_filters_",
]
