"""Text of the page: escaping, numbers with units, tables."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

DASH = "\N{EN DASH}"
_THIN = "\N{NARROW NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"
_TIMES = "\N{MULTIPLICATION SIGN}"
# what XML 1.0 forbids: control characters, lone surrogates and two non-characters
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def escape(value: object) -> str:
    """Any value as text that is safe in HTML and XML, in content and in quoted attributes."""
    return html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


def shorten(name: str, limit: int) -> str:
    """The name, or its tail behind an ellipsis: the tail is what tells layers apart."""
    return name if len(name) <= limit else "…" + name[1 - limit :]


def code(name: str, part: str = "") -> str:
    """A name as HTML, and behind it which part is meant, if not all."""
    return f"<code>{escape(name)}</code>" + (f" <small>{escape(part)}</small>" if part else "")


def plain_number(value: float | None, digits: int = 3) -> str:
    """A number with some significant digits, as plain text."""
    if value is None:
        return DASH
    return f"{value:.{digits}g}".replace("-", _MINUS)


def scientific(value: float | None) -> str:
    """A small or large number as HTML: 2.1 x 10^-15."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).replace("-", _MINUS)
    return f"{mantissa.replace('-', _MINUS)}{_THIN}{_TIMES}{_THIN}10<sup>{power}</sup>"


def count(value: float | None) -> str:
    """An integer with thousands apart."""
    return DASH if value is None else f"{value:,.0f}".replace(",", _THIN)


def short_count(value: float | None, unit: str = "") -> str:
    """A number with three digits and k, M, G."""
    if value is None:
        return DASH
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{_three(value / limit)}{_THIN}{prefix}{unit}"
    return f"{value:.0f}{_THIN}{unit}" if unit else f"{value:.0f}"


def _three(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    if value is None:
        return DASH
    return f"{100 * value:.{digits}f}{_THIN}%".replace("-", _MINUS)


def milliseconds(value: float | None, unit: str = f"{_THIN}ms") -> str:
    """Milliseconds with three digits."""
    return DASH if value is None else f"{_three(value)}{unit}"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign; what rounds to zero has none."""
    shown = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(shown) == 0 else shown.replace("-", _MINUS)


def ratio(part: float | None, total: float | None) -> float | None:
    """The part over the total, None if it is not defined."""
    return None if part is None or total is None or total <= 0 else part / total


def times(value: float | None) -> str:
    """A factor: 3.9x."""
    return DASH if value is None else f"{_three(value)}{_TIMES}"


def ranges(indices: Iterable[int]) -> str:
    """Sorted indices with runs joined: 0-3, 7."""
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in runs) or DASH


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already; its first column is text, the others are numbers.

    A head that starts with "<" makes its column text as well, and is shown without that sign.
    """
    texts = [i == 0 or name.startswith("<") for i, name in enumerate(head)]
    kinds = ["" if text else ' class="n"' for text in texts]
    cells = [f'<th scope="col"{k}>{h.lstrip("<")}</th>' for h, k in zip(head, kinds, strict=True)]
    body = []
    for row in rows:
        first, *others = row
        inner = "".join(f"<td{k}>{c}</td>" for c, k in zip(others, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row">{first}</th>{inner}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(cells)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def details(summary: str, content: str, *, opened: bool = False) -> str:
    """A part that can be folded away."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{summary}</summary>{content}</details>"
