"""The comparison of parent and child for the terminal, narrow enough for 60 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nestling.report import human
from nestling.report.rows import Row, compare

_STYLES = {"better": "green", "worse": "yellow", "same": "dim", "": "dim"}


def comparison(summary: Mapping[str, Any]) -> Table:
    """What a run did to its model, one figure a row: parent | pruned | distilled | ratio, or parent | members.

    summary: the content of `summary.json`; what it lacks is left out.
    """
    found = compare(summary)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold", ratio=1)
    for stage in found.stages:
        table.add_column(stage, justify="right", no_wrap=True, style="bold" if stage == found.stages[-1] else "")
    if found.paired:
        table.add_column("ratio", justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(*_cells(row, found.paired))
    return table


def _cells(row: Row, paired: bool) -> list[Text]:
    cells = [Text(row.label), *(Text(row.show(value)) for value in row.values)]
    if paired:
        cells.append(Text(human.ratio(row.ratio), style=_STYLES[row.verdict]))
    return cells
