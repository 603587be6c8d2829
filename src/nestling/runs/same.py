"""Whether a job is asked for with the settings that it was begun with: one setting after the other, by value.

Run folders (`run.yaml`) and checkpoints (`complete.json`) keep the settings themselves. A setting that came later
counts as its default there, so that a run outlives an upgrade; a former name counts as the new one. What does not
change the result may differ: the names in `FREE` of the settings' class.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

FREE = "FREE"  # attribute of a settings class: names of settings that do not change what is made
FORMER = "FORMER"  # attribute of a settings class: former name -> name


def difference(before: Mapping[str, Any], settings: Any, free: Collection[str] = ()) -> str | None:
    """What a sentence says about the first setting that differs, `seed=0, not 1`; None if all agree.

    before: settings by name as they were kept, nested where settings hold settings. settings: a dataclass. free: more
    names that may differ.
    """
    return next(_differences(before, settings, free), None)


def plain(settings: Any) -> Any:
    """Settings as files hold them: mappings for dataclasses, lists for tuples, text for paths."""
    value = dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings  # type: ignore[arg-type]
    return json.loads(json.dumps(value, default=str))


def _differences(
    before: Mapping[str, Any], settings: Any, free: Collection[str] = (), prefix: str = ""
) -> Iterator[str]:
    former, free = getattr(settings, FORMER, {}), {*free, *getattr(settings, FREE, ())}
    kept = {former.get(name, name): value for name, value in before.items()}
    kept = {name: value for name, value in kept.items() if name not in free}
    fields = {field.name: field for field in dataclasses.fields(settings) if field.name not in free}
    for name, field in fields.items():
        now, was = getattr(settings, name), kept[name] if name in kept else _default(field)
        if dataclasses.is_dataclass(now) and isinstance(was, Mapping):
            yield from _differences(was, now, prefix=f"{prefix}{name}.")
        elif was != plain(now):
            yield f"{prefix}{name}={was}, not {plain(now)}"
    for name in kept:
        if name not in fields:
            yield f"{prefix}{name}={kept[name]}, which is no setting of this job"


def _default(field: dataclasses.Field) -> Any:
    """What a setting is that nobody gave; None for one that must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return plain(field.default_factory())
    return None if field.default is dataclasses.MISSING else plain(field.default)
