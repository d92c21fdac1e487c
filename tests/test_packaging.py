from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import metadata, resources
from pathlib import Path

import pytest

import psap
import psap_kernels

ROOT = Path(__file__).parents[1]
PACKAGES = ("psap", "psap_kernels")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "examples")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py")),
        *ROOT.glob("*.py"),
    ]
)
MODULES = {
    file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): ast.parse(
        (ROOT / file).read_text()
    )
    for file in FILES
    if file.split("/")[0] in PACKAGES
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


# What an import costs and does


def test_import_is_cheap_and_silent():
    # The bar is 0.1 s on a quiet machine. A loaded one takes a multiple of its usual time, and what
    # must not come in (onnx, pyarrow, triton, matplotlib) costs more than these 0.3 s each.
    code = (
        "import time, torch; start = time.perf_counter(); import psap, psap_kernels; "
        "print(time.perf_counter() - start, torch.cuda.is_initialized())"
    )
    seconds = []
    for _ in range(3):
        done = python(code)
        assert done.stderr == ""
        elapsed, initialised = done.stdout.split()
        assert initialised == "False"
        seconds.append(float(elapsed))
    assert statistics.median(seconds) < 0.3


def test_import_brings_in_no_optional_package():
    optional = {"PIL", "hypothesis", "matplotlib", "onnx", "onnxruntime", "onnxscript", "pyarrow"}
    done = python(
        "import sys, torch; before = set(sys.modules)\n"
        "import psap, psap_kernels, psap.data, psap.models, psap.measure\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    assert optional.isdisjoint(done.stdout.split())
    assert done.stderr == ""


# Metadata


def test_versions_agree():
    assert metadata.version("psap") == psap.__version__


def test_command_is_declared():
    (command,) = metadata.entry_points(group="console_scripts", name="psap")
    assert command.value == "psap.cli:main"


@pytest.mark.skipif(os.environ.get("PSAP_REQUIRE_EXT") != "1", reason="PSAP_REQUIRE_EXT is not 1")
def test_a_required_extension_is_there():
    part = psap_kernels.build_info()["parts"]["_C"]
    assert part["available"], part["why_missing"]


@pytest.mark.parametrize("name", ["py.typed", "data/digits.npz", "data/DATA_LICENSE.md"])
def test_files_of_the_package(name):
    assert resources.files("psap").joinpath(name).is_file()


# House rules that a linter does not know


def imports(tree: ast.Module, *, functions: bool = False) -> Iterator[str]:
    """Names of the modules that an import of this one imports; those in functions on demand."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else str(node.module)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif functions or not isinstance(node, FUNCTIONS):
            waiting += ast.iter_child_nodes(node)


def import_graph(*, functions: bool = False) -> dict[str, set[str]]:
    """For every module those of the project that it imports, and the packages that they are in."""
    graph: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        found = {other for other in imports(tree, functions=functions) if other in MODULES}
        parents = {".".join(other.split(".")[:n]) for other in found for n in range(1, 4)}
        outside = {parent for parent in parents if not f"{name}.".startswith(f"{parent}.")}
        graph[name] = found | (outside & set(MODULES))
    return graph


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_modules_do_not_import_each_other_in_a_circle():
    graph = import_graph()
    assert graph["psap.data"] >= {"psap.data.loader", "psap.errors"}
    assert graph["psap.shrink"] >= {"psap.graph", "psap.graph.groups"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_only_plans_import_in_functions_what_imports_them():
    """They are `Plan.to_json` and ``plan(round_to="measured")`` to a caller."""
    graph, whole = import_graph(), import_graph(functions=True)
    back = {
        (name, other)
        for name in whole
        for other in whole[name] - graph[name]
        if name in reached(whole, other)
    }
    above = ("psap.planfile", "psap.rounding")
    assert back == {("psap.plans", other) for other in above}


def test_the_channel_graph_imports_nothing_above_it():
    """Not even in functions: the list in docs/architecture.md says what lies below psap/graph."""
    names = (
        "errors",
        "custom",
        "contexts",
        "members",
        "untouched",
        "shared",
        "multihead",
        "symbolic",
        "examples",
        "calling",
    )
    below = {"psap", *(f"psap.{name}" for name in names)}
    whole = import_graph(functions=True)
    for name in MODULES:
        if name in below or name.startswith("psap.graph"):
            others = reached(whole, name) - below
            assert {other for other in others if not other.startswith("psap.graph")} == set(), name
            assert name not in below or not others, name


def test_kernels_do_not_need_psap():
    for name, tree in MODULES.items():
        if name.startswith("psap_kernels"):
            assert not [other for other in imports(tree) if other.split(".")[0] == "psap"]


@pytest.mark.parametrize("file", FILES)
def test_length_of_files_and_functions(file):
    text = (ROOT / file).read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert lines <= 50, f"{node.name} has {lines} lines besides its docstring"


@pytest.mark.parametrize("file", FILES)
def test_nothing_unpickles(file):
    """A pickle runs code when it is loaded, and it is read by nothing here."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        match node:
            case ast.Import(names=names):
                modules = {alias.name.split(".")[0] for alias in names}
            case ast.ImportFrom(module=module):
                modules = {str(module).split(".")[0]}
            case _:
                modules = set()
        assert modules.isdisjoint({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"})
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                assert given.get("weights_only") == "True", f"line {node.lineno}"
            if called in ("np.load", "numpy.load"):
                assert given.get("allow_pickle") == "False", f"line {node.lineno}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("tests/")])
def test_every_raises_says_what_it_expects(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises":
            assert "match" in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}"


def test_defaults_are_immutable():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
                    mutable = isinstance(default, (ast.List, ast.Dict, ast.Set))
                    assert not mutable, f"{name}.{node.name}"


def test_ci_runs_the_checks_of_the_makefile():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^exec make check ", script, re.MULTILINE)
    assert re.search(r"^check: lint types test$", (ROOT / "Makefile").read_text(), re.MULTILINE)
