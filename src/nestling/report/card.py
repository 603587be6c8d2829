"""`model/README.md`: the model card, in the form that the Hugging Face hub reads.

YAML front matter (what a machine wants to know), then what the model is, its figures, how to load it, how it was
made and what it cannot do. Says of licence, language and data only what the run knows: a name is given as a hub id
only if it can be one and is not a file here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nestling.errors import CheckpointError
from nestling.report import human, picture
from nestling.report.page import environment, facts
from nestling.report.rows import Comparison, compare, data_name
from nestling.report.run import Run, get, items, mapping, number, words, write

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".txt", ".jsonl", ".json", ".parquet", ".gguf")


def write_model_card(run_dir: str | Path) -> Path:
    """Write `model/README.md` from what is in a run folder, and return its path.

    Raises `CheckpointError` if the folder holds no run, a damaged one, no model, or cannot be written.
    """
    run = Run.read(run_dir)
    folder = run.folder / "model"
    if not folder.is_dir():
        raise CheckpointError(f"'{run.folder}' holds no model folder to put a card in: finish the run first")
    return write(folder / "README.md", render(run.summary))


def render(summary: Mapping[str, Any]) -> str:
    """The card as text."""
    header = yaml.safe_dump(front_matter(summary), sort_keys=False, allow_unicode=True, width=1000)
    command = words(summary, "command")
    card = (
        environment()
        .get_template("card.md")
        .render(
            header=header,
            name=_line(words(summary, "child", "name") or words(summary, "title") or "A smaller model"),
            parent=_line(words(summary, "parent", "name")),
            changes=_changes(summary),
            table=table(compare(summary)),
            distilled=bool(number(summary, "data", "distill_tokens")),
            needs_nestling=get(summary, "needs_nestling") is True,
            command=command,
            fence="`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0)),
            facts=[(name, _line(value)) for name, value in facts(summary) if name != "machine"],
            losses=_losses(summary),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", card)


def front_matter(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads: base model, tags, library, task, and data, licence and language where they are known."""
    parent = mapping(summary, "parent")
    base = hub_id(words(parent, "hub_id") or words(parent, "name"))
    data = hub_id(words(summary, "data", "train"))
    distilled = ["distilled"] if number(summary, "data", "distill_tokens") else []
    language = [code for code in items(parent, "language") if isinstance(code, str)] or words(parent, "language")
    known = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["nestling", "pruned", *distilled],
        "datasets": [data] if data else None,
        "license": words(parent, "license"),
        "language": language,
    }
    return {key: value for key, value in known.items() if value}


def hub_id(name: str) -> str | None:
    """The name if it can be a hub's `owner/name`, and nothing on this disk is called so."""
    if not _HUB_ID.fullmatch(name) or name.endswith(_FILES) or Path(name).exists():
        return None
    return name


def table(found: Comparison) -> str:
    """The comparison in Markdown; empty if it has no rows."""
    if not found.rows:
        return ""
    compared = found.paired
    lines = [["", *found.stages, *(["ratio"] if compared else [])]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in found.rows:
        ratio = [human.ratio(row.ratio)] if compared else []
        lines.append([row.label, *(row.show(value) for value in row.values), *ratio])
    return "\n".join("| " + " | ".join(_line(cell) for cell in cells) + " |" for cells in lines)


def _changes(summary: Mapping[str, Any]) -> list[str]:
    """What was cut, one entry per axis that lost something."""
    total, kept, _ = picture.layers(summary)
    kept_layers = len(kept & set(range(total)))
    changes = [f"{kept_layers} of {total} layers"] if kept_layers < total else []
    changes += [f"{axis.per_layer} {axis.name}" for axis in picture.axes(summary) if axis.shrunk]
    return [_line(change) for change in changes]


def _losses(summary: Mapping[str, Any]) -> list[str]:
    """Where the child is worse than its parent, as `1.21x the parent's on stdlib`."""
    rows = [row for row in compare(summary).rows if row.label.startswith("perplexity, ")]
    names = [row.label.removeprefix("perplexity, ") for row in rows]
    return [
        f"{human.ratio(row.ratio)} the parent's on {_line(data_name(name))}"
        for row, name in zip(rows, names, strict=True)
        if row.ratio
    ]


def _line(value: str) -> str:
    """Text that cannot leave its line or its table cell, nor be read as HTML."""
    return " ".join(value.split()).replace("|", "\\|").replace("<", "&lt;")
