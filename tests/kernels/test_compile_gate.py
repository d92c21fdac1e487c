"""What nvcc makes of every CUDA kernel, on a machine without a GPU: `make gpu-check`."""

from __future__ import annotations

import json
import re

import compile_gate
import pytest
from compile_gate import ARCHITECTURES, KERNELS, SOURCES, TABLE, Compiled

# At least so many 128-bit loads and stores. Statistics: three of each tensor for each dtype, since
# two are under way together, and an odd one is left.
WIDE = {
    "stats_kernel<false,false>": (12, 0),
    "stats_kernel<true,false>": (24, 0),
    "stats_kernel<true,true>": (24, 0),
    "histogram_kernel": (12, 0),
    "row_kernel": (1, 1),
    "shrink_kernel": (1, 1),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    compile_gate.require()
    return request.param


def test_the_gate_knows_every_kernel():
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("cuda/*.cu*")))
    declared = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", text)
    assert sorted(declared) == sorted(KERNELS)
    table = json.loads(TABLE.read_text())
    assert list(table) == list(ARCHITECTURES)
    for registers in table.values():
        assert len(registers) == len(list(compile_gate.instances()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_without_stack_and_within_their_registers(architecture):
    found = compile_gate.compiled(architecture)
    allowed = json.loads(TABLE.read_text())[architecture]
    assert found.keys() == allowed.keys()
    on_a_stack = {n: k for n, k in found.items() if k.stack or k.spills or k.local}
    assert not on_a_stack
    over = {n: (k.registers, allowed[n]) for n, k in found.items() if k.registers > allowed[n]}
    assert not over, "more registers than the table allows; see CONTRIBUTING.md"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_move_16_bytes_at_a_time(architecture):
    def wide(name: str, kernel: Compiled) -> bool:
        loads, stores = WIDE.get(name.split()[0], (0, 0))
        return kernel.loads_128 >= loads and kernel.stores_128 >= stores

    narrow = {n: k for n, k in compile_gate.compiled(architecture).items() if not wide(n, k)}
    assert not narrow
