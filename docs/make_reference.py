"""Writes docs/reference.md from the docstrings: ``python docs/make_reference.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import psap
from psap import data, measure, record, report

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Reference

Every public name, from its docstring (`python docs/make_reference.py` writes this page; a test
compares). Shares are numbers in (0, 1], `macs` counts multiply-accumulates (1 MAC = 2 FLOPs), and
names say their units (`latency_ms`). Every error derives from `psap.PsapError`; mistakes in
arguments are `ValueError` or `TypeError` too. The symbols are those of [method.md](method.md).
"""
PARTS = {
    "While training": ("Pruner", "Config", "Target"),
    "Once": ("trace", "plan", "apply", "mask", "drop_blocks"),
    "What they return": ("Result", "Plan", "Graph"),
    "Measured latency": ("measure_latency", "LatencyTable"),
    "Files": ("save", "load", "export_onnx", "export_pt2"),
    "Errors": (
        *("PsapError", "ArgumentError", "ArgumentTypeError", "StateError", "TargetError"),
        *("TraceError", "VerificationError", "FileError", "PsapWarning"),
    ),
}
MODULES = {
    "The report": {
        record: ("build", "Measured"),
        report: ("write",),
        measure: ("compare_latency", "latency_ms", "Comparison", "Latency"),
    },
    "Data": {
        data: (
            *("load", "DataSpec", "Loader", "Normalise", "Augment", "Pictures"),
            *("load_digits", "load_cifar10", "load_imagefolder"),
        )
    },
}
"""What is not in psap itself; of psap.data everything but the name of a type."""
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Warns):$")
TABLES = {"Args": "parameter", "Attributes": "attribute"}


def sections(text: str) -> dict[str, list[str]]:
    """The lines of a Google docstring by section; "" is what stands before the first one."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in text.splitlines():
        begins = SECTION.match(line)
        if begins:
            found[name := begins[1]] = []
        elif name and line and not line.startswith(" "):
            raise ValueError(f"text after the section {name}: {line!r}")
        else:
            found[name].append(line.removeprefix("    ") if name else line)
    return found


def items(lines: list[str]) -> Iterator[tuple[str, str]]:
    """The entries of a section: a name, and its text on one line."""
    name, parts = "", list[str]()
    for line in lines:
        if line and not line.startswith(" "):
            if name:
                yield name, " ".join(parts)
            name, _, first = line.partition(": ")
            parts = [first]
        elif line:
            parts.append(line.strip())
    if name:
        yield name, " ".join(parts)


def spoken(text: str) -> str:
    """A docstring's marks as Markdown's; safe in a table."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    return text.replace("|", "\\|")


def signature(value: Any) -> inspect.Signature:
    """The signature, without self."""
    found = inspect.signature(value)
    kept = [p for name, p in found.parameters.items() if name != "self"]
    return found.replace(parameters=kept)


def call(name: str, value: Any) -> str:
    """How it is called, as code."""
    parts, star = [], False
    for p in signature(value).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
            star = True
        prefix = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        parts.append(prefix + p.name + ("" if p.default is p.empty else f"={shown(p.default)}"))
    return f"```python\n{name}({', '.join(parts)})\n```"


def shown(default: Any) -> str:
    """A default as it would be typed."""
    made = isinstance(default, (int, float, str, tuple, type(None)))
    return repr(default) if made else "..."


def kinds(value: Any, annotation: str) -> str:
    """An annotation; a name for several values as these values."""
    alias = getattr(inspect.getmodule(value), annotation, None)
    choices = get_args(alias) if get_origin(alias) is Literal else ()
    return " | ".join(map(repr, choices)) or annotation


def defaults(value: Any) -> dict[str, str]:
    """Types and defaults by name, as a table shows them."""
    found = {}
    for name, p in signature(value).parameters.items():
        default = p.default
        field = getattr(value, "__dataclass_fields__", {}).get(name)
        if field is not None and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = spoken(kinds(value, p.annotation)) if isinstance(p.annotation, str) else ""
        given = "required" if default is p.empty else f"`{default!r}`"
        found[name] = f"{f'`{kind}`' if kind else ''} | {given}"
    return found


def body(text: str, known: dict[str, str]) -> Iterator[str]:
    """A docstring as Markdown."""
    for name, lines in sections(text).items():
        if not name:
            yield spoken("\n".join(lines).strip())
        elif name == "Returns":
            yield "**Returns** " + spoken(" ".join(line.strip() for line in lines if line))
        elif name in TABLES:
            rows = [f"| {TABLES[name]} | type | default | |", "|---|---|---|---|"]
            for item, told in items(lines):
                rows.append(f"| `{item}` | {known.get(item, ' | ')} | {spoken(told)} |")
            yield "\n".join(rows)
        else:
            told = (f"`{item}`: {spoken(text)}" for item, text in items(lines))
            yield f"**{name}** " + " ".join(told)


def described(name: str, value: Any, level: str) -> Iterator[str]:
    """One function, method or class."""
    is_error = inspect.isclass(value) and issubclass(value, Exception | Warning)
    yield f"{level} {name.rpartition('.')[2] if level == '####' else 'psap.' + name}"
    callable_ = inspect.isfunction(value) or (inspect.isclass(value) and not is_error)
    made_by_hand = name not in ("Plan", "Graph", "LatencyTable", "Result")
    if callable_ and made_by_hand:
        yield call(name.rpartition(".")[2] if level == "####" else "psap." + name, value)
    yield from body(inspect.getdoc(value) or "", defaults(value) if callable_ else {})
    if inspect.isclass(value) and not is_error:
        for key, item in vars(value).items():
            if key.startswith("_"):
                continue
            if isinstance(item, classmethod | staticmethod):
                item = item.__func__
            if isinstance(item, property) and item.__doc__:
                yield f"#### {key}\n\n{spoken(inspect.getdoc(item) or '')}"
            elif inspect.isfunction(item):
                yield from described(f"{name}.{key}", item, "####")


def page() -> str:
    """The whole page.

    Raises:
        ValueError: a public name is in no part.
    """
    listed = {name for names in PARTS.values() for name in names}
    if listed != set(psap.__all__):
        raise ValueError(f"PARTS and psap.__all__ differ: {sorted(listed ^ set(psap.__all__))}")
    listed = {*MODULES["Data"][data], "DataName"}
    if listed != set(data.__all__):
        raise ValueError(f"MODULES and psap.data differ: {sorted(listed ^ set(data.__all__))}")
    blocks = [HEAD.strip()]
    for title, names in PARTS.items():
        blocks.append(f"## {title}")
        for name in names:
            blocks += described(name, getattr(psap, name), "###")
    for title, modules in MODULES.items():
        short = {module.__name__.rpartition(".")[2]: module for module in modules}
        blocks.append(f"## {title}\n\n`from psap import {', '.join(short)}`")
        for owner, module in short.items():
            for name in modules[module]:
                blocks += described(f"{owner}.{name}", getattr(module, name), "###")
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
