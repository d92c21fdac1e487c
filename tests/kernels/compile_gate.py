"""Compiles every CUDA kernel without a GPU, and reads from the result what became of it.

``python tests/kernels/compile_gate.py`` writes the table of registers anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
TABLE = Path(__file__).with_name("registers.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# PyTorch builds extensions with the second one, too.
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas", "-v")
# Every kernel: its file, what its table holds, and its further template arguments.
KERNELS = {
    "stats_kernel": ("layer_stats", "StatsJob", ("false, false", "true, false", "true, true")),
    "histogram_kernel": ("abs_histogram", "HistogramJob", ()),
    "row_kernel": ("rows", "RowJob", ()),
    "shrink_kernel": ("shrink", "ShrinkJob", ()),
    "gate_kernel": ("gate_stats_", "GateJob", ()),
}
TABLES = ("ByValue<{0}, kFewBytes>", "ByValue<{0}, kManyBytes>", "ByPointer<{0}>")


@dataclass(frozen=True)
class Compiled:
    """What ptxas and the machine code say of one kernel."""

    registers: int
    stack: int
    spills: int
    loads_128: int
    stores_128: int
    local: int  # instructions that load or store local memory


def nvcc() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = [str(Path(home, "bin")) for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*places, os.environ.get("PATH", "")]))


def cuobjdump() -> str | None:
    """The toolkit's, or the one that triton's wheel carries."""
    compiler = nvcc()
    places = [str(Path(compiler).parent)] if compiler else []
    places.append(os.environ.get("PATH", ""))
    triton = find_spec("triton")
    if triton and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def require() -> None:
    """Skip the test, or fail it where the CUDA part is demanded."""
    missing = [n for n, found in (("nvcc", nvcc()), ("cuobjdump", cuobjdump())) if not found]
    if missing and os.environ.get("PSAP_CUDA") == "1":
        pytest.fail(f"missing: {', '.join(missing)}; set CUDA_HOME to the CUDA toolkit")
    if missing:
        pytest.skip(f"the compile gate needs {' and '.join(missing)}")


def instances() -> Iterator[str]:
    """Every instantiation that the host code launches."""
    for kernel, (_, job, more) in KERNELS.items():
        for table in TABLES:
            for argument in more or ("",):
                arguments = [table.format(job), *filter(None, [argument])]
                yield f"{kernel}<{', '.join(arguments)}>"


def translation_unit() -> str:
    """A source file that makes nvcc compile every instance."""
    includes = sorted({f'#include "cuda/{file}.cuh"' for file, _, _ in KERNELS.values()})
    entries = ",\n".join(f"    reinterpret_cast<const void*>({name})" for name in instances())
    array = "const void* const instances[]"
    body = f"extern {array};\n{array} = {{\n{entries}}};"
    return "\n".join([*includes, "namespace psap {", body, "}", ""])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def build(architecture: str) -> tuple[str, str]:
    """What ptxas said, and the loads and stores of the code; kept for the next time."""
    compiler, dump = nvcc(), cuobjdump()
    assert compiler and dump
    digest = hashlib.sha256(repr((FLAGS, architecture, run([compiler, "--version"]))).encode())
    digest.update(translation_unit().encode())
    for source in sorted([*SOURCES.glob("core/*.h"), *SOURCES.glob("cuda/*.cuh")]):
        digest.update(source.name.encode() + source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"psap-gate-{os.getuid()}" / digest.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            work = Path(name, "made")
            work.mkdir()
            (work / "gate.cu").write_text(translation_unit())
            binary = work / "gate.cubin"
            command = [compiler, *FLAGS, f"-arch={architecture}", f"-I{SOURCES}"]
            said = run([*command, str(work / "gate.cu"), "-o", str(binary)])
            (work / "ptxas.txt").write_text(said)
            code = run([dump, "-sass", str(binary)])
            kept = re.findall(r"Function : .*|\b(?:LD|ST)\w?\.[.\w]*|\b(?:LDL|STL)\b", code)
            (work / "code.txt").write_text("\n".join(kept))
            if not folder.exists():  # another process may have been faster
                work.rename(folder)
    return (folder / "ptxas.txt").read_text(), (folder / "code.txt").read_text()


def readable(mangled: str, sizes: set[int]) -> str:
    """``stats_kernel<true,true> few`` from a mangled name; few, many, pointer are the tables."""
    name, arguments = re.fullmatch(r"_ZN4psap\d+(\w+?_kernel)I(.*)", mangled).groups()
    flags = ",".join(
        "true" if flag == "1" else "false" for flag in re.findall("Lb([01])E", arguments)
    )
    name += f"<{flags}>" if flags else ""
    size = re.search(r"ELi(\d+)E", arguments)
    if size is None:
        return f"{name} pointer"
    return f"{name} {'few' if int(size[1]) == min(sizes) else 'many'}"


@cache
def compiled(architecture: str) -> dict[str, Compiled]:
    """Every kernel of this tree as compiled for one architecture."""
    ptxas, code = build(architecture)
    sizes = set(map(int, re.findall(r"_ZN4psap\d+\w+?_kernelI\S*?ELi(\d+)E", ptxas)))
    functions = dict(part.split("\n", 1) for part in code.split("Function : ")[1:])
    result = {}
    for entry in re.split(r"Compiling entry function ", ptxas)[1:]:
        mangled = re.match(r"'(\S+)'", entry)[1]
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        body = functions[mangled]
        result[readable(mangled, sizes)] = Compiled(
            registers=int(re.search(r"Used (\d+) registers", entry)[1]),
            stack=int(stack),
            spills=int(stores) + int(loads),
            loads_128=len(re.findall(r"\bLDG\.E[.\w]*\.128", body)),
            # Generic where the pointer comes from a table in memory.
            stores_128=len(re.findall(r"\bSTG?\.E[.\w]*\.128", body)),
            local=len(re.findall(r"\b(?:LDL|STL)\b", body)),
        )
    return result


if __name__ == "__main__":
    table = {
        architecture: {name: kernel.registers for name, kernel in sorted(kernels.items())}
        for architecture in ARCHITECTURES
        if (kernels := compiled(architecture))
    }
    TABLE.write_text(json.dumps(table, indent=2) + "\n")
    print(f"{TABLE} has {sum(map(len, table.values()))} kernels")
