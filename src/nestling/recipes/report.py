"""`nestling report`: write the page and the model card of a finished run anew, from the files in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestling.errors import CheckpointError
from nestling.recipes.progress import console
from nestling.report import write_model_card, write_report


@dataclass
class ReportSettings:
    """Settings of `report`.

    Args:
        run: Run folder that `nestling compress` made.
    """

    run: str


def report(settings: ReportSettings) -> dict[str, str]:
    """Write report.html, and the card beside the weights if they are there; returns the page's path."""
    if not Path(settings.run, "summary.json").exists():
        raise CheckpointError(f"'{settings.run}' holds no finished run: give the folder that `nestling compress` made")
    if Path(settings.run, "model").is_dir():
        write_model_card(settings.run)
    page = write_report(settings.run)
    console.print(f"report: {page}")
    return {"report": str(page)}
