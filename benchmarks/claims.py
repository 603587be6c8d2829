"""`make bench`: every claim that the benchmarks have recorded, beside the figure of the paper it is held against.

Reads `benchmarks/results/<area>/<name>.json`, of which it needs `claims`: a map from a claim's name to
`{"value", "spread": [min, max], "seeds", "paper", "unit", "how"}`; any part but the value may be missing. Runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Print the table, or say that nothing has been recorded."""
    console, rows = Console(), list(claims(RESULTS))
    if not rows:
        console.print(f"no claims in {RESULTS}: run a benchmark under benchmarks/ first")
        return
    table = Table("area", title="claims", title_justify="left")
    table.add_column("claim", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("paper", justify="right")
    table.add_column("spread")
    table.add_column("how")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def claims(folder: Path) -> Iterator[tuple[str, ...]]:
    """One row of text per claim: area, claim, value, paper's figure, spread over seeds, how it was measured."""
    for path in sorted(folder.rglob("*.json")):
        recorded = json.loads(path.read_text()).get("claims") or {}
        for name, claim in sorted(recorded.items()):
            area = path.parent.relative_to(folder).as_posix()
            yield area, name, _value(claim), _number(claim.get("paper")), _spread(claim), str(claim.get("how", ""))


def _value(claim: Mapping[str, Any]) -> str:
    return f"{_number(claim.get('value'))} {claim.get('unit') or ''}".strip()


def _spread(claim: Mapping[str, Any]) -> str:
    spread = claim.get("spread")
    return f"{_number(spread[0])} to {_number(spread[1])}" if spread else "-"


def _number(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
