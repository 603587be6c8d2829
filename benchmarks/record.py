"""What a benchmark leaves behind: rows, each kept as soon as it is there, and claims over them.

`benchmarks/results/<area>/<name>.json` holds the command, commit, versions, rows and claims. A row that is there is not
computed again, so a long benchmark may be interrupted or split over several sittings; each row says which commit it is
of. Knows nothing of what it is of.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("nestling", "torch", "transformers")
Row = dict[str, Any]


class Record:
    """The rows and claims of one benchmark; run as `python -m benchmarks.<area>.<name>`."""

    def __init__(self, area: str, name: str):
        self.area, self.name = area, name
        commit()
        self.path = RESULTS / area / f"{name}.json"
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows: list[Row] = kept.get("rows", [])
        self.claims: dict[str, Row] = kept.get("claims", {})

    def row(self, key: Row, make: Callable[[], Row]) -> Row:
        """The row with that key, made and kept unless it is there."""
        found = self.find(**key)
        if found is None:
            started, at = time.perf_counter(), commit()
            figures = {"commit": at, **make()}
            found = {**key, **figures, "seconds": round(time.perf_counter() - started, 1)}
            print(found, flush=True)
            self.rows.append(found)
            self.save()
        return found

    def find(self, **key: Any) -> Row | None:
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def save(self, claims: dict[str, Row] | None = None, **more: Any) -> None:
        """Write what there is; claims stay as they are unless given. more: further facts of the whole benchmark."""
        self.claims = self.claims if claims is None else claims
        content = {
            "command": self._command(),
            "commit": commit(),
            "versions": {name: version(name) for name in PACKAGES},
            "seeds": sorted({row["seed"] for row in self.rows if "seed" in row}),
            **more,
            "rows": self.rows,
            "claims": self.claims,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(beside, self.path)

    def _command(self) -> str:
        """As it was called, without the folders of this machine."""
        options = [Path(part).name if "/" in part else part for part in sys.argv[1:]]
        return shlex.join(["python", "-m", f"benchmarks.{self.area}.{self.name}", *options])


@cache
def commit() -> str:
    """Of the code that runs, as it was when it was first asked for."""
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()


def claim(values: Sequence[float], seeds: Sequence[int], how: str, unit: str, paper: float | None = None) -> Row:
    """What is claimed: the mean of a figure over seeds and its spread, beside the paper's."""
    digits = [round(value, 4) for value in values]
    spread = [min(digits), max(digits)]
    found = {"value": round(mean(digits), 4), "spread": spread, "seeds": list(seeds), "paper": paper}
    return found | {"unit": unit, "how": how}


def show(rows: Iterable[Row], by: Sequence[str], figures: Sequence[str]) -> None:
    """A table with one line for each value of the keys in `by`, and every figure as its mean (and range) over seeds."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(str(row.get(key, "")) for key in by), []).append(row)
    table = Table(*by, *figures, "seeds")
    for key, same in lines.items():
        values = [[row[name] for row in same if name in row] for name in figures]
        table.add_row(*key, *map(_ranged, values), str(len(same)))
    Console(width=120).print(table)


def _ranged(values: Sequence[float]) -> str:
    if not values:
        return ""
    digits = 0 if min(values) >= 1000 else 4
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"
