"""The residual branches that went before channels did."""

from __future__ import annotations

from collections.abc import Sequence

from psap.report.record import Block
from psap.report.text import DASH, code, percent, plain_number, table


def gone(blocks: Sequence[Block]) -> list[str]:
    """The names of the branches, in the order in which they went."""
    return [block.block for block in blocks if block.block is not None]


def section(blocks: Sequence[Block]) -> str:
    """Table of the loss and the cost after each branch; empty if none went."""
    if not gone(blocks):
        return ""
    rows = [
        [
            DASH if block.block is None else code(block.block),
            plain_number(block.loss, 4),
            percent(block.macs_share),
        ]
        for block in blocks
    ]
    return table(["branch", "loss without it and those above", "MACs kept"], rows)
