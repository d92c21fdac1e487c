"""Compiles every Triton kernel for GPUs that are not there; prints one JSON line a build.

Run by test_triton_aot.py in a process of its own, with TRITON_INTERPRET=0: what the interpreter
has once decorated cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from psap_kernels.triton import (
    _input_sums,
    _layer_stats_kernels,
    _tables,
    abs_histogram,
    gate_stats_,
    layer_stats,
    restore_filters_,
    shrink,
    zero_filters_,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
Case = tuple[str, Any, dict[str, str], dict[str, object]]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stats_cases() -> Iterator[Case]:
    ints = dict.fromkeys(["tau_stride", "filters", "pieces"], "i32")
    outputs = {"partial": "*fp64", "filter_sums": "*fp32", "filter_counts": "*i32"}
    tables = {"table": "*i64", "programs": "*i32"}
    for dtype in _tables.ELEMENTS:
        name = name_of(dtype)
        for grads in (True, False):
            yield (
                f"layer_stats {name} {'w g' if grads else 'w'}",
                _layer_stats_kernels.pieces_kernel,
                {**tables, "tau": "*fp32", **outputs, **ints},
                layer_stats.constants(dtype, grads),
            )
        yield (
            f"layer_stats input columns {name}",
            _input_sums._columns_kernel,
            {**tables, "scratch": "*fp64"},
            _input_sums.constants(dtype),
        )
    yield (
        "layer_stats inputs",
        _input_sums._inputs_kernel,
        {**tables, "scratch": "*fp64", "sums": "*fp32"},
        _input_sums.sum_constants(),
    )
    yield (
        "layer_stats totals",
        _layer_stats_kernels.totals_kernel,
        {"ranges": "*i64", "splits": "*i64", **outputs, "layer_sums": "*fp64"}
        | {"layer_counts": "*i64", "layers": "i32", "filters": "i32", "pieces": "i32"},
        layer_stats.totals_constants(),
    )


def histogram_cases() -> Iterator[Case]:
    ints = dict.fromkeys(["scales_stride", "first", "shift", "bins"], "i32")
    arguments = {"table": "*i64", "programs": "*i32", "scales": "*fp32", "counts": "*i64", **ints}
    for dtype in _tables.ELEMENTS:
        yield (
            f"abs_histogram {name_of(dtype)}",
            abs_histogram._histogram_kernel,
            arguments,
            abs_histogram.constants(dtype, 2048),
        )


def gate_cases() -> Iterator[Case]:
    arguments = {"table": "*i64", "terms": "*i32", "offsets": "*i32", "derivatives": "*fp64"}
    arguments |= {"flags": "*i32", "scale_bits": "i64"}
    arguments |= dict.fromkeys(["pairs", "count", "channels", "longest"], "i32")
    dtypes = [[dtype] for dtype in _tables.ELEMENTS]
    for kinds in (*dtypes, list(_tables.ELEMENTS)):
        for long in (False, True):
            name = name_of(kinds[0]) if len(kinds) == 1 else "mixed"
            yield (
                f"gate_stats_ {name} {'long' if long else 'short'} rows",
                gate_stats_._derivatives_kernel,
                arguments,
                gate_stats_.constants(kinds, long),
            )
    arguments = {"sums": "*fp64", "seen": "*i64", "derivatives": "*fp64", "flags": "*i32"}
    arguments |= {"programs": "i32", "channels": "i32"}
    yield "gate_stats_ sums", gate_stats_._add_kernel, arguments, {"BLOCK": gate_stats_.SUMS_BLOCK}


def row_cases() -> Iterator[Case]:
    tables = {"table": "*i64", "programs": "*i32"}
    yield "shrink", shrink._shrink_kernel, tables, shrink.constants()
    yield "zero_filters_", zero_filters_._zero_kernel, tables, zero_filters_.constants()
    restore = restore_filters_
    yield "restore_filters_", restore._restore_kernel, tables, restore.constants()


def cases() -> Iterator[Case]:
    yield from stats_cases()
    yield from histogram_cases()
    yield from gate_cases()
    yield from row_cases()


def build(target: str, case: Case) -> dict[str, Any]:
    name, kernel, arguments, constants = case
    types = {arg: "constexpr" if arg in constants else arguments[arg] for arg in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    built = triton.compile(source, target=TARGETS[target], options=_tables.OPTIONS)
    facts = nvidia(built) if TARGETS[target].backend == "cuda" else amd(built)
    return {"target": target, "kernel": name, **facts}


def nvidia(built: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "loads": dict(Counter(re.findall(r"\bLDG[.\w]*", code))),
        "stores": dict(Counter(re.findall(r"\bSTG[.\w]*", code))),
    }


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def amd(built: Any) -> dict[str, Any]:
    code = built.asm["amdgcn"]
    number = {
        key: int(re.search(rf"\.{key}:\s*(\d+)", code)[1])
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    return {
        "registers": number["vgpr_count"],
        "stack": int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)[1]),
        "spills": number["vgpr_spill_count"] + number["sgpr_spill_count"],
        "loads": dict(Counter(re.findall(r"\b(?:global|buffer|flat)_load_\w+", code))),
        "stores": dict(Counter(re.findall(r"\b(?:global|buffer|flat)_store_\w+", code))),
    }


def write_limits() -> None:
    """Registers are handed out in eights: up to there, nothing changes."""
    limits: dict[str, dict[str, int]] = {}
    for case in cases():
        for target in TARGETS:
            used = build(target, case)["registers"]
            limits.setdefault(case[0], {})[target] = -(-used // 8) * 8
    lines = [f"  {json.dumps(name)}: {json.dumps(limit)}" for name, limit in limits.items()]
    path = Path(__file__).parents[1] / "data" / "triton_registers.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write_limits()
    else:
        for target in sys.argv[1:] or TARGETS:
            for case in cases():
                print(json.dumps(build(target, case)), flush=True)
