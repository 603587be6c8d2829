"""Documents from local .txt, .jsonl and .parquet files.

A text file is cut at line breaks into stretches of about 10,000 characters, each a document, so that even one long
file has something to hold back; joined again they are the file. A line of a .jsonl file is a document: its `text`, or
its `messages` in the tokenizer's chat template. A parquet row is one by the same two columns. Files in a folder that
are called train, validation (valid, val, dev) or test, or lie in such a folder, are taken as those splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nestling.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")
STRETCH = 10_000
LONE_HALF = re.compile(r"[\ud800-\udfff]")
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "test": "test"}
SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})([-_.]?\d.*)?")


def looks_local(spec: str) -> bool:
    """Whether a spec that does not exist was meant as a path: such a name is never sent to the hub."""
    name = spec.split(":")[0]
    return spec.startswith((".", "/", "~", "\\")) or name.lower().endswith((*SUFFIXES, ".json", ".csv", ".md", ".gz"))


def chosen(path: Path, split: str) -> tuple[list[Path], bool]:
    """The files to read for a split, and whether the files themselves say which split they are.

    Raises `DataError` for a file type that cannot be read, or a folder without any that can.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"'{path}' is not a {', '.join(SUFFIXES)} file: convert it to one of these")
        return [path], False
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise DataError(f"the folder '{path}' holds no {', '.join(SUFFIXES)} file: give a folder that does")
    named = {file: _split_of(file.relative_to(path)) for file in found}
    if split == "all" or "validation" not in named.values():
        return found, False
    return [file for file in found if named[file] == split or (split == "train" and named[file] is None)], True


def read(paths: Iterable[Path], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """All documents of these files, in order. Raises `DataError` that names the file, and the line where it can."""
    for path in paths:
        try:
            yield from _READERS[path.suffix.lower()](path, tokenizer)
        except UnicodeDecodeError as error:
            raise DataError(f"'{path}' is not UTF-8 text (byte {error.start}): convert it to UTF-8") from error
        except OSError as error:
            raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error


def text_of(row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of one record: `text`, or `messages` through the chat template. Raises `DataError`."""
    text = row.get("text")
    if isinstance(text, str):
        return _writable(text)
    if row.get("messages"):
        if tokenizer is None or not tokenizer.chat_template:
            raise DataError(f"{where} holds 'messages', but the tokenizer has no chat template: give 'text' instead")
        try:
            return _writable(str(tokenizer.apply_chat_template(row["messages"], tokenize=False)))
        except Exception as error:  # templates are programs: jinja, key and type errors
            raise DataError(f"{where} does not fit the tokenizer's chat template: {error}") from error
    if text is not None:
        raise DataError(f"{where} has a 'text' of type {type(text).__name__}: make it one string")
    if "text" in row or "messages" in row:
        return ""
    names = ", ".join(map(str, row)) or "none"
    raise DataError(f"{where} has no column 'text' or 'messages' (it has {names}): rename the one that holds the text")


def _writable(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can spell but no tokenizer takes."""
    return LONE_HALF.sub("\N{REPLACEMENT CHARACTER}", text)


def stretches(text: str, length: int = STRETCH) -> Iterator[str]:
    """Cut a text at line breaks into pieces of `length` characters or a little more; joined, they are the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + length) + 1
        if not end or end - start > 2 * length:  # no line break in reach: cut anywhere
            end = start + length if end or len(text) - start > 2 * length else len(text)
        yield text[start:end]
        start = end


def _text(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    yield from stretches(path.read_text(encoding="utf-8-sig"))


def _jsonl(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"line {number} of '{path}'"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON ({error.msg}): one object per line is wanted") from error
            if not isinstance(row, dict):
                raise DataError(f"{where} is a JSON {type(row).__name__}, not an object with 'text' or 'messages'")
            yield text_of(row, where, tokenizer)


def _parquet(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path)
        columns = [name for name in ("text", "messages") if name in table.schema_arrow.names]
        if not columns:
            text_of(dict.fromkeys(table.schema_arrow.names, 0), f"'{path}'", tokenizer)
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                yield text_of(row, f"'{path}'", tokenizer)
    except ArrowInvalid as error:
        raise DataError(f"'{path}' is not a whole parquet file ({error}): copy it again") from error


def _split_of(relative: Path) -> str | None:
    for part in (*relative.parts[:-1], relative.stem):
        match = SPLIT_NAME.fullmatch(part.lower())
        if match:
            return SPLITS[match[1]]
    return None


_READERS = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet}
