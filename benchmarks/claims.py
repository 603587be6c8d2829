"""`make bench`: every claim that the benchmarks have recorded, beside the figure of the paper it is held against.

One line a claim, and below it what was measured. Reads `benchmarks/results/<area>/<name>.json`, of which it needs
`claims`: a map from a claim's name to `{"value", "spread": [min, max], "seeds", "paper", "unit", "how"}`; any part but
the value may be missing. Runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Print the table, or say that nothing has been recorded."""
    console, rows = Console(), list(claims(RESULTS))
    if not rows:
        console.print(f"no claims in {RESULTS}: run a benchmark under benchmarks/ first")
        return
    console.print(f"{'value':>16} {'paper':>5} {'spread':>16} seeds  claim", style="bold")
    for area, group in groupby(rows, key=attrgetter("area")):
        console.print(f"\n{area}", style="bold")
        for row in group:
            figures = f"{row.value:>16} {row.paper:>5} {row.spread:>16} {row.seeds:>5}"
            console.print(figures, row.name, highlight=False, soft_wrap=True)
            console.print(Padding(Text(row.how, style="dim"), (0, 0, 0, 6)))


class Row(NamedTuple):
    """A claim as text: area, name, value, paper's figure, spread and number of seeds, how it was measured."""

    area: str
    name: str
    value: str
    paper: str
    spread: str
    seeds: str
    how: str


def claims(folder: Path) -> Iterator[Row]:
    """The recorded claims, area by area."""
    for path in sorted(folder.rglob("*.json")):
        recorded = json.loads(path.read_text()).get("claims") or {}
        area = path.parent.relative_to(folder).as_posix()
        for name, claim in sorted(recorded.items()):
            figures = (_value(claim), _number(claim.get("paper")), _spread(claim), _seeds(claim))
            yield Row(area, name, *figures, str(claim.get("how", "")))


def _value(claim: Mapping[str, Any]) -> str:
    return f"{_number(claim.get('value'))} {claim.get('unit') or ''}".strip()


def _spread(claim: Mapping[str, Any]) -> str:
    spread = claim.get("spread")
    return f"{spread[0]:.3g} to {spread[1]:.3g}" if spread else "-"


def _seeds(claim: Mapping[str, Any]) -> str:
    seeds = claim.get("seeds")
    return str(len(seeds) if isinstance(seeds, list) else seeds or "-")


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
