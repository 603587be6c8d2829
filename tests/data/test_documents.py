"""Sources of text: what is read, how it is shared out, and what is said about a source that is wrong."""

import itertools
import json
import random
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nestling.data import documents, stdlib
from nestling.data import remote as remote_data
from nestling.data.documents import BUFFER, share, shuffled
from nestling.data.files import stretches
from nestling.errors import DataError
from tests.data import toy

PARAGRAPHS = ["".join(f"line {i} of paragraph {p}\n" for i in range(40)) for p in range(400)]


def write_jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_stdlib_splits_share_no_file_and_leave_out_what_is_not_text():
    names = stdlib.file_names()
    held = [name for name in names if stdlib.is_validation(name)]
    assert 0.02 < len(held) / len(names) < 0.09
    assert len("".join(documents("builtin:stdlib", "validation"))) > 100_000
    assert "argparse.py" in names
    assert not any("site-packages" in name or "/test/" in name or name.startswith("encodings/") for name in names)


def test_stdlib_is_whole_and_in_a_fixed_order():
    parts = [list(documents("builtin:stdlib", split)) for split in ("train", "validation", "all")]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2])
    assert parts[0] == list(documents("builtin:stdlib", "train"))
    assert list(documents("builtin:stdlib", "train", seed=1)) != list(documents("builtin:stdlib", "train", seed=2))


def test_stdlib_topics_are_read_as_text():
    assert any(text.startswith('The "assert" statement') for text in documents("builtin:stdlib", "all"))


def test_a_python_without_sources_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(stdlib, "root", lambda: tmp_path)
    stdlib.file_names.cache_clear()
    with pytest.raises(DataError, match="without library sources"):
        next(documents("builtin:stdlib"))
    stdlib.file_names.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "a", "short\nlines\n" * 5000, "x" * 50_000, "x" * 25_000 + "\nend", "\n" * 30_001]
)
def test_stretches_joined_are_the_text(text):
    parts = list(stretches(text))
    assert "".join(parts) == text
    assert all(0 < len(part) <= 20_000 for part in parts)


@pytest.mark.parametrize("count", [1, 2, 5, 9, 10, 11, 100, 1001])
def test_the_share_for_validation_is_fixed_and_complete(count):
    items = list(range(count))
    train, held = list(share(items, "train")), list(share(items, "validation"))
    assert sorted(train + held) == items == list(share(items, "all"))
    assert len(held) == (0 if count == 1 else max(1, (count + 10) // 20))


def test_a_source_with_one_document_has_no_validation_part(tmp_path):
    file = write_jsonl(tmp_path / "one.jsonl", [{"text": "alone"}])
    assert list(documents(file)) == ["alone"]
    with pytest.raises(DataError, match="no text for the split 'validation'"):
        documents(file, "validation")


@pytest.mark.parametrize("count", [10, 3 * BUFFER])
def test_shuffling_keeps_every_item_and_depends_on_the_seed(count):
    orders = [list(shuffled(range(count), random.Random(seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(count)) != orders[0]


def test_shuffling_reads_no_further_than_its_buffer():
    endless = itertools.count()
    next(shuffled(endless, random.Random(0)))
    assert next(endless) == BUFFER + 1


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_local_files_are_read_whole(kind, tmp_path):
    text = "".join(PARAGRAPHS)
    path = tmp_path / f"data.{kind}"
    if kind == "txt":
        path.write_text(text)
    elif kind == "jsonl":
        write_jsonl(path, [{"text": part, "n": 1} for part in PARAGRAPHS])
    elif kind == "parquet":
        pq.write_table(pa.table({"n": [1] * len(PARAGRAPHS), "text": PARAGRAPHS}), path)
    else:
        (path / "sub").mkdir(parents=True)
        (path / "a.txt").write_text(text[:70_000])
        (path / "sub" / "b.txt").write_text(text[70_000:])
        (path / "notes.md").write_text("not read")
    assert "".join(documents(path, "all")) == text
    train, held = list(documents(path, "train")), list(documents(path, "validation"))
    assert not set(train) & set(held)
    assert sum(map(len, train + held)) == len(text)
    assert 0.02 < sum(map(len, held)) / len(text) < 0.09


def test_a_folder_with_splits_of_its_own_is_taken_at_its_word(tmp_path):
    for name, text in {"train-00000.txt": "t", "validation.txt": "v", "test.txt": "x", "more.txt": "m"}.items():
        (tmp_path / name).write_text(text)
    assert sorted(documents(tmp_path)) == ["m", "t"]
    assert list(documents(tmp_path, "validation")) == ["v"]
    (tmp_path / "validation.txt").rename(tmp_path / "valley.txt")  # control: a name that only begins like one
    assert len(list(documents(tmp_path, "all"))) == 4
    assert list(documents(tmp_path)) == ["m", "x", "t"]  # shared out in order: the last of four is held back


def test_messages_go_through_the_chat_template(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "bot", "content": "yes"}]} for i in range(3)]
    file = write_jsonl(tmp_path / "chat.jsonl", rows)
    expected = [f"<user>hi {i}</s><bot>yes</s>" for i in range(3)]
    assert list(documents(file, "all", tokenizer=toy.tokenizer())) == expected
    for tokenizer in (None, toy.tokenizer(template=None)):
        with pytest.raises(DataError, match="no chat template"):
            documents(file, "all", tokenizer=tokenizer)


def test_halves_of_surrogate_pairs_become_replacement_characters(tmp_path):
    """JSON can spell what UTF-8 cannot, and a tokenizer would raise; whole pairs stay."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "a\ud800b"}, {"text": "c \U0001f600"}])
    texts = list(documents(file, "all"))
    assert texts == ["a\ufffdb", "c \U0001f600"]
    assert toy.tokenizer()(texts)["input_ids"]


def _raw(name, content):
    return lambda folder: (folder / name).write_bytes(content)


WRONG = {
    "empty text": (_raw("a.txt", b""), "a.txt", "no text for the split"),
    "blank text": (_raw("a.txt", b" \n \n"), "a.txt", "no text for the split"),
    "empty jsonl": (_raw("a.jsonl", b"\n"), "a.jsonl", "no text for the split"),
    "missing file": (_raw("a.txt", b"x"), "b.txt", "does not exist"),
    "other type": (_raw("a.csv", b"x"), "a.csv", "not a .txt, .jsonl, .parquet file"),
    "empty folder": (_raw("a.md", b"x"), "", "holds no .txt"),
    "latin-1": (_raw("a.txt", b"caf\xe9"), "a.txt", r"not UTF-8 text \(byte 3\)"),
    "latin-1 jsonl": (_raw("a.jsonl", b'{"text": "caf\xe9"}'), "a.jsonl", "not UTF-8"),
    "bad line": (_raw("a.jsonl", b'{"text": '), "a.jsonl", "line 1 of .* is not JSON"),
    "no object": (_raw("a.jsonl", b'["x"]'), "a.jsonl", "JSON list"),
    "no column": (_raw("a.jsonl", b'{"body": "x", "id": 1}'), "a.jsonl", r"no column 'text'.*\(it has body, id\)"),
    "no parquet": (_raw("a.parquet", b"PAR1 nonsense"), "a.parquet", "not a whole parquet"),
    "no parquet column": (
        lambda folder: pq.write_table(pa.table({"body": ["x"]}), folder / "a.parquet"),
        "a.parquet",
        r"no column 'text'.*\(it has body\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named_in_one_sentence(name, tmp_path):
    make, file, message = WRONG[name]
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        list(documents(tmp_path / file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("builtin:novels", "there is builtin:stdlib"), ("owner/name", "cannot be reached"), ("data.txt", "not exist")],
)
def test_sources_that_are_not_there_are_named(spec, message):
    with pytest.raises(DataError, match=message):
        documents(spec)


def test_unknown_splits_are_refused():
    with pytest.raises(DataError, match="split 'tset'"):
        documents("builtin:stdlib", "tset")


class _Rows(list):
    def shuffle(self, seed, buffer_size):
        return _Rows(reversed(self))


@pytest.mark.parametrize(
    ("splits", "split", "wanted", "own"),
    [
        (["train", "validation", "test"], "validation", "validation", True),
        (["train", "test"], "validation", "test", True),
        (["train", "test"], "train", "train", True),
        (["train"], "validation", "train", False),
        (["test"], "train", "test", False),
        (["latest"], "validation", "latest", False),
    ],
)
def test_hub_datasets_are_streamed_by_split(splits, split, wanted, own, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return _Rows([{"text": f"{split} {i}"} for i in range(20)])

    fake = SimpleNamespace(get_dataset_split_names=lambda *_: splits, load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(remote_data, "reachable", lambda: True)
    found = list(documents("owner/name:small", split))
    assert asked == [("owner/name", "small", wanted, True)]
    assert len(found) == (20 if own else {"train": 19, "validation": 1}[split])


def test_a_hub_dataset_that_fails_is_named(monkeypatch):
    def fails(*_):
        raise ValueError("BuilderConfig 'x' not found.\nAvailable: y")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(get_dataset_split_names=fails, load_dataset=fails))
    monkeypatch.setattr(remote_data, "reachable", lambda: True)
    with pytest.raises(DataError, match=r"'owner/name:x' cannot be opened: BuilderConfig 'x' not found"):
        documents("owner/name:x")
