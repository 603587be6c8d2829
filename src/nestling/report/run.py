"""A run folder as data: `summary.json`, `metrics.jsonl` and `run.yaml`, read and nothing more.

Every part of them may be missing, and a part of the wrong type counts as missing: the getters below return an empty
mapping, an empty list or None, and whoever draws it leaves it out. Only a file that is not what its name says is
an error. Knows nothing of pages, models or tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.errors import CheckpointError
from nestling.runs import whole

SUMMARY, METRICS, SETTINGS = "summary.json", "metrics.jsonl", "run.yaml"


@dataclass(frozen=True)
class Run:
    """What a run left behind: its summary, one record per logged step, and its settings as they were written."""

    folder: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    settings: str

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Raises `CheckpointError` if the folder is missing, holds no run, or holds a damaged one."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"run folder '{folder}' does not exist: give a folder that `nestling compress` wrote")
        if not any((folder / name).is_file() for name in (SUMMARY, METRICS, SETTINGS)):
            raise CheckpointError(
                f"'{folder}' is not a run folder: it holds none of {SUMMARY}, {METRICS} and {SETTINGS}"
            )
        return cls(folder, _summary(folder / SUMMARY), _metrics(folder / METRICS), _text(folder / SETTINGS))


def mapping(value: Any, *keys: str) -> dict[str, Any]:
    """The mapping at the end of a path of keys, or an empty one."""
    found = get(value, *keys)
    return dict(found) if isinstance(found, Mapping) else {}


def items(value: Any, *keys: str) -> list[Any]:
    """The list at the end of a path of keys, or an empty one."""
    found = get(value, *keys)
    return list(found) if isinstance(found, (list, tuple)) else []


def number(value: Any, *keys: str) -> float | None:
    """The number at the end of a path of keys; None for what is missing, not a number, or NaN."""
    found = get(value, *keys)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or math.isnan(found):
        return None
    return found


def finite(value: Any, *keys: str) -> float | None:
    """As `number`, but None for infinity too: for what is drawn."""
    found = number(value, *keys)
    return found if found is not None and math.isfinite(found) else None


def words(value: Any, *keys: str) -> str:
    """The text at the end of a path of keys, or an empty one; numbers are written out."""
    found = get(value, *keys)
    if isinstance(found, bool) or not isinstance(found, (str, int, float)):
        return ""
    return str(found)


def get(value: Any, *keys: str) -> Any:
    """What is at the end of a path of keys, or None."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def write(path: Path, text: str) -> Path:
    """Put a file in place whole or not at all. Raises `CheckpointError` that says why it could not."""
    with whole(path, "free the space or mend the rights") as beside:
        beside.write_text(text, encoding="utf-8", errors="replace")
    return path


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}' ({error.strerror}): mend its rights") from error


def _summary(path: Path) -> dict[str, Any]:
    text = _text(path)
    if not path.is_file():
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is damaged ({error}): run the job again to rewrite it") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' is damaged (not a JSON object): run the job again to rewrite it")
    return found


def _metrics(path: Path) -> list[dict[str, Any]]:
    """One record per line. A run that was killed may leave its last line unfinished; that line is left out."""
    text = _text(path)
    records: list[dict[str, Any]] = []
    lines = text.split("\n")
    for position, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if position == len(lines):
                break
            raise CheckpointError(
                f"'{path}' is damaged in line {position} ({error}): delete that line, or run the job again"
            ) from error
        if not isinstance(record, dict):
            raise CheckpointError(f"'{path}' is damaged in line {position}: every line must be a JSON object")
        records.append(record)
    return records
