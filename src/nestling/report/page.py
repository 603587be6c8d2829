"""`report.html`: one page that opens offline and tells what a run did.

Puts the parts (comparison, picture, curve, candidates) into the templates beside this file. The page loads nothing:
styles, drawings and the few lines of script are in it, and its content policy names the script by its hash, so that
no text from a run (prompts, samples, names) could ever run as one. Everything is escaped by the templates; without
script only tooltips, the copy button and the switch between light and dark are lost.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nestling.report import colour, human, picture
from nestling.report.curve import curves, goal, series
from nestling.report.headline import headline
from nestling.report.members import members
from nestling.report.routers import routers
from nestling.report.rows import compare
from nestling.report.run import Run, items, mapping, number, words, write
from nestling.report.scatter import candidates, fields, others, scatter

WIDE, NARROW = 960, 340


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` from what is in a run folder, and return its path.

    Reads `summary.json`, `metrics.jsonl` and `run.yaml`; what is missing in them is left out. Raises
    `CheckpointError` if the folder holds no run, a damaged one, or cannot be written.
    """
    run = Run.read(run_dir)
    return write(run.folder / "report.html", render(run))


def render(run: Run) -> str:
    """The page as text."""
    summary = run.summary
    tried = candidates(summary)
    script = _source("page.js")
    return (
        environment()
        .get_template("page.html")
        .render(
            title=words(summary, "title") or run.folder.resolve().name,
            names=[name for name in (words(summary, "parent", "name"), words(summary, "child", "name")) if name],
            headline=headline(summary),
            comparison=compare(summary),
            family=members(summary),
            model=_model(summary),
            curve=[_panels(run, width) for width in (WIDE, NARROW)],
            evaluated=bool(series(run.metrics)[1]),
            goal=goal(run.metrics),
            routers=routers(summary, run.metrics, (WIDE, NARROW)),
            members=items(summary, "members"),
            member_fields=list(dict.fromkeys(f for one in items(summary, "members") for f in mapping(one, "shape"))),
            candidates=tried,
            fields=fields(tried),
            scatter=[Markup(scatter(tried + others(summary), width)) for width in (WIDE // 2, NARROW)],
            samples=[_sample(entry) for entry in items(summary, "samples") if mapping(entry)],
            command=words(summary, "command"),
            settings=run.settings,
            facts=facts(summary),
            style=Markup(environment().get_template("page.css").render(scales=_scales())),
            script=Markup(script),
            script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was used: budget, data, seed, machine, versions; only what the summary tells."""
    data = mapping(summary, "data")
    tokens = [
        (name, number(data, f"{key}_tokens"))
        for name, key in (("calibration", "calibration"), ("distillation", "distill"))
    ]
    versions = mapping(summary, "versions")
    every = [
        ("budget", words(summary, "budget")),
        ("architecture", words(summary, "parent", "architecture")),
        ("training data", words(data, "train")),
        *((name, f"{human.count(count)} tokens" if count else "") for name, count in tokens),
        ("validation data", words(data, "validation")),
        ("seed", words(summary, "seed")),
        ("machine", words(summary, "machine")),
        ("created", words(summary, "created")[:16].replace("T", " ")),
        *((name, words(versions, name)) for name in versions),
    ]
    return [(name, value) for name, value in every if value]


@cache
def environment() -> Environment:
    """The templates, with everything escaped that is not marked as markup by the code that drew it."""
    found = Environment(
        loader=PackageLoader("nestling.report"),
        autoescape=lambda name: name is None or not name.endswith(("css", "md")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"count": human.count, "ratio": human.ratio, "figure": human.figure}
    found.filters |= {"sizes": picture.sizes, "name_of": picture.name_of}
    return found


def _source(name: str) -> str:
    loader = environment().loader
    assert loader is not None
    return loader.get_source(environment(), name)[0]


def _model(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `model.html` draws: whole-model strips, then one row per layer of the parent."""
    total, kept, importance = picture.layers(summary)
    axes = picture.axes(summary)
    top = max(importance, default=0.0)
    columns = [axis for axis in axes if not axis.whole_model]
    rows = [
        {
            "number": layer,
            "dropped": layer not in kept,
            "score": importance[layer] if importance else None,
            "bar": 100 * max(importance[layer], 0.0) / top if importance and top > 0 else 0.0,
            "strips": [_strip(axis, layer) for axis in columns],
        }
        for layer in range(total)
    ]
    return {
        "whole": [(axis, _strip(axis, 0)) for axis in axes if axis.whole_model],
        "columns": columns,
        "rows": rows,
        "kept_layers": len(kept & set(range(total))),
        "bars": bool(importance),
        "levels": colour.LEVELS,
    }


def _strip(axis: picture.AxisPicture, layer: int) -> dict[str, Any] | None:
    if layer >= len(axis.strips) or not axis.strips[layer].units:
        return None
    strip = axis.strips[layer]
    scores = strip.scores
    spread = f", scores {human.figure(scores.min())} to {human.figure(scores.max())}" if len(scores) else ""
    return {
        "svg": Markup(picture.strip_svg(strip, axis.scale)),
        "units": strip.units,
        "cut": strip.cut,
        "share": round(100 * strip.cut / strip.units, 3),
        "title": f"{strip.kept:,} of {strip.units:,} {axis.name} kept{spread}",
    }


def _panels(run: Run, width: int) -> list[tuple[str, Markup]]:
    return [(title, Markup(drawing)) for title, drawing in curves(run.metrics, width)]


def _sample(entry: Any) -> dict[str, str]:
    """A sample whose texts do not repeat the prompt."""
    prompt = words(entry, "prompt")
    texts = {who: words(entry, who).removeprefix(prompt).strip("\n") for who in ("parent", "child")}
    return {"prompt": prompt, **{who: re.sub(r"^ (?=\S)", "", text) for who, text in texts.items()}}


def _scales() -> dict[str, list[str]]:
    return {"light": colour.scale(), "dark": colour.scale(dark=True)}
