"""The text that is on every machine: source and documentation of the running Python's standard library.

Modules are documents as they are, docstrings included; the language reference (`pydoc_data/topics.py`) is one
document per topic. Left out: installed packages, tests, and tables that programs wrote. Whether a file is for
validation depends on its relative path alone, so it is the same on every machine and in every run.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from nestling.errors import DataError

SPEC = "builtin:stdlib"
VALIDATION_PERCENT = 5
TOPICS = "pydoc_data/topics.py"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
SKIPPED_TABLES = ("encodings/", "config-", "_sysconfigdata", "html/entities.py", "re/_casefix.py")


def documents(split: str, seed: int | None = None) -> Iterator[str]:
    """The documents of a split, by path or, with a seed, by shuffled path. Raises `DataError` without any source."""
    names = [name for name in file_names() if split == "all" or is_validation(name) == (split == "validation")]
    if seed is not None:
        random.Random(seed).shuffle(names)
    for name in names:
        yield from _read(root() / name)


@lru_cache
def file_names() -> tuple[str, ...]:
    """Relative paths (with `/`) of all files of the corpus, sorted. Raises `DataError` when there are none."""
    found = []
    for folder, inner, files in os.walk(root()):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]  # never entered: packages are many
        paths = (Path(folder, name).relative_to(root()).as_posix() for name in files if name.endswith(".py"))
        found += [path for path in paths if not path.startswith(SKIPPED_TABLES)]
    if not found:
        raise DataError(f"this Python comes without library sources in '{root()}': give --data a file or a folder")
    return tuple(sorted(found))


def is_validation(name: str) -> bool:
    """Whether the file with this relative path is held back for validation (about 5 in 100 are)."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < VALIDATION_PERCENT


def root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _read(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []  # a handful of files on some systems, such as templates in other encodings
    if path.as_posix().endswith(TOPICS):
        return _topics(text)
    return [text]


def _topics(source: str) -> list[str]:
    """The values of the dict literal in `topics.py`: plain text, where the file is full of escapes."""
    assigned = (node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    table = next((value for value in assigned if isinstance(value, ast.Dict)), None)
    return [str(text) for text in ast.literal_eval(table).values()] if table else []
