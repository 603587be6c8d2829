"""`nestling family`: several children of one parent in one resumable job, sharing all that can be shared.

The parent is loaded, read, ranked and evaluated once; calibration text, ranking and what a repair needs serve every
member, and all learn from the parent, whose likeliest tokens are kept for them with --distill.top_k. Members are cut
from the parent, or each from the one before it, which for large cuts is better (Minitron, arXiv 2407.14679, table 14)
but needs a ranking for each. Each member has a folder of its own under members/, with the report of how it was made;
the family's report has all of them in one table.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nestling import processes
from nestling.budget import Budget
from nestling.errors import TargetError
from nestling.recipes.child import Child, ChildSettings, Origin, Parent
from nestling.recipes.progress import Stages, console
from nestling.recipes.run import Run
from nestling.recipes.shapes import checked, parent_cost
from nestling.recipes.summary import heading, reported
from nestling.report import comparison, write_report
from nestling.search import describe
from nestling.train import documented

ORIGINS = ("parent", "previous")


@documented
@dataclass
class FamilySettings(ChildSettings):
    """Settings of `family`.

    Args:
        model: Hub id, folder, GGUF file, or builtin:smollm2-135m-instruct.
        to: Targets, one for each member: 0.75x 0.5x 0.25x, or other budgets; ratios are of MODEL.
        out: Run folder; members go to members/ in it.
        each_from: What members are cut from (--from): the parent, or the previous (next larger) member.
    """

    model: str
    to: list[str] = field(default_factory=lambda: ["0.75x", "0.5x", "0.25x"])
    out: str = "runs/family"
    each_from: str = "parent"


def family(settings: FamilySettings) -> dict[str, Any]:
    """Make the members, or those that are left; returns the summary that the report shows.

    Raises a `NestlingError` for anything wrong with the settings before any long work starts.
    """
    if settings.each_from not in ORIGINS:
        raise TargetError(f"--from {settings.each_from} is not possible: choose {' or '.join(ORIGINS)}")
    parent = Parent(settings, settings.calibration_tokens)
    targets = _targets(parent, settings)
    run = parent.run = Run("family", settings, settings.out, settings.overwrite)
    if settings.distill.top_k and settings.distill.correction != "together" and not settings.distill.states:
        parent.cache = run.path("teacher_tokens")
    stages = Stages(2 + 4 * len(targets))
    with stages("rank every axis of the parent on calibration text"):
        origin = Origin(parent, parent.model, run)
        origin.ranking  # noqa: B018  made now, used for every member
    made = []
    for name, budget in targets.items():
        child = Child(parent, origin, _member_run(run, settings, name), name)
        made.append(_member(child, budget, stages))
        if settings.each_from == "previous" and len(made) < len(targets):
            origin = Origin(parent, child.model, child.run)
    parent.taught()
    with stages("write the family's report"):
        summary: dict[str, Any] = run.values("summary.json", lambda: _summary(parent, settings, made))
        report = processes.first(lambda: str(write_report(run.folder)))
    console.print(comparison(summary))
    console.print(f"report:  {report}\nmembers: {run.path('members')}")
    return summary


def _targets(parent: Parent, settings: FamilySettings) -> dict[str, Budget]:
    """Name -> limits in absolute figures, the largest member first. Raises `TargetError` for a member in vain."""
    if not settings.to or len(set(settings.to)) < len(settings.to):
        raise TargetError(f"the targets {' '.join(settings.to)} are not one for each member: give --to 0.75x 0.5x")
    parsed = {name: checked(parent.model, settings, name) for name in settings.to}
    timed = any(isinstance(budget, Budget) and budget.timed for budget in parsed.values())
    whole = parent_cost(parent.model, settings, timed)
    budgets = {name: budget.resolved(whole) for name, budget in parsed.items() if isinstance(budget, Budget)}
    if all("params" in budget.limits for budget in budgets.values()):
        budgets = dict(sorted(budgets.items(), key=lambda item: -item[1].limits["params"].value))
    return budgets


def _folder(name: str) -> str:
    """Where a member is kept in the run folder."""
    return f"members/{re.sub(r'[^A-Za-z0-9_.=-]+', '_', name)}"


def _member_run(run: Run, settings: FamilySettings, name: str) -> Run:
    folder = run.path(_folder(name))
    return Run("family", dataclasses.replace(settings, to=[name], out=str(folder)), folder)


def _member(child: Child, budget: Budget, stages: Stages) -> dict[str, Any]:
    """Make one member, or what is left of it; returns its summary."""
    with stages(f"{child.name}: search a shape"):
        console.print(f"    {describe(child.search(budget))}")
    with stages(f"{child.name}: prune"):
        child.prune()
    with stages(f"{child.name}: distill from the parent"):
        child.distill()
    with stages(f"{child.name}: evaluate"):
        summary, _ = reported(child, child.evaluate())
    return summary


def _summary(parent: Parent, settings: FamilySettings, made: list[dict[str, Any]]) -> dict[str, Any]:
    """All members in one record, ready for JSON."""
    names = [member["budget"] for member in made]
    before = ["parent", *names[:-1]] if settings.each_from == "previous" else ["parent"] * len(names)
    first = made[0]
    return heading(settings, " ".join(names), parent.model) | {
        "data": first["data"],
        "parent": first["parent"],
        "members": [_entry(member, origin) for member, origin in zip(made, before, strict=True)],
    }


def _entry(member: Mapping[str, Any], cut_from: str) -> dict[str, Any]:
    folder = _folder(member["budget"])
    kept = {name: member["child"][name] for name in ("cost", "pruned", "evaluation", "speed")}
    return {
        "name": member["budget"],
        "folder": folder,
        "model": f"{folder}/model",
        "cut_from": cut_from,
        "shape": member["shape"],
        "needs_nestling": member["needs_nestling"],
        **kept,
    }
