"""From what people type to what the argument parser takes, and what they may have meant where it takes nothing.

A list needs no brackets (`--to 0.75x 0.5x`), a switch no value (`--overwrite`), and a count may be written short
(`--tokens 2M`, `1e6`, `4Ki`). What a name or a value may be is for the parser to say; here only its spelling changes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, get_args, get_type_hints

from nestling.budget import amount
from nestling.errors import TargetError

# Options whose name would be a keyword of Python.
SHORT = {"--from": "--each_from"}
SWITCHED = {"true", "false", "yes", "no", "on", "off", "1", "0", "null"}
SIMILAR = 0.6  # of difflib's ratio, from which on a name may have been meant


def options(settings: type, prefix: str = "") -> dict[str, Any]:
    """The options of a settings class (`--distill.tokens` of a nested one) and the types of their values."""
    kinds = get_type_hints(settings)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        kind = kinds[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= options(kind, f"{prefix}{field.name}.")
        else:
            found[f"--{prefix}{field.name}"] = kind
    return found


def spelled_out(arguments: Iterable[str], kinds: Mapping[str, Any]) -> list[str]:
    """Arguments as the parser wants them. kinds: of each option, as `options` gives them."""
    result: list[str] = []
    waiting = [SHORT.get(argument, argument) for argument in arguments]
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        kind = kinds.get(name)
        values = [value] if equals else list(takewhile(lambda text: not text.startswith("-"), waiting))
        if kind == list[str] and values and not values[0].startswith("["):
            taken, text = len(values), json.dumps(values)
        elif _is(kind, bool) and not (values and values[0].lower() in SWITCHED):
            taken, text = 0, value if equals else "true"
        elif _is(kind, int) and values:
            taken, text = 1, _count(values[0])
        else:
            result.append(f"{name}{equals}{value}")
            continue
        result.append(f"{name}={text}")
        waiting = waiting if equals else waiting[taken:]
    return result


def meant(message: str, kinds: Mapping[str, Any]) -> str | None:
    """The options that may have been meant by the first one that a parser's message says there is not."""
    unknown = re.search(r"unrecognized arguments: .*?--([\w.-]+)|not accept option '([\w.-]+)'", message)
    if unknown is None:
        return None
    name = (unknown[1] or unknown[2]).replace("-", "_")
    known = {option.removeprefix("--"): option for option in kinds}
    alone = name.rpartition(".")[2]
    same = [text for text in known if text.rpartition(".")[2] == alone]
    near = difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR)
    inner = [text for text in known if difflib.get_close_matches(alone, [text.rpartition(".")[2]], cutoff=0.8)]
    found = [text if unknown[2] else known[text] for text in (same or near or inner)]
    return f"perhaps {' or '.join(found[:3])} was meant" if found else None


def near(words: list[str], verbs: Iterable[str]) -> str:
    """What to say to a verb that there is not, given the words on the command line."""
    known = list(verbs)
    group = [verb for verb in known if verb.split()[0] == words[0]]
    found = difflib.get_close_matches(" ".join(words[:2]), group, n=1, cutoff=SIMILAR + 0.2) or group
    found = found or difflib.get_close_matches(words[0], known, n=1)
    return f"perhaps {' or '.join(found)} was meant" if found else f"there are {', '.join(known)}"


def _is(kind: Any, wanted: type) -> bool:
    """Whether values are of a type, or of that type and None."""
    return kind is wanted or set(get_args(kind)) == {wanted, type(None)}


def _count(text: str) -> str:
    """A whole number in digits, if that is what a text means; otherwise the text."""
    try:
        number = float(text) if re.fullmatch(r"[\d_.]+e\d+", text, re.IGNORECASE) else amount(text)
    except (TargetError, ValueError):
        return text
    return str(int(number)) if math.isfinite(number) and number == int(number) else text
